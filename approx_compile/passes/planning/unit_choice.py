"""Decide which hidden layers compute some of their units only: the methods `dropout`, `adaptive_dropout` and `alsh`.

The choice belongs to the layer that makes the units, its *producer*, and exists before its output does. The one linear layer that reads them, the *consumer*,
contracts the kept units only. So the pair is carried out as a producer that is narrowed for its consumer (`producer_narrowing`), and the gradients of the
consumer are coupled to its output. In a chain, a layer in the middle is both: it reads the kept units of the layer before, and makes some of its own.

A unit is what the consumer reads of one output channel: an elementwise function of the producer's output, with a nonlinearity, to which nothing else is added
that differs from sample to sample, such as a residual.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.resolve import SiteSettings, UnitSettings
from approx_compile.config.words import UNIT_METHODS
from approx_compile.kernels.estimators import Estimator, make_estimator
from approx_compile.kernels.hash_tables import Hashing
from approx_compile.kernels.unit_selection import UnitChoice
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.fx_utils import CASTS, PERMUTES, VIEWS
from approx_compile.passes.planning.candidates import TIMED_POLICIES, PlanInputs
from approx_compile.passes.planning.plan import Plan, ProductPlan, SitePlan, total
from approx_compile.passes.planning.producer_narrowing import NarrowedRegion, Producers
from approx_compile.passes.planning.product_plans import device, plan_kept_inputs
from approx_compile.passes.planning.rule_matching import match_rules
from approx_compile.passes.sites.site import Site
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import UNITS_CHOSEN, UNITS_PREDICTED, UNITS_READ
from approx_compile.reasons.products import (
    KEEPS_ALL,
    NO_COST_MODEL,
    SHORT_AXIS,
    UNITS_ALL_READ,
    UNITS_BESIDE,
    UNITS_KIND,
    UNITS_LAST,
    UNITS_MIXED,
    UNITS_NO_NONLINEARITY,
    UNITS_NO_TABLES,
    UNITS_READ_TWICE,
    UNITS_UNREAD,
    WOULD_NOT_PAY,
)

aten = torch.ops.aten

_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
_SCALINGS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.clone.default}
_LINEAR = _SUMS | _SCALINGS | VIEWS | PERMUTES | CASTS
_MEANINGLESS = (UNITS_LAST, UNITS_KIND, UNITS_NO_NONLINEARITY)
"""Reasons for which the method means nothing at a layer. A rule that reaches only such layers is an error."""

# --- legal ---


def consumer_of(producer: int, sites: Sequence[Site], producers: Producers) -> int | Reason:
    """Return the number of the site that reads the units of a layer, or the reason why none of them can be left out.

    Args:
        producer: Number of the layer's site.
        sites: The sites of the graph.
        producers: The regions between producers and consumers.
    """
    site = sites[producer]
    if site.kind != "linear":
        return UNITS_KIND()
    if site.last:
        return UNITS_LAST()
    readers = [i for i, other in enumerate(sites) if site.name in other.reads]
    if len(readers) != 1 or sites[readers[0]].kind != "linear":
        return UNITS_READ_TWICE(names=" and ".join(sites[i].name for i in readers)) if len(readers) > 1 else UNITS_UNREAD()
    (reader,) = readers
    consumer = sites[reader]
    if consumer.blocked is not None:
        return UNITS_ALL_READ(name=consumer.name, why=consumer.blocked)
    regions = producers.regions_of(reader)
    region = regions[producer]
    if isinstance(region, Reason):
        return UNITS_ALL_READ(name=consumer.name, why=region)
    if len(regions) > 1 or consumer.products[0].weight != 1:
        return UNITS_MIXED(name=consumer.name)
    return _not_units(site.node, region, consumer.name) or reader


def _not_units(producer: fx.Node, region: NarrowedRegion, consumer: str) -> Reason | None:
    """Why what the consumer reads are no units of the producer: there is no nonlinearity, or other values of the samples are added."""
    forward = [n for n in region if not _torch.is_backward(n) and n is not producer]
    if all(n.target in _LINEAR for n in forward):
        return UNITS_NO_NONLINEARITY(name=consumer)
    return UNITS_MIXED(name=consumer) if any(n.target in _SUMS and _adds_rows(n, region) for n in forward) else None


def _adds_rows(n: fx.Node, region: NarrowedRegion) -> bool:
    """Whether a sum has a term from outside of the region that differs from sample to sample."""
    others = [a for a in n.args if isinstance(a, fx.Node) and a not in region]
    return any(_torch.value(a).dim() > 1 and any(s != 1 for s in _torch.value(a).shape[:-1]) for a in others)


def parameter_behind(weight: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return the input of the graph that a weight (I, K) is, through casts and a transposition, and whether it is (I, K) as well; None if there is none."""
    straight = True
    while weight.op != "placeholder":
        if weight.target in PERMUTES:
            straight = not straight
        elif weight.target not in CASTS | VIEWS or _torch.value(weight).dim() != 2:
            return None
        weight = weight.all_input_nodes[0]
    return weight, straight


# --- decided ---


def choose_units(plan: Plan, inputs: PlanInputs, producers: Producers, config: ApproxConfig) -> Plan:
    """Let hidden layers compute some of their units wherever the settings ask for it. A layer that computes all says why.

    Args:
        plan: The plan with every site decided.
        inputs: The sites, their settings and the cost model.
        producers: The regions between producers and consumers.
        config: The config, for errors about its rules.

    Raises:
        ConfigError: A rule asks for it at layers where it means nothing.
    """
    sites = list(plan.sites)
    refused: dict[int, Reason] = {}
    for i, (site, settings) in enumerate(zip(inputs.sites, inputs.settings, strict=True)):
        if settings.units is None:
            continue
        changed = site.blocked or _with_units(i, sites, inputs, settings, settings.units, producers)
        if isinstance(changed, Reason):
            refused[i] = changed
            sites[i] = replace(sites[i], reason=changed if sites[i].decision == "exact" else join((sites[i].reason, changed)))
        else:
            sites = changed
    _refuse_meaningless(inputs.sites, refused, config)
    return replace(plan, sites=tuple(sites))


def _with_units(
    i: int, sites: Sequence[SitePlan], inputs: PlanInputs, settings: SiteSettings, wanted: UnitSettings, producers: Producers
) -> list[SitePlan] | Reason:  # fmt: skip
    """The sites with the units of one of them chosen, or the reason why it computes all."""
    reader = consumer_of(i, inputs.sites, producers)
    if isinstance(reader, Reason):
        return reader
    site, consumer = inputs.sites[i], inputs.sites[reader]
    busy = next((s.name for s, p in ((site, sites[i]), (consumer, sites[reader])) if not _is_free(p)), None)
    if busy is not None:
        return UNITS_BESIDE(name=busy)
    size = int(_torch.hint(_torch.value(site.node).shape[-1]))
    estimator = make_estimator(wanted.method, size, wanted.ratio, wanted.min_k, 1, 1)
    if estimator is None:
        return SHORT_AXIS(size=size, least=wanted.min_k) if size <= wanted.min_k else KEEPS_ALL(size=size, ratio=wanted.ratio, group=1)
    if wanted.method == "alsh" and parameter_behind(site.products[0].operands[1]) is None:
        return UNITS_NO_TABLES()
    choice = _choice(site, estimator, wanted)
    words = UNITS_CHOSEN(method=wanted.method, kept=estimator.expected, size=size, consumer=consumer.name)
    read = producers.fed_products(reader, plan_kept_inputs(consumer, estimator, wanted.ratio, UNITS_READ(producer=site.name), inputs.cost))
    narrow = producers.narrowed_producer(i, sites[i], consumer.name, estimator)
    if settings.policy in TIMED_POLICIES:
        verdict = _prediction((sites[i], sites[reader]), (*narrow.products, *read), consumer, inputs.cost)
        if not verdict[0]:
            return verdict[1]
        words = join((words, verdict[1]))
    new = list(sites)
    reason = words if sites[i].decision == "exact" else join((sites[i].reason, words))
    new[i] = replace(narrow, decision="sampled", reason=reason, notes=sites[i].notes, units=choice)
    new[reader] = replace(sites[reader], decision="sampled", reason=UNITS_READ(producer=site.name), products=read, shrinks=(site.name,))
    return new


def _choice(site: Site, estimator: Estimator, wanted: UnitSettings) -> UnitChoice:
    t = wanted.table
    hashing = Hashing(t.bits, t.tables, t.powers, t.early_samples, t.early_every, t.every)
    return UnitChoice(estimator, t.alpha, t.beta, hashing, zlib.crc32(site.name.encode()))


def _is_free(plan: SitePlan) -> bool:
    """Whether nothing but a choice of units decides about a site's products."""
    return all(p.decision == "exact" for p in plan.products) or (bool(plan.shrinks) and plan.products[0].method in UNIT_METHODS)


def _prediction(before: Sequence[SitePlan], after: Sequence[ProductPlan], consumer: Site, cost: CostModel) -> tuple[bool, Reason]:
    """Whether a choice of units is predicted to pay, at the layer and at its consumer together, and the words for it."""
    if not cost.predicts_time:
        return False, NO_COST_MODEL(device=device(consumer))
    exact, chosen = total(p.time_sampled_us for s in before for p in s.products), total(p.time_sampled_us for p in after)
    assert exact is not None and chosen is not None
    words = UNITS_PREDICTED(speedup=exact / max(chosen, math.ulp(1.0)), consumer=consumer.name)
    threshold = cost.threshold("linear")
    return (True, words) if threshold.is_exceeded(exact, chosen) else (False, WOULD_NOT_PAY(words=words, missed=threshold.missed(exact, chosen)))


def _refuse_meaningless(sites: Sequence[Site], refused: dict[int, Reason], config: ApproxConfig) -> None:
    """Raise ConfigError for a rule that asks for a choice of units only where it means nothing."""
    matches, _ = match_rules(sites, config)
    for r, rule in enumerate(config.rules):
        hit = [i for i, hits in enumerate(matches) if hits[r]]
        meaningless = [i for i in hit if i in refused and any(m.explains(refused[i]) for m in _MEANINGLESS)]
        if rule.method in UNIT_METHODS and rule.layers != ("site",) and hit and len(meaningless) == len(hit):
            listed = "; ".join(f"{sites[i].name}: {refused[i]}" for i in meaningless)
            raise ConfigError(
                f"rules[{r}].method: {rule.method!r} leaves out units of hidden linear layers with a nonlinearity behind them, and layers {list(rule.layers)} "
                f"are none: {listed}. Name hidden linear layers, such as 'linear[:-1]'"
            )
