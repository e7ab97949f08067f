"""Have the ranks decide alike: the profile of rank 0 holds on all, and what was decided is compared at the first exchange of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from approx_compile import machine
from approx_compile.backend.runtime.compiled_graphs import GraphDecisions, decisions_of
from approx_compile.machine import Machine

SHOWN = 5
"""The most layers that a message names."""


def share_profile(device: str, group: Any) -> None:
    """Decide by the machine profile of rank 0 on all ranks, so that predicted times lead to the same plans. A profile that is named explicitly stays.

    Args:
        device: The type of the device.
        group: The group of the ranks.
    """
    profile = machine.stored(device) if group.rank() == 0 else None
    sent = [profile.model_dump_json() if profile is not None else None]
    dist.broadcast_object_list(sent, group=group, group_src=0)
    if group.rank() != 0 and sent[0] is not None:
        machine.adopt(Machine.model_validate_json(sent[0]), device)


def check_agreement(model: nn.Module, group: Any) -> None:
    """Compare what the ranks have decided for a model's graphs.

    Args:
        model: The model.
        group: The group of the ranks.

    Raises:
        RuntimeError: If settings or plans differ, on every rank, with the ranks and layers.
    """
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, decisions_of(model), group=group)
    problem = disagreement(found)
    if problem is not None:
        raise RuntimeError(f"approx_compile.distributed: {problem}")


def disagreement(by_rank: Sequence[Mapping[str, GraphDecisions]]) -> str | None:
    """Describe where the ranks have decided differently.

    Args:
        by_rank: For each rank the decisions by graph. Graphs that not all ranks have are not compared.

    Returns:
        The description; None if they agree.
    """
    for key, first in by_rank[0].items():
        for rank, graphs in enumerate(by_rank):
            other = graphs.get(key)
            if other is None:
                continue
            if dict(other.settings) != dict(first.settings):
                return f"the ranks were given different settings: rank 0 {dict(first.settings)}, rank {rank} {dict(other.settings)}"
            if other.layers is None or first.layers is None or other.layers == first.layers:
                continue
            names = [n for n in dict.fromkeys([*first.layers, *other.layers]) if first.layers.get(n) != other.layers.get(n)]
            none = "no such layer"
            lines = [f"{n}: rank 0 {first.layers.get(n, none)}, rank {rank} {other.layers.get(n, none)}" for n in names[:SHOWN]]
            more = [f"{len(names) - SHOWN} more layers"] if len(names) > SHOWN else []
            profiles = ", by different machine profiles" if other.profile != first.profile else ""
            return (
                f"the ranks have made different plans{profiles}: {'; '.join([*lines, *more])}. Name one profile for all ranks (APPROX_COMPILE_MACHINE), "
                "or call register(...) before the first training step: it gives all ranks that of rank 0"
            )
    return None
