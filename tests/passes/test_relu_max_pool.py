"""The mask of a ReLU behind max pooling is moved, and no value changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import compiled
from helpers.oracles import grads, relative
from torch import Tensor, fx, nn

from approx_compile import Backend, _torch
from approx_compile.backend import run_as_is

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten
EXACT = {"method": "exact"}

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "halved": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), (3, 2, 8, 6)),
    "overlapping": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), (3, 2, 9, 7)),
    "dilated, rounded up": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2, 3, dilation=2, ceil_mode=True)), (3, 2, 9, 8)),
    "large windows": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(9, 4)), (2, 2, 23, 19)),
    "1-D": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2)), (3, 2, 9)),
    "3-D": (lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.MaxPool3d(2)), (2, 2, 6, 5, 7)),
    "two, into a linear layer": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        (3, 2, 14, 14),
    ),
}


def masks(graph: fx.Graph) -> list[int]:
    """Return the number of entries of every mask in the backward pass."""
    return sorted(_torch.value(n).numel() for n in graph.nodes if n.target is aten.where.self)


def masks_of(model: nn.Module, x: Tensor) -> tuple[list[int], list[int]]:
    """Return the masks before and after the pass."""
    found: list[tuple[list[int], list[int]]] = []
    backend = Backend(EXACT, inner_compile=run_as_is, on_plan=lambda plan, before, after: found.append((masks(before), masks(after))), keep_graphs=True)
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x.requires_grad_())
    (one,) = found
    return one


def forward_and_backward(model: nn.Module, f: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = f(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    return [y.detach(), *grads(model, x)]


LAYOUTS = [(name, layout) for name, (_, size) in CASES.items() for layout in (torch.contiguous_format, torch.channels_last)[: 2 if len(size) == 4 else 1]]


@pytest.mark.sample(6)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_value_stays(name: str, layout: torch.memory_format) -> None:
    make, size = CASES[name]
    model, x = make().to(memory_format=layout), torch.randn(size).contiguous(memory_format=layout)
    want = forward_and_backward(model, model, x)
    got = forward_and_backward(model, torch.compile(model, backend=Backend(EXACT, inner_compile=run_as_is)), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    before, after = masks_of(model, x)
    assert sum(after) < sum(before) and len(after) == len(before)


@pytest.mark.slow
def test_through_inductor() -> None:
    make, size = CASES["overlapping"]
    model, x = make(), torch.randn(size)
    want = forward_and_backward(model, model, x)
    got = forward_and_backward(model, torch.compile(model, backend="approx", options=EXACT), x)
    assert all(relative(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bits(dtype: torch.dtype) -> None:
    """Inductor's decomposition sums in fp32."""
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), torch.randn(2, 3, 9, 8, dtype=dtype)
    want = forward_and_backward(model, model, x)
    got = forward_and_backward(model, torch.compile(model, backend=Backend(EXACT, inner_compile=run_as_is)), x)
    before, after = masks_of(model, x)
    assert sum(after) < sum(before) and all(relative(a, b) < 1e-2 for a, b in zip(got, want, strict=True))


def unpooled(x: Tensor, shape: tuple[int, ...], dim: int, view: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    r = x * 1.0
    y, places = F.max_pool2d(r, 4, return_indices=True)
    return r, torch.zeros(shape).scatter_add(dim, places.view(view), (y * 3 + 1).view(view)).view(2, 3, 8, 8)


class Unpools(torch.autograd.Function):
    """A gradient that the model makes itself, with a mask: maxima spread over another axis, or into one plane, or into their own but with another dtype or
    shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor, where: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, like)
        ctx.where = where
        return x.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, like = ctx.saved_tensors
        r, z = unpooled(x, *ctx.where)
        return (g * torch.where(r <= 0, torch.zeros_like(like), z)).sum_to_size(x.shape).to(x.dtype), None, None


@pytest.mark.sample(5)
@pytest.mark.parametrize("where", [((64, 6), 0, (4, 6)), ((1, 384), 1, (1, 24)), ((6, 64), 1, (6, 4))])
@pytest.mark.parametrize("like", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8).double(), torch.zeros(4, 1, 3, 8, 8)], ids=["same", "double", "more"])
def test_what_users_scatter_is_theirs(where: tuple[Any, ...], like: Tensor) -> None:
    x = torch.randn(2, 3, 8, 8)

    def forwards(x: Tensor) -> Tensor:
        r, z = unpooled(x, *where)
        return torch.where(r <= 0, torch.zeros_like(like), z)

    for f in (forwards, lambda x: Unpools.apply(x, like, where)):
        torch._dynamo.reset()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = f(a), torch.compile(f, backend=Backend(EXACT, inner_compile=run_as_is))(b)
        torch.testing.assert_close(got, want)
        want.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("above", [[nn.Conv2d(3, 4, 3)], [nn.Flatten(), nn.Linear(48, 4)]])
def test_nothing_is_saved_for_the_mask(above: list[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), *above), torch.randn(2, 2, 10, 10)
    f = torch.compile(model, backend=Backend(EXACT, inner_compile=run_as_is))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f(x)
    assert not any(t.dtype is torch.bool for t in saved)
    assert all(t.shape != (2, 3, 8, 8) for t in saved)


def test_nan_and_inf() -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1)), torch.randn(2, 3, 8, 8)
    x[0, 0, 2, 2], x[1, 1, 3, 3], x[1, 2] = math.nan, math.inf, -1.0
    upstream = torch.randn(2, 3, 6, 6)
    upstream[0, 1, 2, 2], upstream[1, 2, 1, 1] = math.inf, math.nan  # the second behind a mask
    want, got = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(want).backward(upstream)
    torch.compile(model, backend=Backend(EXACT, inner_compile=run_as_is))(got).backward(upstream)
    assert isinstance(want.grad, Tensor) and isinstance(got.grad, Tensor)
    torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0, equal_nan=True)
    assert want.grad.isnan().any() == want.grad.isnan().any() and not want.grad[1, 2].any()


class Twice(nn.Module):
    """A ReLU whose output is read by more than the pooling."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 3, 3), other

    def forward(self, x: Tensor) -> Tensor:
        r = F.relu(self.conv(x))
        return F.max_pool2d(r, 2).sum((2, 3)) + self.other(r)


@pytest.mark.parametrize("other", [lambda r: r.sum((2, 3)), lambda r: F.avg_pool2d(r, 2).sum((2, 3)), lambda r: F.max_pool2d(r, 3).sum((2, 3))])
def test_what_others_read_stays(other: Callable[[Tensor], Tensor]) -> None:
    model, x = Twice(other), torch.randn(2, 2, 8, 8)
    want = forward_and_backward(model, model, x)
    got = forward_and_backward(model, torch.compile(model, backend=Backend(EXACT, inner_compile=run_as_is)), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    before, after = masks_of(model, x)
    assert before == after and before


def test_other_activations_stay() -> None:
    for activation in (F.gelu, F.leaky_relu, F.relu6, F.silu):
        model, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 8, 8)
        whole = lambda x, model=model, activation=activation: F.max_pool2d(activation(model(x)), 2)  # noqa: E731
        want = forward_and_backward(model, whole, x)
        torch._dynamo.reset()
        got = forward_and_backward(model, torch.compile(whole, backend=Backend(EXACT, inner_compile=run_as_is)), x)
        assert all(relative(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_before_the_put_back_of_kept_channels() -> None:
    """The second convolution samples, so its activation's mask is applied to the kept channels, and the first convolution skips the others."""
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, bias=False))
    x = torch.randn(3, 2, 12, 12)
    options = {"policy": "always", "ratio": 0.5, "min_k": 1, "rules": [{"layers": "0", "method": "exact"}]}
    f, _, plans = compiled(model, options)
    got = forward_and_backward(model, f, x)
    norms = model[3].weight.detach().square().sum((0, 2, 3)).sqrt() * model[:3](x).detach().square().sum((0, 2, 3)).sqrt()
    kept = torch.zeros(8).index_fill_(0, norms.topk(4).indices, 1.0).reshape(1, 8, 1, 1)
    masked = lambda x: model[3](model[:3](x) * kept)  # noqa: E731
    want = forward_and_backward(model, masked, x)
    assert [s.decision for s in plans.sites] == ["exact", "sampled"], plans.sites
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
