"""The backend finds the size of the batch among Dynamo's symbols, declines rows early where they cannot pay, and leaves nothing behind in torch's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers.compile import Plans
from helpers.models import Gathered, mlp
from helpers.oracles import grads
from helpers.sampling import all_but
from torch import Tensor, nn

from approx_compile import ApproxWarning, Backend, _torch
from approx_compile._torch import symbol_requests
from approx_compile.backend import run_as_is
from approx_compile.rows import early_decline, row_backward, row_compiler

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5}


# --- a symbol for the batch, where it can't be had ---


class Grid(nn.Module):
    """An op that AOTAutograd cannot trace with a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.Linear(192, 6), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.l(x.flatten(1)).view(-1, 2, 3)
        return self.o(F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False).flatten(1))


@torch.library.custom_op("approx_compile_tests::of_known_size", mutates_args=())
def of_known_size(x: Tensor) -> Tensor:
    return x * 2


@of_known_size.register_fake
def _(x: Tensor) -> Tensor:
    if not isinstance(x.shape[0], int):
        raise NotImplementedError("sizes must be numbers")
    return torch.empty_like(x)


of_known_size.register_autograd(lambda ctx, g: g * 2)


class Known(nn.Module):
    """An op that Dynamo cannot trace with a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(of_known_size(self.a(x.flatten(1)).relu()))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_work_counts")
@pytest.mark.parametrize(
    ("make", "fullgraph", "inner"),
    [
        (Grid, False, run_as_is),
        pytest.param(Grid, True, None, marks=pytest.mark.exhaustive),
        (Known, False, run_as_is),
        (Known, True, run_as_is),
        pytest.param(Known, False, None, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.filterwarnings("error:Error detected in")
def test_what_fails_under_a_symbol_is_compiled_without(make: type[nn.Module], fullgraph: bool, inner: Any) -> None:
    model, x, plans = make(), torch.randn(8, 3, 8, 8, requires_grad=True), Plans()
    f = torch.compile(model, backend=Backend(None, inner_compile=inner, on_plan=plans), fullgraph=fullgraph)
    with torch._inductor.config.patch(force_disable_caches=True):  # of a cached graph nothing is planned
        y = f(x)
    y.square().sum().backward()
    found = [y, *grads(model, x)]
    y = model(x)
    y.square().sum().backward()
    for a, b in zip(found, [y, *grads(model, x)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(plans) == 1 and "symbol for the batch's size" in plans.sites[0].reason
    assert not any("dynamic" in name for t in (x, y) for name in vars(t)) and not symbol_requests.pending_requests


@pytest.mark.slow
@pytest.mark.usefixtures("small_work_counts")
def test_it_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    f = torch.compile(Grid(), backend=Backend(None, inner_compile=run_as_is))
    for _ in range(2):
        f(torch.randn(8, 3, 8, 8)).sum().backward()
    told = [w for w in recwarn if issubclass(w.category, ApproxWarning)]
    assert all(w.filename == __file__ for w in told)  # the user's line, not one of ours
    assert len(told) == 1 and "can't be compiled with a symbol" in str(told[0].message)


@pytest.mark.usefixtures("one_thread", "small_work_counts")
@pytest.mark.parametrize("where", ["estimate_coverage", "partition_backward"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_defect_of_ours_is_told_and_exact(where: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise KeyError("lost")

    broken.__code__ = broken.__code__.replace(co_filename=row_compiler.__file__)
    monkeypatch.setattr(row_compiler, where, broken)
    model, x, plans = mlp(16, 64, 64, 8), torch.randn(32, 16), Plans()
    f = torch.compile(model, backend=Backend(None, inner_compile=run_as_is, on_plan=plans), dynamic=dynamic)
    with pytest.warns(ApproxWarning, match="a defect of approx_compile.*lost.*please report"):
        f(x).square().sum().backward()
    found = grads(model)
    model(x).square().sum().backward()
    for a, b in zip(found, grads(model), strict=True):
        torch.testing.assert_close(a, b)
    assert all(s.decision == "exact" for s in plans[-1].sites)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_work_counts")
@pytest.mark.parametrize("inner", all_but([run_as_is], [run_as_is, None]))
def test_nested_tensors_are_exact(inner: Any) -> None:
    model, plans = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), Plans()
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in (3, 5, 9, 2)], layout=torch.jagged)
    torch.compile(model, backend=Backend(None, inner_compile=inner, on_plan=plans))(x).values().square().mean().backward()
    found = grads(model)
    model(x).values().square().mean().backward()
    for a, b in zip(found, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all("NestedTensor" in s.reason for s in plans.sites)


# --- nothing is left behind ---


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_work_counts")
@pytest.mark.parametrize("make", [lambda: mlp(16, 64, 8), lambda: nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU()), Known])
def test_other_compilations_see_sizes(make: Callable[[], nn.Module]) -> None:
    """Whether rows are sampled, declined or fail: neither the input nor the output makes the sizes of another graph symbolic."""
    x, seen = torch.randn(32, *((3, 8, 8) if make is Known else (16,))), []

    def spy(gm: Any, example_inputs: Any) -> Any:
        seen.extend(v for p in gm.graph.find_nodes(op="placeholder") for v in p.meta["example_value"].shape)
        return gm.forward

    f = torch.compile(make(), backend=Backend(None, inner_compile=run_as_is))
    other = torch.compile(lambda a, b: a.sum() + b.sum(), backend=spy)
    for _ in range(2):
        y = f(x)
        y.sum().backward()
        other(x, y.detach())
        other(x, y)
        assert not vars(x) and not any("dynamic" in name for name in vars(y))
    assert all(isinstance(v, int) for v in seen)


@pytest.mark.usefixtures("one_thread", "small_work_counts")
def test_other_graphs_of_the_same_variable_see_sizes() -> None:
    """A request for a symbol holds for one compilation. A frame that is compiled afterwards, with an input of the same name, is not affected."""
    shapes: list[Any] = []

    def spy(gm: Any, example_inputs: Any) -> Any:
        values = [p.meta["example_value"] for p in gm.graph.find_nodes(op="placeholder")]
        shapes.extend(v.shape[0] for v in values if not isinstance(v, nn.Parameter))
        return gm.forward

    x = torch.randn(32, 16)
    torch.compile(nn.Linear(16, 64), backend=Backend(None, inner_compile=run_as_is))(x).sum().backward()
    torch._dynamo.reset()
    torch.compile(nn.Linear(16, 64), backend=spy)(x)
    assert shapes == [32] and not symbol_requests.pending_requests


# --- which symbol ---


class Masked(nn.Module):
    """A model whose mask is only indexed, so that no op shows that the mask and the ids have the same batch."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.h = nn.Embedding(50, 16), mlp(16, 64, 16), nn.Linear(16, 2)

    def forward(self, mask: Tensor, ids: Tensor) -> Tensor:
        kept = mask[torch.arange(ids.shape[0])[:, None], torch.arange(ids.shape[1])]
        return self.h((self.f(self.e(ids)) * kept[..., None]).mean(1))


class Loss(Masked):
    """The same model with the loss inside, so that only a number comes out."""

    def forward(self, mask: Tensor, ids: Tensor) -> Tensor:
        return super().forward(mask, ids).square().sum()


class Table(Masked):
    """A model whose larger input has no batch, but as many rows as the other has samples."""

    def forward(self, mask: Tensor, ids: Tensor) -> Tensor:
        return self.h(self.f(self.e(ids)).mean(1) + mask.mean())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "small_work_counts")
@pytest.mark.parametrize(
    ("model", "inputs", "inner"),
    [
        (Masked, lambda: (torch.rand(48, 12), torch.randint(0, 50, (48, 12))), run_as_is),
        pytest.param(Masked, lambda: (torch.rand(48, 12), torch.randint(0, 50, (48, 12))), None, marks=pytest.mark.exhaustive),
        (Loss, lambda: (torch.rand(48, 12), torch.randint(0, 50, (48, 12))), run_as_is),
        (Table, lambda: (torch.rand(48, 500), torch.randint(0, 50, (48, 12))), run_as_is),
        (Table, lambda: (torch.rand(99, 500), torch.randint(0, 50, (48, 12))), run_as_is),
        (Gathered, lambda: (torch.randn(48, 5, 8), torch.randint(0, 5, (48,))), run_as_is),
    ],
)
def test_the_batch_is_that_of_the_outputs(model: type[nn.Module], inputs: Any, inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The even rows, then the odd ones, are kept with weight 2, so the mean of both gradients is the exact one."""
    start = [0]

    def halves(method: str, norms_sq: Tensor, k: int, random: Any) -> tuple[Tensor, Tensor]:
        assert k == 24
        return torch.arange(start[0], 48, 2), torch.full((24,), 2.0)

    monkeypatch.setattr(row_backward, "choose_rows", halves)
    made, given, plans = model(), inputs(), Plans()
    f = torch.compile(made, backend=Backend({"policy": "always", "grad": {"axis": "rows", "ratio": 0.5}}, inner_compile=inner, on_plan=plans))
    found = []
    for start[0] in (0, 1):
        f(*given).square().sum().backward()
        found.append(grads(made))
    made(*given).square().sum().backward()
    for a, b, c in zip(*found, grads(made), strict=True):
        torch.testing.assert_close((a + b) / 2, c, rtol=1e-4, atol=1e-5)
    ((cut,),) = [p.cuts for p in plans]
    assert (cut.decision, cut.rows) == ("rows", 48)


# --- declined before anything is traced for it ---


def images(*places: int) -> nn.Module:
    """Six convolutions, with BatchNorm behind those whose places are given."""
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), *([nn.BatchNorm2d(8)] if i in places else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Frozen(nn.Module):
    """A model with given statistics, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = mlp(16, 32, 32), nn.BatchNorm1d(32).eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.inner(x))
        return (h[:, :, None] @ h[:, None, :]).sum(2)


WORTH = {
    "plain": (lambda: images(), torch.randn(8, 3, 8, 8)),
    "first": (lambda: images(0), torch.randn(8, 3, 8, 8)),
    "middle": (lambda: images(2), torch.randn(8, 3, 8, 8)),
    "late": (lambda: images(3), torch.randn(8, 3, 8, 8)),
    "last": (lambda: images(5), torch.randn(8, 3, 8, 8)),
    "all": (lambda: images(*range(6)), torch.randn(8, 3, 8, 8)),
    "frozen": (Frozen, torch.randn(8, 16)),
}


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.usefixtures("one_thread", "small_work_counts")
@pytest.mark.parametrize("name", list(WORTH))
def test_what_is_declined_at_once_would_be_declined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x = WORTH[name]
    found, asked = [], []
    ask = _torch.ask_for_symbol
    monkeypatch.setattr(_torch, "ask_for_symbol", lambda *a: (asked.append(a), ask(*a)))
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(early_decline, "early_rejection", lambda *a: None)
        torch._dynamo.reset()
        plans = Plans()
        torch.compile(make(), backend=Backend(None, inner_compile=run_as_is, on_plan=plans))(x).sum().backward()
        found.append([(c.decision, c.method, c.ratio, c.rows, c.level) for p in plans for c in p.cuts])
        if at_once:
            certain = not asked
    assert found[0] == found[1] and found[0]
    assert certain == (name == "all")
    assert {c[0] for c in found[0]} == {"exact" if name == "all" else "rows"}


def test_a_small_model_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "ask_for_symbol", lambda *a: pytest.fail("asked"))
    plans = Plans()
    torch.compile(mlp(16, 64, 8), backend=Backend(None, inner_compile=run_as_is, on_plan=plans))(torch.randn(32, 16)).sum().backward()
    assert all("over before its rows would be chosen" in s.reason for s in plans.sites) and len(plans.sites) == 2


class Doubled(torch.autograd.Function):
    """An op whose backward pass has no known cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


@pytest.mark.slow
@pytest.mark.parametrize("unknown", [Doubled.apply, lambda x: of_known_size(x)])
def test_unknown_costs_are_not_guessed(unknown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    count = _torch.count_dynamo_flops
    monkeypatch.setattr(_torch, "count_dynamo_flops", lambda gm: seen.append(count(gm)) or seen[-1])
    model = mlp(16, 64, 8)
    torch.compile(lambda x: unknown(model(x)), backend=Backend(None, inner_compile=run_as_is))(torch.randn(32, 16)).sum().backward()
    assert seen == [None]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_flops_of_a_dynamo_graph_are_the_formulas(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    count = _torch.count_dynamo_flops
    monkeypatch.setattr(_torch, "count_dynamo_flops", lambda gm: (found := count(gm), seen.append(sum(found.values())))[0])
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def body(x: Tensor) -> Tensor:
        return linear(conv(x).flatten(1))

    def call(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)

    torch.compile(call, backend=Backend(None, inner_compile=run_as_is))(torch.randn(4, 3, 8, 8).requires_grad_())
    assert seen == [2 * 4 * 36 * 8 * 3 * 9 + 2 * 4 * 8 * 36 * 4]
    assert torch.is_grad_enabled()
