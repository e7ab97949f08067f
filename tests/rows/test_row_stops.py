"""Where rows end and why: ops that mix samples, batches of fixed size, models that are too small; and the reasons that a user reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.compile import HALF, Plans, rows_of
from helpers.models import mlp
from helpers.oracles import ChosenRows, grads, grads_under_a_tangent, over_halves, relative
from torch import Tensor, nn

from approx_compile import Backend
from approx_compile.reasons import Template
from approx_compile.reasons.rows import CROSS_SAMPLE, UNKNOWN_OP

pytestmark = pytest.mark.usefixtures("one_thread")


class Slices(nn.Module):
    def __init__(self, width: int = 60) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.mix(torch.tanh(self.a(x))))

    def mix(self, h: Tensor) -> Tensor:
        return torch.cat([h[::2], h[1::2]])


class Shifts(Slices):
    def mix(self, h: Tensor) -> Tensor:
        return h + h.roll(1, 0)


class Similarity(Slices):
    def mix(self, h: Tensor) -> Tensor:
        return (h @ h.t()).softmax(1) @ h


class Cumulates(Slices):
    def mix(self, h: Tensor) -> Tensor:
        return h.cumsum(0)


class Picks(Slices):
    def mix(self, h: Tensor) -> Tensor:
        return h[torch.arange(h.shape[0] - 1, -1, -1)]


class Norms(Slices):
    def __init__(self, width: int = 60) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(20)

    def mix(self, h: Tensor) -> Tensor:
        return self.norm(h)


class Means(Slices):
    def mix(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


@pytest.mark.parametrize("make", [Shifts, Similarity, Cumulates, Picks, Norms, Means])
def test_rows_stop_where_samples_mix(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the op all rows run, with zeros for those left out, so the gradient is still that of the masked tangents."""
    chosen = ChosenRows(monkeypatch)
    model, x = make(), torch.randn(24, 20).requires_grad_()
    f, plans = rows_of(model)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model, x)
    (cut,) = plans[0].cuts
    assert cut.decision == "rows" and cut.reason.startswith("rows end where ")
    assert 0 < cut.flops_on_rows < cut.flops_all
    decisions = {s.name: [p.decision for p in s.products[1:]] for s in plans.sites if s.name in "ab"}
    assert decisions == {"a": ["exact", "exact"], "b": ["rows", "rows"]}
    model(x).backward(tangent * chosen.mask(24)[:, None])
    want = grads(model, x)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-5 * (1 + b.norm())


class Redundancy(Slices):
    """Barlow Twins: the loss compares features over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(torch.tanh(self.a(x)))
        z = (z - z.mean(0)) / z.std(0)
        return (z.T @ z / len(x) - torch.eye(z.shape[1])).square().sum()


class TwoNorms(Norms):
    """Rows lie between two norms: the backward pass of the last one runs on all rows, and so does what is below the first."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.first, self.c, self.d = nn.BatchNorm1d(20), nn.Linear(20, 40), nn.Linear(40, 20)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.d(torch.tanh(self.c(self.first(x)))))


class TwoHeads(Norms):
    """One output is behind a norm, the other is not."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return torch.cat([self.b(self.mix(h)), h[:, :2]], 1)


@pytest.mark.parametrize("make", [Shifts, Similarity, Cumulates, Picks, Norms, Means, Redundancy, TwoNorms, TwoHeads])
def test_rows_begin_below_a_head_where_samples_mix(make: type[Slices], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where most work lies below the ops that mix samples. The mean of the gradients on even samples and on odd ones, with weight 2, is the exact gradient."""
    model, x = make(3), torch.randn(24, 20).requires_grad_()
    f, plans = rows_of(model)

    mean, differ = over_halves(monkeypatch, lambda: grads_under_a_tangent(f, model, x))
    (cut,) = plans[0].cuts
    assert cut.decision == "rows" and "all above it runs on all rows" in cut.reason
    assert cut.flops_on_rows > 0.25 * cut.flops_all
    for got, want in zip(mean, grads_under_a_tangent(model, model, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert differ[[n for n, _ in model.named_parameters()].index("a.weight")]


def images() -> nn.Module:
    """Most work lies between two norms, in convolutions, for which Inductor chooses a memory layout of its own."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 8, 3, padding=1)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


@pytest.mark.slow
def test_stages_get_the_strides_that_they_were_compiled_for(small_work_counts: None) -> None:
    """Inductor gives gradients that go from stage to stage other strides than the graph has. All rows are kept, so that gradients are the exact ones."""
    model, x = images(), torch.randn(12, 3, 8, 8)
    plans = Plans()
    f = torch.compile(model, backend=Backend({"policy": "adaptive", "adaptive": {"tau": 1e-9}}, on_plan=plans))
    for n in (12, 9):
        f(x[:n]).square().sum().backward()
        found = grads(model)
        model(x[:n]).square().sum().backward()
        for got, want in zip(found, grads(model), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()) + 1e-4)
    assert [c.decision for p in plans for c in p.cuts] == ["rows"] and plans[0].cuts[0].flops_on_rows > 0.5 * plans[0].cuts[0].flops_all


@pytest.mark.slow
@pytest.mark.exhaustive
def test_policies_that_look_at_the_cost_decline_and_are_then_inductor_bit_for_bit() -> None:
    model, x = nn.Sequential(nn.Linear(20, 64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 5)), torch.randn(24, 20)
    twin = copy.deepcopy(model)
    plans = Plans()
    f = torch.compile(model, backend=Backend({"policy": "adaptive"}, on_plan=plans))
    with torch._inductor.config.patch(force_disable_caches=True):  # after a cache hit there is no plan to look at
        f(x).sum().backward()
    torch.compile(twin, backend="inductor")(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(twin), strict=True))
    assert "BatchNorm" in plans.sites[0].reason and "could run on some of the rows" in plans.sites[0].reason
    assert plans[-1].cuts[0].decision == "exact"
    assert "24x" in plans.sites[0].shape
    with torch.compiler.set_stance("fail_on_recompile"):
        f(torch.randn(24, 20)).sum().backward()


def test_small_models_are_left_alone() -> None:
    """Choosing rows takes time too, so by default the backward pass must be large enough."""
    model = mlp(64, 64, 8)
    f, plans = rows_of(model, {})
    f(torch.randn(32, 64)).sum().backward()
    assert "is over before its rows would be chosen" in plans.sites[0].reason
    large = mlp(512, 1024, 1024, 8)
    torch._dynamo.reset()
    f, plans = rows_of(large, {})
    f(torch.randn(128, 512)).sum().backward()
    assert {s.decision for s in plans.sites} == {"sampled"}


@pytest.mark.slow
def test_no_symbol_no_rows() -> None:
    model = nn.Linear(20, 5)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).view(24, 5) + torch.ones(24, 5)

    cases: list[tuple[nn.Module, Tensor, str]] = [
        (Fixed(), torch.randn(24, 20), "fixes the size"),
        (nn.Sequential(model), torch.randn(2, 20), "a batch of 2"),
    ]
    for module, x, words in cases:
        f, plans = rows_of(module)
        f(x).sum().backward()
        assert words in plans.sites[0].reason
        got = grads(module)
        module(x).sum().backward()
        assert max(relative(a, b) for a, b in zip(got, grads(module), strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.exhaustive
def test_blocked_reasons_are_shown_by_explain() -> None:
    from approx_compile import explain

    for config, decision in ((HALF, "rows"), ({}, "exact")):
        report = explain(Norms(), torch.randn(24, 20), config=config)
        (cut,) = report.cuts
        assert "Rows: " in str(report) and (cut.rows, cut.decision) == (24, decision)
        assert {s.name: s.products["grad_weight"].decision for s in report.sites} == {"a": "exact", "b": decision}


class Distances(nn.Module):
    """The gradient of `cdist` is an op without a batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.centers = nn.Linear(20, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.a(x).unsqueeze(1), self.centers.expand(len(x), 6, 8))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(20, 20), nn.BatchNorm1d(20)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))


def test_a_reason_names_module_source_line_and_what_to_do() -> None:
    """In the joint graph, where an op has no rule, and in Dynamo's, where a model is declined before it is traced again."""
    cases: list[tuple[nn.Module, dict[str, Any], str, Template]] = [
        (Distances(), HALF, "(at blocks.0, test_row_stops.py:", UNKNOWN_OP),
        (nn.Sequential(*(Normalised() for _ in range(5))), {}, "(at blocks.0.4.norm, test_row_stops.py:", CROSS_SAMPLE),
    ]
    for block, options, place, template in cases:
        model = nn.Sequential()
        model.blocks = nn.Sequential(block, nn.Flatten())
        f, plans = rows_of(model, options)
        f(torch.randn(24, 20)).sum().backward()
        (cut,) = plans[0].cuts
        assert place in cut.reason and template.id in cut.reason.ids and template.advice in cut.reason.advice
        code = cut.reason.partition(place)[2]
        assert "torch.cdist(" in code or "self.norm(" in code
