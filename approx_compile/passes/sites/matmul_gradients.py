"""Find the gradient products of a matmul in the backward part of a joint graph.

For Y = A B, the output contracts K, dA = dY B^T contracts N, and dB = A^T dY contracts M. The graph may have each of them transposed. A node is a
gradient only if it reads one of the forward operands, through permutations, in the orientation that the chain rule asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import BMM, PERMUTES, VIEWS
from approx_compile.passes.sites.site import Product
from approx_compile.reasons import Reason
from approx_compile.reasons.products import BACKWARD_NOT_UNDERSTOOD, ONE_TENSOR

aten = torch.ops.aten


def matmul_products(n: fx.Node, a: fx.Node, b: fx.Node, weight: int | None, backward_nodes: list[fx.Node]) -> tuple[list[Product], Reason | None]:
    """Return the products of a matmul: the output, and the gradients that the backward pass computes.

    Args:
        n: The matmul of the forward pass.
        a: Its left operand A, (M, K) or (batch, M, K).
        b: Its right operand B, (K, N) or (batch, K, N).
        weight: Which operand is a weight, 0 or 1; None if neither is.
        backward_nodes: The nodes of the backward pass with the same sequence number.

    Returns:
        The products, and why the site must stay exact, or None.
    """
    batched = int(n.target in BMM)
    lead = _torch.value(a).shape[0] if batched else 1
    k = _torch.value(a).shape[-1]
    left, right = (Axis(2, 0), Axis(1, 0)) if batched else (Axis(1), Axis(0))
    products = [Product("output", n, (a, b), (left, right), k, lead, weight)]
    target = aten.bmm.default if batched else aten.mm.default
    gradients: dict[int, Product] = {}  # by the operand that they are the gradient of
    root_a, root_b = _root_and_permutation(a), _root_and_permutation(b)
    for m in backward_nodes:
        reads = _operand_reads(m, root_a, root_b)
        if not reads:
            continue
        if root_a[0] is root_b[0]:
            return products, ONE_TENSOR()
        if not (m.target is target or _is_outer_product(m)) or len(reads) != 1:
            return products, BACKWARD_NOT_UNDERSTOOD()
        (position, operand), lhs, rhs = reads[0], m.args[0], m.args[1]
        assert isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)
        # K must be the dim of the operand that this product does not contract, or it is not a gradient
        dim = _dim_in(m.args[position], (root_a, root_b)[operand], batched + 1 - operand)
        grad_of = 1 - operand
        if dim != batched + position or grad_of in gradients:
            return products, BACKWARD_NOT_UNDERSTOOD()
        weight_position = position if operand == weight else None
        name = "grad_weight" if grad_of == weight else "grad_input"
        if name == "grad_input" and weight is None and grad_of == 1:
            name = "grad_input#2"
        contraction = _torch.value(lhs).shape[-1]
        gradients[grad_of] = Product(name, m, (lhs, rhs), (left, right), contraction, lead, weight_position, operand, position)
    return products + [gradients[i] for i in sorted(gradients)], None


def _is_outer_product(m: fx.Node) -> bool:
    """Whether a node multiplies (N, 1) by (1, K) elementwise.

    Inductor turns a matmul that contracts an axis of one entry, such as a weight's gradient for one row, into this.
    """
    if m.target is not aten.mul.Tensor or not all(isinstance(arg, fx.Node) for arg in m.args):
        return False
    left, right = (_torch.value(arg).shape for arg in m.args)
    return len(left) == len(right) >= 2 and left[:-2] == right[:-2] and left[-1] == 1 and right[-2] == 1


def _operand_reads(m: fx.Node, root_a: tuple[Any, Any], root_b: tuple[Any, Any]) -> list[tuple[int, int]]:
    """(position, operand) for every argument of a backward node that is a permuted forward operand; nodes that only view an operand read none."""
    if m.target in PERMUTES or m.target in VIEWS:
        return []
    hits = []
    for position, arg in enumerate(m.args):
        if isinstance(arg, fx.Node):
            root = _root_and_permutation(arg)[0]
            hits += [(position, i) for i, r in enumerate((root_a, root_b)) if root is r[0]]
    return hits


# --- permutations ---


def _root_and_permutation(n: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The node under a chain of permutations, and the permutation from its dims to those of `n`: dim i of `n` is dim perm[i] of the root."""
    if not isinstance(n, fx.Node):
        return n, None
    perm = list(range(_torch.value(n).dim())) if isinstance(_torch.value(n), torch.Tensor) else []
    while n.target in PERMUTES:
        source = n.args[0]
        assert isinstance(source, fx.Node)
        step = _permutation_of(n)
        perm = [step[d] for d in perm]
        n = source
    return n, tuple(perm)


def _permutation_of(n: fx.Node) -> list[int]:
    """The dims of its input in the order in which a permuting node has them."""
    dims: list[int] = list(range(_torch.value(n).dim()))
    if n.target is aten.permute.default:
        return [int(d) % len(dims) for d in n.args[1]]  # type: ignore[arg-type,union-attr]
    i: Any = n.args[1] if n.target is aten.transpose.int else 0
    j: Any = n.args[2] if n.target is aten.transpose.int else len(dims) - 1
    dims[i], dims[j] = dims[j], dims[i]
    return dims


def _dim_in(arg: Any, root: tuple[Any, Any], dim: int) -> int:
    """Where dim `dim` of a forward operand with this root lies in `arg`, a permutation of the same root."""
    in_root = root[1][dim]
    return _root_and_permutation(arg)[1].index(in_root)  # type: ignore[union-attr]


def permutation_between(operand: fx.Node, arg: fx.Node) -> list[int]:
    """Return the permutation that turns a forward operand into `arg`, which is a permutation of the same root."""
    of_operand, of_arg = _root_and_permutation(operand)[1], _root_and_permutation(arg)[1]
    assert of_operand is not None and of_arg is not None
    return [of_operand.index(d) for d in of_arg]
