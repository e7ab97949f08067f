"""Gradient products that are not computed but replaced: which can be, and the edit of the graph.

The mathematics are in `kernels.replacements`. What a replacement does not read is not kept for it: with `zero` and `random` the activation that
only the weight gradient needed is not saved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.config.resolve import ProductSettings
from approx_compile.kernels import max_conv
from approx_compile.kernels.gradient_replacements import ConvGeometry, Replacement, max_conv_weight, max_linear_input, max_linear_weight
from approx_compile.passes.fx_utils import CONV, MM, VIEWS, window_of
from approx_compile.passes.planning import lowering
from approx_compile.passes.rewrite.graph_edit import inline, replace_output
from approx_compile.passes.sites.site import Product, Site

aten = torch.ops.aten


class Choice(NamedTuple):
    """How a product is replaced (None: it can't be), how many of how many entries of the output gradient count, and in words."""

    how: Replacement | None
    kept: int
    size: int
    reason: str


def choose(site: Site, product: Product, wanted: ProductSettings) -> Choice:
    """What comes of a request to replace a gradient product."""
    how = Replacement(wanted.method, wanted.j, wanted.scale, wanted.std)
    if _torch.hint(product.size) == 0 and how.method != "max":
        return Choice(Replacement("zero"), 0, 1, "zeros in its place: the batch is empty")
    if how.method == "zero":
        return Choice(how, 0, _torch.hint(product.size), "zeros in its place")
    if how.method == "random":
        std = "1 / batch" if how.std is None else f"{how.std:g}"
        return Choice(how, 0, _torch.hint(product.size), f"random numbers in its place, standard deviation {std}")
    reason = _no_max(site, product)
    if reason is not None:
        return Choice(None, 1, 1, reason)
    sizes = _entries(site, product)
    size = math.prod(sizes)
    if wanted.tile is not None:
        if site.node.target not in CONV:
            return Choice(None, size, size, "max with tile is for convolutions, whose output gradients are images; j is for linear layers")
        how = replace(how, tile=_tile(wanted.tile, sizes))
    kept = how.entries(sizes)
    if kept >= size:
        asked = f"j {how.j}" if how.tile is None else f"tile {how.tile}"
        return Choice(None, size, size, f"max with {asked}: there are no more than {size} entries of the output gradient")
    words = f"max, {kept} of {size} entries of the output gradient" + (f", one of every tile of {how.tile}" if how.tile is not None else "")
    if wanted.lowering == "inductor":
        return Choice(how, kept, size, words)
    why = lowering.no_max_kernel(site, "cuda" if wanted.lowering == "auto" else wanted.lowering, how)
    if why is None:
        return Choice(replace(how, lowering="cuda"), kept, size, f"{words}, by cuda")
    return Choice(how, kept, size, words if wanted.lowering == "auto" else f"{words}, by inductor: {why}")


def _tile(wanted: int | float | str, sizes: Sequence[int]) -> int:
    if isinstance(wanted, str):
        return small_tile(sizes)
    return wanted if isinstance(wanted, int) else math.ceil(wanted * max(sizes))


def small_tile(sizes: Sequence[int]) -> int:
    """The smallest tile that is worth it: on CPUs the sum of patches takes as long as the exact product at some 16 entries a channel."""
    return next(t for t in itertools.count(4) if Replacement("max", tile=t).entries(sizes) <= 16)


def _entries(site: Site, product: Product) -> Sequence[Any]:
    """The sizes of what `max` chooses from: a channel's places in one sample, a row's outputs."""
    shape = _torch.value(product.output_grad).shape
    return shape[2:] if site.node.target in CONV else (shape[product.output_grad_dim],)


def _no_max(site: Site, product: Product) -> str | None:
    if site.kind == "matmul":
        return "max is for products with a weight"
    if site.node.target in CONV:
        if product.name != "grad_weight":
            return "max for grad_input is for linear layers"
    elif site.node.target not in MM:
        return "max is not for batched products"
    if not all(_static(o, axis.dim if product.name == "grad_weight" else 1 - axis.dim) for o, axis in zip(product.operands, product.axes, strict=True)):
        return "max: an operand has a dynamic size beside the batch"
    return None


def _static(n: fx.Node, batch: int = 0) -> bool:
    """Whether all sizes but the batch's are fixed."""
    return all(isinstance(s, int) for d, s in enumerate(_torch.value(n).shape) if d != batch)


# --- the graph ---


def replace_matmul(graph: fx.Graph, product: Product, how: Replacement) -> None:
    """Put the replacement of a matmul's gradient in the place of its node."""
    m, position = product.node, product.position
    if how.method != "max":
        _replace(m, _made_up(graph, m, product, how, _torch.value(m)))
        return

    def run(a: Tensor, b: Tensor) -> Tensor:
        """dY with rows first, X (M, K) or W (N, K) as the layer has them; the result is their product's transpose where the graph has it so."""
        operands = (a, b)
        contracted = [axis.dim for axis in product.axes]
        dy, operand = operands[1 - position], operands[position]
        if product.name == "grad_weight":  # both contracted over rows
            dy = dy if contracted[1 - position] == 0 else dy.t()
            operand = operand if contracted[position] == 0 else operand.t()
            d = max_linear_weight(operand, dy, how)
        else:  # both contracted over outputs
            dy = dy if contracted[1 - position] == 1 else dy.t()
            operand = operand if contracted[position] == 0 else operand.t()
            d = max_linear_input(dy, operand, how)
        return _laid_out(d if position == 1 else d.t(), _torch.value(m))

    _replace(m, inline(graph, m, run, product.operands, by_sample=True))


def _replace(m: fx.Node, new: fx.Node) -> None:
    m.replace_all_uses_with(new)
    m.graph.erase_node(m)


def replace_conv_weight(graph: fx.Graph, product: Product, how: Replacement) -> None:
    """Put the replacement of a convolution's weight gradient in the place of that output of its convolution_backward."""
    m = product.node
    old = _torch.value(m)[product.mask]
    if how.method == "max":
        kernel = tuple(int(s) for s in old.shape[2:])
        stride, padding, dilation = (tuple(int(v) for v in each) for each in window_of(m.args[4:7], len(kernel)))
        groups, transposed = m.args[9], bool(m.args[7])
        assert isinstance(groups, int)
        conv = ConvGeometry(kernel, stride, padding, dilation, groups, transposed)
        new = inline(graph, m, lambda x, dy: _laid_out(_max(x, dy, how, conv), old), product.operands, by_sample=True)
    else:
        new = _made_up(graph, m, product, how, old)
    replace_output(graph, m, product.mask, new)


def _max(x: Tensor, dy: Tensor, how: Replacement, conv: ConvGeometry) -> Tensor:
    if how.lowering == "inductor":
        return max_conv_weight(x, dy, how, conv)
    sizes = [list(v) for v in (conv.kernel, conv.stride, conv.padding, conv.dilation)]
    df: Tensor = max_conv.max_conv_weight(x, dy, how.j, how.scale, *sizes, conv.groups)
    return df


def _made_up(graph: fx.Graph, m: fx.Node, product: Product, how: Replacement, old: Any) -> fx.Node:
    """Zeros or random numbers like a gradient; they depend on nothing, and the backward pass makes them itself (the forward pass would have to save them)."""
    batch = product.operands[0], product.axes[0].dim

    def run(a: Tensor) -> Tensor:
        order = sorted(range(old.dim()), key=lambda d: -old.stride(d))
        sizes = [old.shape[d] for d in order]
        if how.method == "zero":
            made = torch.zeros(sizes, dtype=old.dtype, device=old.device)
        else:
            made = torch.randn(sizes, dtype=old.dtype, device=old.device) * (how.std if how.std is not None else 1 / a.shape[batch[1]])
        return made.permute([order.index(d) for d in range(old.dim())])

    new = inline(graph, m, run, (batch[0],))
    assert isinstance(new, fx.Node)
    for n in (new, *new.all_input_nodes):
        if n is not batch[0] and isinstance(n.meta.get("val"), Tensor):
            _torch.keep_in_backward(n)
    return new


def _laid_out(x: Tensor, old: Any) -> Tensor:
    """The memory order that the graph expects."""
    order = sorted(range(x.dim()), key=lambda d: -old.stride(d))
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def let_go_of_activation(graph: fx.Graph, call: fx.Node) -> None:
    """A convolution_backward without the weight's gradient wants the input's shape only: give it memory of that shape that nobody writes or reads."""
    x, mask = call.args[1], call.args[10]
    assert isinstance(x, fx.Node) and isinstance(mask, (list, tuple))
    if mask[1] or not call.users or not _static(x) or _mask_would_be_saved(x):
        return
    order = sorted(range(_torch.value(x).dim()), key=lambda d: -_torch.hint(_torch.value(x).stride(d)))
    shaped = inline(graph, call, lambda x: torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device), (x,))
    call.args = (call.args[0], shaped, *call.args[2:])


def _mask_would_be_saved(x: fx.Node) -> bool:
    """Whether a ReLU's backward reads the activation too, on a CPU. Its bool mask would be saved in place of it, which Inductor's C++ code stores and loads
    some 20 times slower than the activation: a ResNet-20's step took 1.3 times as long as the exact one."""
    return _torch.value(x).device.type == "cpu" and any(u.target in _COMPARISONS for u in _users_behind_views(x))


_COMPARISONS = (aten.le.Scalar, aten.gt.Scalar)


def _users_behind_views(x: fx.Node) -> Iterator[fx.Node]:
    for u in x.users:
        yield u
        if u.target in VIEWS:
            yield from _users_behind_views(u)
