"""Predict whether leaving out rows is worth it.

The time saved is compared with the time to select rows, to gather what is needed of them and to put the results back:

| term | its time |
|---|---|
| saved: each product on rows | FLOPs / rate at all rows, minus the same at the kept rows (the rate depends on the rows: a weight is read whole for few, too) |
| selecting rows, each level | `select.METHOD` at the batch's size |
| norms of the gradients that enter | bytes / `norms` |
| gathering these, and each saved tensor with rows | 2 x bytes kept / `take`, new memory / `fresh`, `LAUNCHES_PER_TENSOR` launches |
| putting back input gradients, and what later runs on all rows again | bytes of all rows / `untake`, new memory / `fresh`, `LAUNCHES_PER_TENSOR` launches |
| calling compiled code in pieces, with a symbol for the batch | `CALL_OVERHEAD` selections from the smallest batch |

What elementwise ops save is left out. Rates are tables of the machine's profile, which `CostModel` reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.config.resolve import RowSettings
from approx_compile.machine import Machine
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.cost.expressions import WORKING_SET_FACTOR
from approx_compile.passes.fx_utils import BMM, MM
from approx_compile.reasons import Reason
from approx_compile.reasons.rows import GATHERING_COSTS, SHORT_BACKWARD
from approx_compile.rows.batch_dim import BatchSize, SampleLayout

ANY_SIZE = False
"""Whether rows count as worth it at any size. Tests set this, because their models are too small for rows to pay."""

ASSUMED_RATIO = 0.5
"""The share of kept rows that is assumed under the policy "adaptive", which finds the share during the run: it starts with all rows and may reach a quarter
or less. A graph that pays at half the rows pays through much of such a run. A graph that pays only at a quarter would cost time on the way there, and in the
whole run if the share never gets so low."""

MARGIN = 1.2
"""The ratio of the time saved to the cost that must be exceeded (times `margins.QUICK_MARGIN` where the machine was measured quickly)."""

CALL_OVERHEAD = 3
"""The remaining overhead of a backward pass on rows, in units of the time to select rows from the smallest batch: Python that calls two or more pieces of
compiled code instead of one, checks of the batch's symbol, and small ops that are slower in a step than in a loop by themselves. (Measured with multilayer
perceptrons on one core of a Xeon, batches from 64 to 1024, widths from 64 to 256: with half the rows, where nothing was saved, a step took 1000 us more, of
which 200 us were for selecting rows and 100 us for moving them.)"""

LAUNCHES_PER_TENSOR = 4
"""Kernel launches to gather one tensor or put it back, in addition to the time for its bytes: views, the op itself, and the weights."""

LEAST_FLOPS = {"cpu": 2e8, "cuda": 2e10}
"""The least FLOPs on rows for which rows are worth it, by device type, where the machine has no profile. No profile is measured for this question alone,
because the first call would take seconds longer. (A perceptron with batch and width 256 broke even at this number on one core of a Xeon. The number for CUDA
is not measured; it is a hundred times that of the CPU. Other devices count as CUDA.)"""


class ProductWork(NamedTuple):
    """A product that runs on selected rows.

    Attributes:
        level: The level of rows that it runs on.
        flops: Its FLOPs on all rows.
        dtype: The dtype of its operands.
        rate: The table with its rate in GFLOP/s; if empty, the highest rate of the machine counts.
        sizes: The sizes at which the table is read.
        rows: Which of these sizes are proportional to the number of rows.
    """

    level: int
    flops: int
    dtype: torch.dtype
    rate: str = ""
    sizes: tuple[float, ...] = ()
    rows: tuple[bool, ...] = ()

    def time_us(self, share: float, machine: Machine) -> float:
        """Return the predicted time in us on a share of the rows, 1.0 for all."""
        if not self.rate:
            return self.flops * share / machine.peak_gflops(self.dtype) / 1e3
        at = [max(1.0, s * share) if r else s for s, r in zip(self.sizes, self.rows, strict=True)]
        return CostModel(machine).time_us(self.rate, self.flops * share, at, self.dtype)


class RowTraffic(NamedTuple):
    """A tensor whose rows are read or written.

    Attributes:
        level: The level of rows.
        bytes: The bytes of all rows.
        run: How many entries of one row are contiguous in memory.
        dtype: The dtype of the entries.
    """

    level: int
    bytes: int
    run: int
    dtype: torch.dtype


@dataclass(frozen=True)
class RowWork:
    """The work of a backward pass on selected rows.

    Attributes:
        batch: The number of all rows.
        products: The products that run on selected rows.
        entering: The gradients by whose norms rows are selected.
        gathered: The tensors whose rows are gathered, the entering gradients among them.
        scattered: The gradients that are put back among all rows.
    """

    batch: int
    products: tuple[ProductWork, ...]
    entering: tuple[RowTraffic, ...]
    gathered: tuple[RowTraffic, ...]
    scattered: tuple[RowTraffic, ...]


@dataclass(frozen=True)
class Prediction:
    """The predicted effect of leaving out rows in a backward pass.

    Attributes:
        saved_us: The time that products save, in us.
        cost_us: The time that selecting, gathering and putting back takes, in us.
        share: The share of the rows that the first level in use keeps.
    """

    saved_us: float
    cost_us: float
    share: float

    def least_us(self, machine: Machine) -> float:
        """Return the time saved that must be exceeded, in us: the cost with the margin that holds for this machine's profile."""
        return self.cost_us * MARGIN * (margins.QUICK_MARGIN if machine.quick else 1)

    def pays(self, machine: Machine) -> bool:
        """Return whether the time saved is large enough."""
        return self.saved_us > self.least_us(machine)

    def describe(self, machine: Machine) -> Reason:
        """Return the reason that holds where it does not pay."""
        left_out = "half" if self.share == 0.5 else f"{1 - self.share:.0%}"
        cost_us, saved_us, least_us = (f"{t:.0f}" if t >= 10 else f"{t:.1g}" for t in (self.cost_us, self.saved_us, self.least_us(machine)))
        return GATHERING_COSTS(cost=cost_us, left_out=left_out, saved=saved_us, least=least_us)


def predict(work: RowWork, levels: Sequence[RowSettings], machine: Machine) -> Prediction:
    """Predict the times of a backward pass by the terms in the table above.

    Args:
        work: What the backward pass does.
        levels: The settings of level 1, 2, ...
        machine: The profile of the machine.
    """
    cost = CostModel(machine)
    shares = [ASSUMED_RATIO if s.ratio is None else s.ratio for s in levels]
    used = sorted({p.level for p in work.products})

    def new_memory_us(size: float) -> float:
        return cost.time_us("fresh", size, [WORKING_SET_FACTOR * size])

    def gather_us(m: RowTraffic) -> float:
        kept = shares[m.level - 1] * m.bytes
        return cost.time_us("take", 2 * kept, [m.run, 2 * kept], m.dtype) + new_memory_us(kept)

    def put_back_us(m: RowTraffic) -> float:
        return cost.time_us("untake", m.bytes, [m.run, m.bytes], m.dtype) + new_memory_us(m.bytes)

    saved = math.fsum(p.time_us(1.0, machine) - p.time_us(shares[p.level - 1], machine) for p in work.products)
    select = math.fsum(cost.time_us(f"select.{levels[level - 1].method}", 1, [work.batch, 1]) for level in used)
    calls = cost.time_us("select.bernoulli", CALL_OVERHEAD, [1, 1])
    launches = cost.time_us("kernel", LAUNCHES_PER_TENSOR * (len(work.gathered) + len(work.scattered)))
    norms = math.fsum(cost.time_us("norms", m.bytes, [m.bytes], m.dtype) for m in work.entering)
    moves = math.fsum(map(gather_us, work.gathered)) + math.fsum(map(put_back_us, work.scattered))
    return Prediction(max(0.0, saved), select + calls + launches + norms + moves, shares[used[0] - 1] if used else 1.0)


def rejection_reason(work: RowWork, levels: Sequence[RowSettings], machine: Machine | None, device: str, elsewhere: int = 0) -> Reason | None:
    """Return why rows would not be worth their time, or None if they would.

    Args:
        work: What the backward pass does.
        levels: The settings of level 1, 2, ...
        machine: The profile of the machine. None: the number of FLOPs decides.
        device: The type of the device.
        elsewhere: The FLOPs that may run on rows in other graphs of the same model.
    """
    if ANY_SIZE:
        return None
    if machine is not None:
        prediction = predict(work, levels, machine)
        return None if prediction.pays(machine) else prediction.describe(machine)
    return too_little_work(sum(p.flops for p in work.products) + elsewhere, device)


def too_little_work(flops: int, device: str, machine: Machine | None = None) -> Reason | None:
    """Return why so few FLOPs on rows are not worth it, if that is certain without knowing what is gathered; else None.

    Args:
        flops: The FLOPs that can run on rows.
        device: The type of the device.
        machine: The profile of the machine. Where there is one, only less than a quarter of `LEAST_FLOPS` is certain to be too little.
    """
    least = LEAST_FLOPS.get(device, LEAST_FLOPS["cuda"]) * (1 if machine is None else 0.25)
    if ANY_SIZE or flops >= least:
        return None
    return SHORT_BACKWARD(mflop=flops / 1e6)


# --- of a graph's nodes ---


def product_work(n: fx.Node, level: int, batch: BatchSize) -> ProductWork | None:
    """Return the work of a node of a backward graph that is a product; None for other ops.

    Args:
        n: The node.
        level: The level of rows that it runs on.
        batch: The batch's size.
    """
    flops = _torch.flops(n)
    if not flops:
        return None
    operands = [a for a in n.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
    dtype = _torch.value(operands[0]).dtype
    rate, sizes = _rate(n, [_torch.value(a) for a in operands], batch)
    return ProductWork(level, flops, dtype, rate, tuple(float(_torch.hint(s)) for s in sizes), tuple(map(batch.is_in, sizes)))


def _rate(n: fx.Node, operands: Sequence[Tensor], batch: BatchSize) -> tuple[str, list[Any]]:
    """The table that holds a product's rate, and the sizes to read it at in the order of its axes."""
    if n.target in MM or n.target in BMM:
        a, b = operands[-2:]
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        if n.target in BMM:
            return "bmm", [rows, inner, columns]
        return ("linear.grad_weight", [inner, columns, rows]) if batch.is_in(inner) else ("linear.grad_input", [rows, columns, inner])
    if n.target is torch.ops.aten.convolution_backward.default:
        dy, x, w = operands[:3]
        of = x if n.args[7] else dy
        return "conv.grad_weight", [of.shape[0] * math.prod(of.shape[2:]), w.shape[1], _torch.hint(w.shape[0]) // int(n.args[9]), math.prod(w.shape[2:])]  # type: ignore[arg-type]
    return "", []


def row_traffic(value: Any, layout: SampleLayout | None, level: int) -> list[RowTraffic]:
    """Return the traffic of a tensor's rows as a list of one entry, or an empty list if it holds no rows or they are all the same."""
    if not isinstance(value, Tensor) or layout is None or layout.uniform:
        return []
    inner = int(layout.inner) if layout.inner.is_Integer else 1
    run = inner * math.prod(_torch.hint(s) for s in value.shape[layout.dim + 1 :])
    return [RowTraffic(level, _torch.numel_of(value) * value.dtype.itemsize, max(1, run), value.dtype)]
