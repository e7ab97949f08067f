"""Gradients replaced by zeros or random numbers, and how replaced gradients combine with sampled products, rows, batches of any size and policies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Plans, compiled, rows_of
from helpers.models import mlp
from helpers.oracles import ChosenRows, grads, relative, spread
from helpers.replacements import algorithm_1, compile_afresh, options
from helpers.sampling import all_but
from torch import Tensor, fx, nn

from approx_compile import Backend, explain
from approx_compile.backend import run_as_is

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 6))


class Saved:
    """An `inner_compile` that records what the forward pass saves, and the products of the backward graph."""

    def __init__(self) -> None:
        self.bytes, self.products = 0, 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, *, is_backward: bool = False, **kwargs: Any) -> Any:
        if is_backward:
            saved = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder") if "tangents" not in n.name and "primals" not in n.name]
            self.bytes = sum(v.numel() * v.dtype.itemsize for v in saved)
            masks = [n.args[10] for n in gm.graph.nodes if n.target is aten.convolution_backward.default]
            self.products = sum(m[0] + m[1] for m in masks) + sum(n.target in (aten.mm.default, aten.addmm.default) for n in gm.graph.nodes)
            assert not any(m[2] and not m[1] for m in masks)  # a bias alone would cost as much as the weight on CPUs
        return run_as_is(gm)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", all_but([run_as_is], [run_as_is, None]))
def test_zero_is_gone_with_the_activation_it_kept(lowering: Any) -> None:
    model, x = cnn(), torch.randn(16, 3, 12, 12)
    exact, zero = Saved(), Saved()
    compile_afresh(model, {"method": "exact"}, exact)(x).square().sum().backward()
    want = grads(model)
    rule = {"layers": ["2", "3", "5"], "output": "exact", "grad_weight": "zero"}
    settings = {"policy": "always", "rules": [{"layers": "site", "output": "exact"}, rule]}
    compile_afresh(model, settings, zero)(x).square().sum().backward()
    grads(model)
    compile_afresh(model, settings, lowering)(x).square().sum().backward()
    names = [n for n, _ in model.named_parameters()]
    for name, got, expected in zip(names, grads(model), want, strict=True):
        if name in ("2.weight", "3.weight", "5.weight"):
            assert torch.equal(got, torch.zeros_like(expected))
        else:
            assert relative(got, expected) < 1e-5
    assert zero.products == exact.products - 3
    assert exact.bytes - zero.bytes == 4 * 16 * (8 * 64 + 36)  # two of the three inputs; a ReLU's backward reads the other (on CPUs its mask is worse)


def test_zero_under_optimizers() -> None:
    def after(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 4), torch.randn(8, 6)
        before = layer.weight.detach().clone()
        optimizer = make(list(layer.parameters()))
        compile_afresh(layer, options("zero"))(x).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        assert norm > 1 and relative(norm, 2 * layer(x).detach().sum(0).norm()) < 1e-5  # the bias alone counts
        optimizer.step()
        return before, layer.weight.detach()

    before, now = after(lambda p: torch.optim.Adam(p, lr=0.1))
    assert torch.equal(before, now)  # no moments yet
    before, now = after(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    torch.testing.assert_close(now, before * (1 - 0.1 * 0.5))
    before, now = after(lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5))
    torch.testing.assert_close(now, before - 0.1 * before.sign(), atol=1e-5, rtol=1e-5)  # decay is all its gradient: a whole step


def test_zero_with_moments_coasts() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    compile_afresh(layer, options("zero"))(x).square().sum().backward()
    optimizer.step()
    assert (layer.weight.detach() - before).abs().min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("lowering", all_but([run_as_is], [run_as_is, None]))
def test_random_is_normal_and_comes_from_the_seed(lowering: Any) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 40)), torch.randn(25, 16, 6, 6)
    f = compile_afresh(model, options("random") | {"rules": [{"layers": "3", "grad_weight": {"method": "random", "std": 0.5}}]}, lowering)

    def step() -> list[Tensor]:
        f(x).sum().backward()
        return grads(model)

    torch.manual_seed(5)
    first, second = step(), step()
    torch.manual_seed(5)
    again = step()
    model(x).sum().backward()
    exact = grads(model)
    for i, std in ((0, 1 / 25), (2, 0.5)):
        n = first[i].numel()
        assert torch.equal(first[i], again[i]) and (first[i] - second[i]).std() > std
        assert first[i].mean().abs() < 4 * std / n**0.5 and (first[i].std() / std - 1).abs() < 4 / (2 * n) ** 0.5
        assert relative(first[i + 1], exact[i + 1]) < 1e-5  # the bias


def test_composes_with_a_sampled_output() -> None:
    model, x = nn.Conv2d(8, 6, 3, bias=False), torch.randn(3, 8, 7, 5, requires_grad=True)
    dy = torch.randn(3, 6, 5, 3)
    f, choices, plans = compiled(model, {"policy": "always", "ratio": 0.5, "min_k": 2, "grad_weight": "max"})
    y = f(x)
    y.backward(dy)
    weight, dx = grads(model, x)
    idx = choices[f"{plans.sites[0].name}.output.idx"]
    sampled = F.conv2d(x[:, idx], model.weight[:, idx])
    assert relative(y, sampled) < 1e-6 and relative(dx, torch.autograd.grad(sampled, x, dy)[0]) < 1e-6
    assert relative(weight, torch.from_numpy(algorithm_1(x, dy, model))) < 1e-6
    assert [p.decision for p in plans.sites[0].products] == ["sampled", "coupled", "replaced"]


def test_zeros_of_later_sites_leave_replacements_alone() -> None:
    """The layer below a sampled one skips the channels that were dropped; a replaced product has none to skip."""
    model, x = mlp(24, 32, 40, 5), torch.randn(64, 24)
    f, _, plans = compiled(
        model, {"policy": "always", "min_k": 4, "rules": [{"layers": "0", "grad_weight": {"method": "max", "j": 40}}, {"layers": "2", "grad_weight": "zero"}]}
    )
    f(x).square().sum().backward()
    got = grads(model)
    assert not got[2].any() and got[0].any()
    assert all(p.skips is None for s in plans.sites for p in s.products if p.decision == "replaced")


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize(("method", "images"), [*itertools.product(("zero", "random", "max"), (False, True)), ("tile", True)])
def test_beside_rows_of_the_batch(method: str, images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go on past a replaced gradient, which equals that of the output gradient with the dropped rows set to zero."""
    model, x = (cnn(), torch.randn(36, 3, 12, 12)) if images else (mlp(12, 20, 20, 5), torch.randn(36, 12))
    layers = ["2", "3"] if images else ["2"]
    chosen = ChosenRows(monkeypatch)
    tables = {"max": {"method": "max", "j": 2}, "tile": {"method": "max", "tile": 4}}
    rules = [{"layers": layers, "grad_weight": tables.get(method, method)}]
    f, plans = rows_of(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5, "method": "topk"}, "rules": rules})
    torch.manual_seed(7)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    assert [c.decision for c in plans[0].cuts] == ["rows"]
    g = compile_afresh(model, {"policy": "always", "rules": [{"layers": "site", "output": "exact"}, *rules]})
    g(x).backward(tangent * spread(chosen.mask(36), tangent))
    for name, a, b in zip((n for n, _ in model.named_parameters()), got, grads(model), strict=True):
        if method == "random" and name in [f"{layer}.weight" for layer in layers]:
            assert a.std() > 0 and (a.std() * 36 - 1).abs() < 0.2
        else:
            assert relative(a, b) < 1e-5, name


@pytest.mark.slow
def test_a_batch_of_any_size() -> None:
    model, settings = cnn(), options({"method": "max", "j": 2}, rules=[{"layers": "3", "grad_weight": "zero"}])
    f, _, plans = compiled(model, settings)
    for size in (4, 9):
        x = torch.randn(size, 3, 12, 12)
        torch._dynamo.mark_dynamic(x, 0)
        f(x).square().sum().backward()
        got = grads(model)
        torch.compile(model, backend=Backend(settings, inner_compile=run_as_is), dynamic=False)(x).square().sum().backward()
        assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
    assert len(plans) == 1 and [s.products[-1].decision for s in plans.sites] == ["replaced"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "lowering"),
    all_but([*itertools.product(("zero", "random", "max"), (run_as_is,)), ("zero", None)], itertools.product(("zero", "random", "max"), (run_as_is, None))),
)
def test_an_empty_batch_has_no_gradient(method: str, lowering: Any) -> None:
    """An empty batch may come first or after others; code for a batch of any size assumes at least two samples."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    f = compile_afresh(model, options(method), lowering)
    for size in (0, 6, 4, 0):
        f(torch.randn(size, 3, 6, 6)).sum().backward()
        found = grads(model)
        assert all(bool(g.any()) is (size > 0 and not (method == "zero" and g.dim() > 1)) for g in found)


def test_images_of_any_size() -> None:
    model, settings = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), options("max", rules=[{"layers": "2", "grad_weight": "zero"}])
    f, _, plans = compiled(model, settings, dynamic=True)
    x = torch.randn(4, 3, 9, 8)
    f(x).square().sum().backward()
    got = grads(model)
    model(x).square().sum().backward()
    exact = grads(model)
    assert "dynamic size" in plans.sites[0].reason and not got[2].any()
    assert all(relative(got[i], exact[i]) < 1e-5 for i in (0, 1, 3))


@pytest.mark.slow
def test_obeyed_under_every_policy_with_the_reason() -> None:
    model, x = cnn(), torch.randn(4, 3, 12, 12)
    for policy in ("cost", "always", "adaptive"):
        rule = {"layers": ["conv", "linear"], "output": "exact", "grad_input": "exact", "grad_weight": "max"}
        report = explain(model, x, config={"policy": policy, "rules": [rule]})
        assert [s.products["grad_weight"].decision for s in report.sites] == ["replaced"] * 4
        assert all("grad_weight: max" in s.reason for s in report.sites)
        assert all(p.decision != "sampled" for s in report.sites for p in s.products.values())
    assert [(s.k, s.size) for s in report.sites] == [(1, 100), (1, 64), (1, 9), (1, 6)]
    assert all(s.flops_sampled < s.flops_exact for s in report.sites)
    zero = explain(model, x, config=options("zero")).sites[1].products["grad_weight"]
    assert (zero.decision, zero.method, zero.flops_sampled) == ("replaced", "zero", 0)


@pytest.mark.slow
def test_what_can_not_be_replaced_is_exact_with_the_reason() -> None:
    def reason(model: Any, settings: dict[str, Any], *args: Tensor) -> str:
        plans = Plans()
        torch._dynamo.reset()
        torch.compile(model, backend=Backend(settings, inner_compile=run_as_is, on_plan=plans))(*args)
        assert plans.sites[0].decision == "exact"
        return str(plans.sites[0].reason)

    a, b = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    assert "products with a weight" in reason(torch.bmm, options("exact", grad_input="max"), a, b)
    image = torch.randn(2, 3, 5, 5, requires_grad=True)
    assert "linear layers" in reason(nn.Conv2d(3, 4, 3), options("exact", grad_input="max"), image)

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, a: Tensor) -> Tensor:
            return torch.bmm(a, self.weight)

    assert "batched" in reason(Batched(), options("max"), a)
    model = Batched()
    compile_afresh(model, options("zero"))(a).sum().backward()
    assert model.weight.grad is not None and not model.weight.grad.any()
