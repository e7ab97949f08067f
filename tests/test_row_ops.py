"""Whatever an op does with the batch, the gradient is that of the masked tangents: on the rows kept where samples stay apart, on all rows below where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import grads
from test_rows import HALF, Chosen, rows_of
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
B, C = 20, 12
IDX = torch.tensor([3, 1, 1, 0, 7])
TABLE = torch.randn(C, 5)

APART: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("sin", "exp", "tanh", "sigmoid", "erf", "abs", "reciprocal", "atan")},
    **{
        name: getattr(F, name) for name in ("gelu", "silu", "mish", "softplus", "elu", "hardswish", "leaky_relu", "logsigmoid", "softsign", "relu6", "hardtanh")
    },
    "softmax": lambda h: h.softmax(1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True),
    "layer_norm": lambda h: F.layer_norm(h, (C,)),
    "group_norm": lambda h: F.group_norm(h, 3),
    "instance_norm": lambda h: F.instance_norm(h.view(B, 3, 4)).flatten(1),
    "normalize": lambda h: F.normalize(h, dim=1),
    "std": lambda h: h / h.std(1, keepdim=True),
    "prod": lambda h: h * (1 + 0.1 * h).prod(1, keepdim=True),
    "amax": lambda h: h - h.amax(1, keepdim=True),
    "max": lambda h: h + h.max(1, keepdim=True).values,
    "cumsum": lambda h: h.cumsum(1),
    "cumprod": lambda h: (1 + 0.1 * h).cumprod(1),
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(2, 1),
    "sort": lambda h: h.sort(1).values,
    "topk": lambda h: torch.cat([h.topk(5, 1).values, h[:, :7]], 1),
    "chunk": lambda h: torch.cat([2 * a for a in h.chunk(3, 1)], 1),
    "split": lambda h: h.split([5, 7], 1)[1].repeat(1, 2)[:, :C],
    "unbind": lambda h: torch.stack(h.unbind(1)[::-1], 1),
    "glu": lambda h: F.glu(torch.cat([h, h.sin()], 1), 1),
    "gather": lambda h: h + h.gather(1, IDX.expand(h.shape[0], 5)).sum(1, keepdim=True),
    "index_select": lambda h: h + h.index_select(1, IDX).sum(1, keepdim=True),
    "advanced_index": lambda h: h + h[:, IDX].sum(1, keepdim=True),
    "lookup": lambda h: h * F.embedding(h.detach().abs().long().clamp(max=C - 1), TABLE).sum(2),
    "gather_by_place": lambda h: h * TABLE.repeat(2, 1)[:B].gather(1, (h[:, :1] > 0).long()),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h.sin()),
    "masked_fill": lambda h: h.masked_fill(h > 0.5, 0.0),
    "tril": lambda h: h.view(B, 3, 4).tril().flatten(1),
    "pad": lambda h: F.pad(h, (2, 3))[:, 1 : C + 1],
    "conv1d": lambda h: F.conv1d(h.view(-1, 3, 4), torch.ones(3, 3, 3) * 0.1, padding=1).flatten(1),
    "avg_pool": lambda h: F.avg_pool1d(h.view(-1, 3, 4), 2).repeat(1, 1, 2).flatten(1),
    "max_pool": lambda h: F.max_pool2d(h.view(-1, 3, 2, 2), 2).repeat(1, 1, 2, 2).flatten(1),
    "adaptive_pool": lambda h: F.adaptive_avg_pool1d(h.view(-1, 3, 4), 2).repeat(1, 1, 2).flatten(1),
    "upsample": lambda h: F.interpolate(h.view(-1, 3, 4), scale_factor=2.0)[:, :, ::2].flatten(1),
    "unfold": lambda h: h.unfold(1, 3, 3).flatten(1),
    "einsum": lambda h: torch.einsum("bij,jk->bik", h.view(-1, 3, 4), TABLE[:4, :4]).flatten(1),
    "outer": lambda h: torch.einsum("bi,bj->bij", h[:, :3], h[:, 3:7]).flatten(1),
    "matmul": lambda h: (h.view(-1, 3, 4) @ h.view(-1, 4, 3)).flatten(1).repeat(1, 2)[:, :C],
    "permuted": lambda h: h.view(-1, 3, 4).permute(1, 0, 2).reshape(3, -1).sin().view(3, -1, 4).permute(1, 2, 0).reshape(-1, C),
    "merged": lambda h: (h.reshape(-1, 4) @ TABLE[:4, :4]).view(-1, C),
    "time_first": lambda h: torch.tanh(h.view(-1, 3, 4).transpose(0, 1) @ TABLE[:4, :4]).transpose(0, 1).reshape(-1, C),
    "attention": lambda h: F.scaled_dot_product_attention(*(h.view(-1, 1, 3, 4) for _ in range(3))).flatten(1),
    "by_size": lambda h: h / h.shape[0] + h * h.shape[0],
    "half": lambda h: h.bfloat16().sin().float(),
    "position": lambda h: h * torch.arange(h.shape[0]).view(-1, 1),
    "size_power": lambda h: h.abs().pow(1 + 1 / h.shape[0]),
    "random": lambda h: h * (1 + 0 * torch.rand_like(h)),
}


class Keeps(torch.autograd.Function):
    """Its gradient is in part no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.cat([g[:, :6], x[:, 6:]], 1)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "softmax": lambda h: h.softmax(0),
    "cumsum": lambda h: h.cumsum(0),
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "sort": lambda h: h.sort(0).values,
    "gram": lambda h: h @ (h.t() @ h),
    "similarity": lambda h: (h @ h.t()).softmax(1) @ h,
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "first": lambda h: h + h[0],
    "even": lambda h: h + h.repeat_interleave(2, 0)[: h.shape[0]],
    "shuffled": lambda h: h[torch.arange(h.shape[0] - 1, -1, -1)],
    "transposed": lambda h: h + h.t().reshape(h.shape),
    "global": lambda h: h * h.sum(),
    "scatter_some": lambda h: h.scatter(1, IDX[:, None], 3.0),
    "not_linear": lambda h: Keeps.apply(h),  # type: ignore[no-untyped-call]
}


class Net(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.op = nn.Linear(8, C), nn.Linear(C, 5), op

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.op(self.first(x)))
        return out


def against_masked_tangents(op: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Any:
    chosen = Chosen(monkeypatch)
    model, x = Net(op), torch.randn(B, 8).requires_grad_()
    f, plans = rows_of(model, HALF)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model, x)
    mask = chosen.mask(B) if chosen.found else torch.ones(B)
    model(x).backward(tangent * mask[:, None])
    for a, b in zip(got, grads(model, x), strict=True):
        assert (a - b).norm() <= 2e-5 * (1 + b.norm())
    return plans


@pytest.mark.parametrize("name", APART)
def test_samples_kept_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = against_masked_tangents(APART[name], monkeypatch)
    reasons = [c.reason for c in plans[0].cuts]
    assert (reasons == ["the whole backward pass"]) == (name not in NOT_PROVED), reasons


NOT_PROVED = {"instance_norm", "size_power", "tril"}
"""Samples stay apart, but the batch is merged with channels in a reduction, or its size fixed: all rows run below."""


@pytest.mark.parametrize("name", MIXING)
def test_samples_mixed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = against_masked_tangents(MIXING[name], monkeypatch)
    (first,) = [s for s in plans.sites if s.name == "first"]
    assert all(p.decision == "exact" for p in first.products), "the layer below runs on all rows"
    assert all(c.reason != "the whole backward pass" for c in plans[0].cuts)
