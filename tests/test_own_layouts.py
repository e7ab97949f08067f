"""What the graph hands to kernels of ours is what they take: lines of whole multiples of 16 entries, images in channels-last, whatever came before.

On a GPU they would leave anything else to readable torch, under the name of the kernel; on CPUs their references run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import compiled, grads, mlp, relative
from torch import Tensor, fx, nn

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.kernels import available

pytestmark = pytest.mark.usefixtures("one_thread")

ALWAYS: dict[str, Any] = {"policy": "always", "min_k": 1, "group": 32, "lowering": "triton"}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of our kernels are offered on this device as well."""
    monkeypatch.setattr(available, "missing", lambda lowering, device: None)


def ops_of(model: nn.Module, options: dict[str, Any], x: Tensor) -> dict[str, list[tuple[Tensor, ...]]]:
    """Fake operands (the first two) of every op of ours in the joint graph, by its name."""
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
    """The loss is inside: the gradient of the sum is one number, broadcast."""

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


def test_images_are_in_channels_last_below_a_flat_layer() -> None:
    """A view of the flat layer's gradient is contiguous."""
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    ops = ops_of(model, ALWAYS, x)
    images = [pair[0] for pair in ops["skip_conv"]] + [pair[0] for pair in ops["skip_conv_input"]] + [i for pair in ops["skip_conv_weight"] for i in pair]
    assert len(images) == 7 and all(i.is_contiguous(memory_format=torch.channels_last) for i in images)
    same_by_inductor(model, ALWAYS | {"rules": [{"layers": "linear", "method": "exact"}]}, x, lambda y: y.square().sum())


@pytest.mark.parametrize("conv", [False, True])
def test_any_batch_by_inductors_own_code(conv: bool) -> None:
    """Compiled once for all batches, the ops within Inductor's code, against the rewritten graph run op by op."""
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
