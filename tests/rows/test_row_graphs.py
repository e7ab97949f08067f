"""The graphs of one model (graph breaks, blocks compiled one by one, the buckets of DDP) share one choice of rows where they may."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, compiled, rows_of
from helpers.models import Buckets, ResidualLayer, mlp
from helpers.oracles import ChosenRows, grads, relative
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from approx_compile import Backend, _torch, machine
from approx_compile.backend import run_as_is
from approx_compile.reasons.rows import SHORT_BACKWARD
from approx_compile.rows import row_cost
from approx_compile.utils import ApproxWarning

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
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


@pytest.mark.slow
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


class Body(nn.Module):
    def __init__(self, op: Callable[[Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        self.inner, self.op = nn.Linear(8, 8), op

    def forward(self, x: Tensor) -> Any:
        return self.op(self.inner(x))


def test_rows_of_another_axis_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upper graph's first axis is the lower one's second, so the rows that it marks are no samples there."""
    chosen = ChosenRows(monkeypatch)
    lower, upper, x = Body(lambda h: torch.tanh(h).transpose(0, 1)), Body(), torch.randn(16, 12, 8)
    f, g = rows_of(lower)[0], rows_of(upper)[0]
    out = g(f(x))
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(lower) + grads(upper)
    upper(lower(x)).backward(tangent * chosen.mask(12).view(12, 1, 1))
    assert max(relative(a, b) for a, b in zip(got, grads(lower) + grads(upper), strict=True)) < 1e-5


@pytest.mark.slow
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


def clipped(g: Tensor) -> Tensor:
    return g.clamp(-0.02, 0.02)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return clipped(g)


def with_hook(h: Tensor) -> Tensor:
    h.register_hook(clipped)
    return h


def through_hooked_module(h: Tensor) -> Tensor:
    module = nn.Identity()
    module.register_full_backward_hook(lambda m, given, out: (clipped(given[0]),))
    found: Tensor = module(h)
    return found


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {"function": Clipped.apply, "hook": with_hook, "module": through_hooked_module, "graph": lambda h: h}
BETWEEN["compiled autograd"] = Clipped.apply
BETWEEN["hook after the call"] = lambda h: h


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_not_linear_below_a_graph_gets_exact_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager code between two compiled graphs, or in the lower one. Rows of the lower graph are chosen below it."""
    chosen = ChosenRows(monkeypatch)
    lower, upper, x = Body(Clipped.apply) if name == "graph" else Body(), Body(), torch.randn(16, 8)
    f, g = rows_of(lower)[0], rows_of(upper)[0]
    between = BETWEEN[name](f(x))
    out = g(between)
    if name == "hook after the call":
        between.register_hook(clipped)
    tangent = torch.randn_like(out)
    with compiled_autograd._enable(torch.compile(backend="eager")) if name == "compiled autograd" else contextlib.nullcontext():
        out.backward(tangent)
    got = grads(upper) + grads(lower)
    assert len(chosen.choices) == 1, "the lower graph's"
    lower.op = (lambda h: h) if name == "graph" else torch.tanh
    hidden = lower(x).detach().requires_grad_()
    upper(hidden).backward(tangent)
    assert hidden.grad is not None
    exact = clipped(hidden.grad)
    lower(x).backward(exact * chosen.mask(16)[:, None])
    want = grads(upper) + grads(lower)
    if name == "graph":
        want[3] = exact.sum(0)  # its bias is a sum above the product where the rows are chosen
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


def test_linear_functions_and_hooks_on_parameters_below_a_graph_stop_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    lower, upper, x = Body(), Body(), torch.randn(16, 8)
    lower.inner.weight.register_hook(clipped)
    f, g = rows_of(lower)[0], rows_of(upper)[0]
    out = g(2 * f(x).sin())
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(upper) + grads(lower)
    assert len(chosen.choices) == 1, "the upper graph's"
    upper(2 * lower(x).sin()).backward(tangent * chosen.mask(16)[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(upper) + grads(lower), strict=True)) < 1e-5


class SmallStem(nn.Module):
    """A layer that is too small for rows to pay, in front of layers that are not; DDP with `bucket_cap_mb=1` puts it in a bucket of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rest = nn.Linear(16, 512), Buckets()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.relu(self.stem(x)))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("one_rank")
def test_a_small_bucket_does_not_switch_off_rows_in_the_others() -> None:
    f, plans = rows_of(nn.parallel.DistributedDataParallel(SmallStem(), bucket_cap_mb=1), {})
    f(torch.randn(512, 16)).sum().backward()
    decisions = {s.name: s.decision for s in plans.sites}
    assert decisions == {"stem": "exact"} | {f"rest.body.{i}": "sampled" for i in range(4)}


@pytest.mark.distributed
@pytest.mark.usefixtures("one_rank")
def test_the_floor_of_flops_counts_all_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "stored", lambda device: None)
    monkeypatch.setitem(row_cost.LEAST_FLOPS, "cpu", 2.0 * 2 * 2 * 64 * 512 * 512)  # twice the gradients of one layer, and half those of all
    f, plans = rows_of(nn.parallel.DistributedDataParallel(Buckets(), bucket_cap_mb=1), {})
    f(torch.randn(64, 512)).sum().backward()
    assert [s.decision for s in plans.sites] == ["sampled"] * 4


@pytest.mark.distributed
@pytest.mark.usefixtures("one_rank")
def test_buckets_that_all_decline_rows_get_static_sizes_and_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cost, "rejection_reason", lambda *args: SHORT_BACKWARD(mflop=1.0))
    f = torch.compile(nn.parallel.DistributedDataParallel(Buckets(), bucket_cap_mb=1), backend=Backend({}, inner_compile=run_as_is))
    with pytest.warns(ApproxWarning) as caught:
        f(torch.randn(512, 512)).sum().backward()
    texts = [str(w.message) for w in caught if "nothing was approximated" in str(w.message)]
    assert len(texts) == 1 and "4x a backward pass of 1" in texts[0]
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        f(torch.randn(256, 512))


def test_an_inner_compiler_that_counts_as_false_compiles_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty record of choices does, being a dict."""
    monkeypatch.setattr(_torch, "compile_graph", lambda *args, **kwargs: pytest.fail("compiled by Inductor"))
    model, x = mlp(20, 16, 5), torch.randn(24, 20)
    f, _, plans = compiled(model, HALF)
    f(x).sum().backward()
    assert [c.decision for c in plans[0].cuts] == ["rows"] and all(p.grad is not None for p in model.parameters())
