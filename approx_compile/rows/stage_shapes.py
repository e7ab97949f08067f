"""Sizes and inputs of the stages of a backward pass: what a stage reads for a number of rows, and when a saved value is read for the last time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from approx_compile.rows.stages import Partition, StageInput


def shape_of(entry: StageInput, here: Mapping[Any, int], whole: Mapping[Any, int]) -> Any:
    """The size and stride of a stage's input, or its value if it is a number.

    `here` holds the symbols' values with the number of rows of the stage's level as the batch's size, `whole` those with the size of the whole batch.
    """
    if entry.number is not None:
        if entry.dtype is not None:
            return torch.tensor(number_of(entry.number, whole), dtype=entry.dtype, device="cpu")
        return number_of(entry.number, here)
    return [number_of(e, here) for e in entry.size], [number_of(e, here) for e in entry.stride]


def number_of(expression: Any, symbols: Mapping[Any, int]) -> Any:
    """Evaluate an expression over sizes, as an int if it is whole and as a float otherwise."""
    value = expression.subs(symbols)
    return int(value) if value.is_Integer else float(value)


def entering_gradients(partition: Partition, level: int) -> list[StageInput]:
    """Return the gradients that stages below a cut read from above it. Their norms together decide which rows the cut keeps.

    Args:
        partition: The partition of the backward graph.
        level: The level above the cut; the cut begins level `level` + 1.
    """
    below = [e for s in partition.stages if s.level > level for e in s.entries if e.gradient]
    return list({e.name: e for e in below if e.source <= level}.values())


def last_use_of_saved(partition: Partition) -> dict[str, int]:
    """The last stage that reads each value, by name. Outputs of the graph are left out, because they are needed until the end."""
    last = {e.name: s for s, stage in enumerate(partition.stages) for e in stage.entries}
    for r in partition.results:
        last.pop(r.name or "", None)
    return last
