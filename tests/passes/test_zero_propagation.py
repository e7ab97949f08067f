"""Skipping zeros that dropped entries caused changes no gradient, and happens exactly where the zeros are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from torch import Tensor, nn

from approx_compile import machine
from approx_compile.passes import joint_graph_pass
from approx_compile.passes.cost import margins
from approx_compile.passes.cost.expressions import B, Case, I, K, M, T, e, k, skip, terms
from approx_compile.passes.planning import zero_skipping

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}


class ConvChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.b, self.bn2, self.c = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.a(x)))
        return self.c(F.relu(self.bn2(self.b(h))) + h)


class Feed(nn.Module):
    """The two linear layers of a transformer block, gated, with dropout."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.drop = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64), nn.Dropout(0.1)
        self.f = getattr(F, activation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.f(self.gate(x)) * self.up(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 96), nn.Linear(96, 80), nn.Linear(80, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(F.relu(self.one(x)))))


class Residual(nn.Module):
    """A second op reads the activation, so its gradient has no zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        return self.two(h) + h


CASES: dict[str, tuple[Any, tuple[int, ...], set[tuple[str, str, str]]]] = {
    "plain": (
        Plain,
        (256, 64),
        {("two", "grad_input", "three"), ("two", "grad_weight", "three"), ("one", "grad_input", "two"), ("one", "grad_weight", "two")},
    ),
    # the pieces of equal layers are traced once
    "equal layers": (lambda: mlp(64, 64, 64, 64), (256, 64), {(a, g, b) for a, b in (("0", "2"), ("2", "4")) for g in ("grad_input", "grad_weight")}),
    "gelu": (lambda: Feed("gelu"), (4, 64, 64), {(n, g, "down") for n in ("gate", "up") for g in ("grad_input", "grad_weight")}),
    "silu": (lambda: Feed("silu"), (4, 64, 64), {(n, g, "down") for n in ("gate", "up") for g in ("grad_input", "grad_weight")}),
    # h has two readers, so a's output gradient is not zero where b dropped; b's is where c dropped
    "conv": (ConvChain, (8, 32, 8, 8), {("b", "grad_input", "c"), ("b", "grad_weight", "c")}),
    "residual": (Residual, (256, 64), set()),
}


@pytest.fixture
def skip_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let skipping count as worth it, because the models here are too small for it."""
    monkeypatch.setattr(margins, "pays", lambda *anything: True)


def skipped(sites: list[Any]) -> set[tuple[str, str, str]]:
    return {(s.name, p.name, p.skips) for s in sites for p in s.products if p.skips is not None}


def gradients_and_sites(model: nn.Module, options: dict[str, Any], x: Tensor) -> tuple[list[Tensor], list[Any]]:
    f, _, plans = compiled(model, options)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    f(x).square().sum().backward()
    return grads(model, x), plans.sites


@pytest.mark.slow
@pytest.mark.sample(5)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["topk", "wta"])
@pytest.mark.parametrize("group", [1, 4, 5])
def test_gradients_are_the_same_with_and_without(name: str, method: str, group: int, skip_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape, want = CASES[name]
    model, x = make(), torch.randn(shape)
    options = ALWAYS | {"method": method, "group": group}
    with_skips, sites = gradients_and_sites(model, options, x)
    assert skipped(sites) == want
    with monkeypatch.context() as m:
        m.setattr(joint_graph_pass, "skip_zeros", lambda plan, inputs: plan)
        without, sites = gradients_and_sites(model, options, x)
    assert not skipped(sites)
    assert max(relative(a, b) for a, b in zip(with_skips, without, strict=True)) < 2e-6


# --- by kernels of ours ---


class Three(nn.Module):
    """The gradients of the middle layer meet zeros on their other axis; 64 of 128, 96 of 192 and 64 of 128 channels are kept."""

    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        widths = ((128, 192), (192, 128), (128, 32))
        self.one, self.two, self.three = (nn.Conv2d(a, b, 3, padding=1) if conv else nn.Linear(a, b) for a, b in widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(F.relu(self.one(x)))))


OWN: dict[str, tuple[dict[str, str], set[tuple[str, str]]]] = {
    # what runs the second site, and (lowering, skips_by) of its gradients
    "exact": ({"method": "exact"}, {("inductor", "triton"), ("inductor", "inductor")}),
    "what is kept by gathers": ({"lowering": "inductor"}, {("inductor", "triton"), ("inductor", "inductor")}),
    "what is kept by a kernel": ({}, {("triton", "inductor"), ("inductor", "triton")}),
}


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("method", ["topk", "wta"])
@pytest.mark.usefixtures("skip_all", "everywhere")
def test_kernels_step_over_zeros(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to skip gives the gradients of not skipping, and the fastest way is taken."""
    rule, ways = OWN[name]
    options = ALWAYS | {"method": method, "group": 32, "lowering": "triton", "rules": [{"layers": "two"} | rule]}
    model, x, offered = Three(), torch.randn(64, 128), zero_skipping._ways

    def one_way(way: tuple[str, str], site: Any, plan: Any, *others: Any) -> tuple[list[tuple[str, str]], str | None]:
        if site.name != "two":
            return offered(site, plan, *others)
        found, why = offered(site, replace(plan, lowerings=("inductor", "triton")), *others)
        assert set(found) == ways
        return [way], why

    def off(plan: Any, inputs: Any) -> Any:
        return plan

    with monkeypatch.context() as m:
        m.setattr(joint_graph_pass, "skip_zeros", off)
        want, sites = gradients_and_sites(model, options, x)
        assert not skipped(sites)
    for way in ways:
        with monkeypatch.context() as m:
            m.setattr(zero_skipping, "_ways", partial(one_way, way))
            torch._dynamo.reset()
            got, sites = gradients_and_sites(model, options, x)
        products = sites[1].products[1:]
        assert [(p.lowering, p.skips_by) for p in products] == [way] * 2 and skipped(sites) >= {("two", p.name, "three") for p in products}
        assert ("skips what three dropped by triton" in products[0].reason) == (way[1] == "triton")
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 2e-6


@pytest.mark.slow
@pytest.mark.usefixtures("skip_all", "everywhere")
def test_convolutions_step_over_input_channels_and_gather_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Three(conv=True).to(memory_format=torch.channels_last), torch.randn(2, 128, 5, 5).contiguous(memory_format=torch.channels_last)
    for rule in ({}, {"method": "exact"}):
        options = ALWAYS | {"group": 32, "lowering": "triton", "rules": [{"layers": "two"} | rule]}
        torch._dynamo.reset()
        got, sites = gradients_and_sites(model, options, x)
        two = sites[1].products[1:]
        assert {(p.lowering, p.skips_by, p.skips) for p in two} == {("inductor" if rule else "triton", "inductor", "three")}
        assert ("three dropped by inductor: in a convolution's gradients a kernel leaves out input channels" in two[0].reason) == bool(rule)
        torch._dynamo.reset()
        with monkeypatch.context() as m:
            m.setattr(joint_graph_pass, "skip_zeros", lambda plan, inputs: plan)
            want, _ = gradients_and_sites(model, options, x)
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 2e-6


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_zeros_by_kernels_are_decided_by_time_and_by_the_lowering() -> None:
    """`auto` takes a kernel where it is measured and faster, a named kernel lowering where it fits, and the lowering "inductor" never."""
    profile = machine.current()
    exact = {"rules": [{"layers": "two", "method": "exact"}, {"layers": "three", "lowering": "inductor"}]}

    def ways(by: float | None, **options: Any) -> tuple[set[str], str]:
        known = {n: t for n, t in profile.tables.items() if n.startswith("linear.")} if by else {}
        fast = {f"triton.{n}": t.model_copy(update={"values": tuple(v * (by or 1) for v in t.values)}) for n, t in known.items()}
        torch._dynamo.reset()
        with machine.use(profile.model_copy(update={"tables": profile.tables | fast})):
            two = plans_of(Three(), ALWAYS | {"group": 32} | exact | options, torch.randn(2048, 128))[1]
        return {p.skips_by for p in two.products[1:] if p.skips}, two.products[2].reason

    assert ways(20.0)[0] == {"triton"} and ways(0.05)[0] == ways(None)[0] == ways(20.0, lowering="inductor")[0] == {"inductor"}
    assert ways(1.0, lowering="triton")[0] == {"triton"}
    by, reason = ways(1.0, lowering="triton", group=16)
    assert by == {"inductor"} and reason.endswith("skips what three dropped by inductor: triton skips whole groups of a multiple of 32, not 16")


def test_costs_of_zeros_by_a_kernel() -> None:
    """Counted by hand: the products alone, with one axis shortened by the kernel; where the other axis is gathered, that too."""

    def found(product: str, decision: str, **more: Any) -> dict[str, Any]:
        return {t.what: t for t in terms(Case("linear", product, decision, skips=True, **more))}

    dx, dw = (found(p, "exact", skips_by="triton") for p in ("grad_input", "grad_weight"))
    assert set(dx) == set(dw) == {"product"} and dx["product"].flops == dw["product"].flops == 2 * B * M * K * skip * T
    assert (dx["product"].rate, dx["product"].at) == ("triton.linear.output", (M, skip, K))
    assert (dw["product"].rate, dw["product"].at) == ("triton.linear.grad_weight", (M, skip, K))
    kept = found("grad_input", "coupled", lowering="triton")
    assert set(kept) == {"take dY", "new memory, dY", "take W", "new memory, W", "launches", "product"}
    assert kept["product"].rate == "triton.linear.grad_input" and kept["product"].at == (M, k, skip)
    assert kept["take W"].bytes == 2 * e * B * K * T * skip  # of the whole weight
    other = found("grad_weight", "coupled", skips_by="triton", alone=True)
    assert set(other) == {"take A", "new memory, A", "launches", "product", "new memory, narrow result", "untake", "new memory, result"}
    assert other["product"].at == (M, skip, k) and other["take A"].bytes == 2 * e * k * B * I


def test_exact_sites_skip_too_and_say_so(skip_all: None) -> None:
    sites = plans_of(Plain(), ALWAYS | {"rules": [{"layers": "two", "method": "exact"}]}, torch.randn(256, 64, requires_grad=True))
    two = sites[1]
    assert two.decision == "exact" and "its gradients skip what later sites dropped" in two.notes
    assert two.flops_sampled < two.flops_exact and two.products[0].flops_sampled == two.products[0].flops_exact


def test_nothing_is_skipped_where_gradients_are_not_coupled(skip_all: None) -> None:
    for sampling in ("backward", "blackbox"):
        assert not skipped(plans_of(Plain(), ALWAYS | {"sampling": sampling}, torch.randn(256, 64)))


def test_grouped_convolutions_are_left_out(skip_all: None) -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3, groups=2), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2), nn.ReLU(), nn.Conv2d(64, 32, 3))
    sites = plans_of(model, ALWAYS | {"min_k": 4}, torch.randn(4, 32, 9, 9))
    assert [s.decision for s in sites] == ["sampled"] * 3 and not skipped(sites)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_batched_products_are_left_out_whatever_the_batch(skip_all: None) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.o((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))

    for batch in (1, 2):
        model, x = Attention(), torch.randn(batch, 64, 64)
        got, sites = gradients_and_sites(model, ALWAYS, x)
        assert [s.op for s in sites].count("bmm") == 2 and all(s.decision == "sampled" for s in sites)
        assert all(g.isfinite().all() for g in got)


def test_small_products_do_not_skip_by_the_gate() -> None:
    assert not skipped(plans_of(Plain(), ALWAYS, torch.randn(8, 64)))


def test_the_relus_mask_is_not_saved() -> None:
    """The ReLU's backward pass runs on the kept entries, before the un-gather, and needs no mask of the whole activation."""
    texts: list[str] = []

    def listen(plan: Any, before: Any, after: Any) -> None:
        texts.extend((str(before), str(after)))

    from approx_compile import Backend
    from approx_compile.backend import run_as_is

    f = torch.compile(Plain(), backend=Backend(ALWAYS, inner_compile=run_as_is, on_plan=listen, keep_graphs=True))
    f(torch.randn(16, 64))
    before, after = texts
    assert before.count("aten.le.Scalar") == 2 == after.count("aten.le.Scalar")
    assert before.count("aten.alias.default](args = (%alias") > after.count("aten.alias.default](args = (%alias")
