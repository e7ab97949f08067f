"""Find the gradient products of a matmul in the backward part of a joint graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import BMM, PERMUTES, VIEWS
from approx_compile.passes.sites.site import Product

aten = torch.ops.aten


def matmul_products(n: fx.Node, a: fx.Node, b: fx.Node, weight: int | None, backward_nodes: list[fx.Node]) -> tuple[list[Product], str | None]:
    """Y = A B: output contracts K; dA = dY B^T contracts N; dB = A^T dY contracts M (each written either way round in the graph)."""
    batched = int(n.target in BMM)
    lead = _torch.value(a).shape[0] if batched else 1
    k = _torch.value(a).shape[-1]
    left, right = (Axis(2, 0), Axis(1, 0)) if batched else (Axis(1), Axis(0))
    products = [Product("output", n, (a, b), (left, right), k, lead, weight)]
    target = aten.bmm.default if batched else aten.mm.default
    found: dict[int, Product] = {}
    root_a, root_b = _root(a), _root(b)
    for m in backward_nodes:
        reads = _reads(m, root_a, root_b)
        if not reads:
            continue
        if root_a[0] is root_b[0]:
            return products, "both operands are views of one tensor"
        if not (m.target is target or _is_outer_product(m)) or len(reads) != 1:
            return products, "its backward pass is not understood"
        (position, operand), lhs, rhs = reads[0], m.args[0], m.args[1]
        assert isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)
        # K must be the free dim of the operand there, or this is another product
        dim = _dim_in(m.args[position], (a, b)[operand], (root_a, root_b)[operand], batched + 1 - operand)
        grad_of = 1 - operand
        if dim != batched + position or grad_of in found:
            return products, "its backward pass is not understood"
        own_weight = position if operand == weight else None
        name = "grad_weight" if grad_of == weight else "grad_input"
        if name == "grad_input" and weight is None and grad_of == 1:
            name = "grad_input#2"
        contraction = _torch.value(lhs).shape[-1]
        found[grad_of] = Product(name, m, (lhs, rhs), (left, right), contraction, lead, own_weight, operand, position)
    return products + [found[i] for i in sorted(found)], None


def _is_outer_product(m: fx.Node) -> bool:
    """Whether it is (N, 1) times (1, K), op by op: what Inductor makes of a matmul that contracts an axis of one entry (a weight's gradient for one row)."""
    if m.target is not aten.mul.Tensor or not all(isinstance(arg, fx.Node) for arg in m.args):
        return False
    left, right = (_torch.value(arg).shape for arg in m.args)
    return len(left) == len(right) >= 2 and left[:-2] == right[:-2] and left[-1] == 1 and right[-2] == 1


def _reads(m: fx.Node, root_a: tuple[Any, Any], root_b: tuple[Any, Any]) -> list[tuple[int, int]]:
    """(position, operand) for every argument of a backward node that is a permuted forward operand; views and casts of them are not reads."""
    if m.target in PERMUTES or m.target in VIEWS:
        return []
    hits = []
    for position, arg in enumerate(m.args):
        if isinstance(arg, fx.Node):
            root = _root(arg)[0]
            hits += [(position, i) for i, r in enumerate((root_a, root_b)) if root is r[0]]
    return hits


def _root(n: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The node under a chain of permutations, and the permutation from its dims to n's (dim i of n is dim perm[i] of the root)."""
    if not isinstance(n, fx.Node):
        return n, None
    perm = list(range(_torch.value(n).dim())) if isinstance(_torch.value(n), torch.Tensor) else []
    while n.target in PERMUTES:
        source = n.args[0]
        assert isinstance(source, fx.Node)
        step = _permutation(n)
        perm = [step[d] for d in perm]
        n = source
    return n, tuple(perm)


def _permutation(n: fx.Node) -> list[int]:
    dims: list[int] = list(range(_torch.value(n).dim()))
    if n.target is aten.permute.default:
        return [int(d) % len(dims) for d in n.args[1]]  # type: ignore[arg-type,union-attr]
    i: Any = n.args[1] if n.target is aten.transpose.int else 0
    j: Any = n.args[2] if n.target is aten.transpose.int else len(dims) - 1
    dims[i], dims[j] = dims[j], dims[i]
    return dims


def _dim_in(arg: Any, operand: fx.Node, root: tuple[Any, Any], dim: int) -> int:
    """Where dim `dim` of a forward operand lies in `arg`, a permutation of the same root."""
    in_root = root[1][dim]
    return _root(arg)[1].index(in_root)  # type: ignore[union-attr]


def permutation_between(operand: fx.Node, arg: fx.Node) -> list[int]:
    """The permutation that turns a forward operand into `arg`, which shares its root."""
    of_operand, of_arg = _root(operand)[1], _root(arg)[1]
    assert of_operand is not None and of_arg is not None
    return [of_operand.index(d) for d in of_arg]
