"""NaN and inf, zeros, axes of size one, empty batches, odd layouts and every dtype give what exact arithmetic gives, or stay exact with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Plans, compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from helpers.sampling import all_but
from torch import nn

from approx_compile import Backend
from approx_compile.backend import run_as_is

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1, "min_k": 1}
SCORED = ("topk", "topk_weights", "crs", "bernoulli", "wta")


@pytest.mark.sample(8)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_and_inf_reach_the_output(method: str, bad: float, where: str) -> None:
    if method == "topk_weights" and where == "input":
        pytest.skip("topk_weights does not look at the input: its choice is the same on every rank by design")
    layer = nn.Linear(64, 48)
    x = torch.randn(16, 64)
    with torch.no_grad():
        if where == "input":
            x[3, 17] = bad
        else:
            layer.weight[5, 17] = bad
    f, _, _ = compiled(layer, ALWAYS | {"method": method, "ratio": 0.25})
    exact = layer(x)
    got = f(x)
    assert torch.equal(got.isfinite(), exact.isfinite())


@pytest.mark.sample(8)
@pytest.mark.parametrize("sampling", ["forward", "backward", "blackbox"])
@pytest.mark.parametrize("method", (*SCORED, "uniform"))
def test_all_zero_operands(method: str, sampling: str) -> None:
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.zeros(16, 64, requires_grad=True)
    f, _, _ = compiled(layer, ALWAYS | {"method": method, "sampling": sampling, "ratio": 0.25})
    y = f(x)
    y.sum().backward()
    assert torch.equal(y, layer.bias.expand(16, 48))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in (layer.weight.grad, x.grad))
    assert torch.equal(layer.bias.grad, torch.full((48,), 16.0))  # the bias gradient is exact, over all samples


def test_axis_of_one_and_k_equal_to_the_axis() -> None:
    one = plans_of(nn.Linear(1, 8), ALWAYS, torch.randn(4, 1))[0]
    assert (one.decision, one.products[0].reason) == ("exact", "axis of 1, min_k is 1")
    whole = plans_of(nn.Linear(8, 8), ALWAYS | {"ratio": 0.99}, torch.randn(4, 8))[0]
    assert (whole.decision, whole.products[0].reason) == ("exact", "keeps all 8 at ratio 0.99, group 1")
    capacity = plans_of(nn.Linear(8, 8), ALWAYS | {"method": "bernoulli"}, torch.randn(4, 8, requires_grad=True))[0]
    assert capacity.decision == "exact"


@pytest.mark.parametrize("sampling", ["forward", "backward"])
def test_empty_batch(sampling: str) -> None:
    model = mlp(64, 64, 64)
    f, _, plans = compiled(model, ALWAYS | {"sampling": sampling})
    x = torch.randn(0, 64, requires_grad=True)
    y = f(x)
    y.sum().backward()
    assert y.shape == (0, 64) and x.grad is not None and x.grad.shape == (0, 64)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(model)) and plans[0].sites


@pytest.mark.slow
def test_size_one_axes_beside_the_contraction() -> None:
    for shape, out in (((1, 64), 8), ((8, 64), 1), ((1, 64), 1)):
        layer = nn.Linear(64, out)
        f, choices, _ = compiled(layer, ALWAYS)
        x = torch.randn(shape, requires_grad=True)
        y = f(x)
        y.sum().backward()
        if "addmm.output.idx" not in choices:  # Inductor turns some products with a vector into sums; those are no sites
            torch.testing.assert_close(y, layer(x))
            continue
        idx = choices["addmm.output.idx"]
        torch.testing.assert_close(y, F.linear(x[:, idx], layer.weight[:, idx], layer.bias))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_operands(layout: str) -> None:
    base = {"transposed": torch.randn(64, 16).t(), "strided": torch.randn(16, 128)[:, ::2], "expanded": torch.randn(1, 64).expand(16, 64)}[layout]
    weight = nn.Parameter(torch.randn(64, 48).t())
    f, choices, _ = compiled(lambda x: F.linear(x, weight), ALWAYS)
    x = base.detach().requires_grad_()
    y = f(x)
    y.square().sum().backward()
    (idx,) = (v for k, v in choices.items() if k.endswith("output.idx"))
    got, weight.grad = [y.detach(), x.grad, weight.grad], None
    ref = base.detach().clone().requires_grad_()
    z = F.linear(ref[:, idx], weight[:, idx])
    z.square().sum().backward()
    for a, b in zip(got, (z.detach(), ref.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(128, 64)).to(dtype)
    x = torch.randn(8, 32, 6, 6, dtype=dtype, requires_grad=True)
    for method in ("topk", "bernoulli"):
        f, _, plans = compiled(model, ALWAYS | {"method": method, "ratio": 0.25})
        y = f(x)
        y.square().mean().backward()
        assert plans[-1].sampled == 3 and y.dtype == dtype
        assert all(g.dtype == dtype and g.isfinite().all() for g in grads(model, x))


def test_integer_and_complex_products_stay_exact() -> None:
    weight = nn.Parameter(torch.randn(64, 64, dtype=torch.complex64))
    (site,) = plans_of(lambda x: (x @ weight).abs(), ALWAYS, torch.randn(8, 64, dtype=torch.complex64))
    assert (site.decision, site.reason) == ("exact", "complex64 products are not sampled")


def test_strides_are_those_of_the_exact_graph() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(8, 16, 64, requires_grad=True)
    want, got = [], []
    for options, strides in (({"method": "exact"}, want), (ALWAYS, got)):
        f, _, _ = compiled(model, options)
        y = f(x)
        y.sum().backward()
        strides += [y.stride(), *(g.stride() for g in grads(model, x))]
    assert want == got


@pytest.mark.slow
@pytest.mark.exhaustive
def test_channels_last_images_of_dynamic_size() -> None:
    """Images of several sizes run one graph. A view with symbolic strides that the backward pass reads does not compile."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).to(memory_format=torch.channels_last)
    options = {"policy": "always", "rules": [{"layers": "conv[0]", "method": "exact"}]}
    found = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        f = torch.compile(model, backend=Backend(options, inner_compile=None if dynamic else run_as_is), dynamic=dynamic)
        for height, width in ((8, 10), (6, 9)):
            torch.manual_seed(0)
            f(torch.randn(4, 3, height, width).contiguous(memory_format=torch.channels_last)).square().sum().backward()
            found.append(grads(model))
    assert all(relative(a, b) < 1e-5 for fixed, symbolic in zip(found[:2], found[2:], strict=True) for a, b in zip(fixed, symbolic, strict=True))


class Times(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


@pytest.mark.slow
@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "first", [{"sampling": "backward"}, {"group": 4, "sampling": "backward"}, {"grad_weight": "max", "grad_input": "max"}, {"grad_weight": "random"}]
)
@pytest.mark.parametrize("second", [{}, {"sampling": "backward"}, {"grad_input": "max"}])
def test_layers_with_nothing_between_them(first: dict[str, Any], second: dict[str, Any]) -> None:
    """If nothing is between two layers, the gradient of one is the very node that the gradients of the other read."""
    one, two, x = nn.Linear(24, 32), nn.Linear(32, 16), torch.randn(20, 24, requires_grad=True)
    found = []
    for between in (nn.Identity(), Times()):
        torch._dynamo.reset()
        model = nn.Sequential(one, between, two)
        f, _, plans = compiled(model, ALWAYS | {"rules": [{"layers": "0", **first}, {"layers": "2", **second}]})
        torch.manual_seed(3)
        f(x).square().sum().backward()
        assert [s.decision for s in plans.sites] == ["sampled"] * 2
        found.append(grads(model, x))
    assert all(relative(a, b) < 1e-6 for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("inner", all_but([run_as_is], [run_as_is, None]))
def test_groups_of_channels_of_an_image_of_dynamic_size_are_exact(inner: Any) -> None:
    """Inductor cannot order the strides of such a gather: the site stays exact with that reason, and the graph compiles."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    plans = Plans()
    f = torch.compile(model, backend=Backend({"policy": "always", "group": 4, "min_k": 4}, inner_compile=inner, on_plan=plans), dynamic=True)
    for size in (9, 11):
        f(torch.randn(2, 3, size, size)).square().sum().backward()
    assert plans.sites[1].decision == "exact" and "dynamic size" in plans.sites[1].reason
