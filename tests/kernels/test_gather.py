"""Sampled products are unbiased with the variance of the formula, and equal sampling by hand.

Statistical tests take `DRAWS` independent draws (`torch.vmap` over a dummy axis) from a fixed seed, in double precision so that rounding does not matter, and
compare a mean with its expectation in standard errors. They make about 15,000 comparisons; a normal variable exceeds 5.5 standard errors once in 26 million.
Operands have a positive mean, so that the terms in |A B|^2 count, and norms that fall like 1 / i in an order of their own, so that some units are kept for
sure (wta) or certainly (bernoulli) and others are rare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.oracles import relative
from helpers.selections import METHODS, pick
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, make_estimator, water_fill
from approx_compile.kernels.gather import Axis, sample, take, untake, untake_block
from approx_compile.passes.sites.conv_gradients import channel_axis, conv_weight_axes

UNBIASED = ("crs", "bernoulli", "uniform", "wta")
GROUPS = {1: (24, 7), 4: (48, 3), 5: (49, 2)}  # group: size of the axis, units kept; 24, 12, 9 units and a tail of 0, 0, 4
DRAWS = 8000
Z = 5.5


pytestmark = pytest.mark.usefixtures("one_thread")


# --- products, described once for the kernels (axes) and once for the tests (dims) ---


@dataclass(frozen=True)
class Case:
    """A product of operands `a` and `b`; `product` also takes them cut to the kept entries.

    Per operand (lead_dim, dim): it consists of `leads` equal chunks along lead_dim that are independent products, each contracted along dim.
    The chunks of the result lie along `y_lead_dim`.
    """

    a: Tensor
    b: Tensor
    product: Callable[[Tensor, Tensor], Tensor]
    a_axis: Axis
    b_axis: Axis
    a_dims: tuple[int, int]
    b_dims: tuple[int, int]
    leads: int = 1
    y_lead_dim: int = 0

    @property
    def size(self) -> int:
        return self.a.shape[self.a_dims[1]] // (self.leads if self.a_dims[0] == self.a_dims[1] else 1)

    def y_by_lead(self, y: Tensor) -> Tensor:
        return by_lead(y, self.y_lead_dim, self.leads)


def by_lead(x: Tensor, dim: int, leads: int) -> Tensor:
    """Return x as (leads, everything else)."""
    return torch.stack([chunk.flatten() for chunk in x.chunk(leads, dim)])


def entries_of(estimator: Estimator, idx: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the selection as entries of the axis, (leads, n)."""
    idx = idx if idx.dim() == 2 else idx[None]
    entries = (idx[..., None] * estimator.unit + torch.arange(estimator.unit)).flatten(-2)
    return entries, None if scale is None else scale.reshape(idx.shape).repeat_interleave(estimator.unit, -1)


def operand(shape: tuple[int, ...], dims: tuple[int, int], leads: int) -> Tensor:
    """Return positive entries whose norms fall along the contraction axis, in another order in every chunk."""
    x = torch.rand(shape, dtype=torch.float64) + 0.25
    lead_dim, dim = dims
    for chunk in x.chunk(leads, lead_dim):
        fall = torch.arange(1, chunk.shape[dim] + 1, dtype=torch.float64).reciprocal()
        chunk *= fall[torch.randperm(len(fall))].reshape([-1 if d == dim else 1 for d in range(x.dim())])
    return x


def linear(which: str, k: int) -> Case:
    """y = x W^T, dx = dy W, dW = dy^T x: three layouts of the operands."""
    a_axis, b_axis, mm = Axis(1), Axis(0), torch.mm
    if which == "output":
        return Case(operand((3, k), (0, 1), 1), operand((4, k), (0, 1), 1).t(), mm, a_axis, b_axis, (0, 1), (0, 0))
    if which == "grad_input":
        return Case(operand((3, k), (0, 1), 1), operand((k, 4), (0, 0), 1), mm, a_axis, b_axis, (0, 1), (0, 0))
    return Case(operand((k, 3), (0, 0), 1).t(), operand((k, 4), (0, 0), 1), mm, a_axis, b_axis, (0, 1), (0, 0))


def bmm(which: str, k: int) -> Case:
    """y = a b, da = dy b^T, db = a^T dy."""
    axes, dims = (Axis(2, 0), Axis(1, 0)), ((0, 2), (0, 1))
    if which == "output":
        return Case(operand((3, 2, k), (0, 2), 3), operand((3, k, 4), (0, 1), 3), torch.bmm, *axes, *dims, 3)
    if which == "grad_input":
        return Case(operand((3, 2, k), (0, 2), 3), operand((3, 4, k), (0, 2), 3).transpose(1, 2), torch.bmm, *axes, *dims, 3)
    return Case(operand((3, k, 2), (0, 1), 3).transpose(1, 2), operand((3, k, 4), (0, 1), 3), torch.bmm, *axes, *dims, 3)


def conv(rank: int, groups: int, transposed: bool, which: str, k: int) -> Case:
    """Kernel 3 with stride 2 and padding 1, 4 places per dim of the larger side and 2 of the smaller (rank 3: 3 and 2)."""
    large, small = (4, 2) if rank < 3 else (3, 2)
    kernel, large_at, small_at = (3,) * rank, (large,) * rank, (small,) * rank
    in_at, out_at = (small_at, large_at) if transposed else (large_at, small_at)
    output_padding = [large - 2 * small + 1] * rank if transposed else [0] * rank
    settings = ([2] * rank, [1] * rank, [1] * rank, transposed, output_padding, groups)
    backward = torch.ops.aten.convolution_backward.default

    def weight(c_in: int, c_out: int) -> tuple[int, ...]:
        return (groups * c_in, c_out, *kernel) if transposed else (groups * c_out, c_in, *kernel)

    w_in, w_out = conv_weight_axes(transposed, groups)
    w_in_dims, w_out_dims = ((0, 0), (0, 1)) if transposed else ((0, 1), (0, 0))
    channels, channels_dims = channel_axis(groups), (1, 1)
    if which == "output":
        x, w = operand((2, groups * k, *in_at), channels_dims, groups), operand(weight(k, 2), w_in_dims, groups)
        return Case(x, w, lambda a, b: torch.convolution(a, b, None, *settings), channels, w_in, channels_dims, w_in_dims, groups, 1)
    if which == "grad_input":
        dy, w = operand((2, groups * k, *out_at), channels_dims, groups), operand(weight(2, k), w_out_dims, groups)
        x = torch.empty(2, groups * 2, *in_at, dtype=torch.float64)
        f = lambda a, b: backward(a, x, b, None, *settings, [True, False, False])[0]  # noqa: E731
        return Case(dy, w, f, channels, w_out, channels_dims, w_out_dims, groups, 1)
    x, dy = operand((k, groups * 2, *in_at), (0, 0), 1), operand((k, groups * 1, *out_at), (0, 0), 1)
    w = torch.empty(weight(2, 1), dtype=torch.float64)
    return Case(x, dy, lambda a, b: backward(b, a, w, None, *settings, [False, True, False])[1], Axis(0), Axis(0), (0, 0), (0, 0))


PRODUCTS = ("output", "grad_input", "grad_weight")
MATMULS = {f"{f.__name__}-{which}": (lambda k, f=f, which=which: f(which, k)) for f in (linear, bmm) for which in PRODUCTS}
CONVS = {
    f"{name}-{which}": (lambda k, settings=settings, which=which: conv(*settings, which, k))
    for name, settings in {
        "conv1d": (1, 1, False),
        "conv2d": (2, 1, False),
        "conv3d": (3, 1, False),
        "conv2d_grouped": (2, 3, False),
        "conv_transpose2d": (2, 1, True),
        "conv_transpose1d_grouped": (1, 2, True),
    }.items()
    for which in PRODUCTS
}
CASES = MATMULS | CONVS


def case(name: str, group: int, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(len(name) + 100 * group)
    made = CASES[name](GROUPS[group][0])
    return Case(made.a.to(dtype), made.b.to(dtype), *(getattr(made, f) for f in Case.__dataclass_fields__ if f not in ("a", "b")))


def bound(method: str, group: int, weight: int | None = 1) -> Estimator:
    size, k = GROUPS[group]
    estimator = make_estimator(method, size, (k * group + size % group) / size, 1, group, weight)
    assert estimator is not None and estimator.k == k
    return estimator


def sampled(estimator: Estimator, c: Case) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return sample(estimator, c.a, c.b, c.a_axis, c.b_axis)


def contributions(c: Case) -> Tensor:
    """Return what every entry of the axis adds to the product, computed by slicing: (size, leads, rest)."""
    each = torch.arange(c.size).expand(c.leads, -1)
    return torch.stack([c.y_by_lead(c.product(pick(c.a, c.a_dims, e), pick(c.b, c.b_dims, e))) for e in each.split(1, 1)])


# --- mean and variance ---


def scores(c: Case, estimator: Estimator) -> Tensor:
    """Return |A_G| |B_G| for every unit, computed by slicing: (leads, units)."""
    found = []
    for unit in torch.arange(estimator.units * estimator.group).view(estimator.units, estimator.group):
        e = unit.expand(c.leads, -1)
        found.append(by_lead(pick(c.a, c.a_dims, e), c.a_dims[0], c.leads).norm(dim=1) * by_lead(pick(c.b, c.b_dims, e), c.b_dims[0], c.leads).norm(dim=1))
    return torch.stack(found, 1)


def wta_sure(s: Tensor, k: int) -> Tensor:
    """Mark the c* units that are surely kept: c* = argmin of (1 - P_c) / (k - c), by brute force."""
    order = s.argsort(descending=True)
    cost = [s[order[c:]].sum().item() / (k - c) for c in range(k)]
    sure = torch.zeros(len(s), dtype=torch.bool)
    sure[order[: cost.index(min(cost))]] = True
    return sure


def variance(method: str, parts: Tensor, s: Tensor, k: int) -> Tensor:
    """Var of every entry of the sampled product (their sum is E |Y' - Y|_F^2): parts (units, rest), s (units,) -> (rest,).

    C_G = A_G B_G, Y = sum_G C_G over the whole groups (a tail is exact). With draws p_G = s_G / sum s, crs is (1/k) (sum_G C_G^2 / p_G - Y^2);
    wta is crs with k - c* draws over what is not sure. For a matrix product and group 1, |C_i|_F = s_i, which gives the formulas of the notes.
    """
    sq, units = parts.square(), len(s)
    if method == "uniform":
        return (units / k) * (units - k) / (units - 1) * (sq.sum(0) - parts.sum(0).square() / units)
    if method == "bernoulli":
        p = water_fill(s, k)
        return (((1 - p) / p)[:, None] * sq).sum(0)
    rest = ~wta_sure(s, k) if method == "wta" else torch.ones(units, dtype=torch.bool)
    n = k - int((~rest).sum())
    return ((s[rest].sum() / s[rest])[:, None] * sq[rest]).sum(0) / n - parts[rest].sum(0).square() / n


def unit_parts(c: Case, estimator: Estimator) -> Tensor:
    """Return what every whole group adds: (units, leads, rest)."""
    return contributions(c)[: estimator.units * estimator.group].unflatten(0, (estimator.units, estimator.group)).sum(1)


@pytest.mark.slow
@pytest.mark.sample(27)
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
@pytest.mark.parametrize("method", UNBIASED)
@pytest.mark.parametrize("name", CASES)
def test_mean_and_variance(name, method, group):
    c, estimator = case(name, group), bound(method, group)
    parts, s = unit_parts(c, estimator), scores(c, estimator)
    expected_variance = torch.stack([variance(method, parts[:, i], s[i], estimator.k) for i in range(c.leads)])
    y = c.y_by_lead(c.product(c.a, c.b))
    torch.testing.assert_close(contributions(c).sum(0), y)

    def draw(_: Tensor) -> Tensor:
        return c.y_by_lead(c.product(*sampled(estimator, c)[2:]))

    torch.manual_seed(1)
    drawn = torch.vmap(draw, randomness="different", chunk_size=1000)(torch.empty(DRAWS))
    mean_z = (drawn.mean(0) - y) / (expected_variance / DRAWS).sqrt()
    assert mean_z.abs().max() < Z, f"biased by {mean_z.abs().max():.1f} standard errors"
    squared = (drawn - y).square().sum((1, 2))  # |Y' - Y|_F^2
    z = (squared.mean() - expected_variance.sum()) / (squared.std() / DRAWS**0.5)
    assert abs(z) < Z, f"squared error {squared.mean():.4g}, the formula says {expected_variance.sum():.4g}: {z:.1f} standard errors"


@pytest.mark.parametrize("which", PRODUCTS)
def test_variance_is_that_of_the_notes(which):
    """The variance E |Y' - Y|_F^2 of a matrix product is that of the formula with s_i = a_i b_i."""
    c = case(f"linear-{which}", 1)
    size, k = GROUPS[1]
    parts, s, y_sq = unit_parts(c, bound("crs", 1))[:, 0], c.a.norm(dim=0) * c.b.norm(dim=1), (c.a @ c.b).square().sum()
    p, sure = water_fill(s, k), wta_sure(s, k)
    n, rest = k - int(sure.sum()), c.a[:, ~sure] @ c.b[~sure]
    assert 0 < sure.sum() < k
    notes = {
        "crs": s.sum() ** 2 / k - y_sq / k,
        "bernoulli": ((1 - p) / p * s**2).sum(),
        "uniform": (size / k) * (size - k) / (size - 1) * ((s**2).sum() - y_sq / size),
        "wta": s[~sure].sum() ** 2 / n - rest.square().sum() / n,
    }
    for method in UNBIASED:
        torch.testing.assert_close(variance(method, parts, s, k).sum(), notes[method], msg=method)
    assert notes["wta"] < notes["crs"] < notes["uniform"]


@pytest.mark.parametrize("method", ["crs", "bernoulli", "uniform", "wta"])
def test_topk_has_the_least_error_when_a_factor_has_zero_mean(method):
    """Adelman et al. 2021, Theorem 2: paired differences of the squared error over 500 random products."""
    torch.manual_seed(2)
    a = torch.randn(500, 6, 24) * torch.randn(500, 1, 24).exp()
    b = torch.rand(500, 24, 5)
    errors = {}
    for m in ("topk", method):
        _, _, a_kept, b_kept = sample(Estimator(m, 24, 8), a, b, Axis(2, 0), Axis(1, 0))
        errors[m] = (a_kept @ b_kept - a @ b).square().sum((1, 2)) / (a @ b).square().sum((1, 2))
    worse = errors[method] - errors["topk"]
    assert worse.mean() > Z * worse.std() / 500**0.5


# --- against sampling by hand ---


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_sample_is_the_sum_over_the_chosen_entries(name, method, group):
    c, estimator = case(name, group), bound(method, group)
    idx, scale, a, b = sampled(estimator, c)
    entries, by_entry = entries_of(estimator, idx, scale)
    assert entries.shape == (c.leads, estimator.kept)
    assert torch.equal(a, pick(c.a, c.a_dims, entries))
    assert torch.equal(b, pick(c.b, c.b_dims, entries, by_entry))
    weights = torch.ones(c.leads, estimator.kept, dtype=torch.float64) if by_entry is None else by_entry
    parts = contributions(c)
    by_hand = torch.stack([(parts[entries[i], i] * weights[i, :, None]).sum(0) for i in range(c.leads)])
    torch.testing.assert_close(c.y_by_lead(c.product(a, b)), by_hand)


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
@pytest.mark.parametrize("method", ["topk", "wta"])  # without and with a scale
@pytest.mark.parametrize("name", CASES)
def test_untake_is_the_adjoint_of_take(name, method, group):
    """<take(x), y> = <x, untake(y)>, on both operands, and untake is what autograd makes of take."""
    c, estimator = case(name, group), bound(method, group)
    idx, scale, a, b = sampled(estimator, c)
    for x, taken, axis, s in ((c.a, a, c.a_axis, None), (c.b, b, c.b_axis, scale)):
        y = torch.randn_like(taken)
        back = untake(y, axis, idx, s, estimator.unit, estimator.size)
        assert back.shape == x.shape
        torch.testing.assert_close((taken * y).sum(), (x * back).sum())
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(take(x, axis, idx, s, estimator.unit), x, y)
        torch.testing.assert_close(back, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: f"group{g}")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("output")])
def test_coupled_gradients_equal_sampling_by_hand(name, method, group, dtype):
    """Gradients of the kept operands put back by `untake` against autograd through pick(a) and pick(b) * scale with the same indices.

    Relative error under 1e-6 in fp32. In bf16 every rounding (scaled operand, product, scaled gradient) is at most 2^-9 = 0.2 % of an entry:
    1e-2 against the same in fp32.
    """
    c, estimator = case(name, group, dtype), bound(method, group)
    idx, scale, a, b = sampled(estimator, c)
    assert a.dtype == b.dtype == dtype and (scale is None or scale.dtype == torch.float32)
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    y = c.product(a, b)
    dy = torch.randn(y.shape).to(dtype)
    da, db = torch.autograd.grad(y, (a, b), dy)
    da, db = untake(da, c.a_axis, idx, None, estimator.unit, estimator.size), untake(db, c.b_axis, idx, scale, estimator.unit, estimator.size)

    entries, by_entry = entries_of(estimator, idx, scale)
    a_full, b_full = c.a.float().requires_grad_(), c.b.float().requires_grad_()
    y_hand = c.product(pick(a_full, c.a_dims, entries), pick(b_full, c.b_dims, entries, by_entry))
    da_hand, db_hand = torch.autograd.grad(y_hand, (a_full, b_full), dy.float())
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert da.dtype == db.dtype == dtype and da.shape == c.a.shape and db.shape == c.b.shape
    assert relative(y, y_hand) < limit and relative(da, da_hand) < limit and relative(db, db_hand) < limit
    assert torch.equal(da == 0, da_hand == 0) and (da == 0).any()  # dropped entries get exactly nothing


def test_a_block_is_put_where_two_gathers_would_put_it() -> None:
    torch.manual_seed(0)
    y, rows, columns = torch.randn(3, 4), torch.tensor([0, 2, 5]), torch.tensor([1, 2, 6, 7])
    scale = torch.rand(4)
    whole = untake(untake(y, Axis(1), columns, scale, 1, 9), Axis(0), rows, None, 1, 6)
    assert torch.equal(untake_block(y, (rows, columns), (None, scale), (6, 9)), whole)
    assert torch.equal(untake_block(y.double(), (rows, columns), (rows.double() / 2, None), (6, 9))[2, 1], y[1, 0].double())
