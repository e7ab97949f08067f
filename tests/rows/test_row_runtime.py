"""What a backward pass on rows makes while it runs is the graph's own: dtypes, devices, layouts, random numbers; and graphs that are kept."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import ResidualLayer
from helpers.oracles import ChosenRows, grads, relative
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import approx_compile
from approx_compile import Backend
from approx_compile._torch import random_state
from approx_compile.backend import run_as_is
from approx_compile.reasons.rows import FIXED_BATCH_CODE
from approx_compile.rows import gather_rows, row_backward, row_compiler

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


def rows(method: str = "bernoulli", ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"policy": "always", "grad": {"axis": "rows", "ratio": ratio, "method": method, **more}}


# --- torch's defaults ---


@contextlib.contextmanager
def default(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device) if device is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class Scaled(nn.Module):
    """The batch's size is a number in the backward pass."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.norm = nn.BatchNorm1d(32) if norm else nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.norm(self.first(x) / x.shape[0])))
        return out * x.shape[0]


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    **{method: (rows(method), False) for method in ("topk", "bernoulli", "uniform", "wta")},
    "batch_norm": (rows(batch_norm="approximate"), True),
    "adaptive": ({"policy": "adaptive", "adaptive": {"tau": 0.5}}, False),
    "crs": ({"policy": "always", "method": "crs", "sampling": "backward", "min_k": 2}, False),
    "uniform product": ({"policy": "always", "method": "uniform", "sampling": "forward", "min_k": 2}, False),
    "random": ({"policy": "always", "sampling": "backward", "grad": "exact", "grad_weight": {"method": "random"}}, False),
}


def steps(model: nn.Module, options: dict[str, Any], inner: Any, around: Any, x: Tensor, count: int) -> list[Tensor]:
    """The gradients of the last of some steps, all of which ran inside `around`."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    f = torch.compile(model, backend=Backend(options, inner_compile=inner))
    tangent = torch.randn(len(x), 4, dtype=x.dtype, device="cpu") * (torch.arange(len(x), device="cpu") < len(x) // 8)[:, None]
    for _ in range(count):
        with around():
            f(x).backward(tangent)
        found = grads(model)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float16, None), (None, "meta")], ids=["float64", "float16", "meta"])
def test_torchs_defaults_change_nothing(name: str, dtype: torch.dtype | None, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and run under a default dtype or device that is not the model's; a default device of meta shows in whatever is made without one."""
    options, norm = CASES[name]
    model, x = Scaled(norm), torch.randn(64, 8)
    count = 60 if name == "adaptive" else 1
    kept = []
    plain = row_backward.RowBackward.run
    around = functools.partial(default, dtype, device)

    def run(self: Any, values: Any, symbols: Any, counts: Any, *more: Any) -> Any:
        kept.append(counts[0])
        with around():  # the engine takes the default device off
            return plain(self, values, symbols, counts, *more)

    want = steps(model, options, run_as_is, contextlib.nullcontext, x, count)
    monkeypatch.setattr(row_backward.RowBackward, "run", run)
    got = steps(model, options, run_as_is, around, x, count)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert kept == [] if "axis" not in options.get("grad", {}) and name != "adaptive" else min(kept) <= 32


@pytest.mark.slow
@pytest.mark.parametrize("device", [None, "meta"])
def test_weights_of_one_are_made_where_compiled_code_reads_them(device: str | None) -> None:
    """All rows through an approximate BatchNorm."""
    options, norm = CASES["batch_norm"]
    model, x = Scaled(norm).double(), torch.randn(64, 8, dtype=torch.float64)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with default(torch.float16, device), row_backward.all_rows():
            yield

    got = steps(model, options, run_as_is, around, x, 1)
    want = steps(model, {"policy": "cost"}, run_as_is, contextlib.nullcontext, x, 1)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
def test_weights_of_rows_have_the_dtype_that_compiled_code_reads(model_dtype: torch.dtype) -> None:
    model, x = Scaled(True).to(model_dtype), torch.randn(64, 8, dtype=model_dtype)
    options = rows("topk", batch_norm="approximate")
    want = steps(model, options, None, contextlib.nullcontext, x, 1)
    for dtype in (torch.float64, torch.float16):
        got = steps(model, options, None, functools.partial(default, dtype, None), x, 1)
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-6


# --- layouts ---


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.conv(x * scale)).mean((2, 3)))
        return out


def windows(x: Tensor, start: int) -> Tensor:
    """24 rows of images that overlap each other."""
    return x.flatten().as_strided((24, 3, 6, 6), (3, 36, 6, 1), start)


IMAGES: dict[str, Any] = {
    "grey": lambda: torch.randn(24, 1, 6, 6).expand(-1, 3, -1, -1),
    "batch": lambda: torch.randn(1, 3, 6, 6).expand(24, -1, -1, -1),
    "everything": lambda: torch.randn(1, 1, 1, 1).expand(24, 3, 6, 6),
    "lines": lambda: torch.randn(24, 3, 1, 6).expand(-1, -1, 6, -1),
    "channels last": lambda: torch.randn(24, 3, 6, 6).contiguous(memory_format=torch.channels_last),
    "channels last, grey": lambda: torch.randn(24, 6, 6, 1).expand(-1, -1, -1, 3).permute(0, 3, 1, 2),
    "batch inside": lambda: torch.randn(3, 6, 6, 24).permute(3, 0, 1, 2),
    "sliced": lambda: torch.randn(48, 4, 6, 12)[::2, 1:, :, ::2],
    "overlapping": lambda: windows(torch.randn(400), 5),
    "windows": lambda: torch.randn(24, 3, 11).unfold(2, 6, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("inner", [None, run_as_is], ids=["inductor", "as is"])
@pytest.mark.parametrize("wants", [False, True])
def test_expanded_and_overlapping_inputs(name: str, inner: Any, wants: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors of any layout: gradients against masked tangents, with rows left out and with all of them; `wants`: the input's own, too."""
    chosen = ChosenRows(monkeypatch)
    model, x, scale = Images(), IMAGES[name](), torch.rand(24, 1, 1, 1).expand(-1, 3, 6, 6)
    scale = scale.requires_grad_() if wants else scale
    f = torch.compile(model, backend=Backend(rows(), inner_compile=inner))
    for all_of_them in (False, True):
        out = f(x, scale)
        tangent = torch.randn_like(out)
        with row_backward.all_rows() if all_of_them else contextlib.nullcontext():
            out.backward(tangent)
        got = grads(model, *([scale] if wants else []))
        mask = torch.ones(24) if all_of_them else chosen.mask(24)
        model(x, scale).backward(tangent * mask[:, None])
        assert max(relative(a, b) for a, b in zip(got, grads(model, *([scale] if wants else [])), strict=True)) < 1e-5
    assert len(chosen.choices) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        f(IMAGES[name](), scale).sum().backward()


def test_an_expanded_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is a tensor of its own."""
    chosen = ChosenRows(monkeypatch)
    model, x = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), torch.randn(24, 8)
    f = torch.compile(lambda x: model(x).expand(-1, 5), backend=Backend(rows(), inner_compile=run_as_is))
    tangent = torch.randn(24, 5)
    f(x).backward(tangent)
    got = grads(model)
    model(x).expand(-1, 5).backward(tangent * chosen.mask(24)[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


# --- graphs that are kept ---


class Copies:
    """`copy_keeping_strides`, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module in (row_backward, row_compiler):
            monkeypatch.setattr(module, "copy_keeping_strides", self)

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return gather_rows.copy_keeping_strides(x)


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


KEPT: dict[str, dict[str, Any]] = {
    "rows": rows(),
    "adaptive, all rows": {},
    "adaptive, rows left out": {"adaptive": {"tau": 0.5}},
    "fixed": rows(),
    "schedule": {"policy": "always", "sampling": "backward", "grad": "exact", "grad_weight": "topk", "rules": [{"steps": "::2", "method": "exact"}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_graphs_may_be_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor, whose code writes to saved tensors when it may. The first backward pass of all keeps its graph, and so do some in a row."""
    if name == "fixed":
        monkeypatch.setattr(row_compiler, "_why_fixed", lambda *args: FIXED_BATCH_CODE(size=64))
    chosen, copies = ChosenRows(monkeypatch), Copies(monkeypatch)
    model, x = generator(), torch.randn(64, 8)
    f = torch.compile(model, backend="approx", options=KEPT[name])
    few = torch.randn(64, 4) * (torch.arange(64) < 4)[:, None]
    if name == "adaptive, rows left out":
        for _ in range(60):
            f(x).backward(few)
        assert copies.count == 0 and len(chosen.choices[-1][0]) < 32
        model.zero_grad()
    out, plain = f(x), model(x)
    for i in range(4):
        seen, before = len(chosen.choices), copies.count
        tangent = few * (i + 1)
        out.backward(tangent, retain_graph=i < 3)
        got = grads(model)
        assert (len(chosen.choices) > seen) == (name in ("rows", "adaptive, rows left out"))
        assert (copies.count > before) == (i < 3 and name in ("adaptive, all rows", "fixed"))  # rows gathered are copies already
        weight = chosen.mask(64).float()[:, None] if len(chosen.choices) > seen else 1
        plain.backward(tangent * weight, retain_graph=True)
        want = grads(model)
        assert max(relative(a, b) for a, b in zip(got[-1:] if name == "schedule" else got, want[-1:] if name == "schedule" else want, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, rows()], ids=["adaptive", "rows"])
def test_a_second_derivative_is_refused_in_inductors_words(options: dict[str, Any]) -> None:
    model, x = generator(), torch.randn(64, 8)
    f = torch.compile(model, backend="approx", options=options)
    g = torch.autograd.grad(f(x).sum(), [*model.parameters()], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        g[0].square().sum().backward()
    f(x).sum().backward()


# --- random numbers ---


def trained(model: nn.Module, options: dict[str, Any] | None, count: int, inner: Any = run_as_is) -> tuple[Any, list[Tensor]]:
    """Passes with fixed weights, of which every fourth row has a gradient: the compiled model, and the outputs of all."""
    f = torch.compile(model, backend=Backend(options, inner_compile=inner))
    return f, passes(f, count)


def passes(f: Any, count: int) -> list[Tensor]:
    found = []
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        out = f(torch.randn(64, 8, generator=g))
        out.backward(torch.randn(out.shape, generator=g) * (torch.arange(64) < 16)[:, None])
        found.append(out.detach())
    return found


EXACT: dict[str, Any] = {"policy": "always", "sampling": "backward", "grad": "exact"}
LEFT_OUT: dict[str, dict[str, Any]] = {
    **{method: rows(method) for method in ("bernoulli", "uniform", "wta")},
    "all rows": {"adaptive": {"ladder": (1.0,)}},
    "adaptive": {"adaptive": {"tau": 0.5}},
}


class Dropped(nn.Module):
    """Random numbers in the forward pass, in a checkpointed block too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.3), nn.Tanh()), nn.Sequential(nn.Linear(32, 4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(self.first, x, use_reentrant=False)  # type: ignore[assignment]
        out: Tensor = self.last(h)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("make", [generator, Dropped])
def test_the_users_random_stream_is_that_of_an_exact_run(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model = make()
    torch.manual_seed(5)
    _, want = trained(model, EXACT, 40)
    after = torch.rand(5)
    torch._dynamo.reset()
    torch.manual_seed(5)
    _, got = trained(model, LEFT_OUT[name], 40)
    assert torch.equal(torch.rand(5), after)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # the same masks
    assert (chosen.choices == []) == (name == "all rows")


@pytest.mark.slow
def test_dropout_masks_are_those_of_inductor() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5)), torch.randn(64, 8)
    found = []
    for backend in ("inductor", Backend(rows())):
        torch._dynamo.reset()
        torch.manual_seed(5)
        f = torch.compile(model, backend=backend)
        for _ in range(3):
            out = f(x)
            out.sum().backward()
            found.append(out == 0)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True)) and not torch.equal(found[0], found[1])


def drawn(chosen: ChosenRows, f: Any, count: int) -> list[list[int]]:
    seen = len(chosen.choices)
    g = torch.Generator().manual_seed(2)
    x, tangent = torch.randn(64, 8, generator=g), torch.rand(64, 4, generator=g)
    for _ in range(count):
        f(x).backward(tangent)
    return [idx.tolist() for idx, _ in chosen.choices[seen:]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bernoulli", "uniform", "wta"])
def test_a_seed_tells_which_rows_are_drawn(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call draws other rows every time, and the same ones after the same seed: in this model or in another one of its kind."""
    chosen = ChosenRows(monkeypatch)
    f = torch.compile(generator(), backend=Backend(rows(method), inner_compile=run_as_is))
    torch.manual_seed(3)
    first = drawn(chosen, f, 4)
    assert all(a != b for a, b in itertools.combinations(first, 2))
    more = drawn(chosen, f, 4)
    assert all(a != b for a, b in zip(first, more, strict=True))
    torch.manual_seed(3)
    assert drawn(chosen, f, 4) == first and drawn(chosen, f, 4) == more
    torch.manual_seed(4)
    assert all(a != b for a, b in zip(first, drawn(chosen, f, 4), strict=True))
    torch.manual_seed(3)
    again = generator()
    with torch.no_grad():
        for p, q in zip(again.parameters(), f.parameters(), strict=True):
            p.copy_(q)
    assert drawn(chosen, torch.compile(again, backend=Backend(rows(method), inner_compile=run_as_is)), 4) == first


def test_a_stretch_of_random_numbers_of_its_own_disturbs_no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    f = torch.compile(generator(), backend=Backend(rows(), inner_compile=run_as_is))
    torch.manual_seed(3)
    want = drawn(chosen, f, 4)
    torch.manual_seed(3)
    got = drawn(chosen, f, 2)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        torch.rand(3)
    assert got + drawn(chosen, f, 2) == want


def test_torch_may_not_tell_that_it_was_seeded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the count of draws goes on; another seed still tells."""
    monkeypatch.setattr(random_state, "_SEED_TRACKERS", [])
    chosen = ChosenRows(monkeypatch)
    f = torch.compile(generator(), backend=Backend(rows(), inner_compile=run_as_is))
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(drawn(chosen, f, 1)[0])
    assert all(a != b for a, b in itertools.combinations(found, 2))


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_draws_the_rows_of_the_uninterrupted_one(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is a number; what was saved without it can be loaded, too."""
    chosen = ChosenRows(monkeypatch)
    model = generator()
    f = torch.compile(model, backend=Backend(rows(), inner_compile=run_as_is))
    torch.manual_seed(3)
    drawn(chosen, f, 5)
    saved, random = copy.deepcopy((model.state_dict(), approx_compile.state_dict(f))), torch.get_rng_state()
    assert [state for own in saved[1]["controls"].values() for state in own.values()] == [{"draws": 5}]
    want = drawn(chosen, f, 3)
    torch._dynamo.reset()
    torch.manual_seed(8)
    twin = generator()
    g = torch.compile(twin, backend=Backend(rows(), inner_compile=run_as_is))
    if before:
        drawn(chosen, g, 1)
    twin.load_state_dict(saved[0])
    approx_compile.load_state_dict(g, saved[1])
    torch.set_rng_state(random)
    assert approx_compile.state_dict(g) == saved[1]
    assert drawn(chosen, g, 3) == want
    approx_compile.load_state_dict(g, {"controls": {}, "clocks": []})
    drawn(chosen, g, 1)


# --- compiled autograd ---


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.second(F.gelu(self.first(x)))).mean((2, 3)))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "images", "adaptive"])
@pytest.mark.parametrize("outer", ["eager", "inductor"])
def test_compiled_autograd_runs_on_rows(name: str, outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies backward graphs into one of its own, where a backward pass on rows is one op; batches of other sizes, graphs that are kept."""
    chosen = ChosenRows(monkeypatch)
    model = Convolutions() if name == "images" else generator()
    f = torch.compile(model, backend=Backend({"adaptive": {"tau": 0.5}} if name == "adaptive" else rows()))
    compiler = torch.compile(backend=outer, fullgraph=True)

    def off(size: int, keep: bool = False) -> float:
        x = torch.randn(size, 3, 6, 6) if name == "images" else torch.randn(size, 8)
        out, plain = f(x), model(x)
        tangent = torch.randn(size, 4) * (torch.arange(size) < size // 8)[:, None]
        for again in (keep, False) if keep else (False,):
            seen = len(chosen.choices)
            with compiled_autograd._enable(compiler):
                out.backward(tangent, retain_graph=again)
            got = grads(model)
            assert len(chosen.choices) == seen + (name != "adaptive" or seen > 0)
            mask = chosen.mask(size) if len(chosen.choices) > seen else torch.ones(size)
            plain.backward(tangent * mask.to(tangent.dtype)[:, None], retain_graph=again)
            worst = max(relative(a, b) for a, b in zip(got, grads(model), strict=True))
        return worst

    if name == "adaptive":  # not a row is left out at first
        assert off(64) < 1e-5
        for _ in range(60):
            f(torch.randn(64, 8)).backward(torch.randn(64, 4) * (torch.arange(64) < 8)[:, None])
        assert len(chosen.choices[-1][0]) < 32
        model.zero_grad()
    assert max(off(64), off(64), off(48), off(64, keep=True)) < 1e-5


@pytest.mark.slow
def test_graphs_share_one_set_of_rows_in_compiled_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ChosenRows(monkeypatch)
    model, x, tangent = nn.Sequential(*[ResidualLayer(8) for _ in range(3)]), torch.randn(64, 8), torch.randn(64, 8)
    for part in model:
        part.compile(backend=Backend(rows(), inner_compile=run_as_is))
    out = model(x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        out.backward(tangent)
    got = grads(model)
    assert len(chosen.choices) == 1
    with torch.compiler.set_stance("force_eager"):
        model(x).backward(tangent * chosen.mask(64)[:, None])
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


@pytest.mark.slow
def test_a_whole_step_with_compiled_autograd_turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the backend gets the graph of the backward pass, too."""
    chosen = ChosenRows(monkeypatch)
    model, x = generator(), torch.randn(64, 8)

    def step(x: Tensor) -> None:
        model(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        f = torch.compile(step, backend="approx", options=rows())
        for i in range(2):
            model.zero_grad()
            f(x)
            assert len(chosen.choices) == i + 1
    got = grads(model)
    out = model(x)
    out.backward(2 * out.detach() * chosen.mask(64)[:, None])
    want = grads(model)  # the cut is where the loss's gradient reaches the last product, whose bias is above
    assert max(relative(a, b) for a, b in zip(got[:-1], want[:-1], strict=True)) < 1e-5
