"""Token rows: the gradients are those of the exact model whose tokens' gradients are weighted where regions begin, and their mean is the exact gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.compile import rows_of
from helpers.oracles import grads, relative
from helpers.tokens import Block, ChosenTokens
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import approx_compile
from approx_compile.rows.row_backward import all_rows
from approx_compile.rows.tokens import choose_op, token_compiler

pytestmark = pytest.mark.usefixtures("one_thread")
HALF: dict[str, Any] = {"policy": "always", "grad": {"axis": "tokens", "ratio": 0.5}}


def weighted(model: nn.Module, blocks: list[Block], chosen: ChosenTokens, x: Tensor, tangent: Tensor, skip: int = 0) -> list[Tensor]:
    """The gradients of the exact model whose tokens are weighted as in the latest backward pass."""
    chosen.apply(blocks, skip)
    model(x).backward(tangent)
    for block in blocks:
        block.weights = {}
    return grads(model, x)


@pytest.mark.sample(3)
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_those_of_weighted_tokens(pre_norm: bool, batch_first: bool, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenTokens(monkeypatch)
    blocks = [Block(8, pre_norm=pre_norm, batch_first=batch_first, fused=fused) for _ in range(2)]
    model, x = nn.Sequential(*blocks), torch.randn(4, 6, 8, requires_grad=True)
    f, plans = rows_of(model, HALF)
    out = f(x)
    tangent = torch.randn_like(out) * torch.rand(*out.shape[:2], 1) ** 3
    out.backward(tangent)
    got = grads(model, x)
    assert [(c.decision, c.axis, c.rows) for c in plans[0].cuts] == [("rows", "tokens", 24)] * 6
    assert [int((w > 0).sum()) for w in chosen.weights] == [12] * 6
    want = weighted(model, blocks, chosen, x, tangent)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_dtypes(dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenTokens(monkeypatch)
    block, x = Block(8).to(dtype), torch.randn(4, 6, 8, dtype=dtype, requires_grad=True)
    f, _ = rows_of(block, HALF)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(block, x)
    want = weighted(block, [block], chosen, x, tangent)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < bound


def test_weights_beyond_float16_scale_small_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with a small gradient is seldom kept, with a large weight. The product is of the size of the others' gradients."""
    monkeypatch.setattr(choose_op, "choose_rows", lambda method, norms_sq, k, random: (torch.arange(k), torch.full((k,), 1e6)))
    model, x = nn.Linear(8, 8).half(), torch.ones(4, 6, 8, dtype=torch.float16)
    f, _ = rows_of(model, HALF)
    f(x).backward(torch.full((4, 6, 8), 1e-6, dtype=torch.float16))
    assert torch.allclose(model.bias.grad, torch.tensor(12.0, dtype=torch.float16), rtol=0.05)  # float16 has 1e-6 as 9.5e-7


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenTokens(monkeypatch)
    block, x = Block(8), torch.randn(4, 6, 8)
    f, plans = rows_of(block, HALF)
    with torch.autocast("cpu", torch.bfloat16):
        out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(block)
    assert plans[0].cuts[0].decision == "rows" and len(chosen.weights) == 3
    with torch.autocast("cpu", torch.bfloat16):
        chosen.apply([block])
        out = block(x)
    out.backward(tangent)
    assert max(relative(a, b) for a, b in zip(got, grads(block), strict=True)) < 0.05


@pytest.mark.slow
def test_checkpointed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenTokens(monkeypatch)
    blocks, x = [Block(8), Block(8)], torch.randn(4, 6, 8, requires_grad=True)
    model = nn.Sequential(*blocks)

    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    f, plans = rows_of(run, HALF)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model, x)
    assert plans[0].cuts[0].decision == "rows" and len(chosen.weights) == 6
    want = weighted(model, blocks, chosen, x, tangent)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
def test_lengths_that_change(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenTokens(monkeypatch)
    block = Block(8)
    f, _ = rows_of(block, HALF, dynamic=dynamic)
    for batch, length in ((4, 6), (3, 7), (5, 9)):
        chosen.weights.clear()
        x = torch.randn(batch, length, 8, requires_grad=True)
        out = f(x)
        tangent = torch.randn_like(out)
        out.backward(tangent)
        got = grads(block, x)
        assert [int((w > 0).sum()) for w in chosen.weights] == [int(batch * length / 2 + 0.5)] * 3
        want = weighted(block, [block], chosen, x, tangent)
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_all_tokens_are_the_exact_gradient() -> None:
    block, x = Block(8), torch.randn(4, 6, 8, requires_grad=True)
    f, _ = rows_of(block, HALF)
    with all_rows():
        f(x).square().sum().backward()
    got = grads(block, x)
    block(x).square().sum().backward()
    want = grads(block, x)
    assert relative(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in want])) < 1e-6  # the gradient of the keys' bias is zero


def test_tokens_without_gradient_are_left_out() -> None:
    """Of padded sequences the gradient is exact if as many tokens are kept as are not padding."""
    mask = torch.arange(6) < torch.tensor([2, 6, 1, 3]).view(-1, 1)
    block, x = Block(8), torch.randn(4, 6, 8)
    f, _ = rows_of(block, HALF)

    def loss(out: Tensor) -> Tensor:
        return (out.square() * mask.unsqueeze(-1)).sum()

    loss(f(x)).backward()
    got = dict(block.named_parameters())
    mine = {n: p.grad.clone() for n, p in got.items() if p.grad is not None}
    block.zero_grad()
    loss(block(x)).backward()
    for n, p in block.named_parameters():  # the gradients of keys and values reach padding, so that region is not exact
        assert p.grad is not None
        if n.startswith(("wide", "narrow", "out", "norms.1")):
            assert relative(mine[n], p.grad) < 1e-5, n


def test_layers_kept_exact() -> None:
    """A rule that keeps a layer exact keeps its products out of regions."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 6, 8)
    f, plans = rows_of(model, HALF | {"rules": [{"layers": "2", "method": "exact"}]})
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    assert len(plans[0].cuts[0].products) == 1
    model(x).backward(tangent)
    want = grads(model)
    assert all(relative(a, b) < 1e-6 for a, b in zip(got[2:], want[2:], strict=True)) and relative(got[0], want[0]) > 1e-3


class Sum(nn.Module):
    """Two layers whose outputs are added, so that one gradient enters both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.a(x) + self.b(z)  # type: ignore[no-any-return]


def test_the_bias_of_a_layer_kept_exact_is_exact() -> None:
    model, x, z = Sum(), torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    f, plans = rows_of(model, HALF | {"rules": [{"layers": "b", "method": "exact"}]})
    tangent = torch.randn(4, 6, 8) * torch.rand(4, 6, 1) ** 3
    f(x, z).backward(tangent)
    got = grads(model.b)
    assert any(c.decision == "rows" for c in plans[0].cuts) and model.a.weight.grad is not None
    sampled = model.a.weight.grad.clone()
    model.zero_grad()
    model(x, z).backward(tangent)
    assert relative(sampled, model.a.weight.grad) > 1e-2 and all(relative(a, b) < 1e-6 for a, b in zip(got, grads(model.b), strict=True))


class TwoOrders(nn.Module):
    """A layer that sees batch and length in one order, and one that sees them in the other."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.mixing, self.below, self.above = mixing, nn.Linear(8, 8), nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        v = self.first(x)
        v = v - v.mean(0, keepdim=True) / 2 if self.mixing else v
        return self.above(torch.relu(self.below(v)).transpose(0, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("second", [(4, 7, 8), (6, 6, 8)], ids=["other length", "square"])
def test_two_orders_of_tokens(second: tuple[int, ...], mixing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that become symbols one by one, or that are equal, leave regions on tokens, without bias; a result has the strides that views below it expect."""
    model = TwoOrders(mixing).double()
    f, plans = rows_of(model, HALF)
    for shape in ((4, 6, 8), second):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        f(x).square().sum().backward()
        grads(model, x)
    assert {c.axis for plan in plans for c in plan.cuts if c.decision == "rows"} == {"tokens"}
    assert all(c.decision == "rows" for plan in plans for c in plan.cuts)
    found = over_halves_of_regions(monkeypatch, lambda: backward_of(f, model, x), len(plans[-1].cuts))
    model(x).square().sum().backward()
    assert max(relative(a, b) for a, b in zip(found, grads(model, x), strict=True)) < 1e-12


def backward_of(f: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    f(x).square().sum().backward()
    return grads(model, x)


def over_halves_of_regions(monkeypatch: pytest.MonkeyPatch, gradients: Callable[[], list[Tensor]], regions: int) -> list[Tensor]:
    """The mean gradients over all ways in which every region keeps its even tokens or its odd ones, with weight 2. They are the exact ones."""
    halves: Iterator[int] = iter(())

    def half(method: str, norms_sq: Tensor, k: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        kept = torch.arange(next(halves), len(norms_sq), 2)
        assert k == len(kept)
        return kept, torch.full((k,), 2.0, dtype=norms_sq.dtype)

    monkeypatch.setattr(choose_op, "choose_rows", half)
    found = []
    for way in itertools.product((0, 1), repeat=regions):
        halves = iter(way)
        found.append(gradients())
        assert next(halves, None) is None  # every region chose once
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(found[0], found[-1], strict=True))
    return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]


@pytest.mark.slow
def test_mean_and_variance() -> None:
    """The error of the mean over many steps is as large as the spread of single steps says: n |mean - exact|^2 is the trace of the covariance."""
    block, x = Block(8).double(), torch.randn(4, 6, 8, dtype=torch.float64)
    f, _ = rows_of(block, HALF)
    weight = torch.rand(4, 6, 1, dtype=torch.float64) ** 2
    draws = []
    for _ in range(400):
        (f(x) * weight).square().sum().backward()
        draws.append(torch.cat([g.flatten() for g in grads(block)]))
    (block(x) * weight).square().sum().backward()
    exact = torch.cat([g.flatten() for g in grads(block)])
    errors = torch.stack(draws) - exact
    gram = (errors - errors.mean(0)) @ (errors - errors.mean(0)).T / (len(draws) - 1)
    freedom = gram.trace().square() / gram.square().sum()  # of so many independent numbers of equal variance
    ratio = len(draws) * errors.mean(0).square().sum() / gram.trace()
    assert abs(ratio - 1) < 4 * (2 / freedom) ** 0.5


def test_runs_repeat() -> None:
    """Seeding torch repeats the choices, which draw nothing from the user's own random numbers."""
    block, x = Block(8), torch.randn(4, 6, 8)
    f, _ = rows_of(block, HALF)

    def run() -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(7)
        f(x).square().sum().backward()
        return grads(block), torch.rand(3)

    (a, after), (b, _) = run(), run()
    torch.manual_seed(7)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and torch.equal(after, torch.rand(3))


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("batch_first", [True, False])
def test_through_inductor(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of code that is compiled, of code from Inductor's cache, and of a second backward pass, which finds what the forward pass has saved."""
    chosen = ChosenTokens(monkeypatch)
    block, x = Block(8, batch_first=batch_first, dropout=0.2), torch.randn(4, 6, 8, requires_grad=True)
    tangent, found = torch.randn(4, 6, 8), []
    for _ in range(2):
        torch._dynamo.reset()
        f = torch.compile(block, backend="approx", options=HALF)
        torch.manual_seed(3)
        out = f(x)
        for keep in (True, False):
            out.backward(tangent, retain_graph=keep)
            found.append((grads(block, x), chosen.weights))
            chosen.weights = []
    exact = torch.compile(block, backend="inductor")  # draws the same dropout masks
    for got, chosen.weights in found:
        chosen.apply([block])
        torch.manual_seed(3)
        exact(x).backward(tangent)
        assert max(relative(a, b) for a, b in zip(got, grads(block, x), strict=True)) < 1e-5


def test_explained() -> None:
    block, x = Block(64), torch.randn(8, 16, 64)
    report = approx_compile.explain(block, x, config=HALF)
    assert "tokens" in str(report)


@pytest.mark.slow
def test_compiled_autograd_is_exact() -> None:
    block, x = Block(8), torch.randn(4, 6, 8, requires_grad=True)
    f, _ = rows_of(block, HALF)
    out = f(x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        out.square().sum().backward()
    got = grads(block, x)
    block(x).square().sum().backward()
    want = grads(block, x)
    assert relative(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in want])) < 1e-5


def test_a_failure_leaves_the_step_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(token_compiler, "rewrite", fails)
    block, x = Block(8), torch.randn(4, 6, 8)
    f, plans = rows_of(block, HALF)
    with pytest.warns(UserWarning, match="tokens are not sampled: a defect of approx_compile .RuntimeError: not today"):
        f(x).square().sum().backward()
    got = torch.cat([g.flatten() for g in grads(block)])
    block(x).square().sum().backward()
    assert relative(got, torch.cat([g.flatten() for g in grads(block)])) < 1e-6
    assert [c.decision for c in plans[0].cuts] == ["exact"] and "not today" in plans[0].cuts[0].reason


class OfConstantPositions(nn.Module):
    """Reads positions that a constant in the model's code names, which the backward graph has as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).index_select(1, torch.tensor([4, 1, 1, 0])))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("small_work_counts")
@pytest.mark.parametrize("axis", ["tokens", "rows"])
def test_constants_in_the_backward_graph(axis: str) -> None:
    model, x = OfConstantPositions(), torch.randn(8, 6, 8)
    f, plans = rows_of(model, {"grad": {"axis": axis}})
    f(x).square().sum().backward()
    got = grads(model)
    model(x).square().sum().backward()
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, grads(model), strict=True))
    assert {(c.decision, c.axis) for c in plans[0].cuts} == {("rows", axis)}
