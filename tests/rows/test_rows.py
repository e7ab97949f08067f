"""The backward pass on some rows: gradients against masked tangents of the exact model, what stops rows, symbols, several graphs, unbiasedness."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, Plans, rows_of
from helpers.models import ZOO, Buckets, ResidualLayer, mlp
from helpers.oracles import ChosenRows, grads, relative, spread
from torch import Tensor, nn

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.rows import row_backward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["bernoulli", "topk"])
@pytest.mark.parametrize("name", [n for n in ZOO if n != "dropout"])  # whose masks only Inductor draws like Inductor
def test_gradients_are_those_of_masked_tangents(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data = ZOO[name]
    chosen = ChosenRows(monkeypatch)
    model, x = make(), data()
    x = x.requires_grad_() if x.is_floating_point() else x
    f, plans = rows_of(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5, "method": method}})
    torch.manual_seed(3)
    out = f(x)
    tangent = torch.randn_like(out) * torch.rand(out.shape[0]).view(-1, *[1] * (out.dim() - 1)) ** 3
    out.backward(tangent)
    got = grads(model, x)
    assert [c.decision for c in plans[0].cuts] == ["rows"] and plans[0].cuts[0].reason == "the whole backward pass"
    assert len(chosen.choices) == 1 and len(chosen.choices[0][0]) == x.shape[0] // 2
    torch.manual_seed(3)
    model(x).backward(tangent * spread(chosen.mask(x.shape[0]), tangent))
    want = grads(model, x)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "flat_logits", "built_attention", "dropout"])
def test_through_inductor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data = ZOO[name]
    chosen = ChosenRows(monkeypatch)
    model, x = make(), data()
    f = torch.compile(model, backend="approx", options=HALF)
    torch.manual_seed(3)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    mask = chosen.mask(x.shape[0])
    exact = torch.compile(model, backend="inductor")  # draws the same dropout masks
    torch.manual_seed(3)
    exact(x).backward(tangent * spread(mask, tangent))
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
    seen = len(chosen.choices)
    for size in (x.shape[0], x.shape[0] + 6):  # other data, and another batch size: no recompile
        with torch.compiler.set_stance("fail_on_recompile"):
            fresh = data()
            fresh = torch.cat([fresh, fresh[:6]])[:size]
            f(fresh).sum().backward()
        model.zero_grad()
    assert [len(i) for i, _ in chosen.choices[seen:]] == [x.shape[0] // 2, (x.shape[0] + 6) // 2]


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_a_loss_inside_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut is where the loss's gradient reaches the last product; the last bias, above it, has its exact gradient."""
    make, data = ZOO[name]
    chosen = ChosenRows(monkeypatch)
    model, x = make(), data()
    y = torch.randint(0, 5, x.shape if name == "transformer" else (x.shape[0],))

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, -2), y.flatten())

    f, plans = rows_of(lambda x: loss(model(x)))
    f(x).backward()
    got = dict(zip([n for n, _ in model.named_parameters()], grads(model), strict=True))
    assert [c.decision for c in plans[0].cuts] == ["rows"]
    out = model(x)
    (whole,) = torch.autograd.grad(loss(out), out, retain_graph=True)
    out.backward(whole * spread(chosen.mask(x.shape[0]), whole))
    want = dict(zip(got, grads(model), strict=True))
    last = [n for n in got if n.endswith("bias")][-1]
    assert max(relative(got[n], want[n]) for n in got if n != last) < 1e-5
    assert relative(got[last], whole.flatten(0, -2).sum(0)) < 1e-5


def test_lower_blocks_keep_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model, x = nn.Sequential(mlp(20, 32, 24), nn.Tanh(), mlp(24, 32, 5)), torch.randn(48, 20)
    f, plans = rows_of(model, HALF | {"rules": [{"layers": "0.*", "grad": {"axis": "rows", "ratio": 0.25}}]})
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    assert [(c.level, c.ratio) for c in plans[0].cuts] == [(1, 0.5), (2, 0.25)]
    (idx1, w1), (idx2, w2) = chosen.choices
    assert (len(idx1), len(idx2)) == (24, 12) and w1 is not None and w2 is not None
    upper, lower = torch.zeros(48), torch.zeros(48)
    upper[idx1] = w1.float()
    lower[idx1[idx2]] = w1.float()[idx2] * w2.float()
    hidden = model[0](x)
    cut = hidden.detach().requires_grad_()
    model[2](torch.tanh(cut)).backward(tangent * upper[:, None])
    assert cut.grad is not None
    hidden.backward(torch.where(upper[:, None] > 0, cut.grad * (lower / upper.clamp_min(1e-9))[:, None], 0.0))
    want = grads(model)
    want[3] = cut.grad.sum(0)  # the cut is at the block's last product; its bias is above
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_rows_by_rule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers above the rule's keep all rows: the cut is where its gradient comes in."""
    chosen = ChosenRows(monkeypatch)
    model, x = nn.Sequential(mlp(20, 32, 24), nn.Tanh(), mlp(24, 32, 5)), torch.randn(48, 20)
    options = {"policy": "always", "sampling": "backward", "grad": "exact", "rules": [{"layers": "0.*", "grad": {"axis": "rows", "ratio": 0.25}}]}
    f, plans = rows_of(model, options)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    assert [s.reason for s in plans.sites] == ["backward on 0.25 of the rows"] * 2 + ["exact by the settings"] * 2
    hidden = model[0](x)
    cut = hidden.detach().requires_grad_()
    model[2](torch.tanh(cut)).backward(tangent)
    assert cut.grad is not None
    hidden.backward(cut.grad * chosen.mask(48)[:, None])
    want = grads(model)
    want[3] = cut.grad.sum(0)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


class Slices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 5)

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
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(20)

    def mix(self, h: Tensor) -> Tensor:
        return self.norm(h)


class Means(Slices):
    def mix(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


@pytest.mark.parametrize("make", [Shifts, Similarity, Cumulates, Picks, Norms, Means])
def test_rows_stop_where_samples_mix(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the op all rows run, with zeros for those left out: the gradient is still that of the masked tangents."""
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


@pytest.mark.slow
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
    """Choosing rows takes time, too: by default a backward pass must be worth it."""
    model = mlp(64, 64, 8)
    f, plans = rows_of(model, {})
    f(torch.randn(32, 64)).sum().backward()
    assert "is over before its rows would be chosen" in plans.sites[0].reason
    large = mlp(512, 1024, 1024, 8)
    torch._dynamo.reset()
    f, plans = rows_of(large, {})
    f(torch.randn(128, 512)).sum().backward()
    assert {s.decision for s in plans.sites} == {"sampled"}


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
        (Slices(), torch.randn(24, 20), "an order that is not known"),
    ]
    for module, x, words in cases:
        f, plans = rows_of(module)
        f(x).sum().backward()
        assert words in plans.sites[0].reason
        got = grads(module)
        module(x).sum().backward()
        assert max(relative(a, b) for a, b in zip(got, grads(module), strict=True)) < 1e-6


def test_users_tensors_keep_no_marks() -> None:
    model, x = mlp(20, 16, 5), torch.randn(24, 20)
    f, _ = rows_of(model)
    f(x).sum().backward()
    assert not hasattr(x, "_approx_compile_marked") and not hasattr(x, "_dynamo_weak_dynamic_indices")


def test_ratio_one_is_exact_and_evaluation_is_untouched() -> None:
    model, x = mlp(20, 16, 5), torch.randn(24, 20)
    torch.compile(model, backend="inductor")(x).square().sum().backward()
    want = grads(model)
    torch._dynamo.reset()
    torch.compile(model, backend="approx", options={"grad": {"axis": "rows", "ratio": 1.0}})(x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(grads(model), want, strict=True))
    torch._dynamo.reset()
    with torch.no_grad():
        exact = torch.compile(model, backend="inductor")(x)
        torch._dynamo.reset()
        f = torch.compile(model, backend="approx", options=HALF)
        assert torch.equal(f(x), exact)


@pytest.mark.parametrize("cut", ["breaks", "blocks"])
def test_several_graphs_share_one_set_of_rows(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            torch._dynamo.graph_break()
            x = F.relu(self.b(x))
            torch._dynamo.graph_break()
            return self.c(x)

    x, head = torch.randn(48, 20), nn.Linear(20, 20)  # the head is not compiled
    if cut == "breaks":
        model: nn.Module = Broken()
        f, plans = rows_of(model)
        assert len(plans) == 0
    else:
        model = f = nn.Sequential(*[ResidualLayer(20) for _ in range(3)])
        for part in model:
            part.compile(backend=Backend(HALF, inner_compile=run_as_is))
    out = f(x)
    tangent = torch.randn(48, 20)
    head(F.pad(out, (0, 20 - out.shape[1]))).backward(tangent)
    got = grads(model)
    assert len(chosen.choices) == 1
    with torch.compiler.set_stance("force_eager"):
        out = model(x)
    out.backward((tangent @ head.weight.detach())[:, : out.shape[1]] * chosen.mask(48)[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


@pytest.mark.distributed
@pytest.mark.usefixtures("one_rank")
def test_the_buckets_of_ddp_share_one_set_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    net, x = Buckets(), torch.randn(32, 512)
    f, plans = rows_of(nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1))
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    assert len(plans) > 1 and {s.decision for s in plans.sites} == {"sampled"} and len(chosen.choices) == 1
    got = grads(net)
    net(x).backward(tangent * chosen.mask(32)[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(net), strict=True)) < 1e-5


def test_gradients_added_on_the_way_make_the_lower_graph_run_on_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    lower, upper, x = ResidualLayer(20), nn.Linear(20, 5), torch.randn(48, 20)
    f, g = rows_of(lower)[0], rows_of(upper)[0]
    hidden = f(x)
    out = g(hidden)
    tangent = torch.randn_like(out)
    (hidden.square().sum() + (out * tangent).sum()).backward()
    got = grads(lower) + grads(upper)
    assert len(chosen.choices) == 1
    hidden = lower(x)
    out = upper(hidden)
    (hidden.square().sum() + (out * tangent * chosen.mask(48)[:, None]).sum()).backward()
    assert max(relative(a, b) for a, b in zip(got, grads(lower) + grads(upper), strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model, x = mlp(20, 32, 5), torch.randn(48, 20)
    cast = dtype == torch.bfloat16
    if not cast:
        model, x = model.to(dtype), x.to(dtype)
    f, _ = rows_of(model)
    tangent = torch.randn(48, 5, dtype=dtype)

    def run(model: Any, tangent: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            model(x).backward(tangent)
        return []

    run(f, tangent)
    got = grads(model)
    run(model, tangent * chosen.mask(48)[:, None].to(dtype))
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < (2e-2 if cast else 1e-12)


def test_accumulation_and_retained_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model, x, y = mlp(20, 32, 5), torch.randn(48, 20), torch.randn(48, 20)
    f, _ = rows_of(model)
    f(x).square().sum().backward()
    f(y).square().sum().backward()
    got = grads(model)
    masks = [torch.zeros(48).index_copy_(0, i, w.float()) for i, w in chosen.choices if w is not None]
    assert len(masks) == 2
    for data, mask in ((x, masks[0]), (y, masks[1])):
        out = model(data)
        out.backward(2 * out.detach() * mask[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
    with torch._functorch.config.patch(donated_buffer=False):
        torch._dynamo.reset()
        f, _ = rows_of(model)
        loss = f(x).square().sum()
        loss.backward(retain_graph=True)
        first = [g.clone() for g in grads(model)]
        chosen.original = lambda *args: chosen.choices[-1]
        loss.backward()
    assert max(relative(a, b) for a, b in zip(first, grads(model), strict=True)) < 1e-6


def test_nan_reaches_every_gradient() -> None:
    model, x = mlp(20, 32, 5), torch.randn(48, 20)
    f, _ = rows_of(model)
    out = f(x)
    tangent = torch.randn_like(out)
    tangent[7, 2] = float("nan")
    out.backward(tangent)
    assert all(g.isnan().any() for g in grads(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_unbiased(name: str) -> None:
    """2,000 draws: the mean gradient is the exact one within its standard error, in the mean square over parameters. A batch's gradient has few
    independent directions, so the draws are of 20 batches, and how far these differ says how far the mean square may be from 1."""
    make, data = ZOO[name]
    model = make()
    f, _ = rows_of(model)
    batches, draws = 20, 100
    squares = []
    for _ in range(batches):
        x = data()
        out = model(x)
        tangent = torch.randn_like(out) * (0.1 + torch.rand(out.shape[0])).view(-1, *[1] * (out.dim() - 1))
        out.backward(tangent)
        exact = torch.cat([g.flatten() for g in grads(model)]).double()
        off = torch.empty(draws, len(exact), dtype=torch.float64)
        for i in range(draws):
            f(x).backward(tangent)
            off[i] = torch.cat([g.flatten() for g in grads(model)]).double() - exact
        spread_of_mean = off.std(0) / draws**0.5
        real = spread_of_mean > 1e-7 * exact.abs().max()
        assert real.double().mean() > 0.85
        squares.append((off.mean(0) / spread_of_mean)[real].square().mean())
    found = torch.stack(squares)
    assert abs(found.mean() - 1) < 3.5 * found.std() / batches**0.5 and found.mean() < 1.5


def test_calls_of_a_stage_count_on_what_was_assumed_of_the_size() -> None:
    """A convolution's code may assume a batch of at least 16: fewer rows are then rounded up."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)), torch.randn(64, 3, 8, 8)
    counts = []
    plain = row_backward.RowBackward.run

    def run(self: Any, values: Any, symbols: Any, kept: Any, *more: Any) -> Any:
        counts.append((list(kept), [g.subs(symbols | {self.found.batch: kept[0]}) for g in self.guards]))
        return plain(self, values, symbols, kept, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_backward.RowBackward, "run", run)
        f, _ = rows_of(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.05}})
        f(x).sum().backward()
    ((kept, guards),) = counts
    assert 3 <= kept[0] <= 16 and all(bool(g) for g in guards)


def test_blocked_reasons_are_shown_by_explain() -> None:
    from approx_compile import explain

    for config, decision in ((HALF, "rows"), ({}, "exact")):
        report = explain(Norms(), torch.randn(24, 20), config=config)
        (cut,) = report.cuts
        assert "rows, level 1" in str(report) and (cut.rows, cut.decision) == (24, decision)
        assert {s.name: s.products["grad_weight"].decision for s in report.sites} == {"a": "exact", "b": decision}


def test_backends_differ_by_their_rows() -> None:
    seen = set()
    for method, ratio in itertools.product(["bernoulli", "topk"], [0.5, 0.25]):
        seen.add(Backend({"grad": {"axis": "rows", "method": method, "ratio": ratio}}))
    assert len(seen) == 4 and Backend({"policy": "adaptive"}) not in seen


class Body(nn.Module):
    def __init__(self, op: Callable[[Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        self.inner, self.op = nn.Linear(8, 8), op

    def forward(self, x: Tensor) -> Any:
        return self.op(self.inner(x))


def test_rows_of_another_axis_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upper graph's first axis is the lower one's second: what it marks are no samples there."""
    chosen = ChosenRows(monkeypatch)
    lower, upper, x = Body(lambda h: torch.tanh(h).transpose(0, 1)), Body(), torch.randn(16, 12, 8)
    f, g = rows_of(lower)[0], rows_of(upper)[0]
    out = g(f(x))
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(lower) + grads(upper)
    upper(lower(x)).backward(tangent * chosen.mask(12).view(12, 1, 1))
    assert max(relative(a, b) for a, b in zip(got, grads(lower) + grads(upper), strict=True)) < 1e-5


def test_a_graph_with_a_loss_of_its_own_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    lower, upper, x = Body(lambda h: (torch.tanh(h), h.square().sum())), Body(), torch.randn(16, 8)
    f, g = rows_of(lower)[0], rows_of(upper)[0]
    hidden, own = f(x)
    out = g(hidden)
    tangent = torch.randn_like(out)
    ((out * tangent).sum() + own).backward()
    got = grads(lower)
    hidden, own = lower(x)
    ((upper(hidden) * tangent * chosen.mask(16)[:, None]).sum() + own).backward()
    assert max(relative(a, b) for a, b in zip(got, grads(lower), strict=True)) < 1e-5


def test_rows_that_only_a_lower_level_needs_are_kept_above() -> None:
    """One branch has no gradient in half the rows, the other, which keeps fewer, has."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(20, 16), nn.Linear(16, 5), nn.Linear(16, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            return (self.one(h).square() * mask).mean() + self.two(h).square().mean()

    model, x, mask = Branches(), torch.randn(32, 20), (torch.arange(32) < 16).float()[:, None]
    f, _ = rows_of(model, HALF | {"rules": [{"layers": "two", "grad": {"axis": "rows", "ratio": 0.25}}]})
    model(x, mask).backward()
    want = grads(model)
    mean = [torch.zeros_like(g) for g in want]
    for _ in range(600):
        f(x, mask).backward()
        mean = [m + g / 600 for m, g in zip(mean, grads(model), strict=True)]
    assert max(relative(a, b) for a, b in zip(mean, want, strict=True)) < 0.12


def test_a_sum_inside_the_graph_spreads_an_expanded_gradient() -> None:
    first, last, x = nn.Linear(20, 20), nn.Linear(20, 5), torch.randn(32, 20)
    f, plans = rows_of(lambda x: last(torch.tanh(first(x))).sum())
    f(x).backward()
    assert plans[0].cuts[0].decision == "rows" and all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters())


def test_an_exact_last_layer_has_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model, x = mlp(20, 32, 32, 5), torch.randn(32, 20)
    f, plans = rows_of(model, HALF | {"rules": [{"layers": "4", "method": "exact"}]})
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    hidden = model[:4](x)
    top = hidden.detach().requires_grad_()
    model[4](top).backward(tangent)
    assert top.grad is not None
    hidden.backward(top.grad * chosen.mask(32)[:, None])
    bias = 3  # of layer 2, above the cut: exact
    assert max(relative(a, b) for i, (a, b) in enumerate(zip(got, grads(model), strict=True)) if i != bias) < 1e-5
    assert [s.reason for s in plans.sites][-1] == "exact by the settings"


def test_channels_last_below_the_rows_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients put back among all rows have the strides that the code below was compiled for."""
    chosen = ChosenRows(monkeypatch)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(288, 5)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(24, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    out = torch.compile(model, backend="approx", options=HALF)(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    model(x).backward(tangent * chosen.mask(24)[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
