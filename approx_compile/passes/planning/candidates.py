"""What time has to say in a plan: which ways to sample a site are tried, how they compare, and the words for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from approx_compile import _torch
from approx_compile.config.resolve import ProductSettings, SiteSettings
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.machine import Machine
from approx_compile.passes.cost import estimates
from approx_compile.passes.planning import lowering as lowerings
from approx_compile.passes.planning.plan import BreakEven, ProductPlan, total
from approx_compile.passes.sites.site import Product, Site

TIMED = ("cost", "measure")
"""The policies under which a site must be worth its time."""

GRANULE = 16
"""Under these kept entries come in multiples of this, which vector units and product kernels like."""


OFF = 1.2
"""How far a prediction is taken to be off where a break-even ratio's sensitivity is shown (benchmarks/predict.py has how far predictions are off)."""

LEAST_RATIO = 0.001
"""Break-even ratios are sought from here on, and as precisely."""

TIES = 1.03
"""Times no more than so many times apart count as equal, and the finer grained way is taken."""


def candidates(site: Site, settings: SiteSettings, machine: Machine | None) -> list[SiteSettings]:
    """The ways among which time decides: lowerings (left to "auto", those that the machine's profile knows), and what `group: "auto"` may come to."""
    found = []
    for lowering in known_lowerings(site, settings.output.lowering, machine):
        if settings.output.lowering == "auto" and lowering in CUSTOM_KERNELS and lowerings.guessed(site, settings.output.group):
            continue
        for group in _groups(site, settings, lowering):
            tried: dict[str, Any] = {name: _as_tried(name, wanted, settings.policy, lowering, group) for name, wanted in _products(settings).items()}
            found.append(replace(settings, **tried))
    return found


def known_lowerings(site: Site, wanted: str, machine: Machine | None) -> tuple[str, ...]:
    """The code that may run a site's products: what is asked for; left to "auto", what fits, kernels of ours where the machine's profile has their rates."""

    def known(lowering: str) -> bool:
        return lowering not in CUSTOM_KERNELS or (machine is not None and machine.has(f"{lowering}.{estimates.kind_of(site)}.output", site.dtype))

    return tuple(n for n in lowerings.offered(site, wanted) if wanted != "auto" or known(n))


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
    return replace(wanted, group=1 if name == "grad_weight" and lowering in CUSTOM_KERNELS else group, whole=whole, lowering=lowering)


def rank(products: Sequence[ProductPlan], more_us: float = 0.0) -> float:
    """For comparison: ties count as equal, and the first of equals wins. `more_us`: what these products make others take."""
    time = total(p.time_sampled_us for p in products)
    return 0.0 if time is None or time + more_us <= 0 else math.ceil(math.log(time + more_us) / math.log(TIES))


def predicted(planned: Sequence[tuple[Site, Sequence[ProductPlan]]], machine: Machine) -> tuple[str, BreakEven]:
    """Of one site, or of those that are sampled together: "predicted 0.94x at ratio 0.5, break-even 0.41", and the latter in numbers."""
    everything = [(site, p) for site, products in planned for p in products]
    exact, time = (total(times) for times in ([p.time_exact_us for _, p in everything], [p.time_sampled_us for _, p in everything]))
    assert exact is not None and time is not None
    ratio = next(p.ratio for _, p in everything if p.decision != "exact")

    @functools.cache
    def sampled(share: float) -> float:
        return math.fsum(_estimate(site, p, machine, share).time_us or 0.0 for site, p in everything)

    at = BreakEven(*(_break_even(exact / off, sampled) for off in (1.0, OFF, 1 / OFF)))
    return f"predicted {exact / time:.2f}x at ratio {ratio:g}, {at}", at


def _break_even(time_us: float, sampled: Callable[[float], float]) -> float:
    """The ratio from which on `sampled`, which grows with it, is above a time."""
    if sampled(LEAST_RATIO) >= time_us:
        return 0.0
    if sampled(1.0) < time_us:
        return 1.0
    low, high = LEAST_RATIO, 1.0
    while high - low > LEAST_RATIO:
        middle = (low + high) / 2
        low, high = (middle, high) if sampled(middle) < time_us else (low, middle)
    return low


def _estimate(site: Site, plan: ProductPlan, machine: Machine, share: float) -> estimates.Estimate:
    """Of a product as planned, but with another share of its axis kept."""
    product = next(p for p in site.products if p.name == plan.name)
    if plan.how is None:
        return estimates.exact(site, product, machine)
    estimate = estimates.coupled if plan.decision == "coupled" else estimates.sampled
    return estimate(site, product, plan.how, machine, share * plan.size, plan.lowering, plan.shares is not None)


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
