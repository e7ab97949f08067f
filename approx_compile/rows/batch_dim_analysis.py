"""The batch followed through a graph: where every tensor holds its rows, and whether an op keeps them apart.

The batch has a symbol of its own, so a dim that holds it shows; what is to be proved is that rows stay apart. An op may run on some of the rows
if entry i of its result is made of entries i of its operands (elementwise ops, views, products over other axes), or if it sums over rows what is
linear in the output's gradients (weight gradients). Then leaving out rows is the same as setting their gradients to zero, and scaling a row's
gradient scales all that comes of it. Anything else is blocked, with the reason. Nothing is edited here.
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
from approx_compile.passes.fx_utils import BMM, MM, op_name
from approx_compile.passes.rewrite.graph_edit import BY_SAMPLE_KEY
from approx_compile.rows.batch_dim import CONST, COUPLED, DECOUPLED, FORWARD, HEAD, ROWS, TOTAL, Blocked, Followed, Layout, SampleLayout, holds
from approx_compile.rows.batching_rules import ARITHMETIC, COUNTS, FACTORIES, MOVES, SPREADS, rule_of
from approx_compile.rows.linearity import is_linear

aten = torch.ops.aten


def follow(graph: fx.Graph, batch: sympy.Symbol, known: Mapping[str, Layout] | None = None, tangents: Sequence[fx.Node] = ()) -> Followed:
    """Walk `graph` in order. `known`: layouts of placeholders by name (merged dims can't be told from sizes); `tangents`: the output's gradients."""
    out = Followed(batch)
    for n in graph.nodes:
        if n.op == "output":
            continue
        if n.op == "placeholder" or n.op == "get_attr":
            _input(n, out, known or {}, n in tangents)
        else:
            _node(n, out)
    return out


def _input(n: fx.Node, out: Followed, known: Mapping[str, Layout], tangent: bool) -> None:
    value = n.meta.get("val")
    layout = known.get(n.name)
    if not _fits(layout, value, out):
        layout = by_size(value, out.batch)
    if layout is None and holds(value, out.batch):
        out.lost.add(n)
    out.layout[n] = layout
    has = holds(value, out.batch)
    out.kind[n] = (ROWS if has else HEAD) if tangent else FORWARD if has else CONST


def _node(n: fx.Node, out: Followed) -> None:
    value = n.meta.get("val")
    operands = [a for a in n.all_input_nodes if not isinstance(a.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)]
    linear = [a for a in operands if out.kind.get(a) in (HEAD, ROWS, TOTAL)]
    out.kind[n] = _kind(n, value, operands, linear, out)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):  # a size, or made of sizes: no value of a tensor is in it
        out.layout[n] = None
        return
    if linear and BY_SAMPLE_KEY not in n.meta and not is_linear(n, set(linear), out):
        out.nonlinear[n] = f"{op_name(n)} is not linear in the gradient"
    try:
        out.layout[n] = _placed(n, value, _checked(n, value, _layout(n, value, operands, out), out), out)
        _check_sums(n, linear, out)
        _check_numbers(n, out)
    except Blocked as e:
        out.blocked[n] = str(e)
        values = value if isinstance(value, tuple | list) else (value,)
        guesses = tuple(by_size(v, out.batch) for v in values)
        out.layout[n] = guesses if isinstance(value, tuple | list) else guesses[0]
        if any(g is None and holds(v, out.batch) for g, v in zip(guesses, values, strict=True)):
            out.lost.add(n)


def _kind(n: fx.Node, value: Any, operands: list[fx.Node], linear: list[fx.Node], out: Followed) -> str:
    whole = holds(value, out.batch)
    if not linear:
        return FORWARD if whole or any(out.kind.get(a) == FORWARD for a in operands) else CONST
    if whole and not (isinstance(value, tuple | list)):
        return ROWS
    if any(out.kind[a] in (ROWS, TOTAL) for a in linear):
        return ROWS if whole else TOTAL
    return HEAD


def _layout(n: fx.Node, value: Any, operands: list[fx.Node], out: Followed) -> Layout:
    if any(a in out.lost for a in operands) and not _adopted(n, value, operands, out):
        raise Blocked("the batch is merged with other axes in an order that is not known")
    if n.target is operator.getitem:
        found = out.layout[n.args[0]]  # type: ignore[index]
        return found[n.args[1]] if isinstance(found, tuple) else found  # type: ignore[index,return-value]
    if _torch.is_random(n):
        if holds(value, out.batch):
            raise Blocked("random numbers are drawn for the whole batch")
        return None
    if n.target in COUNTS and _is_count(n, value, out.batch):
        out.whole.add(n)
        return SampleLayout(0, index=True)
    if n.target in FACTORIES:
        return _repeated(value, out.batch) if holds(value, out.batch) else None
    if not any(out.layout.get(a) is not None for a in operands):
        if not holds(value, out.batch):
            return None
        if n.target in SPREADS:
            return _repeated(value, out.batch)
        raise Blocked(f"{op_name(n)} makes rows")
    rule = rule_of(n)
    if rule is None:
        raise Blocked(f"{op_name(n)} is not known to keep samples apart")
    found = rule(n, value, out)
    if n.target in MOVES and isinstance(found, SampleLayout) and (own := out.rows(n.args[0])) is not None and own.index and not value.dtype.is_floating_point:
        return replace(found, index=True)
    return found


def _adopted(n: fx.Node, value: Any, operands: list[fx.Node], out: Followed) -> bool:
    """Give the operands of which it is not known where they have their samples the place at which another one has them; says whether all have one then.

    Any place will do for a tensor of the forward pass that is made for the whole batch, like a mask of dropout: its entries are constants, each of which
    meets one entry of the gradient, and the gradient's place says what sample that is."""
    unknown = [a for a in operands if a in out.lost]
    if any(out.kind.get(a) not in (FORWARD, CONST) for a in unknown):
        return False
    for a in unknown:
        place = _place_beside(n, a, value, operands, out)
        if place is None or not _fits(place, _torch.value(a), out):
            return False
        out.layout[a] = place
        out.lost.discard(a)
    return True


def _place_beside(n: fx.Node, unknown: fx.Node, value: Any, operands: list[fx.Node], out: Followed) -> SampleLayout | None:
    """Where an operand would have to have its samples to meet those of the others."""
    rank = _torch.value(unknown).dim()
    others = [(a, place) for a in operands if (place := out.rows(a)) is not None and not place.uniform]
    if n.target in MM | BMM:
        left, right = n.args[-2:]
        for a, place in others:
            if {a, unknown} == {left, right} and unknown is not a:
                contracted = (rank - 1, rank - 2) if a is left else (rank - 2, rank - 1)
                if place.dim == contracted[0]:
                    return place.at_dim(contracted[1])
                return place if rank == 3 and place.dim == 0 else None
        return None
    if not _torch.is_pointwise(n) and any(_torch.value(a).dim() != rank for a, _ in others):
        return None
    return next((place.at_dim(place.dim + rank - _torch.value(a).dim()) for a, place in others), None)


def _is_count(n: fx.Node, value: Any, batch: sympy.Symbol) -> bool:
    """Whether an op makes the numbers 0, 1, .. of the samples."""
    if by_size(value, batch) is None:
        return False
    if n.target is torch.ops.prims.iota.default:
        return (n.kwargs.get("start"), n.kwargs.get("step")) == (0, 1)
    return len(n.args) == 1 or (n.args[0], *n.args[2:3]) in ((0,), (0, 1))


def _checked(n: fx.Node, value: Any, layout: Layout, out: Followed) -> Layout:
    """The layout, if the sizes agree with it."""
    if isinstance(value, tuple | list):
        each = layout if isinstance(layout, tuple) else (layout,) * len(value)
        for v, own in zip(value, each, strict=True):
            _checked(n, v, own, out)
        return tuple(each)
    if not isinstance(value, torch.Tensor):
        return None
    assert not isinstance(layout, tuple)
    dims = [d for d, s in enumerate(value.shape) if _torch.has_symbol(s, out.batch)]
    if layout is None:
        if dims:
            raise Blocked(f"{op_name(n)} makes rows")
        return None
    if dims != [layout.dim]:
        raise Blocked(f"two axes of {op_name(n)} have the batch's size" if len(dims) > 1 else f"{op_name(n)} moves the batch")
    if not _fits(layout, value, out):
        raise Blocked(f"{op_name(n)} changes the batch's size")
    return layout


def _fits(layout: Layout, value: Any, out: Followed) -> bool:
    """Whether a tensor may have its samples at a place, as far as its sizes tell."""
    if not isinstance(layout, SampleLayout) or not isinstance(value, torch.Tensor):
        return layout is None and not holds(value, out.batch)
    if [d for d, s in enumerate(value.shape) if _torch.has_symbol(s, out.batch)] != [layout.dim]:
        return False
    return layout.uniform or bool(sympy.expand(layout.outer * out.batch * layout.inner - _torch.size_expr(value.shape[layout.dim])) == 0)


def _placed(n: fx.Node, value: Any, layout: Layout, out: Followed) -> Layout:
    """A gradient that is the same for every row will not be once rows have weights: it needs a definite place."""
    if not isinstance(layout, SampleLayout) or not layout.uniform or out.kind[n] != ROWS:
        return layout
    definite = by_size(value, out.batch)
    if definite is None:
        raise Blocked("a gradient spreads over the batch merged with other axes")
    return definite


def _check_sums(n: fx.Node, linear: list[fx.Node], out: Followed) -> None:
    """Linear in the gradients; sums over rows only of those; and no sum goes back to the rows."""
    sees = any(out.layout.get(a) is not None for a in n.all_input_nodes)
    found = out.layout[n]
    result = any(p is not None for p in found) if isinstance(found, tuple) else found is not None
    if not linear:
        if sees and not result and n.target not in FACTORIES:
            raise Blocked(f"{op_name(n)} takes the forward pass's batch as a whole")
        return
    if n in out.nonlinear:
        raise Blocked(out.nonlinear[n])
    kinds = {out.kind[a] for a in linear}
    if result and TOTAL in kinds and DECOUPLED not in n.meta:
        raise Blocked(COUPLED)
    if n.target in (aten.mean.dim, aten.mean.default) and out.kind[n] == TOTAL and ROWS in kinds:
        raise Blocked("a mean over the batch divides by the number of rows")


def _check_numbers(n: fx.Node, out: Followed) -> None:
    """The batch's size as a factor is kept at its value; as anything else it can't be."""
    found = [a for a in _torch.symbolic_scalar_arguments(n) if _torch.has_symbol(a.meta["val"], out.batch)]
    if not found:
        return
    value = n.meta.get("val")
    if n.target in ARITHMETIC and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        linear = out.kind[n] in (HEAD, ROWS, TOTAL)
        if not linear or n.target in (aten.mul.Tensor, aten.div.Tensor):
            out.numbers.add(n)
            return
    raise Blocked(f"{op_name(n)} uses the batch's size as a number")


# --- sizes ---


def by_size(value: Any, batch: sympy.Symbol) -> SampleLayout | None:
    """The only dim that holds the batch, if it is the batch and nothing else."""
    if not isinstance(value, torch.Tensor):
        return None
    dims = [d for d, s in enumerate(value.shape) if _torch.has_symbol(s, batch)]
    return SampleLayout(dims[0]) if len(dims) == 1 and _torch.size_expr(value.shape[dims[0]]) == batch else None


def _repeated(value: Any, batch: sympy.Symbol) -> SampleLayout:
    """The place of the batch in a tensor that is filled, or expanded from one without samples. A dim that is the batch and nothing else is a place as any
    other: merged with a second axis later, its entries differ. A dim of several times the batch's size is constant throughout."""
    dims = [d for d, s in enumerate(value.shape) if _torch.has_symbol(s, batch)]
    return by_size(value, batch) or SampleLayout(dims[0], None, None)
