"""For every family of ops: where its result has the batch, given where its operands have it, or why it may not run on some of the rows. An op without a
rule is blocked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import BMM, CASTS, MM, VIEWS, op_name
from approx_compile.passes.rewrite.custom_ops import CUSTOM_CONV, CUSTOM_MM, skip_conv_input, skip_matmul, skip_matmul_into
from approx_compile.rows.batch_dim import (
    Blocked,
    Followed,
    Geometry,
    Layout,
    SampleLayout,
    geometry_of,
    holds,
    numbers_of,
    numel_of,
    place_at,
    place_in_memory,
    same_memory,
    strided_geometry,
    whole_number,
)

aten = torch.ops.aten
prims = torch.ops.prims


# --- one rule per family of ops: the layout of the result ---

Rule = Callable[[fx.Node, Any, Followed], Layout]


def _agree(*places: SampleLayout | None) -> SampleLayout | None:
    """One place for all that hold rows; None where none does."""
    found: SampleLayout | None = None
    for p in places:
        if p is None:
            continue
        if found is None or (found.uniform and p.dim == found.dim):
            found = p
        elif p.dim != found.dim or not (p.uniform or p == found):
            raise Blocked("the batch lies elsewhere in another operand")
    return found


def _pointwise(n: fx.Node, value: Any, out: Followed) -> Layout:
    shape = value[0].shape if isinstance(value, tuple | list) else value.shape
    places = []
    for a in n.all_input_nodes:
        own = out.rows(a)
        if own is not None:
            places.append(own.at_dim(own.dim + len(shape) - _torch.value(a).dim()))
    return _agree(*places)


def _copy(n: fx.Node, value: Any, out: Followed) -> Layout:
    """copy(to, source): `source`, broadcast to the shape of `to`, whose values nobody reads."""
    own = out.rows(n.args[1])
    return own.at_dim(own.dim + value.dim() - _torch.value(n.args[1]).dim()) if own is not None else None


def _same(n: fx.Node, value: Any, out: Followed) -> Layout:
    return out.rows(n.args[0])


def _view(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    if own is None:
        return None
    old, new = _torch.value(n.args[0]).shape, value.shape
    dims = [d for d, s in enumerate(new) if _torch.has_symbol(s, out.batch)]
    if len(dims) != 1:
        raise Blocked("a view splits the batch")
    (dim,) = dims
    if own.uniform:
        return _part_of_constant(own, old, new, dim)
    before, after = numel_of(old[: own.dim]) * own.outer, numel_of(old[own.dim + 1 :]) * own.inner
    outer, inner = sympy.cancel(before / numel_of(new[:dim])), sympy.cancel(after / numel_of(new[dim + 1 :]))
    if not (whole_number(outer) and whole_number(inner)):
        raise Blocked("a view mixes the batch with other axes")
    if not (outer.is_Integer or inner.is_Integer):
        raise Blocked("the batch is merged between two axes of dynamic size")
    return SampleLayout(dim, outer, inner)


def _part_of_constant(own: SampleLayout, old: Sequence[Any], new: Sequence[Any], dim: int) -> SampleLayout:
    """A view of a tensor that is constant along its dim `own.dim`. The new dim `dim` is constant, too, as long as it is made of no other old dim: along
    those the tensor may differ, and where the samples then are is not known."""
    splits = (numel_of(new[:dim]) / numel_of(old[: own.dim]), numel_of(new[dim + 1 :]) / numel_of(old[own.dim + 1 :]))
    if not all(whole_number(sympy.cancel(e)) for e in splits):
        raise Blocked("a view merges an axis that is the same for every sample with others")
    return own.at_dim(dim)


def _permute(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    if own is None:
        return None
    dims = list(range(value.dim()))
    if n.target is aten.permute.default:
        dims = [int(d) % len(dims) for d in n.args[1]]  # type: ignore[union-attr,arg-type]
    else:
        i: Any = n.args[1] if n.target is aten.transpose.int else 0
        j: Any = n.args[2] if n.target is aten.transpose.int else len(dims) - 1
        if dims:
            dims[i], dims[j] = dims[j], dims[i]
    return own.at_dim(dims.index(own.dim))


def _expand(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    return own.at_dim(own.dim + value.dim() - _torch.value(n.args[0]).dim()) if own is not None else None


def _unsqueeze(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    at = int(n.args[1]) % value.dim()  # type: ignore[arg-type]
    return own.at_dim(own.dim + (at <= own.dim)) if own is not None else None


def _squeeze(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    rank = _torch.value(n.args[0]).dim()
    given = n.args[1] if len(n.args) > 1 else [d for d in range(rank) if _torch.value(n.args[0]).shape[d] == 1]
    gone = {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])}  # type: ignore[arg-type]
    return own.at_dim(own.dim - sum(d < own.dim for d in gone)) if own is not None else None


def _reduction(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    rank = _torch.value(n.args[0]).dim()
    given = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
    dims = range(rank) if given is None or given == [] else given if isinstance(given, list | tuple) else [given]
    gone = {int(d) % rank for d in dims} if rank else set()  # type: ignore[arg-type]
    if own is None or own.dim in gone:
        return None
    keep = (n.args[2] if len(n.args) > 2 else n.kwargs.get("keepdim", False)) if n.target not in (aten.sum.default, aten.mean.default) else False
    return own if keep else own.at_dim(own.dim - sum(d < own.dim for d in gone))


def _along(position: int) -> Rule:
    """Ops that work along one dim, their argument number `position`, every entry of it with every other."""

    def rule(n: fx.Node, value: Any, out: Followed) -> Layout:
        rank = _torch.value(n.args[0]).dim()
        dim = n.args[position] if len(n.args) > position else n.kwargs.get("dim", -1)
        own = _agree(*(out.rows(a) for a in n.all_input_nodes))
        dims = dim if isinstance(dim, list | tuple) else [dim]
        if own is not None and any(int(d) % rank == own.dim for d in dims):  # type: ignore[arg-type]
            raise Blocked(f"{op_name(n)} runs along the batch")
        return own

    return rule


def _by_place(n: fx.Node, value: Any, out: Followed) -> Layout:
    """gather and scatter: entry i of every operand belongs to entry i of the others, whatever their sizes; all must have the batch there."""
    tensors = [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    if any(out.rows(a) is None for a in tensors):
        raise Blocked(f"{op_name(n)} has an operand without samples")
    return _along(1)(n, value, out)


def _select(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    dim = int(n.args[1]) % _torch.value(n.args[0]).dim()  # type: ignore[arg-type]
    if own is not None and dim == own.dim:
        raise Blocked("one sample is taken out of the batch")
    return own.at_dim(own.dim - (dim < own.dim)) if own is not None else None


def _times(length: Any, own: SampleLayout, out: Followed) -> Any:
    """How often the samples of an axis fit into a part of it: where some views of the batch are concatenated, a part may be one of them."""
    times = sympy.cancel(_torch.size_expr(length) / (out.batch * own.inner))
    if not times.is_Integer:
        raise Blocked("a part of the batch is taken out or written")
    return times


def _start(n: fx.Node, position: int) -> Any:
    start = n.args[position] if len(n.args) > position else n.kwargs.get("start")
    (number,) = numbers_of([0 if start is None else start])
    return number


def _step(n: fx.Node, position: int) -> Any:
    return n.args[position] if len(n.args) > position else n.kwargs.get("step", 1)


def _slice(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    dim = int(n.args[1]) if len(n.args) > 1 else 0  # type: ignore[arg-type]
    if own is None or own.uniform or dim % value.dim() != own.dim:
        return own
    if _step(n, 4) != 1:
        raise Blocked("every so many samples are taken out of the batch")
    if _torch.known_equal(value.shape[own.dim], _torch.value(n.args[0]).shape[own.dim]):
        return own
    _times(_start(n, 2), own, out)
    return SampleLayout(own.dim, _times(value.shape[own.dim], own, out), own.inner)


def _slice_scatter(n: fx.Node, value: Any, out: Followed) -> Layout:
    to, own = out.rows(n.args[0]), out.rows(n.args[1])
    dim = (int(n.args[2]) if len(n.args) > 2 else 0) % value.dim()  # type: ignore[arg-type]
    if own is None or own.uniform or dim != own.dim:
        return _agree(to, own)
    if _step(n, 5) != 1:
        raise Blocked("every so many samples are written to")
    if _torch.known_equal(value.shape[dim], _torch.value(n.args[1]).shape[dim]):
        return _agree(to, own)
    _times(_start(n, 3), own, out)
    return _agree(to, SampleLayout(dim, _times(value.shape[dim], own, out), own.inner))


def _select_scatter(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = _agree(out.rows(n.args[0]), _into(n, out))
    dim = int(n.args[2]) if len(n.args) > 2 else 0  # type: ignore[arg-type]
    if own is not None and dim % value.dim() == own.dim:
        raise Blocked("one sample is written to")
    return own


def _as_strided(n: fx.Node, value: Any, out: Followed) -> Layout:
    own, x, view = out.rows(n.args[0]), geometry_of(_torch.value(n.args[0])), strided_geometry(n, 1)
    if own is None or own.uniform or not same_memory(x, view):
        raise Blocked("as_strided takes some entries of memory out")
    return _at(view, place_in_memory(x, own), out)


def _as_strided_scatter(n: fx.Node, value: Any, out: Followed) -> Layout:
    """All entries of a tensor are written, from one with other axes."""
    own, x, view = out.rows(n.args[1]), geometry_of(_torch.value(n.args[0])), strided_geometry(n, 2)
    if own is None or own.uniform or not same_memory(x, view):
        raise Blocked("as_strided_scatter writes to some entries of memory")
    return _at(x, place_in_memory(view, own), out)


def _at(geometry: Geometry, step: Any, out: Followed) -> SampleLayout:
    place = place_at(geometry, step, out.batch)
    if place is None:
        raise Blocked("a view mixes the batch with other axes")
    return place


def _into(n: fx.Node, out: Followed) -> SampleLayout | None:
    """The place of a select_scatter's source, counted in the result."""
    own = out.rows(n.args[1])
    dim = int(n.args[2]) % _torch.value(n.args[0]).dim()  # type: ignore[arg-type]
    return own.at_dim(own.dim + (dim <= own.dim)) if own is not None else None


def _cat(n: fx.Node, value: Any, out: Followed) -> Layout:
    parts: Any = n.args[0]
    dim = (int(n.args[1]) if len(n.args) > 1 else 0) % value.dim()  # type: ignore[arg-type]
    places = [out.rows(a) for a in parts]
    own = _agree(*(SampleLayout(p.dim, sympy.S.One, p.inner) if p is not None and p.dim == dim and not p.uniform else p for p in places))
    if own is None or own.dim != dim or own.uniform:
        return own
    if any(p is None for p in places):
        raise Blocked("something without samples is concatenated with the batch")
    return SampleLayout(dim, sum(_times(_torch.value(a).shape[dim], own, out) for a in parts), own.inner)


def _pieces(n: fx.Node, value: Any, out: Followed) -> Layout:
    """split, unbind: the same place in every piece; some views of the batch, concatenated, may be split into them."""
    unbind = n.target is aten.unbind.int
    own = out.rows(n.args[0])
    position = 1 if unbind else 2
    dim = int(n.args[position]) % _torch.value(n.args[0]).dim() if len(n.args) > position else 0  # type: ignore[arg-type]
    if own is None or dim != own.dim:
        return own.at_dim(own.dim - (unbind and dim < own.dim)) if own is not None else None
    if unbind or own.uniform:
        raise Blocked("the batch is split")
    return tuple(SampleLayout(dim, _times(v.shape[dim], own, out), own.inner) for v in value)


def _pad(n: fx.Node, value: Any, out: Followed) -> Layout:
    own = out.rows(n.args[0])
    if own is not None and value.dim() - 1 - own.dim < len(n.args[1]) // 2:  # type: ignore[arg-type]
        pads = n.args[1][2 * (value.dim() - 1 - own.dim) :][:2]  # type: ignore[index]
        if any(p != 0 for p in pads):  # type: ignore[union-attr]
            raise Blocked("the batch is padded")
    return own


def _mm(n: fx.Node, value: Any, out: Followed) -> Layout:
    """(.., M, K) x (.., K, N): rows in M or N stay, rows in K of both are summed; a leading batch dim pairs with the other's."""
    left, right = n.args[:2] if n.target in CUSTOM_MM else n.args[-2:]
    a, b = out.rows(left), out.rows(right)
    if n.target is skip_matmul and ((a is not None and a.dim == 1) or (b is not None and b.dim == 0)):
        raise Blocked("a kernel chooses among the rows")
    rank = value.dim()
    found: SampleLayout | None
    if a is not None and b is not None:
        lead = rank == 3 and a.dim == 0 and b.dim == 0
        if not lead and (a.dim, b.dim) != (rank - 1, rank - 2):
            raise Blocked(f"{op_name(n)} multiplies rows with rows")
        together = _agree(a, b if lead else b.at_dim(a.dim))
        found = together if lead else None
    elif a is not None:
        if a.dim == rank - 1 or (rank == 3 and a.dim == 0):
            raise Blocked(f"{op_name(n)} contracts the batch with something else")
        found = a
    else:
        assert b is not None or len(n.args) == 3
        if b is not None and (b.dim == rank - 2 or (rank == 3 and b.dim == 0)):
            raise Blocked(f"{op_name(n)} contracts the batch with something else")
        found = b
    if n.target is skip_matmul_into and found is not None and found.dim == n.args[5]:
        raise Blocked("a kernel chooses among the rows")
    if len(n.args) == 3 and (bias := out.rows(n.args[0])) is not None:
        if found is None:
            raise Blocked(f"{op_name(n)} adds rows to a sum over rows")
        found = _agree(found, bias.at_dim(bias.dim + rank - _torch.value(n.args[0]).dim()))
    return found


def _first(n: fx.Node, value: Any, out: Followed) -> Layout:
    """Ops whose tensors all have samples first, or no samples."""
    own = _agree(*(out.rows(a) for a in n.all_input_nodes))
    if own is None or own.dim != 0 or not (own.uniform or own == SampleLayout(0)):
        raise Blocked(f"{op_name(n)}: the batch is not the first axis")
    if isinstance(value, tuple | list):
        return tuple(own if holds(v, out.batch) else None for v in value)
    return own


def _matrices(n: fx.Node, value: Any, out: Followed) -> Layout:
    """Linear algebra on the matrices in the last two dims of every operand, one problem for each place in the dims before."""
    tensors = [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    lead = max(_torch.value(a).dim() for a in tensors) - 2
    own = _agree(*(out.rows(a) for a in tensors))
    if own is None or own.dim >= lead or any(out.rows(a) is None and _torch.value(a).dim() > 2 for a in tensors):
        raise Blocked(f"{op_name(n)}: the batch is not among the axes before the matrices'")
    return tuple(own if holds(v, out.batch) else None for v in value) if isinstance(value, tuple | list) else own


def _as_complex(n: fx.Node, value: Any, out: Followed) -> Layout:
    """view_as_real and view_as_complex: the last dim, of real and imaginary part, comes or goes."""
    own = out.rows(n.args[0])
    if own is not None and own.dim >= min(value.dim(), _torch.value(n.args[0]).dim()):
        raise Blocked("real and imaginary parts along the batch")
    return own


def _attention(n: fx.Node, value: Any, out: Followed) -> Layout:
    schema = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(schema, n.args, strict=False)) | n.kwargs
    if given.get("dropout_p", 0.0) != 0.0:
        raise Blocked("attention with dropout draws its mask by position in the batch")
    return _first(n, value, out)


def _conv_backward(n: fx.Node, value: Any, out: Followed) -> Layout:
    dy, x, w = n.args[:3]
    if out.rows(w) is not None:
        raise Blocked("the convolution's weight depends on the sample")
    own = _agree(out.rows(dy), out.rows(x))
    if own != SampleLayout(0):
        raise Blocked(f"{op_name(n)}: the batch is not the first axis")
    return (own if value[0] is not None else None, None, None)


def _by_kernel(n: fx.Node, value: Any, out: Followed) -> Layout:
    """A convolution's gradient in its chosen input channels: of x, from dY and W, or of W, from x and dY."""
    own = _agree(*(out.rows(a) for a in n.args[:2]))
    if own != SampleLayout(0) or (n.target is skip_conv_input and out.rows(n.args[1]) is not None):
        raise Blocked(f"{op_name(n)}: the batch is not the first axis")
    return own if n.target is skip_conv_input else None


def _take(n: fx.Node, value: Any, out: Followed) -> Layout:
    """x[.., i, j, ..] with tensors for some dims."""
    x, indices = n.args[0], n.args[1]
    own = out.rows(x)
    given = [(d, i) for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    places = [out.rows(i) for _, i in given]
    first, width = given[0][0], max(_torch.value(i).dim() for _, i in given)
    adjacent = [d for d, _ in given] == list(range(first, first + len(given)))
    if own is not None and (place := _counted(n, own, given, width, out)) is not None:
        return place.at_dim(place.dim + (first if adjacent else 0))
    if not adjacent:
        raise Blocked("indices of several axes apart")
    if own is None:  # a table looked up by the sample's entries
        found = _place_of_indices(places, given, width)
        return found.at_dim(found.dim + first) if found is not None else None
    if any(p is not None for p in places) or first <= own.dim < first + len(given):
        raise Blocked("samples are picked by index")
    return own if own.dim < first else own.at_dim(own.dim - len(given) + width)


def _place_of_indices(places: Sequence[SampleLayout | None], given: Sequence[tuple[int, fx.Node]], width: int) -> SampleLayout | None:
    """Where the samples are in what the indices, broadcast to `width` dims, are together."""
    return _agree(*(p.at_dim(p.dim + width - _torch.value(i).dim()) for p, (_, i) in zip(places, given, strict=True) if p is not None))


def _counted(n: fx.Node, own: SampleLayout, given: Sequence[tuple[int, fx.Node]], width: int, out: Followed) -> SampleLayout | None:
    """x[arange(batch), i]: every sample's own entries, where its number stands for the sample. On some of the samples the number is another one."""
    if own != SampleLayout(own.dim):
        return None
    numbers = [(d, i) for d, i in given if d == own.dim and (p := out.rows(i)) is not None and p.index]
    if len(numbers) != 1:
        return None
    (_, number) = numbers[0]
    place = out.rows(number)
    assert place is not None
    shape = _torch.value(number).shape
    others = [_torch.value(i).shape for _, i in given if i is not number]

    def is_given(d: int) -> bool:  # counted from the last dim
        return any(len(o) >= d and _torch.known_equal(o[-d], shape[-d]) for o in others)

    if any(not _torch.known_equal(shape[-d], 1) and len(shape) - d != place.dim and not is_given(d) for d in range(1, len(shape) + 1)):
        return None
    out.counted[n] = own.dim, place.dim
    return _place_of_indices([out.rows(i) for _, i in given], given, width)


def _put(n: fx.Node, value: Any, out: Followed) -> Layout:
    """x[i, ..] += values: the gradient of a table looked up, a sum over samples; or in a row of x."""
    if op_name(n) == "_unsafe_masked_index_put_accumulate":
        x, mask, indices, values = n.args
        accumulate: Any = True
        _agree(out.rows(mask), *(out.rows(i) for i in indices if i is not None))  # type: ignore[union-attr]
    else:
        x, indices, values = n.args[:3]
        accumulate = n.args[3] if len(n.args) > 3 else False
    own, given = out.rows(x), [(d, i) for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    places = [out.rows(i) for _, i in given]
    first, width = given[0][0], max(_torch.value(i).dim() for _, i in given)
    adjacent = [d for d, _ in given] == list(range(first, first + len(given)))
    rank = width + _torch.value(x).dim() - len(given)
    held = out.rows(values)
    held = held.at_dim(held.dim + rank - _torch.value(values).dim()) if held is not None else None
    if own is not None and (place := _counted(n, own, given, width, out)) is not None:
        _agree(place.at_dim(place.dim + (first if adjacent else 0)), held)
        return own
    if own is not None:
        if any(p is not None for p in places) or own.dim in [d for d, _ in given] or first < own.dim:
            raise Blocked("samples are written by index")
        return _agree(own, held)
    if not accumulate or not adjacent or first:
        raise Blocked("rows overwrite one another")
    where = _place_of_indices(places, given, width)
    if _agree(where, held) is None or (held is not None and held.dim >= width):
        raise Blocked("rows are written all over")
    return None


def _table_gradient(n: fx.Node, value: Any, out: Followed) -> Layout:
    _agree(out.rows(n.args[0]), out.rows(n.args[1]))
    return None


COUNTS: set[Any] = {prims.iota.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
MOVES: set[Any] = {*VIEWS, *CASTS, aten.permute.default, aten.t.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.clone.default}
MOVES |= {aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default}
"""Ops whose result has the operand's entries, in other places."""
FACTORIES = {
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.empty_permuted.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.empty_strided.default,
}
LIKE = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default}
"""Filled tensors: with sizes given, and with those of another tensor, where they have the batch in the same place."""
SPREADS = {aten.expand.default}
ARITHMETIC: set[Any] = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}
_REDUCTIONS = {aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default, aten.any.dim}
_REDUCTIONS |= {aten.argmax.default, aten.argmin.default, aten.prod.dim_int, aten.var.correction, aten.var_mean.correction, aten.any.dims}
_SAME: set[Any] = {aten.clone.default, aten._to_copy.default, prims.convert_element_type.default, aten.lift_fresh_copy.default}
_SAME |= LIKE | {aten.detach.default, aten.alias.default}

_FIRST_NAMES = """
    convolution max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d
    _adaptive_avg_pool2d_backward adaptive_max_pool2d_backward max_pool3d_with_indices_backward avg_pool3d_backward _adaptive_avg_pool3d_backward
    upsample_nearest2d upsample_nearest2d_backward upsample_bilinear2d upsample_bilinear2d_backward upsample_nearest1d_backward
    reflection_pad1d_backward reflection_pad2d_backward replication_pad2d_backward native_group_norm native_group_norm_backward
    _low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices pixel_shuffle pixel_unshuffle""".split()
_ATTENTION_NAMES = """
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_efficient_attention
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward""".split()


_MATRIX_NAMES = """
    linalg_inv_ex _linalg_solve_ex linalg_lu_factor_ex linalg_lu_solve linalg_lu lu_unpack linalg_cholesky_ex cholesky_solve linalg_solve_triangular
    triangular_solve _linalg_det _linalg_slogdet linalg_qr _linalg_svd _linalg_eigh tril triu""".split()

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, _same),
    aten.copy.default: _copy,
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys((aten.permute.default, aten.t.default, aten.transpose.int), _permute),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(MM | BMM | CUSTOM_MM, _mm),
    **dict.fromkeys(CUSTOM_CONV, _by_kernel),
    **dict.fromkeys((aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default), _squeeze),
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default, aten.cumsum.default, aten.cumprod.default, aten.flip.default), _along(1)),
    **dict.fromkeys((aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default), _by_place),
    **dict.fromkeys((aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default), _along(1)),
    **dict.fromkeys((aten.view_as_real.default, aten.view_as_complex.default), _as_complex),
    aten.index_select.default: _along(1),
    **dict.fromkeys((aten._softmax_backward_data.default, aten._log_softmax_backward_data.default), _along(2)),
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.as_strided.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
    **dict.fromkeys((aten.index.Tensor, aten._unsafe_index.Tensor), _take),
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), _put),
    aten.convolution_backward.default: _conv_backward,
    aten.embedding_dense_backward.default: _table_gradient,
    aten.expand.default: _expand,
    aten.split_with_sizes.default: _pieces,
    aten.split.Tensor: _pieces,
    aten.unbind.int: _pieces,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
}
_RULES_BY_NAME: dict[str, Rule] = {
    "rev": _along(1),
    "inductor_force_stride_order": _same,
    **dict.fromkeys(("_conj", "_conj_physical", "conj_physical", "resolve_conj"), _same),
    "_unsafe_masked_index_put_accumulate": _put,
    **dict.fromkeys(_FIRST_NAMES, _first),
    **dict.fromkeys(_MATRIX_NAMES, _matrices),
    **dict.fromkeys(_ATTENTION_NAMES, _attention),
}
"""Ops of which Inductor registers some late, and the overloads do not matter."""


def rule_of(n: fx.Node) -> Rule | None:
    return _RULES.get(n.target) or _RULES_BY_NAME.get(op_name(n)) or (_pointwise if _torch.is_pointwise(n) else None)
