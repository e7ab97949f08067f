"""Find the symbol that stands for the batch's size in a Dynamo graph, and have Dynamo trace again if the size is still a number.

The batch is a dim of the model's data, that is of the inputs that are neither parameters nor buffers: dim 0, or dim 1 of sequences whose first axis is time.
Recurrent layers and attention of `torch.nn` take them so unless they are told otherwise (`batch_first`); elsewhere the sizes of the outputs show it.

The choice decides only where rows are looked for. Whether the samples of a dim are kept apart is proved by the analysis of the graph.
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


def batch_symbols(gm: fx.GraphModule, config: ApproxConfig, whole: fx.GraphModule | None = None) -> list[sympy.Symbol] | NoRows:
    """Find the symbols that may stand for the batch's size.

    If the size is still a number and sampled rows may pay, Dynamo is asked to trace again with a symbol. This function does not return then.

    Args:
        gm: Dynamo's graph.
        config: The settings, which give the least number of rows and decide whether rows may pay.
        whole: The graph of the frame that `gm` is a part of. Whether Dynamo is asked is decided for this graph.

    Returns:
        The symbols, the most likely first, or the reason why there is none.
    """
    data = [n for n in gm.graph.find_nodes(op="placeholder") if is_data(n)]
    if not data:
        return NoRows(NO_SAMPLES())
    outputs = _outputs_with_gradient(gm)
    time_first = _size_of_second_dim(gm) or _second_dim_of_outputs(data, outputs)
    size = _size_of_first_dim(data, outputs) if time_first is None else time_first
    dims = {n: d for n in data if (d := _dim_of_size(_value(n), size, (0,) if time_first is None else (1, 0))) is not None}
    sizes = {n: _torch.size_expr(_value(n).shape[d]) for n, d in dims.items()}
    symbols = dict.fromkeys(e for e in sizes.values() if e.is_Symbol)
    if symbols:
        in_outputs = [s for o in outputs for d in o.shape for s in _torch.size_expr(d).free_symbols]
        elements = {s: sum(_torch.numel_of(_value(n)) for n, e in sizes.items() if e == s) for s in symbols}
        return sorted(symbols, key=lambda s: (s in in_outputs, elements[s]), reverse=True)
    if whole is not None and whole is not gm:
        no_rows = batch_symbols(whole, config)
        return no_rows if isinstance(no_rows, NoRows) else NoRows(FIXED_BATCH(size=size))
    if size <= config.least_rows():
        return NoRows(SMALL_BATCH(size=size, least=config.least_rows()))
    if (certain := early_decline.early_rejection(gm, config, size)) is not None:
        return NoRows(*certain)
    _torch.ask_for_symbol({n: dims[n] for n, e in sizes.items() if e.is_Integer}, _torch.count_tensors(gm))
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


def _outputs_with_gradient(gm: fx.GraphModule) -> list[torch.Tensor]:
    returned = next(n for n in reversed(gm.graph.nodes) if n.op == "output").all_input_nodes
    return [v for n in returned if isinstance(v := _value(n), torch.Tensor) and v.is_floating_point() and v.requires_grad]


def _size_of_first_dim(data: Sequence[fx.Node], outputs: Sequence[torch.Tensor]) -> int:
    """Return the size that dim 0 of most elements of the data has, among the sizes that are also the dim 0 of an output.

    If no output shares its dim 0 with any data, for example because the loss is inside the graph, all data count.
    """
    output_sizes = {_torch.hint(o.shape[0]) for o in outputs if o.dim()}
    elements: dict[int, int] = {}
    for n in data:
        size = _torch.hint(_value(n).shape[0])
        elements[size] = elements.get(size, 0) + _torch.numel_of(_value(n))
    return max(elements, key=lambda s: (s in output_sizes, elements[s]))


def _second_dim_of_outputs(data: Sequence[fx.Node], outputs: Sequence[torch.Tensor]) -> int | None:
    """Return the size that most elements of the data have in dim 1 and an output has in dim 0. None if there is no such size, or if data have it in dim 0.

    This finds the samples of a sequence that a model takes step by step along its first axis.
    """
    output_sizes = {_torch.hint(o.shape[0]) for o in outputs if o.dim()} - {1}
    elements: dict[int, int] = {}
    for n in data:
        first, *others = map(_torch.hint, _value(n).shape)
        if first in output_sizes:
            return None
        if others and others[0] in output_sizes:
            elements[others[0]] = elements.get(others[0], 0) + _torch.numel_of(_value(n))
    return max(elements, key=elements.__getitem__, default=None)


_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
"""The functions that recurrent layers call. Their last argument is `batch_first`, except for packed sequences, whose first argument is a matrix."""


def _size_of_second_dim(gm: fx.GraphModule) -> int | None:
    """Return the size of dim 1 of the data that the first recurrent layer or attention of the graph reads; None if its samples lie along dim 0, or if there
    is no such layer.
    """
    for n in gm.graph.nodes:
        name = getattr(n.target, "__name__", "") if n.op == "call_function" and n.args else ""
        if name == "multi_head_attention_forward" or (name in _RECURRENT and n.args[-1] is False):
            value, transposed = _value(n.args[0]), _is_transposed(n.args[0])
            return _torch.hint(value.shape[1]) if isinstance(value, torch.Tensor) and value.dim() == 3 and transposed is False else None
        if name in _RECURRENT:
            return None
    return None


def _is_transposed(n: Any) -> bool | None:
    """Return whether the first two dims of a value are those of an input of the graph, swapped; None if that is not known."""
    swapped = False
    while isinstance(n, fx.Node) and n.op != "placeholder":
        if n.target == "transpose" and {*n.args[1:]} == {0, 1}:
            swapped = not swapped
        elif not any(_same_first_dims(n, a) for a in n.all_input_nodes[:1]):
            return None
        n = n.all_input_nodes[0]
    return swapped


def _same_first_dims(n: fx.Node, operand: fx.Node) -> bool:
    values = _value(n), _value(operand)
    sizes = [tuple(map(_torch.hint, v.shape[:2])) for v in values if isinstance(v, torch.Tensor)]
    return len(sizes) == 2 and len(sizes[0]) == 2 and sizes[0] == sizes[1]


def _dim_of_size(value: torch.Tensor, size: int, dims: Sequence[int]) -> int | None:
    """Return the first of some dims that has a size; None if none has."""
    return next((d for d in dims if d < value.dim() and _torch.hint(value.shape[d]) == size), None)


def _value(n: fx.Node) -> Any:
    return n.meta.get("example_value")
