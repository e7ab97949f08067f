"""Sites that read the same activation share one choice: the best for the product with all their weights side by side. The graph is the one written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from helpers.compile import compiled, plans_of
from helpers.oracles import grads, relative
from rich.progress import Progress
from torch import Tensor, nn

from approx_compile import ApproxConfig, ConfigError, explain, machine
from approx_compile.kernels import availability
from approx_compile.kernels.estimators import make_estimator
from approx_compile.kernels.gather import Axis, norms_sq, sample
from approx_compile.passes.cost.expressions import B, Case, I, K, e, terms
from approx_compile.tools.tuning.measurements import Measurements
from approx_compile.tools.tuning.search_space import SearchSpace
from approx_compile.tools.tuning.trial import Trials
from approx_compile.tools.tuning.tune import _trials_with_sharing as shared_ways

pytestmark = pytest.mark.usefixtures("one_thread")

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "min_k": 1, "group": 1, "share": True}


class Attention(nn.Module):
    """q, k and v read one activation; with `residual` its gradient has a further term."""

    def __init__(self, width: int = 64, residual: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = (self.q(h) @ self.k(h).mT).softmax(-1) @ self.v(h)
        return y + h if self.residual else y


class Down(nn.Module):
    """Both convolutions of a downsampling block read the ReLU's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(64, 128, 3, padding=1)
        self.main = nn.Conv2d(128, 48, 3, 2, 1)
        self.short = nn.Conv2d(128, 48, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.main(h) + self.short(h)


def masks(choices: Any, leader: str, size: int) -> Tensor:
    found = torch.zeros(size)
    scale = choices.get(f"{leader}.output.scale")
    found[choices[f"{leader}.output.idx"]] = 1 if scale is None else scale
    return found


def only(layers: list[str], **keys: Any) -> dict[str, Any]:
    return {**ALWAYS, "method": "exact", "rules": [{"layers": layers, "method": "topk", **keys}]}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("method", ["topk", "bernoulli"])
def test_one_choice_for_all(method: str, residual: bool) -> None:
    model, x = Attention(residual=residual), torch.randn(4, 8, 64, requires_grad=True)
    run, choices, plans = compiled(model, only(["q", "k", "v"], method=method))
    y = run(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = grads(model, x)
    assert {c.split(".")[0] for c in choices} == {"q"}
    q, k, v, *_ = (s for s in plans.sites if s.name in "qkv")
    assert (k.products[0].shares, v.products[0].shares) == ("q", "q") and q.products[0].shares is None
    once = [None, None, None] if residual else [None, "q", "q"]
    assert [next(p for p in s.products if p.name == "grad_input").shares for s in (q, k, v)] == once
    if method == "topk":
        h = model.norm(x).flatten(0, 1)
        score = norms_sq(h, Axis(1)) * sum(norms_sq(m.weight, Axis(1)) for m in (model.q, model.k, model.v))
        assert torch.equal(choices["q.output.idx"], score.topk(32).indices.sort().values)
    mask = masks(choices, "q", 64)
    h = model.norm(x)
    q_, k_, v_ = (torch.nn.functional.linear(h * mask, m.weight, m.bias) for m in (model.q, model.k, model.v))
    by_hand = (q_ @ k_.mT).softmax(-1) @ v_
    by_hand = by_hand + h if residual else by_hand
    by_hand.backward(dy)
    assert relative(y, by_hand) < 1e-6
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, grads(model, x), strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_both_convolutions_of_a_block(memory_format: torch.memory_format) -> None:
    model, x = Down().to(memory_format=memory_format), torch.randn(4, 64, 8, 8).to(memory_format=memory_format)
    run, choices, plans = compiled(model, only(["main", "short"]))
    y = run(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = grads(model)
    assert {c.split(".")[0] for c in choices} == {"main"} and len(choices["main.output.idx"]) == 64
    h = torch.relu(model.stem(x)) * masks(choices, "main", 128).view(-1, 1, 1)
    by_hand = model.main(h) + model.short(h)
    by_hand.backward(dy)
    assert relative(y, by_hand) < 1e-6
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, grads(model), strict=True))
    stem = next(s for s in plans.sites if s.name == "stem")
    assert [p.skips for p in stem.products[1:]] == ["main"]  # what both dropped is zero in the stem's gradient


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("method", ["topk", "wta", "topk_weights"])
@pytest.mark.parametrize("residual", [False, True])
def test_kernels_of_ours_share_the_choice_alone(method: str, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice and every gradient are those of Inductor's lowering. Nothing is put back, because each kernel writes its result in one pass."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
    model, x = Attention(128, residual), torch.randn(4, 8, 128, requires_grad=True)
    found = []
    for lowering in ("inductor", "triton"):
        torch._dynamo.reset()
        torch.manual_seed(1)
        run, choices, plans = compiled(model, only(["q", "k", "v"], method=method, group=32, lowering=lowering))
        run(x).square().sum().backward()
        outputs = [s.products[0] for s in plans.sites if s.name in "qkv"]
        assert [p.shares for p in outputs] == [None, "q", "q"] and {p.lowering for p in outputs} == {lowering}
        assert {c.split(".")[0] for c in choices} == {"q"}
        found.append((choices["q.output.idx"], grads(model, x)))
        summed = [p.shares for s in plans.sites for p in s.products if p.name == "grad_input" and s.name in "kv"]
        assert summed == ([None] * 2 if residual or lowering == "triton" else ["q"] * 2)
    assert torch.equal(found[0][0], found[1][0])
    assert all(relative(a, b) < 1e-5 for a, b in zip(found[1][1], found[0][1], strict=True))


@pytest.mark.slow
def test_convolutions_share_by_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
    model, x = Down().to(memory_format=torch.channels_last), torch.randn(4, 64, 8, 8).to(memory_format=torch.channels_last)
    found = []
    for lowering in ("inductor", "triton"):
        torch._dynamo.reset()
        run, choices, plans = compiled(model, only(["main", "short"], group=32, lowering=lowering))
        run(x).square().sum().backward()
        assert {s.products[0].lowering for s in plans.sites if s.name != "stem"} == {lowering}
        assert choices.keys() == {"main.output.idx"}
        found.append(grads(model))
    assert all(relative(a, b) < 1e-5 for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_only_one_code_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """`k` has no kernel. Left to `auto`, time may choose a lowering that all have."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)

    class Ragged(Attention):
        def __init__(self) -> None:
            super().__init__(128)
            self.k, self.q = nn.Linear(128, 72), nn.Linear(128, 72)  # no whole lines of 16

    def shares(model: nn.Module, **options: Any) -> dict[str, tuple[str | None, str]]:
        torch._dynamo.reset()
        behind = nn.Sequential(nn.Linear(16, 128), nn.GELU(), model)  # what reads raw data is exact
        sites = plans_of(behind, ALWAYS | {"group": 32} | options, torch.randn(8, 512, 16))
        return {s.name: (s.products[0].shares, s.products[0].lowering) for s in sites if s.name.startswith("2.")}

    assert shares(Ragged(), lowering="triton") == {"2.q": (None, "inductor"), "2.k": ("2.q", "inductor"), "2.v": (None, "triton")}
    profile = machine.current()
    fast = {f"triton.{n}": scaled(t, 20.0) for n, t in profile.tables.items() if n.startswith("linear.")}
    options: dict[str, Any] = {"policy": "cost", "rules": [{"layers": "site"}]}
    with machine.use(profile.model_copy(update={"tables": profile.tables | fast})):
        assert shares(Attention(128), **options) == {"2.q": (None, "triton"), "2.k": ("2.q", "triton"), "2.v": ("2.q", "triton")}
        assert shares(Ragged(), **options)["2.v"] == (None, "triton")  # better than with the others by Inductor


@pytest.mark.parametrize("method", ["bernoulli", "crs", "wta", "uniform"])
def test_every_product_stays_unbiased(method: str) -> None:
    """Mean of X W' over draws = X W for both weights, and E |X W' - X W|^2 of bernoulli = sum (1 - p) / p a^2 w^2, w of each weight alone."""
    how = make_estimator(method, 24, 0.3, 1, 1)
    assert how is not None
    x, w, v = torch.rand(3, 24).double() / torch.arange(1, 25), torch.rand(24, 4).double(), torch.rand(24, 2).double()

    def draw(_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        idx, scale, a, b = sample(how, x, w, Axis(1), Axis(0), [(v, Axis(0))])
        assert scale is not None
        return a @ b, a @ (v[idx] * scale[:, None]), torch.zeros(24).double().scatter(0, idx, scale)

    first, second, weight = torch.vmap(draw, randomness="different")(torch.zeros(20000))
    for found, exact in ((first, x @ w), (second, x @ v)):
        assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / 20000**0.5 + 1e-9).all()
    if method == "bernoulli":
        p = 1 / weight.max(0).values  # a unit's scale is 1 / p wherever it is kept
        assert torch.allclose(p.sum(), torch.tensor(how.k).double(), rtol=1e-6)
        for found, other in ((first, w), (second, v)):
            variance = ((1 - p) / p * x.square().sum(0) * other.square().sum(1)).sum()
            spread = (found - found.mean(0)).square().sum((1, 2))
            assert abs(spread.mean() - variance) < 5 * spread.std() / 20000**0.5


@pytest.mark.slow
def test_only_what_chooses_alike_shares() -> None:
    x = torch.randn(4, 8, 64, requires_grad=True)

    def shares(**options: Any) -> dict[str, str | None]:
        torch._dynamo.reset()
        return {s.name: s.products[0].shares for s in plans_of(Attention(), {**ALWAYS, **options}, x) if s.name in "qkv"}

    assert shares() == {"q": None, "k": "q", "v": "q"}
    assert shares(share=False) == {"q": None, "k": None, "v": None}
    assert shares(rules=[{"layers": "k", "ratio": 0.25}]) == {"q": None, "k": None, "v": "q"}
    assert shares(group=5) == {"q": None, "k": "q", "v": "q"}
    assert shares(sampling="blackbox") == {"q": None, "k": "q", "v": "q"}
    assert shares(sampling="backward") == {"q": None, "k": None, "v": None}
    sites = {s.name: s for s in plans_of(Attention(), {**ALWAYS, "sampling": "blackbox"}, x)}
    assert all(p.decision == "exact" and p.shares is None for p in sites["k"].products[1:])


class Readers(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(1024, out) for _ in range(3))
        self.o = nn.Linear(out, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x) * self.b(x) + self.c(x))


@pytest.mark.slow
def test_left_alone_predicted_time_decides() -> None:
    """Three wide layers gain little by sharing. In narrow ones the activation's norms and gather take most of the time. Under policy "cost", narrow layers
    that would not pay by themselves are sampled together where that pays."""
    x = torch.randn(512, 1024, requires_grad=True)
    keys = {k: v for k, v in ALWAYS.items() if k != "share"}

    def shares(out: int, profile: machine.Machine, **options: Any) -> list[Any]:
        torch._dynamo.reset()
        with machine.use(profile):
            return plans_of(Readers(out), {**keys, **options}, x)

    here = machine.current()
    assert [s.products[0].shares for s in shares(1024, here)] == [None] * 4
    narrow = shares(32, here)
    assert [s.products[0].shares for s in narrow] == [None, "a", "a", None] and narrow[1].reason.endswith("shares its indices with a")
    assert narrow[0].reason.endswith("shares its indices with b, c")
    slow = here.model_copy(update={"tables": here.tables | {"take.float32": scaled(here.tables["take.float32"], 0.2)}})
    options = {"policy": "cost", "ratio": 0.5, "group": "auto", "rules": [{"layers": "site"}]}
    apart, together = (shares(32, slow, **options, share=share)[:3] for share in (False, True))
    assert [s.decision for s in apart] == ["exact"] * 3 and [s.decision for s in together] == ["sampled"] * 3
    assert "together" in together[1].reason


@pytest.mark.slow
def test_told_to_it_needs_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without a profile, sampled sites share where the user asks for it, and only there."""
    monkeypatch.setattr(machine, "DEVICES", ())
    x = torch.randn(512, 1024, requires_grad=True)

    def shares(**options: Any) -> list[Any]:
        torch._dynamo.reset()
        return plans_of(Readers(32), {**ALWAYS, **options}, x)

    told = shares()
    assert [s.products[0].shares for s in told] == [None, "a", "a", None] and told[0].time_sampled_us is None
    assert told[1].reason.endswith("output: topk; shares its indices with a") and told[1].flops_sampled < told[0].flops_sampled
    assert [s.products[0].shares for s in shares(share=None)] == [None] * 4
    timed = shares(policy="cost", rules=[{"layers": "site"}])
    assert [s.decision for s in timed] == ["exact"] * 4 and timed[0].reason == "no cost model for cpu"


def scaled(table: machine.Table, by: float) -> machine.Table:
    return table.model_copy(update={"values": tuple(v * by for v in table.values)})


def test_costs_of_a_shared_choice() -> None:
    """Counted by hand: the terms that another site computes are left out (norms of the activation, selection, its gather, and the un-gather of the summed
    gradient)."""
    own, shared = ({t.what: t for t in terms(Case("linear", "output", "sampled", shares=s))} for s in (False, True))
    assert set(own) - set(shared) == {"selection", "take A", "new memory, A"}
    assert sympy.expand(own["norms"].bytes - shared["norms"].bytes) == e * B * I * K
    own, shared = ({t.what: t for t in terms(Case("linear", "grad_input", "coupled", shares=s))} for s in (False, True))
    assert set(own) - set(shared) == {"untake", "launches", "new memory, result"} and own["product"] == shared["product"]
    own, shared = ({t.what: t for t in terms(Case("linear", "output", "sampled", shares=s, lowering="triton"))} for s in (False, True))
    assert set(own) - set(shared) == {"selection"} and own["product"] == shared["product"]  # nothing is gathered in the first place
    assert sympy.expand(own["norms"].bytes - shared["norms"].bytes) == e * B * I * K


def test_the_key_is_checked_and_said() -> None:
    with pytest.raises(ConfigError, match=r"share: got 'yes'; true or false is expected"):
        ApproxConfig(share="yes")
    report = explain(Attention(), torch.randn(4, 8, 64, requires_grad=True), config=ALWAYS)
    assert report.to_dict()["sites"][1]["products"]["output"]["shares"] == "q"
    assert "shares its indices with q" in {s.name: s for s in report.sites}["v"].reason


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tuning_measures_the_error_both_ways() -> None:
    """Narrow layers share by predicted time, so the other measurement is of each at its own entries. Wide layers do not share, so the other measurement is of
    them together."""
    x, target = torch.randn(64, 1024), torch.randn(64, 8)
    for out, other in ((32, False), (1024, True)):
        candidates = SearchSpace.of({"policy": "always", "group": 1})
        trials = Trials(Readers(out), (x,), target, None, candidates.options({}))
        found = Measurements(trials, candidates, 1.0, (0.5,), 60.0, Progress(disable=True))
        candidates.survey(trials, 0.5)
        tried = found.measure_error(candidates.options(dict.fromkeys("abc", 0.5)))
        (again,) = shared_ways(found, tried)
        assert again.options["share"] is other and again.error > 0 and again.error != tried.error
        shares = [[s.products[0].shares for s in t.sites[:3]] for t in (tried, again)]
        assert shares[other] == [None, "a", "a"] and shares[not other] == [None] * 3
