"""Find where every tensor of a graph holds the samples of the batch, and decide for every op whether it may run on a subset of them.

The batch's size is a symbol that nothing else has, so sizes show which dim holds the batch. It remains to be proved that samples stay apart. An op may run on
a subset of the rows in two cases: entry i of its result is computed from entries i of its operands (elementwise ops, views, products over other axes), or it
sums something over the rows that is linear in the output gradient (weight gradients). Leaving out rows is then the same as setting their gradients to zero,
and scaling a row's gradient scales all that is computed from it. Any other op is blocked, with the reason. The graph is not edited.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import BMM, CASTS, MM, VIEWS, op_name
from approx_compile.passes.rewrite.graph_edit import BY_SAMPLE_KEY
from approx_compile.reasons.rows import (
    BATCH_MEAN,
    BATCH_MOVED,
    BATCH_RESIZED,
    CROSS_SAMPLE,
    GRADIENT_MERGED,
    MAKES_ROWS,
    MERGED_UNKNOWN,
    NOT_LINEAR,
    RANDOM_FOR_BATCH,
    SAMPLES_COMPARED,
    SIZE_AS_NUMBER,
    TWO_BATCH_AXES,
    UNKNOWN_OP,
    WHOLE_FORWARD_BATCH,
)
from approx_compile.rows.batch_dim import (
    CONSTANT,
    DECOUPLED,
    FORWARD,
    LOSS_GRAD,
    REDUCED_GRAD,
    ROW_GRAD,
    BatchDimState,
    BatchSize,
    Blocked,
    SampleLayout,
    ValueLayout,
    holds_batch,
)
from approx_compile.rows.batching_rules.registry import rule_of
from approx_compile.rows.linearity import is_linear

aten = torch.ops.aten
prims = torch.ops.prims

_GRADIENTS = (LOSS_GRAD, ROW_GRAD, REDUCED_GRAD)
_INDEX_FACTORIES: set[Any] = {prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
"""Ops that may make the indices 0, 1, .. of the samples."""
_FACTORIES: set[Any] = {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.empty_permuted.default}
_FACTORIES |= {aten.new_zeros.default, aten.new_full.default, aten.new_ones.default, aten.new_empty.default, aten.new_empty_strided.default}
_FACTORIES |= {aten.empty_strided.default}
"""Ops that fill a tensor of given sizes with one value."""
_REARRANGING: set[Any] = {*VIEWS, *CASTS, aten.permute.default, aten.t.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default}
_REARRANGING |= {aten.clone.default, aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default}
"""Ops whose result holds the operand's entries at other positions. Where the entries are the indices of the samples, they still are in the result."""
_ARITHMETIC: set[Any] = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}


def analyze_batch_dim(graph: fx.Graph, batch: BatchSize, known: Mapping[str, ValueLayout] | None = None, tangents: Sequence[fx.Node] = ()) -> BatchDimState:
    """Determine layout, kind and legality of every node of a graph.

    Args:
        graph: A forward, backward or joint graph with symbolic sizes.
        batch: The batch's size.
        known: Layouts of placeholders by name. They are needed for merged dims, whose layout does not follow from sizes.
        tangents: The placeholders that are gradients of the outputs.

    Returns:
        The state after a walk over all nodes in order.
    """
    state = BatchDimState(batch)
    for n in graph.nodes:
        if n.op == "output":
            continue
        if n.op == "placeholder" or n.op == "get_attr":
            _analyze_input(n, state, known or {}, n in tangents)
        else:
            _analyze_op(n, state)
    return state


def layout_from_size(value: Any, batch: BatchSize) -> SampleLayout | None:
    """Return the layout of a tensor of which exactly one dim holds the batch and nothing else; None for any other value."""
    dims = _batch_dims(value, batch)
    return SampleLayout(dims[0]) if len(dims) == 1 and batch.expr(value.shape[dims[0]]) == batch.samples else None


def _batch_dims(value: Any, batch: BatchSize) -> list[int]:
    """The dims of a tensor whose sizes have the batch in them; none for any other value."""
    return [d for d, s in enumerate(value.shape) if batch.is_in(s)] if isinstance(value, torch.Tensor) else []


def _analyze_input(n: fx.Node, state: BatchDimState, known: Mapping[str, ValueLayout], tangent: bool) -> None:
    value = n.meta.get("val")
    layout = known.get(n.name)
    if not _fits(layout, value, state):
        layout = layout_from_size(value, state.batch)
    holds = holds_batch(value, state.batch)
    if layout is None and holds:
        state.unlocated.add(n)
    state.layout[n] = layout
    state.kind[n] = (ROW_GRAD if holds else LOSS_GRAD) if tangent else FORWARD if holds else CONSTANT


def _analyze_op(n: fx.Node, state: BatchDimState) -> None:
    """Determine kind, linearity, layout and legality of an op. A blocked op gets a layout that suits its sizes, so that the analysis can go on."""
    value = n.meta.get("val")
    operands = [a for a in n.all_input_nodes if not isinstance(a.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)]
    gradients = [a for a in operands if state.kind.get(a) in _GRADIENTS]
    state.kind[n] = _kind(n, value, operands, gradients, state)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):  # a size, or computed from sizes: it depends on no tensor's data
        state.layout[n] = None
        return
    if gradients and BY_SAMPLE_KEY not in n.meta and not is_linear(n, set(gradients)):
        state.nonlinear[n] = NOT_LINEAR(op=op_name(n))
    try:
        state.layout[n] = _with_definite_layout(n, value, _checked(n, value, _layout(n, value, operands, state), state), state)
        _check_sums(n, gradients, state)
        _check_batch_size(n, state)
    except Blocked as e:
        state.blocked[n] = e.reason
        values = value if isinstance(value, tuple | list) else (value,)
        guesses = tuple(_guess(v, operands, state) for v in values)
        state.layout[n] = guesses if isinstance(value, tuple | list) else guesses[0]
        if any(g is None and holds_batch(v, state.batch) for g, v in zip(guesses, values, strict=True)):
            state.unlocated.add(n)


def _guess(value: Any, operands: Sequence[fx.Node], state: BatchDimState) -> SampleLayout | None:
    """A layout for a result of a blocked op: the one that its sizes suggest, or else that of an operand. None if there is no such layout.

    Any layout is right that all later ops agree on: the op runs on the whole batch, and which of its result's entries count as one sample is free to choose.
    """
    layouts = (p.at_dim(p.dim) for a in operands if (p := state.layout_of(a)) is not None and not p.uniform)
    return layout_from_size(value, state.batch) or next((p for p in layouts if _fits(p, value, state)), None)


def _kind(n: fx.Node, value: Any, operands: list[fx.Node], gradients: list[fx.Node], state: BatchDimState) -> str:
    """The kind of an op's result (see `batch_dim`), by those of its operands and by whether it holds the batch."""
    holds = holds_batch(value, state.batch)
    if not gradients:
        return FORWARD if holds or any(state.kind.get(a) == FORWARD for a in operands) else CONSTANT
    if holds and not (isinstance(value, tuple | list)):
        return ROW_GRAD
    if any(state.kind[a] in (ROW_GRAD, REDUCED_GRAD) for a in gradients):
        return ROW_GRAD if holds else REDUCED_GRAD
    return LOSS_GRAD


# --- layouts ---


def _layout(n: fx.Node, value: Any, operands: list[fx.Node], state: BatchDimState) -> ValueLayout:
    """The layout of an op's result, by its batching rule or, for an op that creates a tensor, by the values it is filled with."""
    if any(a in state.unlocated for a in operands) and not _locate_from_others(n, value, operands, state):
        if any(len(_batch_dims(_torch.value(a), state.batch)) > 1 for a in operands):
            raise Blocked(SAMPLES_COMPARED(op=op_name(n)))
        raise Blocked(MERGED_UNKNOWN())
    if n.target is operator.getitem:
        layouts = state.layout[n.args[0]]  # type: ignore[index]
        return layouts[n.args[1]] if isinstance(layouts, tuple) else layouts  # type: ignore[index,return-value]
    if _torch.is_random(n):
        if holds_batch(value, state.batch):
            raise Blocked(RANDOM_FOR_BATCH())
        return None
    if n.target in _INDEX_FACTORIES and _makes_sample_indices(n, value, state.batch):
        state.whole_batch_only.add(n)
        return SampleLayout(0, index=True)
    if n.target in _FACTORIES:
        return _filled_layout(value, state.batch) if holds_batch(value, state.batch) else None
    if not any(state.layout.get(a) is not None for a in operands):
        if not holds_batch(value, state.batch):
            return None
        if n.target is aten.expand.default:
            return _filled_layout(value, state.batch)
        raise Blocked(MAKES_ROWS(op=op_name(n)))
    rule = rule_of(n)
    if rule is None:
        raise Blocked(UNKNOWN_OP(op=op_name(n)))
    layout = rule(n, value, state)
    if not isinstance(layout, SampleLayout):
        return layout
    rearranged = n.target in _REARRANGING and not value.dtype.is_floating_point and (operand := state.layout_of(n.args[0])) is not None and operand.index
    return replace(layout, index=rearranged)


def _locate_from_others(n: fx.Node, value: Any, operands: list[fx.Node], state: BatchDimState) -> bool:
    """Give operands with an unknown layout the one that matches another operand's; return whether all operands have a layout then.

    This is legal because such an operand is computed for the whole batch. It may be a tensor of the forward pass, like a mask of dropout: its entries are
    constants, each of which meets one entry of the gradient, whose layout says which sample that entry belongs to. It may also be a gradient that a blocked op
    makes, or an output gradient: which of its entries count as one sample is free to choose (see `_guess`).
    """
    unlocated = [a for a in operands if a in state.unlocated]
    if any(state.kind.get(a) not in (FORWARD, CONSTANT, ROW_GRAD) for a in unlocated):
        return False
    for a in unlocated:
        layout = _matching_layout(n, a, operands, state)
        if layout is None or not _fits(layout, _torch.value(a), state):
            return False
        state.layout[a] = layout
        state.unlocated.discard(a)
    return True


def _matching_layout(n: fx.Node, unlocated: fx.Node, operands: list[fx.Node], state: BatchDimState) -> SampleLayout | None:
    """The layout that an operand must have for its samples to be combined with the same samples of the other operands; None if that is not known."""
    value = _torch.value(unlocated)
    if not isinstance(value, torch.Tensor):  # an op with several results
        return None
    rank = value.dim()
    others = [(a, layout) for a in operands if (layout := state.layout_of(a)) is not None and not layout.uniform]
    if n.target in MM | BMM:
        left, right = n.args[-2:]
        for a, layout in others:
            if {a, unlocated} == {left, right} and unlocated is not a:
                contracted = (rank - 1, rank - 2) if a is left else (rank - 2, rank - 1)
                if layout.dim == contracted[0]:
                    return layout.at_dim(contracted[1])
                return layout if rank == 3 and layout.dim == 0 else None
        return None
    if not _torch.is_pointwise(n) and any(_torch.value(a).dim() != rank for a, _ in others):
        return None
    return next((layout.at_dim(layout.dim + rank - _torch.value(a).dim()) for a, layout in others), None)


def _makes_sample_indices(n: fx.Node, value: Any, batch: BatchSize) -> bool:
    """Whether an op makes the indices 0, 1, .. of the samples."""
    if layout_from_size(value, batch) is None:
        return False
    if n.target is prims.iota.default:
        return (n.kwargs.get("start"), n.kwargs.get("step")) == (0, 1)
    return len(n.args) == 1 or (n.args[0], *n.args[2:3]) in ((0,), (0, 1))


def _filled_layout(value: Any, batch: BatchSize) -> SampleLayout:
    """The layout of a tensor that is filled with one value, or expanded from one without samples.

    A dim that is exactly the batch gets a definite layout: if it is merged with another axis later, the entries of the merged dim differ. A dim of several
    times the batch's size is constant throughout and gets a uniform layout.
    """
    return layout_from_size(value, batch) or SampleLayout(_batch_dims(value, batch)[0], None, None)


# --- checks ---


def _checked(n: fx.Node, value: Any, layout: ValueLayout, state: BatchDimState) -> ValueLayout:
    """The layout, if the sizes of the value agree with it."""
    if isinstance(value, tuple | list):
        layouts = layout if isinstance(layout, tuple) else (layout,) * len(value)
        for v, each in zip(value, layouts, strict=True):
            _checked(n, v, each, state)
        return tuple(layouts)
    if not isinstance(value, torch.Tensor):
        return None
    assert not isinstance(layout, tuple)
    dims = _batch_dims(value, state.batch)
    if layout is None:
        if dims:
            raise Blocked(MAKES_ROWS(op=op_name(n)))
        return None
    if dims != [layout.dim]:
        raise Blocked(TWO_BATCH_AXES(op=op_name(n)) if len(dims) > 1 else BATCH_MOVED(op=op_name(n)))
    if not _fits(layout, value, state):
        raise Blocked(BATCH_RESIZED(op=op_name(n)))
    return layout


def _fits(layout: ValueLayout, value: Any, state: BatchDimState) -> bool:
    """Whether the sizes of a value allow a layout."""
    if not isinstance(layout, SampleLayout) or not isinstance(value, torch.Tensor):
        return layout is None and not holds_batch(value, state.batch)
    if _batch_dims(value, state.batch) != [layout.dim]:
        return False
    return layout.uniform or bool(sympy.expand(layout.outer * state.batch.samples * layout.inner - state.batch.expr(value.shape[layout.dim])) == 0)


def _with_definite_layout(n: fx.Node, value: Any, layout: ValueLayout, state: BatchDimState) -> ValueLayout:
    """The layout, with a definite position of the samples for a gradient: even if its rows are all equal, they differ once they are multiplied by weights."""
    if not isinstance(layout, SampleLayout) or not layout.uniform or state.kind[n] != ROW_GRAD:
        return layout
    definite = layout_from_size(value, state.batch) or _layout_of_model(n, value, state)
    if definite is None:
        raise Blocked(GRADIENT_MERGED())
    return definite


def _layout_of_model(n: fx.Node, value: Any, state: BatchDimState) -> SampleLayout | None:
    """The layout of the tensor whose dtype and device a new tensor takes, such as x.new_empty(..); None if the sizes do not suit it."""
    layout = state.layout_of(n.args[0]) if n.target in _FACTORIES and n.args else None
    return layout if layout is not None and not layout.uniform and _fits(layout, value, state) else None


def _check_sums(n: fx.Node, gradients: list[fx.Node], state: BatchDimState) -> None:
    """Allow a sum over rows only of what is linear in the gradients, and no op that combines such a sum with rows."""
    reads_samples = any(state.layout.get(a) is not None for a in n.all_input_nodes)
    layout = state.layout[n]
    holds = any(p is not None for p in layout) if isinstance(layout, tuple) else layout is not None
    if not gradients:
        if reads_samples and not holds and n.target not in _FACTORIES:
            raise Blocked(WHOLE_FORWARD_BATCH(op=op_name(n)))
        return
    if n in state.nonlinear:
        raise Blocked(state.nonlinear[n])
    kinds = {state.kind[a] for a in gradients}
    if holds and REDUCED_GRAD in kinds and DECOUPLED not in n.meta:
        raise Blocked(CROSS_SAMPLE())
    if n.target in (aten.mean.dim, aten.mean.default) and state.kind[n] == REDUCED_GRAD and ROW_GRAD in kinds:
        raise Blocked(BATCH_MEAN())


def _check_batch_size(n: fx.Node, state: BatchDimState) -> None:
    """Allow the batch's size as an argument only as a factor, which the stages replace by the size of the whole batch."""
    if not any(state.batch.is_in(a.meta["val"]) for a in _torch.symbolic_scalar_arguments(n)):
        return
    value = n.meta.get("val")
    arithmetic = n.target in _ARITHMETIC and isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    if arithmetic and (state.kind[n] not in _GRADIENTS or n.target in (aten.mul.Tensor, aten.div.Tensor)):
        state.batch_size_factors.add(n)
        return
    raise Blocked(SIZE_AS_NUMBER(op=op_name(n)))
