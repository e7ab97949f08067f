"""PyTorch's operator samples: at ratio 1 the graph is unchanged; at 0.5 every sample runs, is finite where exact is, and gives every gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Plans
from helpers.sampling import all_but
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from approx_compile import Backend
from approx_compile.backend import run_as_is

NAMES = (
    "nn.functional.linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "nn.functional.conv1d",
    "nn.functional.conv2d",
    "nn.functional.conv3d",
    "nn.functional.conv_transpose1d",
    "nn.functional.conv_transpose2d",
    "nn.functional.conv_transpose3d",
    "nn.functional.bilinear",
    "nn.functional.multi_head_attention_forward",
)


@functools.cache
def ops() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    return {op.name: op for op in op_db if op.name in NAMES and op.variant_test_name == ""}


def samples(name: str) -> list[Any]:
    return list(ops()[name].sample_inputs("cpu", torch.float32, requires_grad=True))


def function(name: str) -> Any:
    """Return the op itself (for attention, op_db has a wrapper in a file that Dynamo does not trace)."""
    return F.multi_head_attention_forward if name == "nn.functional.multi_head_attention_forward" else ops()[name].get_op()


def call(name: str, sample: Any) -> Any:
    """Return copies of a sample's arguments: (args, kwargs, leaves that need gradients)."""
    args, kwargs = tree_map(
        lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, ((sample.input, *sample.args), sample.kwargs)
    )
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    return args, kwargs, leaves


def run_op(f: Any, name: str, sample: Any) -> tuple[Tensor, list[Tensor | None]]:
    args, kwargs, leaves = call(name, sample)
    torch.manual_seed(0)
    y = f(*args, **kwargs)
    first = next(t for t in tree_leaves(y) if isinstance(t, Tensor))
    if first.requires_grad:
        first.sum().backward()
    return first.detach(), [t.grad for t in leaves]


def test_all_named_ops_are_there() -> None:
    assert set(ops()) == set(NAMES)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NAMES)
def test_ratio_one_leaves_every_sample_alone(name: str) -> None:
    op = function(name)
    for sample in samples(name):
        torch._dynamo.reset()
        graphs: list[tuple[str, str]] = []
        backend = Backend(
            {"policy": "always", "ratio": 1, "min_k": 1},
            inner_compile=run_as_is,
            on_plan=lambda p, b, a, g=graphs: g.append((str(b), str(a))),
            keep_graphs=True,
        )
        run_op(torch.compile(op, backend=backend), name, sample)
        assert all(before == after for before, after in graphs)


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NAMES)
def test_half_runs_is_finite_and_gives_every_gradient(name: str) -> None:
    op = function(name)
    sampled = 0
    for sample in samples(name):
        torch._dynamo.reset()
        want, want_grads = run_op(op, name, sample)
        plans = Plans()
        backend = Backend({"policy": "always", "ratio": 0.5, "min_k": 1}, inner_compile=run_as_is, on_plan=plans)
        got, got_grads = run_op(torch.compile(op, backend=backend), name, sample)
        sampled += sum(p.sampled for p in plans)
        assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
        assert bool(got[want.isfinite()].isfinite().all())
        for a, b in zip(got_grads, want_grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.shape == b.shape and bool(a[b.isfinite()].isfinite().all())
    if name != "nn.functional.bilinear":  # decomposes into products of elements
        assert sampled > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", all_but(["nn.functional.linear"], ["nn.functional.linear", "nn.functional.conv2d", "nn.functional.multi_head_attention_forward"])
)
def test_one_sample_is_inductors_at_ratio_one(name: str) -> None:
    op, sample = function(name), samples(name)[0]
    want, want_grads = run_op(torch.compile(op, backend="inductor"), name, sample)
    torch._dynamo.reset()
    got, got_grads = run_op(torch.compile(op, backend="approx", options={"policy": "always", "ratio": 1, "min_k": 1}), name, sample)
    assert torch.equal(want, got)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(want_grads, got_grads, strict=True))
