"""Stages on rows whose sizes are made of symbols: compiled by Inductor, also from its cache, they equal Inductor alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, Plans, plans_of, rows_of
from helpers.models import Gathered, mlp
from helpers.oracles import ChosenRows, grads, over_halves
from helpers.sampling import all_but
from torch import Tensor, nn

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.rows import batch_dim, row_backward

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


class Tokens(nn.Module):
    """A model in which the batch is merged with the length at once, so that no tensor has it as a dim of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(8, 32, 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1))


class Language(nn.Module):
    """A model with the loss inside, on a length that is one shorter than the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(50, 16), mlp(16, 32, 50)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.inner(self.embedding(x[:, :-1])).flatten(0, 1), x[:, 1:].flatten())


class Sound(nn.Module):
    """A model in which strides halve the length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv1d(4, 8, 5, stride=2), nn.Conv1d(8, 8, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean(2))


def pictures() -> nn.Module:
    """Images whose size Inductor fixes when it makes convolutions of them, after the stages were cut."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], tuple[int, ...]]] = {
    "tokens": (Tokens, lambda t: torch.randn(32, t, 8), (5, 6, 7)),
    "language": (Language, lambda t: torch.randint(0, 50, (32, t)), (10, 12, 13)),
    "sound": (Sound, lambda t: torch.randn(32, 4, t), (30, 36, 41)),
    "pictures": (pictures, lambda t: torch.randn(32, 3, t, t), (12, 14, 16)),
}
ADAPTIVE: dict[str, Any] = {"policy": "adaptive", "adaptive": {"tau": 1e-9}}
EVEN: dict[str, Any] = {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5}}


@pytest.mark.slow
@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("name", "lowering", "options"),
    all_but([*itertools.product(MODELS, (run_as_is,), (ADAPTIVE, EVEN))], itertools.product(MODELS, (run_as_is, None), (ADAPTIVE, EVEN))),
)
def test_lengths_change_and_caches_are_met(name: str, lowering: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The default keeps all rows here, so gradients are exact. With half the rows, the even rows and then the odd ones are kept with weight 2, so the mean of
    both gradients is exact. Inductor's code runs twice, the second time from Inductor's cache."""
    make, data, sizes = MODELS[name]
    model = make()
    inputs = [data(t) for t in sizes]
    expected = []
    for x in inputs:
        copied = copy.deepcopy(model)
        copied(x).square().sum().backward()
        expected.append(grads(copied))
    start = [0]

    def halves(method: str, norms_sq: Tensor, k: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        assert k == 16
        return torch.arange(start[0], 32, 2), torch.full((16,), 2.0)

    monkeypatch.setattr(row_backward, "choose_rows", halves)
    for _ in range(1 if lowering else 2):
        torch._dynamo.reset()
        f = torch.compile(model, backend=Backend(options, inner_compile=lowering))
        for x, exact in zip(inputs, expected, strict=True):
            found = []
            for start[0] in (0, 1):
                f(x).square().sum().backward()
                found.append(grads(model))
            for a, b, c in zip(*found, exact, strict=True):
                torch.testing.assert_close((a + b) / 2, c, rtol=1e-4, atol=1e-4)


def test_a_batch_that_no_fewer_rows_may_stand_for_is_exact_and_says_so() -> None:
    plans, model = Plans(), Gathered()
    f = torch.compile(model, backend=Backend(EVEN, inner_compile=run_as_is, on_plan=plans))
    x, i = torch.randn(48, 5, 8), torch.randint(0, 5, (48,))
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(i, 0)
    f(x, i).sum().backward()
    found = grads(model)
    model(x, i).sum().backward()
    for a, b in zip(found, grads(model), strict=True):
        torch.testing.assert_close(a, b)
    ((cut,),) = [p.cuts for p in plans]
    assert cut.decision == "exact" and "of the batch's size" in cut.reason


class Modulated(nn.Module):
    """A kernel for every sample, as in StyleGAN2, so that there are as many groups as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(5, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        b = x.shape[0]
        w = self.weight[None] * self.style(z)[:, None, :, None, None]
        return F.conv2d(x.reshape(1, -1, 6, 6), w.flatten(0, 1), groups=b).view(b, 4, 4, 4)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"policy": "cost"}, {"policy": "always"}, {"rules": [{"layers": "conv", "grad_weight": "max"}]}])
def test_as_many_groups_as_samples_are_exact(options: dict[str, Any]) -> None:
    model, x, z = Modulated(), torch.randn(16, 3, 6, 6), torch.randn(16, 5)
    f = torch.compile(model, backend=Backend({"policy": "adaptive"} | options, inner_compile=run_as_is), dynamic=True)
    for n in (16, 9, 5):
        f(x[:n], z[:n]).square().sum().backward()
        found = grads(model)
        model(x[:n], z[:n]).square().sum().backward()
        for a, b in zip(found, grads(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rows_begin_below_as_many_groups_as_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, z = Modulated(), torch.randn(16, 3, 6, 6), torch.randn(16, 5)
    f, plans = rows_of(model, HALF, dynamic=True)

    def step(g: Any) -> list[Tensor]:
        g(x, z).square().sum().backward()
        return grads(model)

    mean, differ = over_halves(monkeypatch, lambda: step(f))
    assert plans[0].cuts[0].decision == "rows" and differ == [False, True, False]
    for got, want in zip(mean, step(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_groups_that_are_a_symbol_are_a_reason() -> None:
    model, x, z = Modulated(), torch.randn(16, 3, 6, 6), torch.randn(16, 5)
    x.requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(z, 0)
    (site,) = [s for s in plans_of(model, {"policy": "always", "min_k": 1}, x, z) if s.kind == "conv"]
    assert (site.decision, site.reason) == ("exact", "the number of its groups is a symbol")


class Recurrent(nn.Module):
    """The last step of a recurrent layer on embedded tokens, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 6), nn.GRU(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.table(x))[0][-1])
        return out


class Attends(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        out: Tensor = self.head(self.body(h, h, h)[0])
        return out


class Loop(nn.Module):
    """A recurrent layer written by hand, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.step, self.head = nn.Embedding(9, 6), nn.Linear(14, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[1], 8)
        for t in range(x.shape[0]):
            h = torch.tanh(self.step(torch.cat([self.table(x[t]), h], 1)))
        out: Tensor = self.head(h)
        return out


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "recurrent": (Recurrent, 1, 0),
    "loop": (Loop, 1, 0),
    "attention": (Attends, 1, 1),
    "attention, batch first": (lambda: Attends(True), 0, 0),
}
"""A model, and the dims of its input and output that hold samples."""


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SEQUENCES)
def test_the_samples_of_sequences_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent layers and attention of torch.nn take time first unless they are told otherwise; a loop over dim 0 shows by the size of the output."""
    make, given, returned = SEQUENCES[name]
    chosen, model = ChosenRows(monkeypatch), make()
    x = torch.randint(0, 9, (3, 12) if given else (12, 3))
    with torch._dynamo.config.patch(allow_rnn=True):
        f, plans = rows_of(model, HALF)
        out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model)
    mask = chosen.mask(12)
    assert (mask != 0).sum() == 6 and [c.reason for c in plans[0].cuts] == ["the whole backward pass"]
    model(x).backward(tangent * mask.view([-1 if d == returned else 1 for d in range(out.dim())]))
    for a, b in zip(got, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TwoViews(nn.Module):
    """A contrastive loss on two views that come as two inputs. Their sizes are compared only as a + b == 2 a."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(8, 32, 32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z, n = self.inner(torch.cat([x, y])), len(x)
        similar = (z @ z.T).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9)
        return F.cross_entropy(similar, torch.arange(2 * n).roll(n))


def test_inputs_whose_sizes_are_compared_as_a_sum_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both views of a sample are kept together: the mean of the gradients on the even samples and on the odd ones, with weight 2, is the exact gradient."""
    model, x, y = TwoViews(), torch.randn(12, 8), torch.randn(12, 8)
    f, plans = rows_of(model, HALF)

    def step(g: Any) -> list[Tensor]:
        g(x, y).backward()
        return grads(model)

    mean, differ = over_halves(monkeypatch, lambda: step(f))
    assert plans[0].cuts[0].decision == "rows" and differ[0]
    for got, want in zip(mean, step(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [8, 12, 16])
def test_questions_about_memory_add_no_guard(batch: int) -> None:
    """The channels' number, 12 and 8, may be the batch's: a comparison of the two would fix the batch."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda x: x.transpose(0, 1).cos(), tracing_mode="symbolic")(torch.randn(batch, 12, 8).transpose(1, 2))
    values = [n.meta["val"] for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    env = values[0].fake_mode.shape_env
    before = len(env.guards)
    assert [batch_dim.is_dense(batch_dim.geometry_of(v)) for v in values] == [True] * 3
    assert not batch_dim.is_dense(batch_dim.geometry_of(values[0][::2]))
    assert len(env.guards) == before


def test_numbers_that_dynamic_makes_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `dynamic=True` the eps of GroupNorm becomes an input, and torch has Dynamo trace again once it finds that it must not be."""
    chosen, model, x = ChosenRows(monkeypatch), pictures(), torch.randn(16, 3, 8, 8)
    f, plans = rows_of(model, HALF, dynamic=True)
    f(x).square().sum().backward()
    got = grads(model)
    assert [c.decision for c in plans[-1].cuts] == ["rows"]
    (model(x).square().sum(1) * chosen.mask(16)).sum().backward()
    for a, b in zip(got, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_strides_that_inductor_has_made_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """InstanceNorm with running statistics merges the batch with the channels. Inductor puts the merged dim innermost, with strides of the batch at hand."""
    chosen = ChosenRows(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.InstanceNorm2d(16, affine=True, track_running_stats=True), nn.ReLU())
    model.append(nn.Conv2d(16, 8, 3, 2))
    f, x, tangent = torch.compile(model, backend="approx", options=EVEN), torch.randn(16, 3, 32, 32), torch.randn(16, 8, 15, 15)
    f(x).backward(tangent)
    got = grads(model)
    assert (chosen.mask(16) != 0).sum() == 8
    model(x).backward(tangent * chosen.mask(16).view(-1, 1, 1, 1))
    for a, b in zip(got, grads(model), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


class TwoTowers(nn.Module):
    """A contrastive loss of two kinds of data, whose numbers of samples nothing in the model compares."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)) for _ in range(2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        alike = self.a(x) @ self.b(z).t()
        return F.cross_entropy(alike, torch.arange(len(alike))) + F.cross_entropy(alike.t(), torch.arange(alike.shape[1]))


def test_both_towers_of_a_contrastive_loss_run_on_rows() -> None:
    """A choice of one tower's samples alone would leave the other's gradients, sums over the first one's samples, as they are."""
    model = TwoTowers()
    f, plans = rows_of(model, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.25}})
    f(torch.randn(16, 24), torch.randn(16, 24)).backward()
    assert [c.decision for plan in plans for c in plan.cuts] == ["rows"]
    for tower in (model.a, model.b):  # the gradient of a weight is a sum of one matrix of rank 1 for every sample
        assert [int(torch.linalg.matrix_rank(tower[i].weight.grad)) for i in (0, 2)] == [4, 4]
