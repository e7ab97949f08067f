"""Gradients of the rewritten graph equal sampling written by hand with the indices and scales that the graph chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Choices, compiled
from helpers.oracles import relative
from torch import Tensor

aten = torch.ops.aten
METHODS = ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta")


@dataclass(frozen=True)
class Op:
    """A product of two operands. `run` computes it; the dims are those of each operand's contraction axis, by product."""

    run: Callable[[Tensor, Tensor], Tensor]
    a: tuple[int, ...]
    b: tuple[int, ...]
    name: str
    groups: int = 1
    conv: tuple[Any, ...] | None = None  # stride, padding, dilation, transposed, output_padding
    batched: bool = False


def conv(rank: int, a: tuple[int, ...], b: tuple[int, ...], stride=1, padding=1, dilation=1, groups=1, transposed=False, output_padding=0) -> Op:
    f = {
        (1, False): F.conv1d,
        (2, False): F.conv2d,
        (3, False): F.conv3d,
        (1, True): F.conv_transpose1d,
        (2, True): F.conv_transpose2d,
        (3, True): F.conv_transpose3d,
    }[rank, transposed]
    extra = {"output_padding": output_padding} if transposed else {}
    each = lambda v: [v] * rank  # noqa: E731
    return Op(
        lambda x, w: f(x, w, None, stride, padding, groups=groups, dilation=dilation, **extra),
        a,
        b,
        "convolution",
        groups,
        (each(stride), each(padding), each(dilation), transposed, each(output_padding)),
    )


OPS = {
    "mm": Op(lambda a, b: a @ b, (22, 24), (24, 26), "mm"),
    "linear": Op(lambda x, w: F.linear(x, w), (22, 24), (26, 24), "mm"),
    "linear3d": Op(lambda x, w: F.linear(x, w), (2, 11, 24), (26, 24), "mm"),
    "left": Op(lambda w, x: w @ x.t(), (26, 24), (22, 24), "mm"),
    "addmm": Op(lambda a, b: torch.addmm(torch.ones(26, dtype=a.dtype), a, b, alpha=0.5), (22, 24), (24, 26), "addmm"),
    "bmm": Op(torch.bmm, (3, 22, 24), (3, 24, 26), "bmm", batched=True),
    "baddbmm": Op(lambda a, b: torch.baddbmm(torch.ones(3, 22, 26, dtype=a.dtype), a, b, alpha=2), (3, 22, 24), (3, 24, 26), "baddbmm", batched=True),
    "einsum": Op(lambda a, b: torch.einsum("bik,bjk->bij", a, b), (3, 22, 24), (3, 26, 24), "bmm", batched=True),
    "conv1d": conv(1, (22, 24, 9), (26, 24, 3), stride=2),
    "conv2d": conv(2, (22, 24, 6, 5), (26, 24, 3, 3)),
    "conv2d_dilated": conv(2, (22, 24, 7, 7), (26, 24, 3, 3), padding=0, dilation=2),
    "conv2d_grouped": conv(2, (22, 48, 5, 5), (52, 24, 3, 3), groups=2),
    "conv3d": conv(3, (22, 24, 3, 4, 3), (26, 24, 3, 3, 3)),
    "conv_transpose1d": conv(1, (22, 24, 5), (24, 26, 3), stride=2, transposed=True, output_padding=1),
    "conv_transpose2d": conv(2, (22, 24, 4, 4), (24, 26, 3, 3), stride=2, transposed=True),
    "conv_transpose2d_grouped": conv(2, (22, 48, 4, 4), (48, 26, 3, 3), groups=2, transposed=True),
}


class Site(torch.nn.Module):
    """One product with a parameter as its weight (two plain inputs where it has none)."""

    def __init__(self, op: Op, weight: Tensor, weight_first: bool) -> None:
        super().__init__()
        self.op, self.first = op, weight_first
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.op.run(self.weight, x) if self.first else self.op.run(x, self.weight)


def entries(choices: Choices, label: str, unit: int) -> tuple[Tensor, Tensor | None]:
    """Return the chosen indices and scales by entry (a stored index stands for `unit` entries), with a leading dim for independent contractions."""
    idx, scale = choices[label + ".idx"], choices.get(label + ".scale")
    idx = idx if idx.dim() == 2 else idx.unsqueeze(0)
    scale = scale if scale is None or scale.dim() == 2 else scale.unsqueeze(0)
    idx = (idx.unsqueeze(-1) * unit + torch.arange(unit)).flatten(1)
    return idx, scale.repeat_interleave(unit, 1) if scale is not None else None


def weights(choices: Choices, label: str, unit: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return (lead, size): the scale of every entry, 0 where it was dropped. The sampled product is the exact one with one operand so weighted."""
    idx, scale = entries(choices, label, unit)
    full = torch.zeros(idx.shape[0], size, dtype=dtype)
    return full.scatter(1, idx, torch.ones(idx.shape, dtype=dtype) if scale is None else scale.to(dtype))


def as_matrices(op: Op, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.reshape(-1, a.shape[-1]) if a.dim() == 3 and not op.batched else a, b


def channel_weights(v: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return weights (groups, channels) or (batch, K) in a shape that multiplies x along dim."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return v.reshape(shape)


def by_hand(op: Op, sampling: str, a: Tensor, b: Tensor, dy_of: Callable[[Tensor], Tensor], w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, da, db) by the exact formulas with the weight vectors multiplied in."""
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()

    def sampled(a: Tensor, b: Tensor) -> Tensor:
        return op.run(*weigh_contraction(op, a, b, w["output"]))

    exact = op.run(a, b)
    y = sampled(a, b) if "output" in w else exact
    dy = dy_of(y.detach())
    if sampling == "forward":
        da, db = torch.autograd.grad(y, (a, b), dy)
    elif sampling == "blackbox":
        da, db = torch.autograd.grad(exact, (a, b), dy)
    else:
        da = gradient(op, a, b, dy, w.get("a"), 0)
        db = gradient(op, a, b, dy, w.get("b"), 1)
    return y.detach(), da, db


def weigh_contraction(op: Op, a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply the second operand by the weights along the axis that the output contracts."""
    if op.conv is None:
        last = op in (OPS["linear"], OPS["linear3d"], OPS["left"], OPS["einsum"])
        if op.batched:
            return a, b * (v.unsqueeze(1) if last else v.unsqueeze(2))
        return a, b * (v if last else v.reshape(-1, 1))
    return a * channel_weights(v.reshape(-1), a, 1), b  # x's channels, all groups in a row


def gradient(op: Op, a: Tensor, b: Tensor, dy: Tensor, v: Tensor | None, of: int) -> Tensor:
    """Return the gradient of operand `of` with weights on its own contraction axis: the columns of dy (of=0) or its rows (of=1); the same for convolutions."""
    if v is None:
        return torch.autograd.grad(op.run(a, b), (a, b)[of], dy)[0]
    if op.conv is not None:
        weighted = dy * (channel_weights(v.reshape(-1), dy, 1) if of == 0 else channel_weights(v.reshape(-1), dy, 0))
    elif op.batched:
        weighted = dy * (v.unsqueeze(1) if of == 0 else v.unsqueeze(2))
    else:
        flat = dy.reshape(-1, dy.shape[-1])
        weighted = (flat * (v if of == 0 else v.reshape(-1, 1))).reshape(dy.shape)
    return torch.autograd.grad(op.run(a, b), (a, b)[of], weighted)[0]


def run_case(name: str, sampling: str, method: str, group: int, dtype: torch.dtype = torch.float32) -> list[float]:
    op = OPS[name]
    a, b = torch.randn(op.a, dtype=torch.float32).to(dtype), torch.randn(op.b, dtype=torch.float32).to(dtype)
    first = name == "left"
    model = Site(op, (a if first else b).clone(), first)
    x = (b if first else a).clone().requires_grad_()
    options = {"method": method, "ratio": 0.5, "min_k": 2, "group": group, "sampling": sampling, "policy": "always"}
    f, choices, plans = compiled(model, options)
    y = f(x)
    dy = torch.randn(y.shape, dtype=torch.float32).to(dtype)
    y.backward(dy)
    (site,) = plans.sites
    assert site.op.startswith("conv") or site.op == op.name
    if method == "topk_weights" and sampling == "backward":
        assert {p.name: p.decision for p in site.products}["grad_weight"] == "exact"  # no weight among its operands
    else:
        assert site.decision == "sampled"
    w: dict[str, Tensor] = {}
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    for p in site.products:
        if p.decision != "sampled":
            continue
        of_weight = p.name == "grad_weight"
        key = "output" if p.name == "output" else ("a" if first == of_weight else "b")
        w[key] = weights(choices, f"{site.name}.{p.name}", p.how.unit, p.size, exact)
    assert w
    want = by_hand(op, sampling, a.to(exact), b.to(exact), lambda _: dy.to(exact), w)
    da, db = (model.weight.grad, x.grad) if first else (x.grad, model.weight.grad)
    return [relative(got, ref) for got, ref in zip((y, da, db), want, strict=True)]


@pytest.mark.slow
@pytest.mark.sample(36)
@pytest.mark.parametrize("sampling", ["forward", "backward", "blackbox"])
# 5 leaves a tail on axes of 24 and 22; with so few groups bernoulli's capacity is the whole axis, which makes it exact
@pytest.mark.parametrize(("method", "group"), [(method, group) for method in METHODS for group in (1, 4, 5) if method != "bernoulli" or group == 1])
@pytest.mark.parametrize("name", OPS)
def test_against_hand_written_sampling(name: str, method: str, group: int, sampling: str) -> None:
    assert max(run_case(name, sampling, method, group)) < 1e-6


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", OPS)
def test_bfloat16_against_float32(name: str) -> None:
    for method in ("topk", "bernoulli"):
        errors = run_case(name, "forward", method, 4 if method == "topk" else 1, torch.bfloat16)
        assert max(errors) < 1e-2, (method, errors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("linear", "conv2d", "bmm"):
        errors = run_case(name, "forward", "wta", 1, dtype)
        assert max(errors) < (1e-12 if dtype is torch.float64 else 2e-3), (name, errors)
