"""Decide which ops are linear in the gradients that they read.

If an op is linear, scaling or leaving out a sample's gradient scales or leaves out all that is computed from it. An op that this module does not know counts
as not linear.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import VIEWS, is_torch_op, is_zero, op_name
from approx_compile.passes.rewrite.custom_ops import CUSTOM_CONV, CUSTOM_MM
from approx_compile.rows.batch_dim import covers_same_memory, geometry_of, strided_geometry

aten = torch.ops.aten
prims = torch.ops.prims

_CASTS: set[Any] = {aten._to_copy.default, prims.convert_element_type.default}
_MAPS: set[Any] = set(VIEWS) | {
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.mean.default,
}
_MAPS |= {aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default, aten.expand.default, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor}
_MAPS |= {aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default, aten.view_as_real.default, aten.view_as_complex.default}
_MAPS |= {aten.tril.default, aten.triu.default, aten._conj.default, aten.conj_physical.default}  # linear over the reals, as weights are
_MAPS |= {aten.as_strided.default, aten.neg.default, aten.cumsum.default, aten.flip.default, aten.unfold.default, operator.getitem}
_MAPS |= {aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int}
_ZERO_OR_ALL = {aten.add.Tensor, aten.sub.Tensor, aten.slice_scatter.default, aten.select_scatter.default}
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar, aten.mm.default, aten.bmm.default, *CUSTOM_MM, *CUSTOM_CONV}
_SOLVED = {"linalg_solve_triangular": 1, "linalg_lu_solve": 2, "_linalg_solve_ex": 1, "triangular_solve": 0, "cholesky_solve": 0}
"""The position of the right-hand side, in which the solution is linear, for each solver."""
_EMPTY: set[Any] = {aten.empty.memory_format, aten.empty_permuted.default, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}
"""Ops that allocate a tensor to be written to, whose values are never read."""
_INDEXED = {aten.gather.default, aten.index_select.default, aten.index.Tensor, aten._unsafe_index.Tensor}


def is_linear(n: fx.Node, linear: set[fx.Node]) -> bool:
    """Return whether a node is jointly linear in the gradients it reads, so that a row that is scaled or left out is also scaled or left out in the result.

    Args:
        n: The node.
        linear: Its operands that are linear in the output gradients.
    """

    def linear_or_zero(a: Any) -> bool:
        return a in linear or is_zero(a)

    hits = [a in linear for a in n.args if isinstance(a, fx.Node)]
    only_first = bool(hits) and hits[0] and not any(hits[1:]) and not any(v in linear for v in n.kwargs.values())
    name = op_name(n)
    if is_zero(n) or n.target in _EMPTY:
        return True
    if n.target in _CASTS:
        return bool(_torch.value(n).dtype.is_floating_point)
    if is_torch_op(n) and name in _SOLVED:
        return [i for i, a in enumerate(n.args) if isinstance(a, fx.Node) and a in linear] == [_SOLVED[name]]
    if n.target is aten.copy.default:
        return linear_or_zero(n.args[1])
    if n.target is aten.cat.default:
        return all(map(linear_or_zero, n.args[0]))  # type: ignore[arg-type]
    if n.target is aten.constant_pad_nd.default:
        return len(n.args) < 3 or is_zero(n.args[2])
    if n.target in _MAPS or name == "rev":
        return True
    if n.target in _ZERO_OR_ALL:
        return all(map(linear_or_zero, n.args[:2]))
    if n.target is aten.as_strided_scatter.default:
        overwritten = covers_same_memory(geometry_of(_torch.value(n.args[0])), strided_geometry(n, 2))
        return linear_or_zero(n.args[1]) and (overwritten or linear_or_zero(n.args[0]))
    if n.target in _FACTORS:
        return sum(hits) == 1
    if n.target in (aten.div.Tensor, aten.div.Scalar) or n.target in _INDEXED or (is_torch_op(n) and name.endswith(("_backward", "_backward_data"))):
        return only_first
    if n.target is aten.where.self:
        return n.args[0] not in linear and all(map(linear_or_zero, n.args[1:3]))
    if n.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return n.args[1] not in linear and is_zero(n.args[2])
    if n.target in (aten.index_put.default, aten._unsafe_index_put.default):
        return linear_or_zero(n.args[0]) and linear_or_zero(n.args[2]) and not any(i in linear for i in n.args[1])  # type: ignore[union-attr]
    if name in ("scatter_add", "scatter"):
        return linear_or_zero(n.args[0]) and n.args[2] not in linear and linear_or_zero(n.args[3])
    if name == "_unsafe_masked_index":
        return only_first and is_zero(n.args[3])
    if name == "_unsafe_masked_index_put_accumulate":
        return linear_or_zero(n.args[0]) and n.args[1] not in linear and n.args[3] in linear
    if n.target in (aten.addmm.default, aten.baddbmm.default, aten.addcmul.default) or name == "fma":  # addend + x * y
        addend, x, y = (n.args[2], *n.args[:2]) if name == "fma" else n.args[:3]
        return linear_or_zero(addend) and (x in linear) != (y in linear)
    return False
