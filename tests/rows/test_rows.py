"""The backward pass on some rows: its gradients are those of the exact model whose output gradient is masked, and their mean is the exact gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, rows_of
from helpers.models import ZOO, mlp
from helpers.oracles import ChosenRows, grads, relative, spread
from helpers.sampling import all_but
from torch import Tensor, nn

from approx_compile import Backend
from approx_compile.rows import row_backward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.sample(14)
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
@pytest.mark.exhaustive  # e2e/test_inductor.py is what make test has of it
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


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_a_loss_inside_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut is where the loss's gradient reaches the last product. The last bias, above the cut, has its exact gradient."""
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


@pytest.mark.slow
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
    """The layers above that of the rule keep all rows: the cut is where this layer's output gradient arrives."""
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


def test_users_tensors_keep_no_marks() -> None:
    model, x = mlp(20, 16, 5), torch.randn(24, 20)
    f, _ = rows_of(model)
    f(x).sum().backward()
    assert not hasattr(x, "_approx_compile_marked") and not hasattr(x, "_dynamo_weak_dynamic_indices")


@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.parametrize("name", all_but(["mlp"], ["mlp", "cnn", "transformer"]))
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
    """The code of a convolution may assume a batch of at least 16: fewer rows are then rounded up."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)), torch.randn(64, 3, 8, 8)
    counts = []
    plain = row_backward.RowBackward.run

    def run(self: Any, values: Any, symbols: Any, kept: Any, *more: Any) -> Any:
        counts.append((list(kept), [g.subs(symbols | {self.partition.batch.symbol: kept[0]}) for g in self.guards]))
        return plain(self, values, symbols, kept, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_backward.RowBackward, "run", run)
        f, _ = rows_of(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.05}})
        f(x).sum().backward()
    ((kept, guards),) = counts
    assert 3 <= kept[0] <= 16 and all(bool(g) for g in guards)


def test_backends_differ_by_their_rows() -> None:
    seen = set()
    for method, ratio in itertools.product(["bernoulli", "topk"], [0.5, 0.25]):
        seen.add(Backend({"grad": {"axis": "rows", "method": method, "ratio": ratio}}))
    assert len(seen) == 4 and Backend({"policy": "adaptive"}) not in seen


@pytest.mark.slow
def test_rows_that_only_a_lower_level_needs_are_kept_above() -> None:
    """One branch has no gradient in half of the rows; the other, which keeps fewer rows, has."""

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


@pytest.mark.slow
def test_channels_last_below_the_rows_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are put back among all rows have the strides that the code below was compiled for."""
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


class Residual(nn.Module):
    """Blocks with a path around them, so that the gradient of an excluded layer is added to one that runs on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(32, 64, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("rule", [{"method": "exact"}, {"grad": {"axis": "rows", "ratio": 1}}, {"grad": {"axis": "rows", "method": "exact"}}], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_that_a_rule_keeps_exact(residual: bool, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is exact wherever it is, some layers above and below are sampled, and the mean over complementary halves of the rows is exact."""
    model = Residual() if residual else mlp(32, 64, 64, 64, 64, 8)
    layer = "blocks.2.0" if residual else "4"
    start = [0]

    def halves(method: str, norms_sq: Tensor, k: int, random: Any) -> tuple[Tensor, Tensor]:
        return torch.arange(start[0], 16, 2), torch.full((8,), 2.0)

    monkeypatch.setattr(row_backward, "choose_rows", halves)
    x = torch.randn(16, 32, requires_grad=True)
    f, plans = rows_of(model, HALF | {"rules": [{"layers": layer, **rule}]})
    found = []
    for start[0] in (0, 1):
        f(x).square().sum().backward()
        found.append(dict(zip([*dict(model.named_parameters()), "x"], grads(model, x), strict=True)))
    model(x).square().sum().backward()
    exact = dict(zip([*dict(model.named_parameters()), "x"], grads(model, x), strict=True))
    for name, want in exact.items():
        torch.testing.assert_close((found[0][name] + found[1][name]) / 2, want, rtol=1e-4, atol=1e-4)
    off = {name: relative(found[0][name], want) for name, want in exact.items()}
    assert max(off[f"{layer}.weight"], off[f"{layer}.bias"]) < 1e-5
    lowest, highest = ("blocks.0.0.weight", "blocks.3.2.weight") if residual else ("0.weight", "8.weight")
    assert off[lowest] > 0.01 and off[highest] > 0.01
    assert next(s for s in plans.sites if s.name == layer).decision == "exact"
