"""What sampling a site saves and what it moves. A plain gate for now: a fixed machine balance, no measured machine.

Terms, per product with operands A and B, kept share r = kept / K:

| term | counts |
|---|---|
| exact product | F floating-point operations |
| sampled product | r F |
| norms of both operands (not for `uniform`; the weight's alone for `topk_weights`) | 2 (|A| + |B|) operations, reads |A| + |B| |
| selection over K units | about 10 K log2 K operations |
| gathers | read and write r (|A| + |B|), one operation per entry of B where scaled |
| un-gather of a coupled gradient | r F for the product, reads r |G|, writes |G| where the exact product wrote |G| too |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from approx_compile import _torch
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.replacements import Replacement
from approx_compile.passes.sites import Product, Site

BALANCE = {"cpu": 40.0, "cuda": 200.0}
"""Floating-point operations a machine does in the time it moves a byte into memory of its own; other devices count as the larger. On CPUs most of what
sampling writes is freshly allocated: some 5 GB/s where products reach 200 GFLOP/s."""

MARGIN = 1.6
"""The time saved must be this many times the time the sampling takes."""

SKIP_MARGIN = 0.65
"""The same for skipping zeros, which costs no accuracy and gathers whole rows of the weight: below 1, because the balance is that of short runs."""


@dataclass(frozen=True)
class Estimate:
    """FLOPs of one product, exact and as planned (sampling included), and the bytes that the sampling moves."""

    flops_exact: int
    flops_sampled: int
    bytes: int


def exact(site: Site) -> Estimate:
    return Estimate(site.flops, site.flops, 0)


def sampled(site: Site, product: Product, how: Estimator) -> Estimate:
    """A product sampled along its own contraction axis."""
    a, b = (_torch.numel(o) for o in product.operands)
    kept = how.kept / how.size
    if how.method == "uniform":
        normed = 0
    elif how.method == "topk_weights":
        normed = (a, b)[how.weight or 0]
    else:
        normed = a + b
    selection = 10 * how.units * max(1, math.ceil(math.log2(max(2, how.units)))) * _torch.hint(product.lead)
    flops = kept * site.flops + 2 * normed + selection + (kept * b if how.scaled else 0)
    size = _torch.value(site.node).dtype.itemsize
    return Estimate(site.flops, round(flops), round(size * (normed + 2 * kept * (a + b))))


def coupled(site: Site, product: Product, how: Estimator) -> Estimate:
    """A gradient through the entries that the output kept (`how` is the output's)."""
    kept = how.kept / how.size
    grad_of = 1 - product.reads if product.mask < 0 else product.mask
    grad = _torch.numel(site.products[0].operands[grad_of])
    size = _torch.value(site.node).dtype.itemsize
    scaled = kept * grad if how.scaled and grad_of == 1 else 0
    return Estimate(site.flops, round(kept * site.flops + scaled), round(size * kept * grad))


def skipped(site: Site, product: Product, flops: int, dropped: Estimator) -> Estimate:
    """A gradient of `flops` that leaves out the output channels another site dropped (dY, and for grad_input the weight, are gathered)."""
    kept = dropped.kept / dropped.size
    size = _torch.value(site.node).dtype.itemsize
    moved = sum(_torch.numel(o) for o in product.operands) + _torch.numel(site.products[0].operands[1])
    return Estimate(flops, round(flops * kept), round(size * kept * moved))


def pays(estimates: list[Estimate], device: str, margin: float = MARGIN) -> bool:
    """Whether the FLOPs saved over a site outweigh the bytes moved, by the margin."""
    saved = sum(e.flops_exact - e.flops_sampled for e in estimates)
    moved = sum(e.bytes for e in estimates)
    return saved > margin * BALANCE.get(device, max(BALANCE.values())) * moved


def replaced(site: Site, product: Product, how: Replacement) -> int:
    """FLOPs of what stands in a gradient's place: none for zeros, a draw an entry for random numbers; for max the magnitudes and sums of the output gradient,
    and 2 per entry kept and entry of the weight that it meets."""
    if how.method == "zero":
        return 0
    first, second = site.products[0].operands
    if how.method == "random":
        return _torch.numel(second if product.mask == 1 or product.reads == 0 else first)
    assert product.output_grad is not None
    dy = _torch.value(product.output_grad)
    if product.mask == 1:
        return 2 * _torch.numel(product.output_grad) + 2 * how.j * _torch.hint(dy.shape[0]) * _torch.numel(second)
    return 2 * _torch.numel(product.output_grad) + how.j * site.flops // _torch.hint(dy.shape[product.output_grad_dim])
