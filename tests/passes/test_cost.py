"""The cost expressions, evaluated against counts made by hand and by torch, and the decisions that follow from a fixed profile."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import sympy
import torch
from helpers.compile import plans_of
from helpers.models import mlp
from torch import nn

from approx_compile import Backend, explain, machine
from approx_compile.backend import run_as_is
from approx_compile.kernels.estimators import Estimator
from approx_compile.passes.cost import expressions, margins
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.cost.expressions import Case, terms
from approx_compile.passes.planning.plan import BreakEven
from approx_compile.passes.planning.selection import PREDICTION_ERROR

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "min_k": 1}
SIZES = {
    expressions.B: 1,
    expressions.M: 32,
    expressions.K: 64,
    expressions.N: 128,
    expressions.T: 1,
    expressions.I: 32,
    expressions.O: 32,
    expressions.S: 32,
    expressions.e: 4,
    expressions.k: 16,
    expressions.u: 64,
    expressions.p: 1,
    expressions.q: 1,
    expressions.r: 1,
}


def factor(machine_: machine.Machine, name: str, by: float) -> machine.Machine:
    """Return the profile with the values of a table multiplied."""
    changed = {n: t.model_copy(update={"values": tuple(v * by for v in t.values)}) for n, t in machine_.tables.items() if n.startswith(name)}
    return machine_.model_copy(update={"tables": machine_.tables | changed})


def decided(model: nn.Module, x: torch.Tensor, profile: machine.Machine, **options: Any) -> Any:
    with machine.use(profile):
        return plans_of(model, {"policy": "cost", "rules": [{"layers": "site"}], **options}, x)


def test_terms_of_a_sampled_product() -> None:
    """The terms are counted by hand for X (32, 64), W (128, 64) in groups of one, with 16 of 64 kept."""
    found = {t.what: t for t in terms(Case("linear", "output", "sampled"))}
    at = {s: v for s, v in SIZES.items()}
    made = {"new memory, A", "new memory, B", "new memory, result"}
    assert set(found) == {"norms", "selection", "take A", "take B", "product", "launches"} | made
    assert [found[m].bytes.subs(at) for m in sorted(made)] == [4 * 32 * 16, 4 * 16 * 128, 4 * 32 * 128]
    assert found["product"].flops.subs(at) == 2 * 32 * 16 * 128 and found["product"].at == (expressions.M, expressions.k, expressions.N)
    assert found["norms"].bytes.subs(at) == 4 * (32 * 64 + 64 * 128) and found["norms"].flops.subs(at) == 2 * (32 * 64 + 64 * 128)
    assert found["take A"].bytes.subs(at) == 2 * 4 * 32 * 16 and found["take B"].bytes.subs(at) == 2 * 4 * 16 * 128
    assert math.isclose(found["selection"].flops.subs(at), 10 * 64 * 6) and found["selection"].launches == 1
    assert found["launches"].launches == 2
    own = {t.what: t for t in terms(Case("linear", "grad_weight", "sampled", "uniform", scaled=True))}
    assert "norms" not in own and own["product"].flops.subs(at) == 2 * 16 * 64 * 128
    assert own["take B"].flops.subs(at) == 16 * 128  # the scale of dY's kept rows
    assert {t.rate for t in terms(Case("bmm", "grad_weight", "exact"))} == {"bmm", "fresh"}


def test_a_coupled_gradient_is_put_back() -> None:
    at = {s: v for s, v in SIZES.items()}
    found = {t.what: t for t in terms(Case("linear", "grad_weight", "coupled", "crs", scaled=True))}
    assert found["untake"].bytes.subs(at) == 4 * 64 * 128 and found["untake"].flops.subs(at) == 16 * 128
    assert found["product"].flops.subs(at) == 2 * 32 * 16 * 128
    skipping = {t.what: t for t in terms(Case("linear", "grad_input", "coupled", skips=True))}
    both = skipping["product"].flops.subs(at | {expressions.skip: 32})
    assert both == 2 * 32 * 16 * 32


def test_a_shrunk_producer_gathers_its_weight_and_nothing_of_its_output() -> None:
    at = {s: v for s, v in SIZES.items()} | {expressions.skip: 48}
    output, grad_input, grad_weight = ({t.what: t for t in terms(Case("linear", p, "exact", narrow=True))} for p in ("output", "grad_input", "grad_weight"))
    assert all(found["product"].flops.subs(at) == 2 * 32 * 64 * 48 for found in (output, grad_input, grad_weight))
    assert output.keys() == {"take W", "new memory, W", "product", "launches", "new memory, result"}
    assert output["take W"].bytes.subs(at) == 2 * output["new memory, W"].bytes.subs(at) == 2 * 4 * 64 * 48
    assert (
        output["new memory, W"].at[0].subs(at) == expressions.WORKING_SET_FACTOR * 4 * 64 * 48
        and grad_weight["new memory, narrow result"].bytes.subs(at) == 4 * 64 * 48
    )
    assert grad_input.keys() == {"product", "new memory, result"} and grad_weight["untake"].bytes.subs(at) == 4 * 64 * 128
    both = {t.what: t for t in terms(Case("linear", "output", "sampled", "topk_weights", 1, narrow=True, fed=True))}
    assert (
        not {"take A", "new memory, A"} & both.keys()
        and both["take B"].bytes.subs(at) == 2 * 4 * 16 * 48
        and both["product"].flops.subs(at) == 2 * 32 * 16 * 48
    )
    assert {t.what for t in terms(Case("linear", "grad_input", "coupled", fed=True))} == {"product", "new memory, narrow result"}


def test_time_is_amount_over_rate_and_flops_match_torch() -> None:
    profile = machine.current()
    found = CostModel(profile).evaluate(Case("linear", "output", "exact"), SIZES, torch.float32)
    assert found.flops == 2 * 32 * 64 * 128
    memory = 4 * 32 * 128 / profile.table("fresh").at(4 * 32 * 128) / 1e3
    assert found.time_us is not None and math.isclose(found.time_us, found.flops / profile.table("linear.output").at(32, 64, 128) / 1e3 + memory)
    sampled = CostModel(profile).evaluate(Case("linear", "output", "sampled"), SIZES, torch.float32)
    assert sampled.time_us is not None and math.isclose(sampled.time_us, sum(t for _, t in sampled.terms)) and len(sampled.terms) == 9
    norms = next(time for term, time in sampled.terms if term.startswith("norms"))
    assert math.isclose(norms, 4 * 64 * 160 / profile.table("norms").at(expressions.WORKING_SET_FACTOR * 4 * 64 * 160) / 1e3)
    assert CostModel(None).evaluate(Case("linear", "output", "sampled"), SIZES, torch.float32).time_us is None


@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_of_convolutions(transposed: bool) -> None:
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    sites = plans_of(nn.Sequential(make(8, 16, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1)), ALWAYS, torch.randn(5, 8, 9, 9))
    assert [s.kind for s in sites] == ["conv", "conv"]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        make(8, 16, 3, stride=2, groups=2)(torch.randn(5, 8, 9, 9))
    assert sites[0].products[0].flops_exact == counter.get_total_flops()
    names = {str(s) for s in expressions.SYMBOLS}
    assert all({str(s) for s in t.bytes.free_symbols} <= names for t in terms(Case("conv", "output", "sampled")))


@pytest.mark.slow
def test_decisions_follow_the_machine() -> None:
    """The same site is decided otherwise on machines with faster products or faster memory."""
    model, x = mlp(1024, 1024, 1024), torch.randn(512, 1024, requires_grad=True)
    profile = machine.current()
    (first, *_) = decided(model, x, profile)
    assert first.decision == "sampled" and first.time_exact_us > margins.MARGIN * first.time_sampled_us
    assert "predicted" in first.reason and "break-even" in first.reason
    (fast, *_) = decided(model, x, factor(profile, "linear", 1e3))
    assert fast.decision == "exact" and fast.reason.startswith("would not pay: predicted 0.") and fast.time_exact_us < first.time_exact_us
    assert fast.reason.endswith(" (must exceed 1.2x)")
    (slow, *_) = decided(model, x, factor(factor(profile, "take", 1e-3), "untake", 1e-3))
    assert slow.decision == "exact" and ("break-even 0.0" in slow.reason or "no ratio breaks even" in slow.reason)


def test_large_results_pay_for_new_memory() -> None:
    """Where the C library maps memory anew, tensors of that size cost more, and small ones do not."""
    profile = machine.current()
    slow = profile.model_copy(update={"tables": profile.tables | {"fresh": machine.Table(unit="GB/s", axes={"allocated": (2**24, 2**25)}, values=(1e3, 2.5))}})
    for m, extra in ((2**12, 0.0), (2**16, 4 * 2**26 / 2.5 / 1e3)):  # results of 16 MiB and of 256 MiB
        sizes = SIZES | {expressions.M: m, expressions.I: m, expressions.O: m, expressions.S: m, expressions.N: 1024}
        times = [t for term, t in CostModel(slow).evaluate(Case("linear", "output", "exact"), sizes, torch.float32).terms if term.startswith("new memory")]
        assert math.isclose(sum(times), extra + (4 * 2**22 / 1e3 / 1e3 if not extra else 0.0))


@pytest.mark.slow
def test_a_quick_profile_asks_for_more_and_little_is_left_alone() -> None:
    model, x = mlp(1024, 1024, 1024), torch.randn(512, 1024, requires_grad=True)
    profile = machine.current()
    (site, *_) = decided(model, x, profile)
    exact, sampled = site.time_exact_us, site.time_sampled_us
    dull = factor(profile, "kernel", (exact - sampled) / profile.table("kernel").at() / margins.LEAST_LAUNCHES * 1.2)
    assert decided(model, x, dull)[0].decision == "exact" and re.search(r"\(saves \d+ us, must exceed \d+ us\)", decided(model, x, dull)[0].reason)
    quick = profile.model_copy(update={"quick": True})
    for gain, want in ((1.1, (False, False)), (1.3, (True, False)), (1.6, (True, True))):
        assert tuple(margins.threshold("linear", p).is_exceeded(gain * 1e6, 1e6) for p in (profile, quick)) == want
    conv = margins.threshold("conv", profile)
    assert not conv.is_exceeded(1.3e6, 1e6) and conv.is_exceeded(1.6e6, 1e6)
    assert conv.missed(1.46e6, 1e6) == "must exceed 1.5x" and conv.missed(0.9, 0.5).startswith("saves 0.4 us, must exceed ")


@pytest.mark.slow
def test_break_even_is_where_times_meet() -> None:
    model, x = mlp(512, 512, 512), torch.randn(256, 512, requires_grad=True)
    profile = factor(machine.current(), "untake", 0.02)
    reason = decided(model, x, profile, ratio=0.25, group=16)[0].reason
    at = float(reason.split("break-even ")[1])
    assert 0.15 < at < 0.85
    below, above = (decided(model, x, profile, ratio=at + step, group=16, policy="always")[0] for step in (-0.1, 0.1))
    assert below.time_exact_us > below.time_sampled_us and above.time_exact_us < above.time_sampled_us


@pytest.mark.slow
def test_break_even_says_how_sure_it_is() -> None:
    """At the ends of its range, sampling would take as long as the exact products if it took 1.2, or 1 / 1.2, times as long as predicted."""
    model, x = mlp(512, 512, 512), torch.randn(256, 512, requires_grad=True)
    profile = factor(machine.current(), "untake", 0.02)
    found = decided(model, x, profile, ratio=0.25, group=16)[0].break_even
    assert 0 < found.slower < found.ratio < found.faster < 1
    for at, off in ((found.slower, PREDICTION_ERROR), (found.ratio, 1.0), (found.faster, 1 / PREDICTION_ERROR)):
        site = decided(model, x, profile, ratio=at, group=16, policy="always")[0]
        times = [sum(v or 0.0 for _, v in p.terms) for p in site.products]
        assert math.isclose(site.time_exact_us, off * sum(times), rel_tol=0.1)  # k comes in groups
    assert decided(model, x, factor(profile, "linear", 1e4), ratio=0.25)[0].break_even == BreakEven(0.0, 0.0, 0.0)
    with machine.use(profile):
        report = explain(model, x, config={"policy": "cost", "ratio": 0.25, "group": 16, "rules": [{"layers": "site"}]})
    assert report.sites[0].break_even == found and f"break-even ratio {found.range}" in report.costs()
    assert report.to_dict()["sites"][0]["break_even"] == {"ratio": found.ratio, "slower": found.slower, "faster": found.faster}
    assert report.sites[1].break_even is None  # the last layer: not a question of time


@pytest.mark.slow
def test_group_and_k_are_chosen() -> None:
    """Groups are long where single entries gather slowly, else single entries; kept entries are multiples of 16; a group that the user gives is not changed."""
    model, x = mlp(1024, 1024, 1024), torch.randn(512, 1024, requires_grad=True)
    profile = machine.current()

    def single_runs(by: float) -> machine.Machine:
        """Return the profile with every run as fast as long ones, and single entries `by` times as fast."""
        tables = {}
        for name in ("take.float32", "untake.float32"):
            table = profile.tables[name]
            sizes = len(table.axes["bytes"])
            longest = table.values[-sizes:]
            values = tuple(by * v for v in longest) + longest * (len(table.axes["run"]) - 1)
            tables[name] = table.model_copy(update={"values": values})
        return profile.model_copy(update={"tables": profile.tables | tables})

    long, short, own = (decided(model, x, single_runs(by), ratio=0.3, **given)[0].products[0] for by, given in ((0.1, {}), (1, {}), (0.1, {"group": 4})))
    assert (long.how.group, short.how.group, own.how.group) == (16, 1, 4)
    assert (long.k, short.k, own.k) == (320, 320, 308) and long.ratio == short.ratio == 0.3  # 0.3 x 1024 = 307.2


@pytest.mark.slow
def test_expressions_hold_for_a_symbolic_batch() -> None:
    """One plan serves all sizes: the time is evaluated at the size of the batch that was traced, and the expressions hold for any."""
    s0 = sympy.Symbol("s0", positive=True, integer=True)
    product = next(t for t in terms(Case("linear", "output", "sampled")) if t.what == "product")
    assert product.flops.subs({expressions.M: s0, expressions.B: 1, expressions.T: 1, expressions.K: 64, expressions.N: 128, expressions.k: 16}) == 4096 * s0
    x = torch.randn(48, 64)
    torch._dynamo.mark_dynamic(x, 0)
    found: list[Any] = []
    backend = Backend({**ALWAYS, "group": 1}, inner_compile=run_as_is, on_plan=lambda plan, b, a: found.append(plan))
    torch.compile(mlp(64, 64, 64), backend=backend)(x)
    assert found[0].sites[0].products[0].time_exact_us == plans_of(mlp(64, 64, 64), {**ALWAYS, "group": 1}, torch.randn(48, 64))[0].products[0].time_exact_us


def test_explain_prints_the_expressions() -> None:
    report = explain(mlp(64, 48, 32), torch.randn(40, 64), config=ALWAYS | {"group": 1})
    lines = report.costs().splitlines()
    (product, *_) = [line for line in lines if "2*B*M*N*T*k" in line]
    first = report.sites[0].products["output"]
    assert f"{dict(first.terms)['product: 2*B*M*N*T*k by linear.output at M, k, N']:.3g}" in product
    assert dict(first.sizes) == {"B": 1, "I": 40, "K": 64, "M": 40, "N": 48, "O": 40, "T": 1, "e": 4, "k": 32, "p": 1, "q": 1, "u": 64}
    assert report.sites[0].time_sampled_us == sum(p.time_sampled_us or 0 for p in report.sites[0].products.values())


def test_estimators_of_every_method_have_a_time() -> None:
    profile = machine.current()
    for method in ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta"):
        how = Estimator(method, 64, 16, weight=1)
        found = CostModel(profile).evaluate(Case("linear", "output", "sampled", method, 1, how.scaled), SIZES | {expressions.k: how.kept}, torch.bfloat16)
        assert found.time_us is not None and found.time_us > profile.table(f"select.{method}").at(64, 1)
