"""Whether leaving out rows is worth it: the time that it saves against that of choosing rows, gathering what is needed of them and putting results back.

| term | its time |
|---|---|
| saved: each product on rows | FLOPs / rate at all rows, less the same at the rows kept (fewer rows have another rate: a weight is read whole for few, too) |
| choosing, each level | `select.METHOD` of the batch |
| norms of the gradients that enter | bytes / `norms` |
| gathering them, and each saved tensor with rows | 2 x bytes kept / `take`, new memory / `fresh`, `LAUNCHES_PER_TENSOR` launches |
| putting back input gradients, and what all rows need again | bytes of all rows / `untake`, `LAUNCHES_PER_TENSOR` launches |
| calling compiled code in pieces, with a symbol for the batch | `CALL_OVERHEAD` choices from few |

What elementwise ops save is left out. Rates are tables of the machine's profile (`gauges`), read as `cost` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.config.resolve import RowSettings
from approx_compile.machine import Machine
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.expressions import WORKING_SET_FACTOR
from approx_compile.passes.fx_utils import BMM, MM
from approx_compile.rows.batch_dim import SampleLayout

ANY_SIZE = False
"""Tests set this: rows are worth it in models that are too small for it to pay."""

ASSUMED_RATIO = 0.5
"""The share of the rows kept where nobody says: the policy "adaptive" finds it while it runs, begins with all and may come to a quarter and less. What pays
at half pays through much of such a run; what pays at a quarter only would cost time on the way there, and for good where it never comes to it."""

MARGIN = 1.2
"""What is saved must be so many times the cost (`margins.QUICK_MARGIN` times more where the machine was measured quickly)."""

CALL_OVERHEAD = 3
"""What running a backward pass on rows takes besides, in choices of rows from the fewest: Python that calls two or more pieces of compiled code in place of
one, checks of the batch's symbol, and small ops that are slower in a step than in a loop of their own. (Multilayer perceptrons on one core of a Xeon,
batches from 64 to 1024, widths from 64 to 256: half the rows came to 1000 us more where nothing was saved, 200 us of them for choosing, 100 for moving.)"""

LAUNCHES_PER_TENSOR = 4
"""Launches of gathering one tensor or putting it back, besides its bytes: views, the op, its weights."""

LEAST_FLOPS = {"cpu": 2e8, "cuda": 2e10}
"""Where the machine has no profile: the FLOPs on rows from which on they are worth it. Nothing is measured for this question alone, the first call would
take seconds longer. (A perceptron of batch and width 256 broke even there on one core of a Xeon; the number for CUDA is no measurement: a hundred times as
many. Other devices count as CUDA.)"""


class ProductWork(NamedTuple):
    """A product on rows: its FLOPs, the table with its rate, the sizes to read that at and which of them hold the rows. No table: the best rate of all."""

    level: int
    flops: int
    dtype: torch.dtype
    rate: str = ""
    sizes: tuple[float, ...] = ()
    rows: tuple[bool, ...] = ()

    def time_us(self, share: float, machine: Machine) -> float:
        if not self.rate:
            return self.flops * share / machine.peak_gflops(self.dtype) / 1e3
        at = [max(1.0, s * share) if r else s for s, r in zip(self.sizes, self.rows, strict=True)]
        return self.flops * share / machine.table(self.rate, self.dtype).at(*at) / 1e3


class RowTraffic(NamedTuple):
    """A tensor of which rows are read: the bytes of all, and how many entries of a row lie together."""

    level: int
    bytes: int
    run: int
    dtype: torch.dtype


@dataclass(frozen=True)
class RowWork:
    """What a backward pass on some rows does: `entering` gradients, by whose norms rows are chosen, are also `gathered`."""

    batch: int
    products: tuple[ProductWork, ...]
    entering: tuple[RowTraffic, ...]
    gathered: tuple[RowTraffic, ...]
    scattered: tuple[RowTraffic, ...]


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a backward pass: what leaving out rows saves, and what it takes."""

    saved_us: float
    cost_us: float
    share: float

    def pays(self, machine: Machine) -> bool:
        return self.saved_us > self.cost_us * MARGIN * (margins.QUICK_MARGIN if machine.quick else 1)

    def __str__(self) -> str:
        left_out = "half" if self.share == 0.5 else f"{1 - self.share:.0%}"
        cost_us, saved_us = (f"{t:.0f}" if t >= 10 else f"{t:.1g}" for t in (self.cost_us, self.saved_us))
        return f"choosing and gathering rows would take about {cost_us} us, leaving out {left_out} of them saves {saved_us} us"


def predict(work: RowWork, levels: Sequence[RowSettings], machine: Machine) -> Prediction:
    """Of a backward pass with these levels of rows (1, 2, ..)."""
    shares = [ASSUMED_RATIO if s.ratio is None else s.ratio for s in levels]
    used = sorted({p.level for p in work.products})

    def moved(m: RowTraffic, table: str, size: float) -> float:
        sizes = (m.run, WORKING_SET_FACTOR * size) if table != "norms" else (WORKING_SET_FACTOR * size,)
        return size / machine.table(table, m.dtype).at(*sizes) / 1e3

    def made(size: float) -> float:
        return size / machine.table("fresh").at(WORKING_SET_FACTOR * size) / 1e3

    def gathering(m: RowTraffic) -> float:
        kept = shares[m.level - 1] * m.bytes
        return moved(m, "take", 2 * kept) + made(kept)

    saved = math.fsum(p.time_us(1.0, machine) - p.time_us(shares[p.level - 1], machine) for p in work.products)
    choosing = math.fsum(machine.table(f"select.{levels[level - 1].method}").at(work.batch, 1) for level in used)
    calls = CALL_OVERHEAD * machine.table("select.bernoulli").at(1, 1)
    launches = LAUNCHES_PER_TENSOR * (len(work.gathered) + len(work.scattered)) * machine.table("kernel").at()
    norms = math.fsum(moved(m, "norms", m.bytes) for m in work.entering)
    back = math.fsum(moved(m, "untake", m.bytes) + made(m.bytes) for m in work.scattered)
    taken = choosing + calls + launches + norms + back + math.fsum(map(gathering, work.gathered))
    return Prediction(max(0.0, saved), taken, shares[used[0] - 1] if used else 1.0)


def rejection_reason(work: RowWork, levels: Sequence[RowSettings], machine: Machine | None, device: str) -> str | None:
    """Why rows would not be worth their time, if so."""
    if ANY_SIZE:
        return None
    if machine is not None:
        found = predict(work, levels, machine)
        return None if found.pays(machine) else str(found)
    return too_little_work(sum(p.flops for p in work.products), device)


def too_little_work(flops: int, device: str, machine: Machine | None = None) -> str | None:
    """Why so few FLOPs on rows are not worth it, if that is certain without a look at what is gathered: with a profile, if they are a quarter of what
    decides where there is none.
    """
    least = LEAST_FLOPS.get(device, LEAST_FLOPS["cuda"]) * (1 if machine is None else 0.25)
    if ANY_SIZE or flops >= least:
        return None
    return f"a backward pass of {flops / 1e6:.3g} MFLOP is over before its rows would be chosen"


# --- of a graph's nodes ---


def product_work(n: fx.Node, level: int, batch: sympy.Symbol) -> ProductWork | None:
    """A product of a backward graph; None for other ops."""
    flops = _torch.flops(n)
    if not flops:
        return None
    operands = [a for a in n.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
    dtype = _torch.value(operands[0]).dtype
    rate, sizes = _rate(n, [_torch.value(a) for a in operands], batch)
    return ProductWork(level, flops, dtype, rate, tuple(float(_torch.hint(s)) for s in sizes), tuple(_torch.has_symbol(s, batch) for s in sizes))


def _rate(n: fx.Node, operands: Sequence[Tensor], batch: sympy.Symbol) -> tuple[str, list[Any]]:
    """The table of a product's rate, and the sizes in the order of its axes."""
    if n.target in MM or n.target in BMM:
        a, b = operands[-2:]
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        if n.target in BMM:
            return "bmm", [rows, inner, columns]
        return ("linear.grad_weight", [inner, columns, rows]) if _torch.has_symbol(inner, batch) else ("linear.grad_input", [rows, columns, inner])
    if n.target is torch.ops.aten.convolution_backward.default:
        dy, x, w = operands[:3]
        of = x if n.args[7] else dy
        return "conv.grad_weight", [of.shape[0] * math.prod(of.shape[2:]), w.shape[1], _torch.hint(w.shape[0]) // int(n.args[9]), math.prod(w.shape[2:])]  # type: ignore[arg-type]
    return "", []


def row_traffic(value: Any, layout: SampleLayout | None, level: int) -> list[RowTraffic]:
    """A tensor with rows; none if it has none, or all of them the same."""
    if not isinstance(value, Tensor) or layout is None or layout.uniform:
        return []
    inner = int(layout.inner) if layout.inner.is_Integer else 1
    run = inner * math.prod(_torch.hint(s) for s in value.shape[layout.dim + 1 :])
    return [RowTraffic(level, _torch.numel_of(value) * value.dtype.itemsize, max(1, run), value.dtype)]
