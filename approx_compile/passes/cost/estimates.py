"""Estimate FLOPs and time of a site's products, exact or sampled: evaluate the cost expressions at the sizes of the site with the rates of a machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from approx_compile import _torch
from approx_compile.config.words import UNIT_METHODS
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gradient_replacements import Replacement
from approx_compile.machine import Machine
from approx_compile.machine.profile import Table
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.expressions import SYMBOLS, WORKING_SET_FACTOR, Case, k, p, q, r, skip, terms, u
from approx_compile.passes.cost.site_sizes import contiguous_run, kind_of, role, sizes_of
from approx_compile.passes.sites.site import Product, Site

COSTED_AS = {"dropout": "uniform", "adaptive_dropout": "uniform", "alsh": "uniform"}
"""Methods that choose a layer's units, each with the estimator that takes the time of its selection. Neither takes norms."""

_AMOUNT_BY_UNIT = {"GFLOP/s": "flops", "GB/s": "bytes", "us": "launches"}


@dataclass(frozen=True)
class Estimate:
    """FLOPs of a product, its sampling included, and its predicted time.

    `time_us` is None where there is no machine profile. `terms` holds the time of each term in us, `sizes` the values of the symbols in these terms.
    """

    flops: int
    time_us: float | None
    terms: tuple[tuple[str, float], ...] = ()
    sizes: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class CostModel:
    """The cost expressions bound to one machine. Without a machine it estimates FLOPs only."""

    machine: Machine | None = None

    @property
    def predicts_time(self) -> bool:
        """Whether estimates have times."""
        return self.machine is not None

    def has_rates(self, site: Site, lowering: str) -> bool:
        """Return whether the time of a site's products under a lowering can be predicted: always under "inductor", else if the profile has the kernel."""
        return lowering not in CUSTOM_KERNELS or (self.machine is not None and self.machine.has(f"{lowering}.{kind_of(site)}.output", site.dtype))

    def threshold(self, kind: str) -> margins.Threshold:
        """Return what sampling a site of this kind must save (see `margins.threshold`). The model must have a machine."""
        assert self.machine is not None
        return margins.threshold(kind, self.machine)

    def time_us(self, rate: str, amount: float, at: Sequence[float] = (), dtype: Any = "float32") -> float:
        """Return the time of some work at a measured rate, in us. The model must have a machine.

        Args:
            rate: The name of the table of rates.
            amount: FLOPs, bytes or launches, by the table's unit.
            at: The sizes at which the table is read.
            dtype: The dtype of the operands.
        """
        assert self.machine is not None
        return _time_us(_table(self.machine, rate, dtype), amount, at)

    def exact(self, site: Site, product: Product) -> Estimate:
        """Estimate the exact product."""
        return self.evaluate(Case(kind_of(site), role(product), "exact"), sizes_of(site), site.dtype)

    def sampled(
        self, site: Site, product: Product, estimator: Estimator, kept: float | None = None, lowering: str = "inductor", shares: bool = False
    ) -> Estimate:
        """Estimate a product that is sampled along its own contraction axis.

        Args:
            site: The site of the product.
            product: The product.
            estimator: What is kept of the axis.
            kept: Number of entries kept, in place of the estimator's.
            lowering: The code that runs the product.
            shares: Whether the product uses the indices that another site selected.
        """
        runs = [contiguous_run(site, product, i) for i in (0, 1)]
        sizes = sizes_of(site) | {k: kept or estimator.kept, u: estimator.units, p: runs[0] * estimator.unit, q: runs[1] * estimator.unit}
        case = _case(site, product, "sampled", estimator)._replace(lowering=lowering, shares=shares)
        return self.evaluate(case, sizes, site.dtype)

    def coupled(
        self, site: Site, product: Product, estimator: Estimator, kept: float | None = None, lowering: str = "inductor", shares: bool = False
    ) -> Estimate:
        """Estimate a gradient that is computed through the entries that the output kept.

        Args:
            site: The site of the product.
            product: The gradient product.
            estimator: The estimator of the output.
            kept: Number of entries kept, in place of the estimator's.
            lowering: The code that runs the product.
            shares: Whether the result is put back in place together with that of another site.
        """
        run = contiguous_run(site, site.products[0], 0 if role(product) == "grad_input" else 1) * estimator.unit
        sizes = sizes_of(site) | {k: kept or estimator.kept, r: run}
        case = _case(site, product, "coupled", estimator)._replace(lowering=lowering, shares=shares)
        return self.evaluate(case, sizes, site.dtype)

    def skipping_zeros(
        self, site: Site, product: Product, estimator: Estimator | None, dropped: Estimator,
        lowering: str = "inductor", skips_by: str = "inductor", shares: bool = False, alone: bool = False,
    ) -> Estimate:  # fmt: skip
        """Estimate a gradient that leaves out the output channels which another site dropped.

        Args:
            site: The site of the product.
            product: The gradient product.
            estimator: The estimator of the site's own output, to which the gradient is coupled; None for an exact gradient.
            dropped: The estimator of the other site.
            lowering: The code that runs the product.
            skips_by: The code that leaves out the channels.
            shares: Whether the result is put back in place together with that of another site.
            alone: Whether the operand is gathered for this gradient only, because the kernel of the output did without a gather.
        """
        width = _torch.hint(_torch.value(site.products[0].operands[0]).shape[-1])
        sizes = sizes_of(site) | {skip: dropped.kept, u: dropped.unit, q: dropped.unit * width}
        if estimator is None:
            return self.evaluate(Case(kind_of(site), role(product), "exact", skips=True, skips_by=skips_by), sizes, site.dtype)
        sizes |= {k: estimator.kept, r: estimator.unit}
        if alone:
            sizes |= {symbol: contiguous_run(site, site.products[0], i) * estimator.unit for i, symbol in enumerate((p, q))}
        case = _case(site, product, "coupled", estimator)._replace(skips=True, shares=shares, lowering=lowering, skips_by=skips_by, alone=alone)
        return self.evaluate(case, sizes, site.dtype)

    def narrowed(
        self, site: Site, product: Product, estimator: Estimator | None, only: Estimator | None, fed: bool, shares: bool = False
    ) -> Estimate:  # fmt: skip
        """Estimate a product of a site that makes only the channels a consumer keeps, or that is such a consumer, or both.

        Args:
            site: The site of the product.
            product: The product.
            estimator: The estimator of the site's own output; None for an exact product.
            only: The estimator of the consumer whose kept channels the site makes; None if it makes all channels.
            fed: Whether the activation of the site arrives narrow.
            shares: As in `sampled` and `coupled`.
        """
        if estimator is None:
            case, sizes = Case(kind_of(site), role(product), "exact"), sizes_of(site)
        else:
            decision = "sampled" if product.name == "output" else "coupled"
            case = _case(site, product, decision, estimator)._replace(fed=fed, shares=shares)
            runs = [contiguous_run(site, site.products[0], i) * estimator.unit for i in (0, 1)]
            grad_run = runs[0 if role(product) == "grad_input" else 1]
            sizes = sizes_of(site) | {k: estimator.kept, u: estimator.units, p: runs[0], q: runs[1], r: grad_run}
        if only is not None:
            width = _torch.hint(_torch.value(site.products[0].operands[0]).shape[-1]) if kind_of(site) != "conv" else 1
            chooses = only.method if only.method in UNIT_METHODS and product.name == "output" else ""
            case, sizes = case._replace(narrow=True, chooses=chooses), {q: only.unit * width} | sizes | {skip: only.kept}
        return self.evaluate(case, sizes, site.dtype)

    def evaluate(self, case: Case, sizes: Mapping[sympy.Symbol, float], dtype: Any) -> Estimate:
        """Evaluate the terms of a case.

        Args:
            case: The product and how it is carried out.
            sizes: The values of the symbols; 1 for those that are missing.
            dtype: The dtype of the operands, which selects the tables of rates.

        Returns:
            FLOPs, and times if the model has a machine.
        """
        flops, times = 0.0, []
        texts, used = _texts(case)
        for term, text, (term_flops, term_bytes, launches, at) in zip(terms(case), texts, _amounts(case)(*(sizes.get(s, 1) for s in SYMBOLS)), strict=True):
            flops += term_flops
            if self.machine is None:
                continue
            table = _table(self.machine, term.rate, dtype)
            amount = {"flops": term_flops, "bytes": term_bytes, "launches": launches}[_AMOUNT_BY_UNIT[table.unit]]
            times.append((text, _time_us(table, amount, at)))
        known = {str(s): float(v) for s, v in sizes.items()}
        time_us = sum(t for _, t in times) if self.machine is not None else None
        return Estimate(round(flops), time_us, tuple(times), tuple((s, known[s]) for s in used))


def _case(site: Site, product: Product, decision: str, estimator: Estimator) -> Case:
    return Case(kind_of(site), role(product), decision, COSTED_AS.get(estimator.method, estimator.method), estimator.weight, estimator.scaled)


@functools.cache
def _texts(case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms as text, and the names of the symbols in them, sorted."""
    symbols = {str(s) for t in terms(case) for x in (t.flops, t.bytes, *t.at) for s in x.free_symbols}
    return tuple(map(str, terms(case))), tuple(sorted(symbols))


@functools.cache
def _amounts(case: Case) -> Any:
    """A function of the symbols that returns (flops, bytes, launches, sizes at which the rate is read) of every term."""
    return sympy.lambdify(SYMBOLS, [[t.flops, t.bytes, t.launches, list(t.at)] for t in terms(case)], "math")


def _time_us(table: Table, amount: float, at: Sequence[float]) -> float:
    """The time of some work. Bandwidths are read at `WORKING_SET_FACTOR` times the bytes, because a step touches other memory in between."""
    rate = table.at(*(x * WORKING_SET_FACTOR if axis == "bytes" else x for x, axis in zip(at, table.axes, strict=True)))
    return amount * rate if table.unit == "us" else amount / rate / 1e3


def _table(machine: Machine, rate: str, dtype: Any) -> Table:
    """A table of the profile. A kernel that the profile has no rates for gets those of the exact product."""
    lowering, _, exact = rate.partition(".")
    return machine.table(exact if lowering in CUSTOM_KERNELS and not machine.has(rate, dtype) else rate, dtype)


def replacement_flops(site: Site, product: Product, replacement: Replacement) -> int:
    """Count the FLOPs of what replaces a gradient.

    Zeros take none, random numbers one per entry. `max` takes the magnitudes and sums of the output gradient, and 2 per entry kept and entry of the weight that
    it is multiplied with.

    Args:
        site: The site of the gradient.
        product: The gradient product.
        replacement: What replaces it.
    """
    if replacement.method == "zero":
        return 0
    first, second = site.products[0].operands
    if replacement.method == "random":
        return _torch.numel(second if product.mask == 1 or product.reads == 0 else first)
    assert product.output_grad is not None
    dy = _torch.value(product.output_grad)
    if product.mask == 1:
        entries = replacement.entries([_torch.hint(s) for s in dy.shape[2:]]) * _torch.hint(dy.shape[0])
        return 2 * _torch.numel(product.output_grad) + 2 * entries * _torch.numel(second)
    return 2 * _torch.numel(product.output_grad) + replacement.j * site.flops // _torch.hint(dy.shape[product.output_grad_dim])
