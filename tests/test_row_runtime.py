"""What a backward pass on rows makes while it runs is the graph's own: dtypes, devices, layouts, random numbers; and graphs that are kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from common import grads, relative
from torch import Tensor, nn

from approx_compile import Backend, backward
from approx_compile.backend import run_as_is

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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float16, None), (None, "meta")], ids=["float64", "float16", "meta"])
def test_torchs_defaults_change_nothing(name: str, dtype: torch.dtype | None, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and run under a default dtype or device that is not the model's; a default device of meta shows in whatever is made without one."""
    options, norm = CASES[name]
    model, x = Scaled(norm), torch.randn(64, 8)
    count = 60 if name == "adaptive" else 1
    kept = []
    plain = backward.RowBackward.run
    around = functools.partial(default, dtype, device)

    def run(self: Any, values: Any, symbols: Any, counts: Any, *more: Any) -> Any:
        kept.append(counts[0])
        with around():  # the engine takes the default device off
            return plain(self, values, symbols, counts, *more)

    want = steps(model, options, run_as_is, contextlib.nullcontext, x, count)
    monkeypatch.setattr(backward.RowBackward, "run", run)
    got = steps(model, options, run_as_is, around, x, count)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert kept == [] if "axis" not in options.get("grad", {}) and name != "adaptive" else min(kept) <= 32


@pytest.mark.parametrize("device", [None, "meta"])
def test_weights_of_one_are_made_where_compiled_code_reads_them(device: str | None) -> None:
    """All rows through an approximate BatchNorm."""
    options, norm = CASES["batch_norm"]
    model, x = Scaled(norm).double(), torch.randn(64, 8, dtype=torch.float64)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with default(torch.float16, device), backward.all_rows():
            yield

    got = steps(model, options, run_as_is, around, x, 1)
    want = steps(model, {"policy": "cost"}, run_as_is, contextlib.nullcontext, x, 1)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
def test_weights_of_rows_have_the_dtype_that_compiled_code_reads(model_dtype: torch.dtype) -> None:
    model, x = Scaled(True).to(model_dtype), torch.randn(64, 8, dtype=model_dtype)
    options = rows("topk", batch_norm="approximate")
    want = steps(model, options, None, contextlib.nullcontext, x, 1)
    for dtype in (torch.float64, torch.float16):
        got = steps(model, options, None, functools.partial(default, dtype, None), x, 1)
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-6
