"""Graphs pass the custom ops operands that their kernels take: contiguous axes of a multiple of 16 entries, and images in channels-last.

On a GPU the op would run its reference for anything else, although the plan names the kernel; on CPUs the references run always.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.compile import compiled
from helpers.models import mlp
from helpers.oracles import grads, relative
from helpers.sampling import all_but
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.kernels import availability

pytestmark = pytest.mark.usefixtures("one_thread")

ALWAYS: dict[str, Any] = {"policy": "always", "min_k": 1, "group": 32, "lowering": "triton"}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer the ops of this project's kernels on this device as well."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)


def ops_of(model: nn.Module, options: dict[str, Any], x: Tensor) -> dict[str, list[tuple[Tensor, ...]]]:
    """Return fake operands (the first two) of every custom op in the joint graph, by its name."""
    graphs: list[fx.Graph] = []
    backend = Backend(options, inner_compile=run_as_is, on_plan=lambda plan, before, after: graphs.append(after), keep_graphs=True)
    torch.compile(model, backend=backend)(x)
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    for n in (n for g in graphs for n in g.nodes if n.op == "call_function" and str(n.target).startswith("approx_compile.skip")):
        found.setdefault(str(n.target).split(".")[1], []).append(tuple(a.meta["val"] for a in n.args[:2]))
    return found


def aligned(x: Tensor) -> bool:
    return any(x.stride(i) == 1 and x.stride(1 - i) > 0 and x.stride(1 - i) % 16 == 0 and x.shape[i] % 16 == 0 for i in (0, 1))


def same_by_inductor(model: nn.Module, options: dict[str, Any], x: Tensor, loss: Any) -> None:
    found = []
    for lowering in ("inductor", "triton"):
        torch._dynamo.reset()
        f, _, _ = compiled(model, options | {"lowering": lowering})
        loss(f(x)).backward()
        found.append(grads(model))
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 1e-5


class Summed(nn.Module):
    """A model with the loss inside: the gradient of the sum is one number that is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum()


@pytest.mark.parametrize("rows", [32, 40, 7])
def test_broadcast_gradients_are_laid_out(rows: int) -> None:
    model, x = Summed(), torch.randn(rows, 128, requires_grad=True)
    ops = ops_of(model, ALWAYS, x)
    assert {k: len(v) for k, v in ops.items()} == {"skip_matmul": 1, "skip_matmul_into": 2}
    assert all(aligned(operand) for operands in ops.values() for pair in operands for operand in pair)
    same_by_inductor(model, ALWAYS, x, lambda y: y)


@pytest.mark.slow
def test_images_are_in_channels_last_below_a_flat_layer() -> None:
    """The gradient of the flat layer's input is a contiguous view, which must become channels-last."""
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    ops = ops_of(model, ALWAYS, x)
    images = [pair[0] for pair in ops["skip_conv"]] + [pair[0] for pair in ops["skip_conv_input"]] + [i for pair in ops["skip_conv_weight"] for i in pair]
    assert len(images) == 7 and all(i.is_contiguous(memory_format=torch.channels_last) for i in images)
    same_by_inductor(model, ALWAYS | {"rules": [{"layers": "linear", "method": "exact"}]}, x, lambda y: y.square().sum())


@pytest.mark.slow
def test_rows_go_on_through_kernels(small_work_counts: None) -> None:
    """The first layer's gradients run on half of the rows, and by a kernel that skips what the second layer dropped."""
    model, x = mlp(128, 128, 32), torch.randn(64, 128, requires_grad=True)
    options = ALWAYS | {"rules": [{"layers": "0", "output": "exact", "grad": {"axis": "rows", "method": "topk", "ratio": 0.5}}]}
    found = []
    for lowering in ("inductor", "triton"):
        torch._dynamo.reset()
        f, _, plans = compiled(model, options | {"lowering": lowering})
        f(x).square().sum().backward()
        products = plans.sites[0].products[1:]
        assert [p.decision for p in products] == ["rows"] * 2
        assert {p.skips_by for p in products} == {lowering} and all(p.skips == "2" for p in products)
        found.append(grads(model, x))
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 1e-5


@pytest.mark.slow
def test_rows_go_on_through_convolutions(small_work_counts: None) -> None:
    """Under `adaptive`, sites that sample outputs may have rows as well; all rows are kept at first."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 16, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(16, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    options = {"policy": "adaptive", "rules": [{"layers": "conv[1]", "output": {"method": "topk", "ratio": 0.5, "group": 32}}]}
    found = []
    for lowering in ("inductor", "triton"):
        torch._dynamo.reset()
        f, _, plans = compiled(model, options | {"lowering": lowering})
        f(x).square().sum().backward()
        assert [s.products[0].lowering for s in plans.sites] == ["inductor", lowering, "inductor"]
        ((cut,),) = (plan.cuts for plan in plans)
        assert cut.reason == "the whole backward pass" and cut.flops_on_rows == cut.flops_all
        assert {"skip_conv_input", "skip_conv_weight"} <= set(cut.products) or lowering == "inductor"
        found.append(grads(model))
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 1e-5


def test_flops_of_the_ops() -> None:
    """FLOPs are those of products of the kept entries."""
    a, b, idx = torch.randn(6, 8), torch.randn(8, 10), torch.arange(2)
    x, w = torch.randn(2, 8, 5, 5), torch.randn(3, 8, 3, 3)
    y = torch.randn(2, 3, 3, 3)
    ours, geometry = torch.ops.approx_compile, ([1, 1], [0, 0], [1, 1])
    for run, want in (
        (lambda: ours.skip_matmul(a, b, idx, None, 2), 2 * 6 * 4 * 10),
        (lambda: ours.skip_matmul_into(a, b, idx, None, 2, 0), 2 * 4 * 8 * 10),
        (lambda: ours.skip_matmul_into(a, b, idx, None, 2, 1), 2 * 6 * 8 * 4),
        (lambda: ours.skip_conv(x, w, idx, None, 2, *geometry), 2 * 2 * 9 * 3 * 4 * 9),
        (lambda: ours.skip_conv_input(y, w, idx, None, 2, [5, 5], *geometry), 2 * 2 * 9 * 3 * 4 * 9),
        (lambda: ours.skip_conv_weight(x, y, idx, None, 2, [3, 3], *geometry), 2 * 2 * 9 * 3 * 4 * 9),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == want


@pytest.mark.slow
@pytest.mark.parametrize("conv", all_but([False], [False, True]))
def test_any_batch_by_inductors_own_code(conv: bool) -> None:
    """The ops inside Inductor's code, compiled once for all batches, equal the rewritten graph run op by op."""
    layers = [nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)] if conv else list(mlp(128, 128, 8))
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def batch(n: int) -> Tensor:
        x = torch.linspace(-1, 1, n * (64 * 6 * 6 if conv else 128)).sin()
        return x.view(n, 64, 6, 6).contiguous(memory_format=torch.channels_last) if conv else x.view(n, 128)

    found = []
    for inner in ({}, {"inner_compile": run_as_is}):
        torch._dynamo.reset()
        f = torch.compile(model, backend=Backend(ALWAYS, **inner), dynamic=True)
        for n in (5, 12):
            f(batch(n)).square().sum().backward()
            found.append(grads(model))
    for got, want in zip(found[:2], found[2:], strict=True):
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
