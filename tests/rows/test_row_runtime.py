"""What a backward pass on rows makes while it runs has the graph's dtypes, devices and layouts; it runs on kept graphs and under compiled autograd."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import ResidualLayer
from helpers.oracles import ChosenRows, grads, relative
from helpers.rows import generator, rows
from helpers.sampling import all_but
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.reasons.rows import FIXED_BATCH_CODE
from approx_compile.rows import gather_rows, row_backward, row_compiler

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


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
    """A model whose backward pass has the batch's size as a number."""

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
    """Return the gradients of the last of some steps, all of which ran inside the context `around`."""
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
@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float16, None), (None, "meta")], ids=["float64", "float16", "meta"])
def test_torchs_defaults_change_nothing(name: str, dtype: torch.dtype | None, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is compiled and run under a default dtype or device that is not its own. A default device of meta shows everything that is made without a
    device."""
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
    """All rows are kept, through an approximate BatchNorm."""
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
@pytest.mark.parametrize(
    ("model_dtype", "dtype"), all_but([(torch.float32, torch.float64)], itertools.product((torch.float32, torch.float64), (torch.float64, torch.float16)))
)
def test_weights_of_rows_have_the_dtype_that_compiled_code_reads(model_dtype: torch.dtype, dtype: torch.dtype) -> None:
    model, x = Scaled(True).to(model_dtype), torch.randn(64, 8, dtype=model_dtype)
    options = rows("topk", batch_norm="approximate")
    want = steps(model, options, None, contextlib.nullcontext, x, 1)
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
    """Return 24 rows of images that overlap each other."""
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
@pytest.mark.sample(10)
@pytest.mark.parametrize(("name", "inner"), all_but([*itertools.product(IMAGES, (run_as_is,))], itertools.product(IMAGES, (run_as_is, None))))
@pytest.mark.parametrize("wants", [False, True])
def test_expanded_and_overlapping_inputs(name: str, inner: Any, wants: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors of any layout: the gradients are those of masked tangents, with rows left out and with all of them, and with `wants` also the input's."""
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


@pytest.mark.slow
def test_an_expanded_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of an expanded output is a tensor of full size."""
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
    """Count the calls of `copy_keeping_strides`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module in (row_backward, row_compiler):
            monkeypatch.setattr(module, "copy_keeping_strides", self)

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return gather_rows.copy_keeping_strides(x)


KEPT: dict[str, dict[str, Any]] = {
    "rows": rows(),
    "adaptive, all rows": {},
    "adaptive, rows left out": {"adaptive": {"tau": 0.5}},
    "fixed": rows(),
    "schedule": {"policy": "always", "sampling": "backward", "grad": "exact", "grad_weight": "topk", "rules": [{"steps": "::2", "method": "exact"}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", all_but(["adaptive, all rows", "fixed"], KEPT))
def test_graphs_may_be_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's code writes to saved tensors when it may. The first backward pass keeps its graph, and so do some later ones in succession."""
    if name == "fixed":
        monkeypatch.setattr(row_compiler, "_fixed_size_reason", lambda *args: FIXED_BATCH_CODE(size=64))
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


# --- compiled autograd ---


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.second(F.gelu(self.first(x)))).mean((2, 3)))
        return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "outer"), all_but([("mlp", "eager")], itertools.product(["mlp", "images", "adaptive"], ["eager", "inductor"])))
def test_compiled_autograd_runs_on_rows(name: str, outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled autograd copies backward graphs into its own, where a backward pass on rows is one op. Batches of other sizes and kept graphs are tried."""
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
    """With compiled autograd turned on the backend also gets the graph of the backward pass."""
    chosen = ChosenRows(monkeypatch)
    model, x = generator(), torch.randn(64, 8)

    def step(x: Tensor) -> None:
        model(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        f = torch.compile(step, backend=Backend(rows(), inner_compile=run_as_is))
        for i in range(2):
            model.zero_grad()
            f(x)
            assert len(chosen.choices) == i + 1
    got = grads(model)
    out = model(x)
    out.backward(2 * out.detach() * chosen.mask(64)[:, None])
    want = grads(model)  # the cut is where the loss's gradient reaches the last product, whose bias is above
    assert max(relative(a, b) for a, b in zip(got[:-1], want[:-1], strict=True)) < 1e-5
