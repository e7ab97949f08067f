"""Gathers, their adjoints and norms agree with indexing in every memory layout and dtype, and handle NaN, empty batches and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers.selections import METHODS, pick
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gather import Axis, norms_sq, sample, take, untake
from approx_compile.passes.sites.conv_gradients import channel_axis, conv_weight_axes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("method", ["topk", "crs", "bernoulli", "wta"])
def test_nan_and_inf_reach_the_output_as_in_exact_arithmetic(method, value):
    torch.manual_seed(3)
    a, b = torch.rand(50, 6, 24) * 0.1, torch.randn(50, 24, 5) * torch.arange(1, 25).view(24, 1)
    a[:, 2, 0] = value  # the smallest score
    _, _, a_kept, b_kept = sample(Estimator(method, 24, 7), a, b, Axis(2, 0), Axis(1, 0))
    exact, y = a @ b, a_kept @ b_kept
    assert torch.equal(exact.isnan(), y.isnan()) and torch.equal(exact == torch.inf, y == torch.inf) and torch.equal(exact == -torch.inf, y == -torch.inf)
    assert (~y[:, 2].isfinite()).all() and y[:, [0, 1, 3, 4, 5]].isfinite().all()


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)


LAYOUTS = {  # tensor and the axes along which it is taken; every axis has 24 entries
    "transposed": (lambda: torch.randn(24, 6).t(), [Axis(1)]),
    "slices": (lambda: torch.randn(12, 72)[::2, 1::3], [Axis(1)]),
    "slices-of-transposed": (lambda: torch.randn(72, 12).t()[1::2, ::3], [Axis(1)]),
    "batch-inner": (lambda: torch.randn(24, 6, 3).permute(2, 1, 0), [Axis(2), Axis(2, 0)]),
    "batch-between": (lambda: torch.randn(24, 3, 6).permute(1, 2, 0), [Axis(2, 0), Axis(2, 1)]),
    "lead-behind": (lambda: torch.randn(24, 5, 3), [Axis(0), Axis(0, 2), Axis(0, 1)]),
    "conv": (lambda: torch.randn(2, 24, 5, 4), [Axis(1)]),
    "conv-groups": (lambda: torch.randn(2, 72, 5, 4), [channel_axis(3)]),
    "channels_last": (lambda: channels_last(2, 24, 5, 4), [Axis(1)]),
    "channels_last-groups": (lambda: channels_last(2, 72, 5, 4), [channel_axis(3)]),
    "channels_last-samples": (lambda: channels_last(24, 2, 5, 4), [Axis(0)]),
    "channels_last-weight-groups": (lambda: channels_last(6, 24, 3, 3), [conv_weight_axes(False, 3)[0]]),
    "channels_last-weight-out": (lambda: channels_last(72, 6, 3, 3), [conv_weight_axes(False, 3)[1]]),
    "channels_last_3d": (lambda: channels_last(2, 24, 3, 5, 4), [Axis(1)]),
    "channels_last_3d-groups": (lambda: channels_last(2, 48, 3, 5, 4), [channel_axis(2)]),
    "expanded-rows": (lambda: torch.randn(1, 24).expand(6, 24), [Axis(1)]),
    "expanded-axis": (lambda: torch.randn(6, 1).expand(6, 24), [Axis(1)]),
    "expanded-batch": (lambda: torch.randn(6, 24).expand(3, 6, 24), [Axis(2), Axis(2, 0)]),
    "expanded-all": (lambda: torch.randn(()).expand(3, 6, 24), [Axis(2), Axis(2, 0)]),
    "one-row": (lambda: torch.randn(1, 24), [Axis(1), Axis(1, 0)]),
    "one-column": (lambda: torch.randn(24, 1), [Axis(0)]),
    "one-batch": (lambda: torch.randn(1, 6, 24), [Axis(2, 0)]),
    "one-place": (lambda: channels_last(1, 24, 1, 1), [Axis(1)]),
    "one-place-groups": (lambda: channels_last(2, 48, 1, 1), [channel_axis(2)]),
    "no-rows": (lambda: torch.randn(0, 24), [Axis(1)]),
    "no-columns": (lambda: torch.randn(3, 24, 0), [Axis(1), Axis(1, 0)]),
    "no-samples": (lambda: torch.randn(0, 48, 5, 4), [channel_axis(2)]),
}


def dims_in_memory_order(x: Tensor) -> list[int]:
    return sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=lambda d: -x.stride(d))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, group):
    """The result has the values of indexing a contiguous copy, in the memory order of the operand."""
    make, axes = LAYOUTS[layout]
    for axis in axes:
        torch.manual_seed(4)
        x = make()
        seen = axis.view(x)
        leads, n = 1 if axis.lead is None else seen.shape[axis.lead], 24 // group
        idx, scale = torch.rand(leads, n).argsort(1)[:, : n // 3].sort(1).values, torch.rand(leads, n // 3) + 0.5
        entries, by_entry = (idx[..., None] * group + torch.arange(group)).flatten(1), scale.repeat_interleave(group, 1)
        if axis.lead is None:
            idx, scale = idx[0], scale[0]
        plain = x.clone(memory_format=torch.contiguous_format).requires_grad_()
        torch.testing.assert_close(norms_sq(x, axis, group), norms_sq(plain.detach(), axis, group))
        for s, hand_scale in ((None, None), (scale, by_entry)):
            y = take(x, axis, idx, s, group)
            hand = axis.unview(pick(axis.view(plain), (axis.lead or 0, axis.dim), entries, hand_scale))
            assert torch.equal(y, hand)
            dy = torch.empty_like(y).normal_()  # in the layout of y
            back = untake(dy, axis, idx, s, group, 24)
            assert torch.equal(back, torch.autograd.grad(hand, plain, dy)[0])
            if "expanded" in layout or not x.numel():
                continue
            assert dims_in_memory_order(y) == dims_in_memory_order(x)
            dense = torch.empty_like(y)
            assert all(a == b for a, b, size in zip(y.stride(), dense.stride(), y.shape, strict=True) if size > 1)  # no gaps
            if axis.lead is None or seen.stride(axis.lead) >= seen.stride(axis.dim):
                assert dims_in_memory_order(back) == dims_in_memory_order(x)
    if layout.startswith("channels_last"):
        form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        assert y.is_contiguous(memory_format=form) and back.is_contiguous(memory_format=form)


def test_take_against_indexing():
    """`take` equals plain indexing, written out."""
    torch.manual_seed(5)
    x, idx, scale = torch.randn(3, 24, 5), torch.tensor([1, 4, 5]), torch.tensor([0.5, 2.0, 4.0])
    assert torch.equal(take(x, Axis(1), idx, scale, 1), x[:, idx] * scale[:, None])
    blocks = torch.tensor([4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23])
    assert torch.equal(take(x, Axis(1), idx, scale, 4), x[:, blocks] * scale.repeat_interleave(4)[:, None])
    rows = torch.tensor([[0, 3], [7, 23], [5, 6]])
    assert torch.equal(take(x, Axis(1, 0), rows, None, 1), torch.stack([x[i, rows[i]] for i in range(3)]))
    columns = torch.tensor([[0, 3], [7, 23], [5, 6], [1, 2], [8, 9]])
    assert torch.equal(take(x, Axis(1, 2), columns, None, 1), torch.stack([x[:, columns[i], i] for i in range(5)], 2))
    y = torch.randn(3, 3, 5)
    full = torch.zeros(3, 24, 5)
    full[:, idx] = y * scale[:, None]
    assert torch.equal(untake(y, Axis(1), idx, scale, 1, 24), full)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=["fp16", "bf16", "fp32", "fp64"])
def test_types(dtype, method):
    """Operands keep their dtype, norms and scales are fp32 (fp64 for fp64), and scaling rounds once."""
    torch.manual_seed(6)
    a, b = torch.randn(4, 24).to(dtype), torch.randn(24, 5).to(dtype)
    estimator = Estimator(method, 24, 7, weight=1)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    for x, axis, dim in ((a, Axis(1), 0), (b, Axis(0), 1)):
        v = norms_sq(x, axis)
        assert v.dtype == precise
        torch.testing.assert_close(v.double(), x.double().square().sum(dim), rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0.0)
    idx, scale, a_kept, b_kept = sample(estimator, a, b, Axis(1), Axis(0))
    assert a_kept.dtype == b_kept.dtype == dtype and (scale is None or scale.dtype == precise)
    assert torch.equal(a_kept, a[:, idx])
    assert torch.equal(b_kept, b[idx] if scale is None else (b[idx].to(precise) * scale[:, None]).to(dtype))
    back = untake(b_kept, Axis(0), idx, scale, 1, 24)
    assert back.dtype == dtype and torch.equal(back[idx], b_kept if scale is None else (b_kept.to(precise) * scale[:, None]).to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_selects_and_multiplies(method):
    estimator = Estimator(method, 24, 7, weight=1)
    idx, scale, a, b = sample(estimator, torch.randn(0, 24), torch.randn(24, 5), Axis(1), Axis(0))  # no rows: no score, but a valid choice
    assert (idx.diff() > 0).all() and idx[0] >= 0 and idx[-1] < 24
    assert (a @ b).shape == (0, 5) and b.isfinite().all()
    assert untake(a, Axis(1), idx, None, 1, 24).shape == (0, 24) and (untake(b, Axis(0), idx, scale, 1, 24) != 0).any()
    idx, scale, a, b = sample(estimator, torch.randn(0, 4, 24), torch.randn(0, 24, 5), Axis(2, 0), Axis(1, 0))  # no products at all
    assert idx.shape == (0, estimator.slots) and (a @ b).shape == (0, 4, 5)
    assert untake(b, Axis(1, 0), idx, scale, 1, 24).shape == (0, 24, 5)


@pytest.mark.parametrize("method", METHODS)
def test_selection_carries_no_gradient(method):
    """Only the gathers carry gradients: the gradient of A' is that of a gather with constant indices and scales."""
    torch.manual_seed(7)
    a, b = torch.randn(4, 24, requires_grad=True), torch.randn(24, 5, requires_grad=True)
    idx, scale, a_kept, b_kept = sample(Estimator(method, 24, 7, weight=1), a, b, Axis(1), Axis(0))
    assert not idx.requires_grad and (scale is None or not scale.requires_grad)
    (b_kept.sum() + a_kept.sum()).backward()
    kept = torch.zeros(24)
    kept[idx] = 1 if scale is None else scale
    assert torch.equal(b.grad, kept[:, None].expand(24, 5))
    assert torch.equal(a.grad, (torch.zeros(24).index_fill(0, idx, 1)).expand(4, 24))


class Sums(TorchDispatchMode):
    """Count the sums that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.sum.dim_IntList
        return func(*args, **(kwargs or {}))


NORMS = {  # tensor, axis, its einsum over squares, sums taken
    "short-rows": (lambda: torch.randn(64, 24), Axis(1), "mk->k", 1),
    "256-rows": (lambda: torch.randn(256, 24), Axis(1), "mk->k", 2),
    "288-rows": (lambda: torch.randn(288, 24), Axis(1), "mk->k", 2),
    "260-rows": (lambda: torch.randn(260, 24), Axis(1), "mk->k", 1),
    "224-rows": (lambda: torch.randn(224, 24), Axis(1), "mk->k", 1),
    "contiguous-sum": (lambda: torch.randn(24, 256), Axis(0), "km->k", 1),
    "transposed": (lambda: torch.randn(24, 256).t(), Axis(1), "mk->k", 1),
    "tokens": (lambda: torch.randn(256, 3, 24), Axis(2), "bmk->k", 2),
    "inner-tokens": (lambda: torch.randn(3, 256, 24), Axis(2), "bmk->k", 1),
    "bmm-left": (lambda: torch.randn(3, 320, 24), Axis(2, 0), "bmk->bk", 2),
    "bmm-right": (lambda: torch.randn(3, 24, 320), Axis(1, 0), "bkn->bk", 1),
    "lead-behind": (lambda: torch.randn(24, 512, 3), Axis(0, 2), "kml->lk", 2),
    "lead-behind-outer": (lambda: torch.randn(256, 24, 3), Axis(1, 2), "mkl->lk", 2),
    "conv": (lambda: torch.randn(256, 24, 3, 2), Axis(1), "nkhw->k", 2),
    "conv-channels_last": (lambda: channels_last(256, 24, 3, 2), Axis(1), "nkhw->k", 2),
    "conv-samples": (lambda: torch.randn(24, 256, 2, 2), Axis(0), "knhw->k", 2),
    "conv-weight-out": (lambda: torch.randn(24, 6, 3, 3), Axis(0), "kihw->k", 1),
    "expanded": (lambda: torch.randn(1, 24).expand(256, 24), Axis(1), "mk->k", 1),
    "nothing-to-sum": (lambda: torch.randn(3, 24), Axis(1, 0), "lk->lk", 0),
}


@pytest.mark.parametrize("group", [1, 4, 5, 24, 7])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, group):
    torch.manual_seed(8)
    make, axis, formula, sums = NORMS[name]
    x = make()
    with Sums() as counted:
        v = norms_sq(x, axis, group)
    expected = torch.einsum(formula, x.double().square())
    expected = torch.stack([e.sum(-1) for e in expected.split(group, -1) if e.shape[-1] == group], -1)  # a tail is left out
    assert v.shape == expected.shape and v.dtype == torch.float32
    torch.testing.assert_close(v.double(), expected, rtol=2e-6, atol=0.0)
    assert counted.count == sums + (group > 1)  # long outermost sums in two steps


@pytest.mark.parametrize(
    ("shape", "axis", "formula"),
    [
        pytest.param((256, 72, 3, 2), channel_axis(3), lambda x: x.view(256, 3, 24, 6).sum((0, 3)), id="channels"),
        pytest.param((6, 24, 3, 3), conv_weight_axes(False, 3)[0], lambda w: w.view(3, 2, 24, 9).sum((1, 3)), id="weight-in"),
        pytest.param((72, 2, 3, 3), conv_weight_axes(False, 3)[1], lambda w: w.view(3, 24, 18).sum(2), id="weight-out"),
        pytest.param((72, 2, 3, 3), conv_weight_axes(True, 3)[0], lambda w: w.view(3, 24, 18).sum(2), id="transposed-weight-in"),
        pytest.param((6, 24, 3, 3), conv_weight_axes(True, 3)[1], lambda w: w.view(3, 2, 24, 9).sum((1, 3)), id="transposed-weight-out"),
    ],
)
def test_norms_of_grouped_convolutions(shape, axis, formula):
    torch.manual_seed(9)
    x = torch.randn(shape)
    torch.testing.assert_close(norms_sq(x, axis).double(), formula(x.double().square()), rtol=2e-6, atol=0.0)
