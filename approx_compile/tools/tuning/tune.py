"""`tune`: measures on the user's own batch what every site would save and what error it would bring, and chooses the plan that saves most."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from approx_compile import _torch
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.plan_file import NOT_MEASURED, Tuned, TunedPlan, TunedSite
from approx_compile.passes.planning.plan import SitePlan
from approx_compile.tools.model_state import training_state_preserved
from approx_compile.tools.tuning.knapsack import Option, choose
from approx_compile.tools.tuning.measurements import REVISIONS, Measurements, OutOfTime, Tried
from approx_compile.tools.tuning.search_space import Candidates
from approx_compile.tools.tuning.step_time_model import StepTime, shape_of
from approx_compile.tools.tuning.trial import Times, Trials

LADDER = (0.7, 0.5, 0.35, 0.25)


def tune(
    model: nn.Module,
    *inputs: Any,
    target: Any = None,
    loss: Callable[..., Any] | None = None,
    max_error: float = 0.5,
    time_budget_s: float = 600.0,
    config: ApproxConfig | Mapping[str, Any] | None = None,
    ladder: Sequence[float] = LADDER,
    rows: bool = True,
    progress: Progress | bool = True,
) -> TunedPlan:
    """Choose the ratio of every site of `model` so that a training step takes the least time, with the gradient off by at most `max_error`.

    The step is `loss(model(*inputs), target)` and its backward pass, in the model's training mode, on the device it is on. Without `loss`: cross entropy or
    mean square with `target`, else the model's output (or its `.loss`). The error of a plan is |g - g_exact| / |g_exact| over all parameters together, from
    the same random numbers (a random `method` in the forward pass shifts those of dropout, which then counts as error). `config` says how sites are sampled
    (`method`, `sampling`, rules, ...), the ratios come from `ladder`; what is fed with raw data and the last layer stay exact unless its policy is "always".
    `rows`: whether the backward pass on some of the rows, for the whole model, is tried in place of sampled sites.

    Measured are the error of every site at every ratio, the time of whole compiled steps with each group of equal sites sampled, and in the end the error and
    the time of the plan chosen, its error also with what reads one activation at shared entries and at its own (`share`). What is measured slower than exact,
    or over the error, stays exact. A keyboard interrupt, or the end of `time_budget_s` (seconds; a compilation that has begun is finished), gives the plan
    found so far, and says of sites what was not measured. `progress`: a rich Progress to add a bar to, or whether to show one (on stderr), with an estimate
    of how long all of it would take.

    Parameters, their `.grad`, buffers, random states and modules' attributes are left as they were. Raises ConfigError (a ValueError) for arguments that
    cannot be, ValueError for a step without a loss.
    """
    _check(model, max_error, time_budget_s, ladder)
    candidates = Candidates.of(config)
    trials = Trials(model, inputs, target, loss, candidates.options({}))
    with training_state_preserved(model), _bar(progress) as bar:
        found = Measurements(trials, candidates, max_error, sorted(set(ladder), reverse=True), time_budget_s, bar)
        stopped = None
        try:
            try:
                found.take(rows)
            except OutOfTime:
                stopped = f"the time budget of {time_budget_s:g} s"
            best, times, unmeasured = _chosen(found)
            if unmeasured:
                stopped = f"the time budget of {time_budget_s:g} s"
        except KeyboardInterrupt:
            stopped, times, best = "a keyboard interrupt", None, _unchecked(found)
        return _result(found, best, times, stopped)


def _check(model: Any, max_error: float, time_budget_s: float, ladder: Sequence[float]) -> None:
    if not isinstance(model, nn.Module) or _torch.uncompiled(model) is not model:
        raise ConfigError(f"tune: model: got {type(model).__name__}; the torch.nn.Module itself is expected, before torch.compile")
    if not model.training:
        raise ConfigError("tune: model: it is in eval mode, where nothing is approximated; call model.train() first")
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("tune: model: no parameter requires a gradient, so there is no training step to tune")
    for name, value in (("max_error", max_error), ("time_budget_s", time_budget_s)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"tune: {name}: got {value!r}; a number above 0 is expected")
    if not ladder or not all(isinstance(r, float) and 0 < r < 1 for r in ladder):
        raise ConfigError(f"tune: ladder: got {ladder!r}; ratios between 0 and 1 are expected, such as {LADDER}")


@contextlib.contextmanager
def _bar(progress: Progress | bool) -> Iterator[Progress]:
    if isinstance(progress, Progress):
        yield progress
        return
    columns = (TextColumn("tune"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as own:
        yield own


@dataclass(frozen=True)
class _Choice:
    """Settings, the ratios of the sites they sample or that of the rows, the share of the exact step's time they are predicted to save, their measured
    error (None: not measured), and the sites as planned then."""

    options: Mapping[str, Any]
    ratios: Mapping[str, float]
    saved: float
    error: float | None
    rows: float | None = None
    sites: tuple[SitePlan, ...] = ()


def _picked(found: Measurements, budget: float) -> tuple[dict[str, float], float]:
    """The ratio of every site to sample, and the share of the step's time that this saves: the knapsack of what each saves alone, less what two save both.
    Errors are taken to add up as squares."""
    model = StepTime(found.candidates.sites, found.times)
    keys = found.usable
    options = [Option(name, model.saved(found.alone[name, ratio].sites), found.alone[name, ratio].error ** 2) for name, ratio in keys]
    overlaps = {}
    for (of, by), (site, flops) in found.candidates.overlaps().items():
        for i, (a, r) in enumerate(keys):
            for j, (b, q) in enumerate(keys):
                if (a, b) == (of, by):
                    overlaps[i, j] = model.rate(site) * flops / model.flops * (1 - r) * (1 - q)
    chosen = choose(options, budget, overlaps)
    saved = sum(options[i].gain for i in chosen) - sum(overlap for (i, j), overlap in overlaps.items() if i in chosen and j in chosen)
    return dict(keys[i] for i in chosen), saved


def _on_rows(found: Measurements) -> list[_Choice]:
    return [_Choice(tried.options, {}, saved, tried.error, ratio, tried.sites) for ratio, (tried, saved) in found.rows.items()]


def _nothing(found: Measurements) -> _Choice:
    return _Choice(found.candidates.options({}), {}, 0.0, 0.0)


def _chosen(found: Measurements) -> tuple[_Choice, Times | None, bool]:
    """The plan that saves most, its time, and whether there was none left to measure that: rows whose time is known go before a plan without one then."""
    good = _good(found)
    best = max(good, key=lambda c: c.saved)
    times = found.time_of_the_choice(best.options) if best.saved > 0 else None
    if best.saved <= 0 or times is not None:
        return best, times, False
    known = [c for c in good if c.rows is not None and c.saved > 0]
    return max(known, key=lambda c: c.saved) if known else best, None, True


def _good(found: Measurements) -> list[_Choice]:
    """Plans within the error allowed. Squares of errors do not quite add up: the budget at which the plan's own error is the one allowed is sought by
    bisection."""
    model = StepTime(found.candidates.sites, found.times)
    good = [_nothing(found), *_on_rows(found)]
    errors: dict[tuple[tuple[str, float], ...], float] = {(): 0.0}
    low, high, budget = 0.0, math.inf, found.max_error**2
    most = sum(found.alone[key].error ** 2 for key in found.usable)  # all sites at all ratios: more changes nothing
    while len(errors) <= REVISIONS and low < most and high > 1.05 * low and high > 1e-3 * found.max_error**2:
        ratios, _ = _picked(found, budget)
        key = tuple(ratios.items())
        if key not in errors:
            if found.no_time_for_errors(1):
                break
            found.show("gradient error of the whole plan")
            tried = found.tried(found.candidates.options(ratios))
            errors[key] = tried.error
            ways = [tried, *(() if found.no_time_for_errors(2) else _shared(found, tried))]
            good += [_Choice(t.options, ratios, model.saved(t.sites), t.error, sites=t.sites) for t in ways if t.error <= found.max_error]
        low, high = (budget, high) if errors[key] <= found.max_error else (low, budget)
        budget = 1.5 * low if high == math.inf else math.sqrt(low * high) if low else high / 4
    return good


def _shared(found: Measurements, tried: Tried) -> list[Tried]:
    """The same with what reads one activation at the same entries, and with none at those of another, where that makes a difference and no rule has said."""
    if any("share" in keys for keys in (tried.options, *tried.options.get("rules", ()))):
        return []
    others = [{**tried.options, "share": share} for share in (True, False)]
    planned = [[p.shares for s in found.trials.planned(options) for p in s.products] for options in (tried.options, *others)]
    return [found.tried(options) for options, plan in zip(others, planned[1:], strict=True) if plan != planned[0]]


def _unchecked(found: Measurements) -> _Choice:
    """The best of what is known, its error not measured."""
    ratios, saved = _picked(found, found.max_error**2)
    return max([_nothing(found), _Choice(found.candidates.options(ratios), ratios, saved, None), *_on_rows(found)], key=lambda c: c.saved)


def _result(found: Measurements, best: _Choice, times: Times | None, stopped: str | None) -> TunedPlan:
    if times is not None and times.share >= 1:
        stopped = f"the plan chosen took {times.share:.2f} times the exact step, so everything stays exact"
        best, times = _nothing(found), None
    model, times_model = found.trials.model, StepTime(found.candidates.sites, found.times)
    sites = [_site(found, times_model, s, best) for s in found.candidates.sites]
    record = Tuned(
        model=type(model).__name__,
        torch=torch.__version__,
        device=next(model.parameters()).device.type,
        threads=torch.get_num_threads(),
        max_error=found.max_error,
        error=_rounded(best.error),
        predicted_speedup=round(1 / (1 - min(best.saved, 0.99)), 4),
        achieved_speedup=round(1 / times.share, 4) if times is not None else None,
        step_exact_ms=round(times.exact_s * 1e3, 3) if times is not None else None,
        step_ms=round(times.step_s * 1e3, 3) if times is not None else None,
        rows=best.rows,
        stopped=stopped,
        sites=tuple(sites),
    )
    said = {s.name: f"saves {s.saved:.1%} of the step, gradient error {s.error:g} alone" for s in sites}
    return TunedPlan(best.options, record, {found.candidates.pattern(name): said[name] for name in best.ratios})


def _site(found: Measurements, model: StepTime, site: SitePlan, best: _Choice) -> TunedSite:
    """What the record says of a site: what was found at its ratio, or, if it stays exact, at the least harmful one, and why."""
    known = {ratio: tried for (name, ratio), tried in found.alone.items() if name == site.name}
    ratio = best.ratios.get(site.name)
    at = ratio if ratio is not None else max(known, default=None)
    tried: Tried | None = known[at] if at is not None else None
    notes = next((s.notes for s in best.sites if s.name == site.name), ())
    saved = round(model.saved(tried.sites), 4) if tried is not None else 0.0
    return TunedSite(
        name=site.name,
        op=site.op,
        shape=shape_of(site),
        dtype=site.dtype,
        ratio=ratio if ratio is not None else 1.0,
        saved=saved if ratio is not None else 0.0,
        error=(_rounded(tried.error) or 0.0) if tried is not None and ratio is not None else 0.0,
        reason=None if ratio is not None else "; ".join((_why_exact(found, site, best, at, tried, saved), *notes)),
    )


def _why_exact(found: Measurements, site: SitePlan, best: _Choice, at: float | None, tried: Tried | None, saved: float) -> str:
    if tried is None:
        return found.candidates.excluded.get(site.name, NOT_MEASURED)
    if tried.error > found.max_error:
        return f"gradient error {tried.error:.2g} at {at:g}"
    if site.name not in found.timed_sites:
        return f"{NOT_MEASURED}: the time it saves (gradient error {tried.error:.2g} at {at:g})"
    if best.rows is not None:
        return "rows save more"
    return f"predicted to save {saved:.1%} at {at:g}" if saved <= 0 else f"error {tried.error:.2g} for {saved:.1%} of the step at {at:g}"


def _rounded(error: float | None) -> float | None:
    return float(f"{error:.4g}") if error is not None else None
