"""Predict whether a region is worth running on some of its tokens.

| term | its time |
|---|---|
| saved: each product | FLOPs / rate at all tokens, minus the same at the tokens kept |
| choosing tokens | `select.METHOD` at the number of tokens |
| norms of the entering gradients | bytes / `norms` |
| gathering these, and what is read of the forward pass | 2 x bytes kept / `take`, new memory / `fresh` |
| putting results back among all tokens | bytes of all tokens / `untake`, new memory / `fresh` |

Where the machine has no profile, the number of FLOPs decides. `row_cost` does the same for rows, whose stages are called one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from approx_compile import _torch
from approx_compile.config.resolve import RowSettings
from approx_compile.machine import Machine
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.cost.expressions import WORKING_SET_FACTOR
from approx_compile.reasons import Reason
from approx_compile.rows import row_cost
from approx_compile.rows.row_cost import ASSUMED_RATIO, Prediction, ProductWork, RowTraffic
from approx_compile.rows.tokens.regions import Region
from approx_compile.rows.tokens.token_axis import TokenLayout


def rejection_reason(region: Region, settings: RowSettings, machine: Machine | None, device: str) -> Reason | None:
    """Return why a region would not be worth its time on tokens, or None if it would.

    Args:
        region: The region.
        settings: What is asked of its tokens.
        machine: The profile of the machine; None: the number of FLOPs decides.
        device: The type of the device.
    """
    if row_cost.ANY_SIZE:
        return None
    if machine is None:
        return row_cost.too_little_work(region.flops, device)
    prediction = predict(region, settings, machine)
    return None if prediction.pays(machine) else prediction.describe(machine)


def variance_weights(flops: Sequence[int]) -> list[float]:
    """Compute how the variance that regions may add together is divided among them, so that least FLOPs are left.

    Keeping a share r of a region's tokens adds a variance of about c / r and leaves f r of its FLOPs f. With equal c, the sum of f r at a given sum of c / r
    is least for r in proportion to f^(-1/2), so that the variances are in proportion to f^(1/2).

    Args:
        flops: The FLOPs of each region on all tokens.

    Returns:
        The factors of the variance that each region may add. Their mean is 1.
    """
    roots = [math.sqrt(f) for f in flops]
    mean = math.fsum(roots) / max(1, len(roots))
    return [root / mean if mean else 1.0 for root in roots]


def predict(region: Region, settings: RowSettings, machine: Machine) -> Prediction:
    """Predict the times of a region by the terms in the table above."""
    cost, share = CostModel(machine), ASSUMED_RATIO if settings.ratio is None else settings.ratio
    entering = [_traffic(n, layout) for n, layout in region.entering.items()]
    read = {a: _traffic(a, r.layout) for (_, a), r in region.reads.items() if r.sizes is None}
    results = [_traffic(n, layout) for n in region.results() if (layout := region.members[n]) is not None]

    def moved_us(table: str, m: RowTraffic, size: float, factor: int) -> float:
        return cost.time_us(table, factor * size, [m.run, factor * size], m.dtype) + cost.time_us("fresh", size, [WORKING_SET_FACTOR * size])

    products = [_product(n, region) for n in region.products]
    saved = math.fsum(p.time_us(1.0, machine) - p.time_us(share, machine) for p in products)
    spent = cost.time_us(f"select.{settings.method}", 1, [_torch.hint(region.tokens), 1])
    spent += math.fsum(cost.time_us("norms", m.bytes, [m.bytes], m.dtype) for m in entering)
    spent += math.fsum(moved_us("take", m, share * m.bytes, 2) for m in (*entering, *read.values()))
    spent += math.fsum(moved_us("untake", m, m.bytes, 1) for m in results)
    return Prediction(max(0.0, saved), spent, share)


def _product(n: fx.Node, region: Region) -> ProductWork:
    a, b = (_torch.value(o) for o in n.args)
    rows, inner, columns = (_torch.hint(s) for s in (a.shape[0], a.shape[1], b.shape[1]))
    summed = region.members[n] is None
    if summed:
        return ProductWork(1, _torch.flops(n), a.dtype, "linear.grad_weight", (float(inner), float(columns), float(rows)), (True, False, False))
    return ProductWork(1, _torch.flops(n), a.dtype, "linear.grad_input", (float(rows), float(columns), float(inner)), (True, False, False))


def _traffic(n: fx.Node, layout: TokenLayout) -> RowTraffic:
    value = _torch.value(n)
    last = max(p.dim for p in layout)
    run = math.prod(_torch.hint(s) for s in value.shape[last + 1 :])
    return RowTraffic(1, _torch.numel_of(value) * value.dtype.itemsize, max(1, run), value.dtype)
