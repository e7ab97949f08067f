"""For every op on the batch the gradient is that of the masked tangents: on the rows kept where samples stay apart, else on all rows below the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, rows_of
from helpers.oracles import ChosenRows, grads
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 20, 12
IDX = torch.tensor([3, 1, 1, 0, 7])
TABLE = torch.randn(C, 5)


def gram(h: Tensor) -> Tensor:
    return h.view(-1, 3, 4).mT @ h.view(-1, 3, 4)


APART: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("sin", "exp", "tanh", "sigmoid", "erf", "abs", "reciprocal", "atan")},
    **{
        name: getattr(F, name) for name in ("gelu", "silu", "mish", "softplus", "elu", "hardswish", "leaky_relu", "logsigmoid", "softsign", "relu6", "hardtanh")
    },
    "softmax": lambda h: h.softmax(1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True),
    "layer_norm": lambda h: F.layer_norm(h, (C,)),
    "group_norm": lambda h: F.group_norm(h, 3),
    "instance_norm": lambda h: F.instance_norm(h.view(-1, 3, 4)).flatten(1),
    "normalize": lambda h: F.normalize(h, dim=1),
    "std": lambda h: h / h.std(1, keepdim=True),
    "prod": lambda h: h * (1 + 0.1 * h).prod(1, keepdim=True),
    "amax": lambda h: h - h.amax(1, keepdim=True),
    "max": lambda h: h + h.max(1, keepdim=True).values,
    "cumsum": lambda h: h.cumsum(1),
    "cumprod": lambda h: (1 + 0.1 * h).cumprod(1),
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(2, 1),
    "sort": lambda h: h.sort(1).values,
    "topk": lambda h: torch.cat([h.topk(5, 1).values, h[:, :7]], 1),
    "chunk": lambda h: torch.cat([2 * a for a in h.chunk(3, 1)], 1),
    "split": lambda h: h.split([5, 7], 1)[1].repeat(1, 2)[:, :C],
    "unbind": lambda h: torch.stack(h.unbind(1)[::-1], 1),
    "glu": lambda h: F.glu(torch.cat([h, h.sin()], 1), 1),
    "gather": lambda h: h + h.gather(1, IDX.expand(h.shape[0], 5)).sum(1, keepdim=True),
    "index_select": lambda h: h + h.index_select(1, IDX).sum(1, keepdim=True),
    "advanced_index": lambda h: h + h[:, IDX].sum(1, keepdim=True),
    "lookup": lambda h: h * F.embedding(h.detach().abs().long().clamp(max=C - 1), TABLE).sum(2),
    "gather_by_place": lambda h: h * TABLE.repeat(2, 1)[:B].gather(1, (h[:, :1] > 0).long()),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h.sin()),
    "masked_fill": lambda h: h.masked_fill(h > 0.5, 0.0),
    "tril": lambda h: h.view(-1, 3, 4).tril().flatten(1),
    "pad": lambda h: F.pad(h, (2, 3))[:, 1 : C + 1],
    "reflected": lambda h: F.pad(h.view(-1, 3, 4), (1, 2), mode="reflect").sin()[:, :, ::2].flatten(1),
    "reflected_images": lambda h: F.pad(h.view(-1, 1, 3, 4), (1, 2, 1, 1), mode="reflect").sin()[:, 0, ::2, ::2].flatten(1),
    "replicated": lambda h: F.pad(h.view(-1, 3, 4), (1, 3), mode="replicate").sin()[:, :, ::2].flatten(1),
    "replicated_clips": lambda h: F.pad(h.view(-1, 1, 3, 2, 2), (1, 1, 1, 1, 1, 1), mode="replicate").sin().sum((3, 4)).repeat(1, 1, 3)[:, 0, :C],
    "conv1d": lambda h: F.conv1d(h.view(-1, 3, 4), torch.ones(3, 3, 3) * 0.1, padding=1).flatten(1),
    "avg_pool": lambda h: F.avg_pool1d(h.view(-1, 3, 4), 2).repeat(1, 1, 2).flatten(1),
    "max_pool": lambda h: F.max_pool2d(h.view(-1, 3, 2, 2), 2).repeat(1, 1, 2, 2).flatten(1),
    "adaptive_pool": lambda h: F.adaptive_avg_pool1d(h.view(-1, 3, 4), 2).repeat(1, 1, 2).flatten(1),
    "max_pool_of_clips": lambda h: F.adaptive_max_pool3d(h.view(-1, 3, 1, 2, 2), (1, 1, 2)).repeat(1, 1, 1, 1, 2).flatten(1),
    "antialiased": lambda h: F.interpolate(h.view(-1, 1, 3, 4), size=(2, 6), mode="bilinear", antialias=True).sin().flatten(1),
    "sampled_at_points": lambda h: h + F.grid_sample(h.view(-1, 3, 2, 2), h[:, :8].tanh().view(-1, 2, 2, 2), align_corners=False).flatten(1),
    "spectrum": lambda h: torch.stft(h, 6, 3, window=torch.ones(6), return_complex=True).abs().flatten(1)[:, :C],
    "spectrum_and_back": lambda h: torch.istft(torch.stft(h, 6, 3, window=torch.ones(6), return_complex=True) * 2, 6, 3, window=torch.ones(6), length=C),
    "upsample": lambda h: F.interpolate(h.view(-1, 3, 4), scale_factor=2.0)[:, :, ::2].flatten(1),
    "unfold": lambda h: h.unfold(1, 3, 3).flatten(1),
    "einsum": lambda h: torch.einsum("bij,jk->bik", h.view(-1, 3, 4), TABLE[:4, :4]).flatten(1),
    "outer": lambda h: torch.einsum("bi,bj->bij", h[:, :3], h[:, 3:7]).flatten(1),
    "matmul": lambda h: (h.view(-1, 3, 4) @ h.view(-1, 4, 3)).flatten(1).repeat(1, 2)[:, :C],
    "permuted": lambda h: h.view(-1, 3, 4).permute(1, 0, 2).reshape(3, -1).sin().view(3, -1, 4).permute(1, 2, 0).reshape(-1, C),
    "merged": lambda h: (h.reshape(-1, 4) @ TABLE[:4, :4]).view(-1, C),
    "time_first": lambda h: torch.tanh(h.view(-1, 3, 4).transpose(0, 1) @ TABLE[:4, :4]).transpose(0, 1).reshape(-1, C),
    "attention": lambda h: F.scaled_dot_product_attention(*(h.view(-1, 1, 3, 4) for _ in range(3))).flatten(1),
    "by_size": lambda h: h / h.shape[0] + h * h.shape[0],
    "half": lambda h: h.bfloat16().sin().float(),
    "position": lambda h: h * torch.arange(h.shape[0]).view(-1, 1),
    "size_power": lambda h: h.abs().pow(1 + 1 / h.shape[0]),
    "number_and_index": lambda h: h + h.view(-1, 3, 4)[torch.arange(h.shape[0]), (h[:, 0] > 0).long() + 1].repeat(1, 3),
    "numbers_and_indices": lambda h: h + h.view(-1, 3, 4)[torch.arange(h.shape[0])[:, None], :, IDX[:3] % 4].flatten(1).repeat(1, 2)[:, :C],
    "two_views": lambda h: torch.cat([h, h.cos()])[h.shape[0] :] * torch.cat([h, h.sin()]).chunk(2)[0],
    "three_views": lambda h: torch.stack(torch.cat([h, h.cos(), 2 * h]).sin().split(h.shape[0])).prod(0),
    "repeated": lambda h: (h.repeat_interleave(2, 0).view(-1, 2, C) * TABLE.repeat(1, 3)[:2, :C]).sum(1),
    "table_over_the_batch": lambda h: h * (TABLE[:, None].expand(C, h.shape[0], 5).flatten(0, 1) @ TABLE[:5]).view(C, h.shape[0], 5).mean(2).t(),
    "filled_then_copied": lambda h: h.new_empty(h.shape).copy_(h).sin(),
    "fft": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * torch.exp(1j * TABLE[:7, 0]), n=C, dim=1),
    "fft_of_images": lambda h: torch.fft.fft2(h.view(-1, 3, 4)).abs().flatten(1),
    "solve": lambda h: torch.linalg.solve_ex(5 * torch.eye(4) + gram(h), h.view(-1, 3, 4).transpose(1, 2)).result.flatten(1),
    "inverse": lambda h: torch.linalg.inv_ex(5 * torch.eye(4) + gram(h)).inverse[:, :3].flatten(1),
    "cholesky": lambda h: torch.linalg.cholesky_ex(5 * torch.eye(4) + gram(h)).L[:, :3].flatten(1),
    "triangular": lambda h: torch.linalg.solve_triangular(5 * torch.eye(4) + gram(h).tril(), h.view(-1, 4, 3), upper=False).flatten(1),
    "determinant": lambda h: h * torch.linalg.det(2 * torch.eye(4) + gram(h)).log()[:, None],
    "random": lambda h: h * (1 + 0 * torch.rand_like(h)),
}


class Backward(torch.autograd.Function):
    """The identity, with a given backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.way = way
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.way(g), None


def zeros_of_numbers(h: Tensor) -> Tensor:
    """An index made of the samples' numbers that is no longer their number."""
    n = torch.arange(len(h))
    return torch.stack([n, -n], 1).sum(1, keepdim=True)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "softmax": lambda h: h.softmax(0),
    "cumsum": lambda h: h.cumsum(0),
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "sort": lambda h: h.sort(0).values,
    "gram": lambda h: h @ (h.t() @ h),
    "similarity": lambda h: (h @ h.t()).softmax(1) @ h,
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "first": lambda h: h + h[0],
    "first_by_index": lambda h: h + h.view(-1, 3, 4)[zeros_of_numbers(h), (h[:, :1] > 0).long()].view(-1, 4).repeat(1, 3),
    "even": lambda h: h + h.repeat_interleave(2, 0)[: h.shape[0]],
    "shuffled": lambda h: h[torch.arange(h.shape[0] - 1, -1, -1)],
    "transposed": lambda h: h + h.t().reshape(h.shape),
    "global": lambda h: h * h.sum(),
    "first_of_all": lambda h: h + h.view(-1, 3, 4)[torch.zeros_like(torch.arange(h.shape[0])), (h[:, 0] > 0).long()].repeat(1, 3),
    "scatter_some": lambda h: h.scatter(1, IDX[:, None], 3.0),
}


class OpBetweenLayers(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.op = nn.Linear(8, C), nn.Linear(C, 20), op

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.op(self.first(x)))
        return out


def against_masked_tangents(op: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Any:
    chosen = ChosenRows(monkeypatch)
    model, x = OpBetweenLayers(op), torch.randn(B, 8).requires_grad_()
    f, plans = rows_of(model, HALF)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model, x)
    mask = chosen.mask(B) if chosen.choices else torch.ones(B)
    model(x).backward(tangent * mask[:, None])
    for a, b in zip(got, grads(model, x), strict=True):
        assert (a - b).norm() <= 2e-5 * (1 + b.norm())
    return plans


@pytest.mark.sample(18)
@pytest.mark.parametrize("name", APART)
def test_samples_kept_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = against_masked_tangents(APART[name], monkeypatch)
    reasons = [c.reason for c in plans[0].cuts]
    assert (reasons == ["the whole backward pass"]) == (name not in NOT_PROVED), reasons


NOT_PROVED = {"size_power"}
"""Samples stay apart, but the size of their batch is fixed: all rows run below."""


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", MIXING)
def test_samples_mixed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = against_masked_tangents(MIXING[name], monkeypatch)
    (first,) = [s for s in plans.sites if s.name == "first"]
    assert all(p.decision == "exact" for p in first.products), "the layer below runs on all rows"
    assert all(c.reason != "the whole backward pass" for c in plans[0].cuts)


NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "clamp": lambda g: g.clamp(-0.3, 0.3),
    "norm_of_each": lambda g: g / (g.norm(dim=-1, keepdim=True) + 1e-6),
    "norm_of_all": lambda g: g / (g.norm() + 1e-6),
    "where": lambda g: torch.where(g.abs() > 0.1, g, 0.0),
    "masked": lambda g: g.masked_fill(g < 0, 0.0),
    "shifted": lambda g: g + 0.1,
    "ones": lambda g: g + torch.ones_like(g),
    "largest": lambda g: g * (g >= g.topk(3, dim=1).values[:, -1:]),
    "rounded": lambda g: (g * 8).round() / 8,
    "sorted": lambda g: g.sort(1).values,
    "squared": lambda g: g * g,
    "in_part": lambda g: torch.cat([g[:, :6], torch.ones_like(g[:, 6:])], 1),
}


class Hooked(nn.Module):
    """A layer below and a layer above something that only the backward pass sees: a custom function or a hook."""

    def __init__(self, way: Callable[[Tensor], Tensor], hook: bool = False) -> None:
        super().__init__()
        self.below, self.first, self.above, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.way, self.hook = way, hook

    def forward(self, x: Tensor) -> Tensor:
        h = 1.0 * self.first(self.below(x).tanh())
        if self.hook:
            h.register_hook(self.way)
        else:
            h = Backward.apply(h, self.way)  # type: ignore[no-untyped-call]
        out: Tensor = self.last(self.above(h.tanh()).tanh())
        return out


@pytest.mark.slow
@pytest.mark.sample(6)
@pytest.mark.parametrize("hook", [False, True], ids=["function", "hook"])
@pytest.mark.parametrize("name", NONLINEAR)
def test_what_is_not_linear_below_a_cut_gets_exact_gradients(name: str, hook: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is left out above the op that is not linear. Below it rows may be left out of its result, whose gradients are then multiplied by the rows'
    weights."""
    chosen = ChosenRows(monkeypatch)
    model, x = Hooked(NONLINEAR[name], hook), torch.randn(16, 6)
    f, plans = rows_of(model, HALF)
    out = f(x)
    tangent = torch.randn_like(out) * torch.rand(16, 1) ** 2
    out.backward(tangent)
    got = dict(zip(dict(model.named_parameters()), grads(model), strict=True))
    mask = chosen.mask(16)
    exact, masked = (of_layers(model, x, tangent, lambda g, w=w: NONLINEAR[name](g) * w[:, None]) for w in (torch.ones(16), mask))
    for layer, below in (("last", False), ("above", False), ("first", True), ("below", True)):
        # above it every gradient of an activation is exact, of a weight it may be that of some rows; a bias may be a sum of either
        inputs, g = exact[layer]
        kept = masked[layer][1] if below else g * mask[:, None]
        assert (got[f"{layer}.weight"] - kept.t() @ inputs).norm() <= 2e-5 * (1 + (kept.t() @ inputs).norm()), layer
        assert min((got[f"{layer}.bias"] - v.sum(0)).norm() for v in (g, kept)) <= 2e-5 * (1 + g.sum(0).norm()), layer
    products = {s.name: {p.name: p.decision for p in s.products} for s in plans.sites}
    assert products["above"]["grad_input"] == products["last"]["grad_input"] == "exact"
    assert products["below"]["grad_weight"] == products["first"]["grad_input"] == "rows"
    assert "is not linear in the gradient" in plans[0].cuts[0].reason


def of_layers(model: Hooked, x: Tensor, tangent: Tensor, way: Callable[[Tensor], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {layer: its input, and the gradient of its output}, in eager mode."""
    model.way, found = way, dict[str, tuple[Tensor, Tensor]]()

    def watch(name: str, given: Any, out: Tensor) -> None:
        out.register_hook(lambda g: found.__setitem__(name, (given[0].detach(), g)))

    children = model.named_children()
    handles = [layer.register_forward_hook(lambda m, given, out, name=name: watch(name, given, out)) for name, layer in children]
    model(x).backward(tangent)
    model.zero_grad()
    for handle in handles:
        handle.remove()
    return found


def test_a_straight_through_estimator_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = against_masked_tangents(lambda h: h + (h.sign() - h).detach(), monkeypatch)
    assert plans[0].cuts[0].reason == "the whole backward pass"


@torch.library.custom_op("approx_compile_tests::doubled_backward", mutates_args=())
def doubled_backward(g: Tensor) -> Tensor:
    return 2 * g.abs()


@doubled_backward.register_fake
def _(g: Tensor) -> Tensor:
    return torch.empty_like(g)


def test_an_op_of_the_users_is_not_taken_for_linear_by_its_name() -> None:
    model, x = Hooked(doubled_backward), torch.randn(16, 6)
    f, plans = rows_of(model, HALF)
    f(x).sum().backward()
    assert {p.decision for s in plans.sites if s.name in ("above", "last") for p in s.products if p.name == "grad_input"} == {"exact"}
    assert "approx_compile_tests.doubled_backward is not linear" in str(plans[0].cuts[0].reason)


class Pooled(nn.Module):
    """Images whose channels are innermost, for a linear layer, and then pooled."""

    def __init__(self, places: int, width: int, contiguous: bool = False) -> None:
        super().__init__()
        self.first, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, width)
        self.pool, self.last, self.contiguous = nn.AdaptiveAvgPool2d(places), nn.Linear(width * places**2, 5), contiguous

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.first(x).sin().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.last(self.pool(h.contiguous() if self.contiguous else h).flatten(1))
        return out


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("way", ["permuted", "channels_last", "contiguous"])
def test_pooling_of_images_in_any_layout(way: str, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling to one place writes its gradient by strides (as_strided_scatter) if channels are innermost."""
    chosen, x = ChosenRows(monkeypatch), torch.randn(12, 3, 6, 6)
    model: Any = Pooled(places, 10, way == "contiguous")
    if way == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    f, plans = rows_of(model, HALF)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    model(x).backward(tangent * chosen.mask(12)[:, None])
    assert all((a - b).norm() <= 2e-5 * (1 + b.norm()) for a, b in zip(got, grads(model), strict=True))
    assert plans[0].cuts[0].reason == "the whole backward pass"


@pytest.mark.slow
@pytest.mark.parametrize("later", [9, 12])
def test_as_many_channels_as_samples(later: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing the sizes of the two, which are equal in the first batch only, must not fix the number of samples."""
    chosen, model = ChosenRows(monkeypatch), Pooled(1, 12)
    f, plans = rows_of(model, HALF)
    for size in (12, later):
        x = torch.randn(size, 3, 6, 6)
        out = f(x)
        tangent = torch.randn_like(out)
        out.backward(tangent)
        got = grads(model)
        model(x).backward(tangent * chosen.mask(size)[:, None])
        assert all((a - b).norm() <= 2e-5 * (1 + b.norm()) for a, b in zip(got, grads(model), strict=True))
    assert [c.reason for plan in plans for c in plan.cuts] == ["the whole backward pass"]
