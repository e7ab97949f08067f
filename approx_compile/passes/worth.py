"""What time has to say in a plan: which ways to sample a site are tried, how they compare, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from approx_compile import _torch
from approx_compile.config import ProductSettings, SiteSettings
from approx_compile.kernels.available import OWN
from approx_compile.machine import Machine
from approx_compile.passes import cost, lowerings
from approx_compile.passes.sites import Product, Site

if TYPE_CHECKING:  # plan asks here
    from approx_compile.passes.plan import ProductPlan

TIMED = ("cost", "measure")
"""The policies under which a site must be worth its time."""

GRANULE = 16
"""Under these kept entries come in multiples of this, which vector units and product kernels like."""


def total(times: Iterable[float | None]) -> float | None:
    found = list(times)
    return None if None in found else math.fsum(t for t in found if t is not None)


def candidates(site: Site, settings: SiteSettings, machine: Machine | None) -> list[SiteSettings]:
    """The ways among which time decides: lowerings (by policy, those that the machine's profile knows), and what `group: "auto"` may come to."""
    found = []
    for lowering in lowerings.offered(site, settings.output.lowering):
        unknown = machine is None or not machine.has(f"{lowering}.{cost.kind_of(site)}.output", site.dtype)
        if settings.output.lowering == "auto" and lowering in OWN and settings.policy in TIMED and unknown:
            continue
        for group in _groups(site, settings, lowering):
            tried: dict[str, Any] = {name: _as_tried(name, wanted, settings.policy, lowering, group) for name, wanted in _products(settings).items()}
            found.append(replace(settings, **tried))
    return found


def _products(settings: SiteSettings) -> dict[str, ProductSettings]:
    return {"output": settings.output, "grad_input": settings.grad_input, "grad_weight": settings.grad_weight}


def _groups(site: Site, settings: SiteSettings, lowering: str) -> tuple[int | None, ...]:
    """What `group: "auto"` is tried as: what a kernel of ours skips; else single entries or as many as move fast, where time decides; None: `auto_group`."""
    if all(w.group != "auto" for w in _products(settings).values()):
        return (None,)
    units = lowerings.units(site, lowering)
    return units or ((1, _long_run(site)) if settings.policy in TIMED else (None,))


def _as_tried(name: str, wanted: ProductSettings, policy: str, lowering: str, group: int | None) -> ProductSettings:
    whole = GRANULE if policy in TIMED and group is not None else wanted.whole
    if group is None or wanted.group != "auto":
        return replace(wanted, whole=whole, lowering=lowering)
    return replace(wanted, group=1 if name == "grad_weight" and lowering in OWN else group, whole=whole, lowering=lowering)


def rank(products: Sequence[ProductPlan]) -> float:
    """For comparison: what takes no more than 3% longer counts as equal, and the first of equals, the finer grained, wins."""
    time = total(p.time_sampled_us for p in products)
    return 0.0 if time is None or time <= 0 else math.ceil(math.log(time) / math.log(1.03))


def predicted(site: Site, products: Sequence[ProductPlan], machine: Machine) -> str:
    """ "predicted 0.94x at ratio 0.5, break-even 0.41"."""
    exact, planned = (total(times) for times in ([p.time_exact_us for p in products], [p.time_sampled_us for p in products]))
    assert exact is not None and planned is not None
    ratio = next(p.ratio for p in products if p.decision != "exact")

    def gain(share: float) -> float:
        return exact - math.fsum(_estimate(site, p, products, machine, share).time_us or 0.0 for p in products)

    return f"predicted {exact / planned:.2f}x at ratio {ratio:g}, {_break_even(gain)}"


def _break_even(gain: Callable[[float], float]) -> str:
    """The largest ratio at which sampling takes no longer than the exact products; `gain` falls with the ratio."""
    low, high = 0.001, 1.0
    if gain(low) <= 0:
        return "no ratio breaks even"
    if gain(high) > 0:
        return "every ratio breaks even"
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return f"break-even {low:.2f}"


def _estimate(site: Site, plan: ProductPlan, products: Sequence[ProductPlan], machine: Machine, share: float) -> cost.Estimate:
    """Of a product as planned, but with another share of its axis kept."""
    product = next(p for p in site.products if p.name == plan.name)
    if plan.how is None:
        return cost.exact(site, product, machine)
    return (cost.coupled if plan.decision == "coupled" else cost.sampled)(site, product, plan.how, machine, share * plan.size, plan.lowering)


def auto_group(site: Site, product: Product) -> int:
    """1 below 256. Else so long that a gather moves whole vectors (CPU) or sectors (GPU); rows and conv channels lie contiguous anyway."""
    assert isinstance(product.size, int)
    if product.size < 256 or site.kind == "conv" or product.name == "grad_weight":
        return 1
    return _long_run(site)


def _long_run(site: Site) -> int:
    return 16 if device(site) == "cpu" else 32


def device(site: Site) -> str:
    return str(_torch.value(site.node).device.type)


