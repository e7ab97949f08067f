"""`tune`: measure on the user's own batch how much time every site saves and how much error it causes, and choose the plan that saves the most time."""

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

from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.plan_file import Tuned, TunedPlan, TunedSite
from approx_compile.passes.planning.plan import SitePlan
from approx_compile.reasons import Reason, join
from approx_compile.reasons.tuning import ERROR_TOO_DEAR, ERROR_TOO_LARGE, NOT_MEASURED, ROWS_SAVE_MORE, SAVES_NOTHING, TIME_NOT_MEASURED
from approx_compile.tools.compiled_parts import compiled_parts, config_of_parts, precision_of_wrapper, unwrapped
from approx_compile.tools.model_state import training_state_preserved
from approx_compile.tools.tuning.deadline import DeadlineReached, deadline
from approx_compile.tools.tuning.knapsack import TIME_LIMIT_S, Option, solve_knapsack
from approx_compile.tools.tuning.measurements import REVISIONS, Measurements, OutOfTime, TrialError
from approx_compile.tools.tuning.search_space import SearchSpace
from approx_compile.tools.tuning.step_time_model import StepTimeModel, shape_of
from approx_compile.tools.tuning.trial import StepTimes, Trials

LADDER = (0.7, 0.5, 0.35, 0.25)
"""The ratios that are tried by default."""


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
    """Choose the ratio of every site of `model` so that a training step takes the least time, while the gradient's error is at most `max_error`.

    The step is `loss(model(*inputs), target)` and its backward pass, in training mode, on the model's device. The error of a plan is
    ``|g - g_exact| / |g_exact|``, taken over the gradients of all parameters together. Both gradients are computed with the same random numbers. (A random
    `method` in the forward pass shifts the random numbers of dropout, and the difference counts as error.)

    `tune` measures the error of every site at every ratio, then the time of whole compiled steps in which each group of equal sites is sampled, and finally the
    error and the time of the chosen plan. If several sites read one activation, it measures the plan's error both with the same entries for all of them and
    with separate entries for each (`share`). Whatever is measured to be slower than the exact step, or to exceed the error, stays exact. After a keyboard
    interrupt, or at the end of the time budget, `tune` returns the best plan so far, whose record says which sites were not measured. Parameters, their
    `.grad`, buffers, random states and modules' attributes are left as they were.

    Args:
        model: The module in training mode, compiled or not.
        *inputs: Its positional arguments.
        target: What the loss compares the output with.
        loss: A function of the output (and of the target). By default cross entropy or the mean square error with `target`; without a target the model's
            output, or its `.loss`.
        max_error: The relative error e = ``|g - g_exact| / |g_exact|`` that the gradient may have. The setting `adaptive.error` bounds its square, e^2.
        time_budget_s: Seconds that tuning may take. What runs when they are over is interrupted, compilations too, if `tune` runs in the main thread;
            otherwise a compilation that has begun is finished.
        config: How sites are sampled (`method`, `sampling`, rules and so on). By default the settings that `model` or its submodules are compiled with. Sites
            that read raw data, and the last layer, stay exact unless the policy of `config` is "always".
        ladder: The ratios to try.
        rows: Whether to also try running the backward pass of the whole model on some of the rows, in place of sampled sites. Tokens are never tried, although
            the default may choose them.
        progress: A rich Progress to add a bar to, or whether to show one on stderr, with an estimate of how long all of it would take.

    Returns:
        The plan, with a record of what was measured.

    Raises:
        ConfigError: If the arguments are not valid. It is a `ValueError`.
        ValueError: If the step has no loss.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> x, y = torch.randn(256, 64), torch.randint(0, 10, (256,))
        >>> plan = approx_compile.tune(model, x, target=y, max_error=0.5, time_budget_s=60, progress=False)
        >>> compiled = torch.compile(model, backend="approx", options={"plan": plan})
    """
    given, (model, found) = model, unwrapped(model)
    _check(model, max_error, time_budget_s, ladder)
    config = config if config is not None else found or config_of_parts(compiled_parts(model))
    space = SearchSpace.of(config)
    with precision_of_wrapper(given, inputs) as inputs, training_state_preserved(model), _progress_bar(progress) as bar:
        trials = Trials(model, inputs, target, loss, space.options({}))
        measured = Measurements(trials, space, max_error, sorted(set(ladder), reverse=True), time_budget_s, bar)
        good: list[_Choice] = []
        over, stopped = f"the time budget of {time_budget_s:g} s", None
        try:
            measured.survey()
            with deadline(measured.seconds_left):
                try:
                    measured.measure_all(rows)
                except OutOfTime:
                    stopped = over
                best, times, unmeasured = _choose_plan(measured, good)
            stopped = over if unmeasured else stopped
        except DeadlineReached:
            stopped, times, best = over, None, _best_untimed(good or [_exact_choice(measured), *_row_choices(measured)])
        except KeyboardInterrupt:
            stopped, times, best = "a keyboard interrupt", None, _best_unmeasured(measured)
        return _result(measured, best, times, stopped)


def _check(model: Any, max_error: float, time_budget_s: float, ladder: Sequence[float]) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"tune: model: got {type(model).__name__}; a torch.nn.Module is expected, compiled or not")
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
def _progress_bar(progress: Progress | bool) -> Iterator[Progress]:
    if isinstance(progress, Progress):
        yield progress
        return
    columns = (TextColumn("tune"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        yield bar


@dataclass(frozen=True)
class _Choice:
    """A plan that may be chosen."""

    options: Mapping[str, Any]
    ratios: Mapping[str, float]
    """The ratios of the sites that are sampled."""
    saved: float
    """The share of the exact step's time that the plan is predicted to save."""
    error: float | None
    """The measured error of the gradient; None if it was not measured."""
    rows: float | None = None
    """The share of the rows that the backward pass runs on, if not all."""
    sites: tuple[SitePlan, ...] = ()
    """The sites as planned."""


def _solve_for_budget(measured: Measurements, budget: float) -> tuple[dict[str, float], float]:
    """Return the ratio of every site to sample, and the share of the step's time that this saves.

    They are the solution of a knapsack problem. Its gains are the time that each site saves alone, less the time that two sites both save. Its costs are
    squared errors, and `budget` is the allowed sum of squared errors.
    """
    model = StepTimeModel(measured.space.sites, measured.times)
    keys = measured.usable
    options = [Option(name, model.saved(measured.alone[name, ratio].sites), measured.alone[name, ratio].error ** 2) for name, ratio in keys]
    overlaps = {}
    for (of, by), (site, flops) in measured.space.overlaps().items():
        for i, (a, r) in enumerate(keys):
            for j, (b, q) in enumerate(keys):
                if (a, b) == (of, by):
                    overlaps[i, j] = model.rate(site) * flops / model.flops * (1 - r) * (1 - q)
    chosen = solve_knapsack(options, budget, overlaps, min(TIME_LIMIT_S, max(1.0, measured.seconds_left)))
    saved = sum(options[i].gain for i in chosen) - sum(overlap for (i, j), overlap in overlaps.items() if i in chosen and j in chosen)
    return dict(keys[i] for i in chosen), saved


def _row_choices(measured: Measurements) -> list[_Choice]:
    return [_Choice(tried.options, {}, saved, tried.error, ratio, tried.sites) for ratio, (tried, saved) in measured.rows.items()]


def _exact_choice(measured: Measurements) -> _Choice:
    return _Choice(measured.space.options({}), {}, 0.0, 0.0)


def _choose_plan(measured: Measurements, good: list[_Choice]) -> tuple[_Choice, StepTimes | None, bool]:
    """Return the plan that saves the most time, its measured time, and whether the time budget was too short to measure this time.

    The plans whose measured error is allowed are added to `good`, so that the caller has them if the deadline interrupts.
    """
    _find_choices_within_error(measured, good)
    best = max(good, key=lambda c: c.saved)
    times = measured.time_of_the_choice(best.options) if best.saved > 0 else None
    if best.saved <= 0 or times is not None:
        return best, times, False
    return _best_untimed(good), None, True


def _best_untimed(good: Sequence[_Choice]) -> _Choice:
    """Return the best plan where the choice could not be timed: one with sampled rows, whose time is known, before one whose time is not known."""
    known = [c for c in good if c.rows is not None and c.saved > 0]
    return max(known or good, key=lambda c: c.saved)


def _find_choices_within_error(measured: Measurements, good: list[_Choice]) -> None:
    """Add plans whose measured error is allowed to `good`.

    The squared errors of sites do not add up exactly. The knapsack's budget is therefore adjusted by bisection until the error of the whole plan is close to
    the allowed error.
    """
    model = StepTimeModel(measured.space.sites, measured.times)
    good += [_exact_choice(measured), *_row_choices(measured)]
    errors: dict[tuple[tuple[str, float], ...], float] = {(): 0.0}
    low, high, budget = 0.0, math.inf, measured.max_error**2
    most = sum(measured.alone[key].error ** 2 for key in measured.usable)  # all sites at all ratios; a larger budget changes nothing
    while len(errors) <= REVISIONS and low < most and high > 1.05 * low and high > 1e-3 * measured.max_error**2:
        ratios, _ = _solve_for_budget(measured, budget)
        key = tuple(ratios.items())
        if key not in errors:
            if measured.no_time_for_errors(1):
                break
            measured.show_progress("gradient error of the whole plan")
            tried = measured.measure_error(measured.space.options(ratios))
            errors[key] = tried.error
            ways = [tried, *(() if measured.no_time_for_errors(2) else _trials_with_sharing(measured, tried))]
            good += [_Choice(t.options, ratios, model.saved(t.sites), t.error, sites=t.sites) for t in ways if t.error <= measured.max_error]
        low, high = (budget, high) if errors[key] <= measured.max_error else (low, budget)
        budget = 1.5 * low if high == math.inf else math.sqrt(low * high) if low else high / 4


def _trials_with_sharing(measured: Measurements, tried: TrialError) -> list[TrialError]:
    """Measure the error of the same settings with shared and with separate entries for sites that read one activation.

    Only variants whose plan differs are measured, and none if the settings already contain `share`.
    """
    if any("share" in keys for keys in (tried.options, *tried.options.get("rules", ()))):
        return []
    others = [{**tried.options, "share": share} for share in (True, False)]
    planned = [[p.shares for s in measured.trials.planned(options) for p in s.products] for options in (tried.options, *others)]
    return [measured.measure_error(options) for options, plan in zip(others, planned[1:], strict=True) if plan != planned[0]]


def _best_unmeasured(measured: Measurements) -> _Choice:
    """Return the best plan according to the measurements so far. Its own error is not measured, unless it is exact or samples rows."""
    ratios, saved = _solve_for_budget(measured, measured.max_error**2)
    return max([_exact_choice(measured), _Choice(measured.space.options(ratios), ratios, saved, None), *_row_choices(measured)], key=lambda c: c.saved)


def _result(measured: Measurements, best: _Choice, times: StepTimes | None, stopped: str | None) -> TunedPlan:
    if times is not None and times.share >= 1:
        stopped = f"the plan chosen took {times.share:.2f} times the exact step, so everything stays exact"
        best, times = _exact_choice(measured), None
    model, times_model = measured.trials.model, StepTimeModel(measured.space.sites, measured.times)
    sites = [_site(measured, times_model, s, best) for s in measured.space.sites]
    record = Tuned(
        model=type(model).__name__,
        torch=torch.__version__,
        device=next(model.parameters()).device.type,
        threads=torch.get_num_threads(),
        max_error=measured.max_error,
        error=_rounded(best.error),
        predicted_speedup=round(1 / (1 - min(best.saved, 0.99)), 4),
        achieved_speedup=round(1 / times.share, 4) if times is not None else None,
        step_exact_ms=round(times.exact_s * 1e3, 3) if times is not None else None,
        step_ms=round(times.step_s * 1e3, 3) if times is not None else None,
        rows=best.rows,
        stopped=stopped,
        sites=tuple(sites),
    )
    comments = {s.name: f"saves {s.saved:.1%} of the step, gradient error {s.error:g} alone" for s in sites}
    return TunedPlan(best.options, record, {measured.space.pattern(name): comments[name] for name in best.ratios})


def _site(measured: Measurements, model: StepTimeModel, site: SitePlan, best: _Choice) -> TunedSite:
    """Make the record of a site from the measurements at its ratio. If the site stays exact, the record gives the reason, from those at the highest ratio."""
    known = {ratio: tried for (name, ratio), tried in measured.alone.items() if name == site.name}
    ratio = best.ratios.get(site.name)
    at = ratio if ratio is not None else max(known, default=None)
    tried: TrialError | None = known[at] if at is not None else None
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
        reason=None if ratio is not None else join((_why_exact(measured, site, best, at, tried, saved), *notes)),
    )


def _why_exact(measured: Measurements, site: SitePlan, best: _Choice, at: float | None, tried: TrialError | None, saved: float) -> Reason:
    if tried is None:
        return measured.space.excluded.get(site.name, NOT_MEASURED())
    if tried.error > measured.max_error:
        return ERROR_TOO_LARGE(error=tried.error, ratio=at)
    if site.name not in measured.timed_sites:
        return TIME_NOT_MEASURED(error=tried.error, ratio=at)
    if best.rows is not None:
        return ROWS_SAVE_MORE()
    return SAVES_NOTHING(saved=saved, ratio=at) if saved <= 0 else ERROR_TOO_DEAR(error=tried.error, saved=saved, ratio=at)


def _rounded(error: float | None) -> float | None:
    return float(f"{error:.4g}") if error is not None else None
