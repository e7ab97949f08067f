"""Find the symbol that stands for the batch's size in a Dynamo graph, and have Dynamo trace again if the size is still a number.

The batch is dim 0 of the model's data, that is of the inputs that are neither parameters nor buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from approx_compile import _torch
from approx_compile.config import ApproxConfig
from approx_compile.passes.planning.plan import RowCut
from approx_compile.reasons import Reason
from approx_compile.reasons.rows import FIXED_BATCH, NO_SAMPLES, SMALL_BATCH
from approx_compile.rows import early_decline


@dataclass(frozen=True)
class NoRows:
    """The reason why the rows of a graph are not sampled, and the cuts that were considered."""

    reason: Reason
    cuts: tuple[RowCut, ...] = ()


def batch_symbols(gm: fx.GraphModule, config: ApproxConfig) -> list[sympy.Symbol] | NoRows:
    """Find the symbols that may stand for the batch's size.

    If the size is still a number and sampled rows may pay, Dynamo is asked to trace again with a symbol. This function does not return then.

    Args:
        gm: Dynamo's graph.
        config: The settings, which give the least number of rows and decide whether rows may pay.

    Returns:
        The symbols, the most likely first, or the reason why there is none.
    """
    data = [n for n in gm.graph.find_nodes(op="placeholder") if is_data(n)]
    if not data:
        return NoRows(NO_SAMPLES())
    size, outputs = _batch_size(gm, data)
    batched = [n for n in data if _torch.hint(_first_dim(n)) == size]
    symbols = dict.fromkeys(e for n in batched if (e := _torch.size_expr(_first_dim(n))).is_Symbol)
    if symbols:
        in_outputs = [s for o in outputs for d in o.shape for s in _torch.size_expr(d).free_symbols]
        elements = {s: sum(_torch.numel_of(_value(n)) for n in batched if _torch.size_expr(_first_dim(n)) == s) for s in symbols}
        return sorted(symbols, key=lambda s: (s in in_outputs, elements[s]), reverse=True)
    if size <= config.least_rows():
        return NoRows(SMALL_BATCH(size=size, least=config.least_rows()))
    if (certain := early_decline.early_rejection(gm, config, size)) is not None:
        return NoRows(*certain)
    _torch.ask_for_symbol([n for n in batched if _torch.size_expr(_first_dim(n)).is_Integer], _torch.count_tensors(gm))
    return NoRows(FIXED_BATCH(size=size))


def is_data(n: fx.Node) -> bool:
    """Tell whether a placeholder of Dynamo's graph is a tensor of samples.

    Args:
        n: The placeholder.

    Returns:
        True for a tensor that has at least one dimension and is neither a parameter nor other state of a module.
    """
    value = n.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and not isinstance(value, nn.Parameter) and not _torch.is_module_state(n)


def _batch_size(gm: fx.GraphModule, data: Sequence[fx.Node]) -> tuple[int, list[torch.Tensor]]:
    """Return the batch's size, and the outputs that get a gradient.

    The size is the dim 0 that most elements of the data have, among the sizes that are also the dim 0 of an output. If no output shares its dim 0 with any
    data, for example because the loss is inside the graph, all data count.
    """
    returned = next(n for n in reversed(gm.graph.nodes) if n.op == "output").all_input_nodes
    outputs = [v for n in returned if isinstance(v := n.meta.get("example_value"), torch.Tensor) and v.is_floating_point() and v.requires_grad]
    output_sizes = {_torch.hint(o.shape[0]) for o in outputs if o.dim()}
    elements: dict[int, int] = {}
    for n in data:
        size = _torch.hint(_first_dim(n))
        elements[size] = elements.get(size, 0) + _torch.numel_of(_value(n))
    return max(elements, key=lambda s: (s in output_sizes, elements[s])), outputs


def _value(n: fx.Node) -> Any:
    return n.meta["example_value"]


def _first_dim(n: fx.Node) -> Any:
    return _value(n).shape[0]
