"""Kernels and training steps on a GPU: `make gpu`, or `python -m benchmarks.kernels.gpu check|tables|plot|train`.

- `check`: every kernel of ours against the same product in fp64, over shapes, dtypes and groups; ends with status 1 if one is off.
- `tables`: bf16, against Inductor's max-autotune in the same process: linear layers forward and backward, group skipping at ratio 1 against cuBLAS, the
  weight gradient `max` against cuDNN's, a GPT-like block, WRN-28-10 channels-last, and both with their backward pass on rows. Rows in results/gpu.csv.
- `train`: the studies' long works (benchmarks/accuracy: accuracy.py, gradients.py) on the GPU; rows where these keep theirs.

`make gpu` is check, tables and plot, meant to take under ten minutes. `--device cpu --small` rehearses all of it, at sizes that mean nothing and
without storing a row.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from approx_compile import machine
from approx_compile.kernels import availability, skip_conv, skip_matmul
from approx_compile.kernels.availability import CONV_UNITS, DEFAULT_UNITS
from approx_compile.kernels.gradient_replacements import ConvGeometry, Replacement, max_conv_weight
from benchmarks.common.plots import speedup_bars
from benchmarks.common.races import raced
from benchmarks.common.rows import RESULTS, conditions, console, show, store
from benchmarks.common.works import Block
from examples.models import build

app = typer.Typer(help=__doc__, no_args_is_help=False)
COLUMNS = ("work", "setting", "median_ms", "p20_ms", "p80_ms", "speedup", "speedup_p20", "speedup_p80", "bar")
TUNED = {"mode": "max-autotune"}
PAPER = ((256, 256, 8), (128, 128, 16), (512, 512, 4), (512, 512, 2), (64, 64, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8))
"""Table 1 of Wang and Nelaturu: input and output channels, height and width; 3 x 3, padding 1, batch 128."""
Device = Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal")]
Small = Annotated[bool, typer.Option(help="tiny sizes, nothing stored")]


@dataclass(frozen=True)
class Bench:
    """Where and at what size: `of(real, tiny)` picks."""

    device: str
    small: bool

    def of(self, real: int, tiny: int) -> int:
        return tiny if self.small else real

    def rand(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def image(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.rand(*shape, dtype=dtype).to(memory_format=torch.channels_last)

    def rounds(self, rounds: int) -> int:
        return 2 if self.small else rounds


# --- correctness ---

LIMITS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 3e-3}
"""Largest error, as a share of the largest entry of the result (fp32: as TF32)."""


def error_of(run: Callable[..., Tensor], *tensors: Tensor | None, at: torch.dtype) -> tuple[float, float]:
    """Of a kernel against the same op on fp64 copies on the CPU (the readable reference): the largest error as a share of the largest entry, and its limit."""
    wide = [t.double().cpu() if isinstance(t, Tensor) and t.is_floating_point() else t.cpu() if isinstance(t, Tensor) else t for t in tensors]
    want, got = run(*wide), run(*tensors).double().cpu()
    if not want.is_floating_point():
        return float((want != got).sum()), 0.0
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)), LIMITS[at]


def f32(scale: Tensor | None) -> Tensor | None:
    """Scales are fp32 whatever the operands are."""
    return None if scale is None else scale.float()


def matmul_cases(b: Bench) -> Iterator[tuple[str, torch.dtype, Callable[..., Tensor], tuple[Any, ...]]]:
    sizes = ((256, 512, 256), (1000, 1024, 144)) if not b.small else ((24, 256, 40),)  # multiples of 16: for others there is no kernel
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # nor is there one for fp32 without
    for dtype in LIMITS:
        units = (*DEFAULT_UNITS["triton"], *(DEFAULT_UNITS["cuda"] if dtype != torch.float32 else ()), 1)
        for (m, k, n), unit in ((s, u) for s in sizes for u in units):
            x, w, dy = b.rand(m, k, dtype=dtype), b.rand(n, k, dtype=dtype), b.rand(m, n, dtype=dtype)
            idx = torch.randperm(k // unit, device=b.device)[: max(1, k // unit // 2)].sort().values
            scale, bias = torch.rand(len(idx), device=b.device) + 0.5, b.rand(n, dtype=dtype)
            at = f"{m} x {k} x {n}, unit {unit}"
            if unit > 1:
                yield f"output, {at}", dtype, lambda x, w, i, s, c, u=unit: skip_matmul.skip_matmul(x, w.t(), i, f32(s), u, c), (x, w, idx, scale, bias)
                yield f"grad_input, {at}", dtype, lambda dy, w, i, s, u=unit: skip_matmul.skip_matmul_into(dy, w, i, f32(s), u, 1), (dy, w, idx, scale)
                yield f"grad_weight, {at}", dtype, lambda dy, x, i, s, u=unit: skip_matmul.skip_matmul_into(dy.t(), x, i, f32(s), u, 1), (dy, x, idx, None)
            else:
                rows = torch.randperm(m, device=b.device)[: m // 4].sort().values
                yield (
                    f"rows of grad_weight, {at}",
                    dtype,
                    lambda dy, x, i, s: skip_matmul.skip_matmul(dy.t(), x, i, f32(s), 1),
                    (dy, x, rows, scale[: len(rows)]),
                )
            if unit == DEFAULT_UNITS["triton"][0]:
                yield f"norms, {at}", dtype, lambda x, u=unit: skip_matmul.axis_norms_sq(x, 1, u), (x,)
    score = torch.randperm(1000 if not b.small else 100, device=b.device).float()
    yield "choose", torch.float32, lambda s: skip_matmul.choose(s, len(s) // 3), (score,)


def conv_cases(b: Bench) -> Iterator[tuple[str, torch.dtype, Callable[..., Tensor], tuple[Any, ...]]]:
    shapes = ((8, 128, 96, 15, 3, 1), (8, 128, 128, 16, 3, 2), (4, 256, 64, 9, 1, 1)) if not b.small else ((2, 128, 24, 5, 3, 1),)
    for dtype in LIMITS:
        for (n, c, o, side, kernel, stride), unit in ((s, u) for s in shapes for u in CONV_UNITS[::2]):  # steps of one unit, and of more
            rest = ([stride] * 2, [kernel // 2] * 2, [1, 1])
            x, w = b.image(n, c, side, side, dtype=dtype), b.image(o, c, kernel, kernel, dtype=dtype)
            out = (side + 2 * (kernel // 2) - kernel) // stride + 1
            dy = b.image(n, o, out, out, dtype=dtype)
            idx = torch.randperm(c // unit, device=b.device)[: max(1, c // unit // 2)].sort().values
            scale = torch.rand(len(idx), device=b.device) + 0.5
            at = f"{n} x {c} x {side} x {side} -> {o}, {kernel} x {kernel} / {stride}, unit {unit}"
            yield f"conv, {at}", dtype, lambda x, w, i, s, u=unit, r=rest: skip_conv.skip_conv(x, w, i, f32(s), u, *r), (x, w, idx, scale)
            back = lambda dy, w, i, s, u=unit, r=rest, z=side: skip_conv.skip_conv_input(dy, w, i, f32(s), u, [z, z], *r)  # noqa: E731
            yield f"conv grad_input, {at}", dtype, back, (dy, w, idx, scale)
            weight = lambda x, dy, i, s, u=unit, r=rest, k=kernel: skip_conv.skip_conv_weight(x, dy, i, f32(s), u, [k, k], *r)  # noqa: E731
            yield f"conv grad_weight, {at}", dtype, weight, (x, dy, idx, scale)


@app.command()
def check(device: Device = "cuda", small: Small = False) -> None:
    """Every kernel against fp64."""
    b = bench_on(device, small)
    torch.manual_seed(0)
    rows = []
    for cases in (matmul_cases(b), conv_cases(b)):
        for name, dtype, run, tensors in cases:
            error, limit = error_of(run, *tensors, at=dtype)
            rows.append(conditions() | {"dtype": str(dtype).removeprefix("torch."), "case": name, "error": float(f"{error:.3g}"), "limit": limit})
    wrong = [r for r in rows if not r["error"] <= r["limit"]]
    show("against fp64", wrong or rows[:: max(1, len(rows) // 20)], ("case", "dtype", "error", "limit"))
    console.print(f"{len(rows) - len(wrong)} of {len(rows)} within their limits")
    if not small:
        store("gpu_check", rows)
    if wrong:
        raise typer.Exit(1)


# --- times ---


def options(ratio: float, **more: Any) -> dict[str, Any]:
    return {"ratio": ratio, "policy": "always", "inductor": TUNED} | more


def step_of(model: nn.Module, x: Tensor, target: Tensor | None, settings: dict[str, Any] | None) -> Callable[[], None]:
    """Forward and backward under Inductor's max-autotune (None) or under approx with these options."""
    compiled = (
        torch.compile(model, backend="inductor", options=None, mode="max-autotune")
        if settings is None
        else torch.compile(model, backend="approx", options=settings)
    )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x)
        loss = F.cross_entropy(out.float(), target) if target is not None else out.float().square().mean()
        loss.backward()

    return step


def model_rows(
    b: Bench, title: str, make: Callable[[], tuple[nn.Module, Tensor, Tensor | None]], contest: dict[str, dict[str, Any]], bars: dict[str, float]
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, target = make()
    steps = {"inductor": step_of(model, x, target, None)} | {name: step_of(model, x, target, o) for name, o in contest.items()}
    return raced(title, steps, b.rounds(20), bars)


def linears(b: Bench) -> list[dict[str, Any]]:
    rows = []
    for (m, k, n), bars in (((8192, 4096, 4096), {"0.5": 1.55, "0.3": 2.1}), ((32768, 4096, 16384), {"0.5": 1.7, "0.3": 2.7})):
        m, k, n = b.of(m, 32), b.of(k, 256), b.of(n, 64)

        def make(m: int = m, k: int = k, n: int = n) -> tuple[nn.Module, Tensor, None]:
            return nn.Linear(k, n, bias=False, device=b.device, dtype=torch.bfloat16), b.rand(m, k).requires_grad_(), None

        contest = {f"{r:g}": options(r) for r in (0.5, 0.3)}
        rows += model_rows(b, f"linear {m} x {k} x {n}", make, contest, bars)
    return rows


def at_ratio_one(b: Bench) -> list[dict[str, Any]]:
    """The group-skip kernel with all groups kept, against the library's product."""
    rows = []
    for m, k, n in ((8192, 4096, 4096), (32768, 4096, 16384)):
        m, k, n = b.of(m, 32), b.of(k, 256), b.of(n, 64)
        x, w = b.rand(m, k), b.rand(n, k)
        idx = torch.arange(k // DEFAULT_UNITS["triton"][0], device=b.device)
        contest: dict[str, Callable[[], Any]] = {
            "inductor": lambda x=x, w=w: x @ w.t(),
            "skip": lambda x=x, w=w, i=idx: skip_matmul.skip_matmul(x, w.t(), i, None, DEFAULT_UNITS["triton"][0]),
        }  # type: ignore[misc]
        rows += raced(f"every group kept, {m} x {k} x {n}, against cuBLAS", contest, b.rounds(50), {"skip": 0.9})
    return rows


def replaced(b: Bench) -> list[dict[str, Any]]:
    """`max` against cuDNN's weight gradient."""
    rows = []
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    for inputs, outputs, size in PAPER:
        x, dy, w = b.image(b.of(128, 4), inputs, size, size), b.image(b.of(128, 4), outputs, size, size), b.image(outputs, inputs, 3, 3)
        rest = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        largest = torch.compile(lambda x, dy: max_conv_weight(x, dy, Replacement("max"), geometry), dynamic=False)
        contest: dict[str, Callable[[], Any]] = {
            "inductor": lambda x=x, dy=dy, w=w, r=rest: torch.ops.aten.convolution_backward(dy, x, w, *r),  # type: ignore[misc]
            "max, inductor": lambda x=x, dy=dy, f=largest: f(x, dy),  # type: ignore[misc]
        }
        if availability.unavailable_reason("cuda", torch.device(b.device)) is None:
            contest["max, cuda"] = lambda x=x, dy=dy: own_max(x, dy)  # type: ignore[misc]
        rows += raced(
            f"grad_weight {inputs} -> {outputs}, {size} x {size}, batch {len(x)}, against cuDNN", contest, b.rounds(30), dict.fromkeys(list(contest)[1:], 1.0)
        )
        torch._dynamo.reset()
    return rows


def own_max(x: Tensor, dy: Tensor) -> Tensor:
    from approx_compile.kernels import max_conv

    return max_conv.max_conv_weight(x, dy, 1, 1.0, [3, 3], [1, 1], [1, 1], [1, 1], 1)


def gpt(b: Bench) -> list[dict[str, Any]]:
    width, tokens, batch = b.of(4096, 128), b.of(2048, 16), b.of(16, 2)

    def make() -> tuple[nn.Module, Tensor, None]:
        return Block(width, b.of(32, 4)).to(b.device, torch.bfloat16), b.rand(batch, tokens, width).requires_grad_(), None

    contest = {f"{r:g}": options(r) for r in (0.5, 0.3)}
    contest["rows 0.25"] = {"grad": {"axis": "rows", "ratio": 0.25}, "policy": "always", "inductor": TUNED}
    return model_rows(b, f"GPT-like block, width {width}, {batch} x {tokens} tokens", make, contest, {"0.5": 1.4, "0.3": 1.8, "rows 0.25": 1.8})


def wrn(b: Bench) -> list[dict[str, Any]]:
    name, batch = ("wrn-10-2", 8) if b.small else ("wrn-28-10", 256)

    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = build(name, (3, 32, 32), 10).to(b.device, torch.bfloat16, memory_format=torch.channels_last)
        return model, b.image(batch, 3, 32, 32), torch.randint(10, (batch,), device=b.device)

    contest = {f"{r:g}": options(r) for r in (0.5, 0.3)}
    contest["rows 0.25"] = {"grad": {"axis": "rows", "ratio": 0.25, "batch_norm": "approximate"}, "policy": "always", "inductor": TUNED}
    return model_rows(b, f"{name}, batch {batch}, channels-last", make, contest, {"0.5": 1.3, "0.3": 1.5, "rows 0.25": 1.6})


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {"linear": linears, "full": at_ratio_one, "max": replaced, "gpt": gpt, "wrn": wrn}


@app.command()
def tables(
    part: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; all by default")] = None, device: Device = "cuda", small: Small = False
) -> None:
    """Times beside Inductor's."""
    b = bench_on(device, small)
    if device == "cuda" and machine.current(device).quick:
        console.print(machine.calibrate(device, progress=True))  # by a quick profile no kernel of ours is chosen
    for name in part or list(PARTS):
        if name not in PARTS:
            raise typer.BadParameter(f"no part {name!r}; there are {', '.join(PARTS)}")
        start = time.perf_counter()
        rows = [r | {"dtype": "bfloat16"} for r in PARTS[name](b)]
        show(f"{name}, {time.perf_counter() - start:.0f} s", rows, COLUMNS)
        if not small:
            store("gpu", rows)  # part by part: what is measured is kept


@app.command()
def plot() -> None:
    """results/gpu.png: the newest speed-ups, beside their bars."""
    path = RESULTS / "gpu.csv"
    if not path.exists():
        raise typer.BadParameter(f"{path} is not there yet: run `tables` on a GPU first")
    with path.open(newline="") as f:
        newest = {f"{r['work']}, {r['setting']}": r for r in csv.DictReader(f) if r["setting"] != "inductor"}
    speedup_bars(newest, "speed-up over Inductor max-autotune, bf16 (mark: the bar)", RESULTS / "gpu.png")
    console.print(f"{len(newest)} bars in {RESULTS / 'gpu.png'}")


@app.command()
def train(
    directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
    work: Annotated[list[str] | None, typer.Option(help="of gradients.py (those that end in -full) or accuracy.py")] = None,
    seeds: Annotated[int, typer.Option(help="trainings of each setting")] = 3,
) -> None:
    """The studies' works that want a GPU."""
    from benchmarks.accuracy.accuracy import study as accuracy
    from benchmarks.accuracy.gradients import study as gradients

    for study in (gradients, accuracy):
        wanted = [w for w in study.works if (w in work if work else w.endswith("-full"))]
        if wanted:
            study.run(directory, wanted, None, seeds, "cuda" if torch.cuda.is_available() else "cpu")


def bench_on(device: str, small: bool) -> Bench:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this torch sees no GPU; --device cpu --small rehearses the script", param_hint="--device")
    if device != "cuda" and not small:
        raise typer.BadParameter("these sizes are for a GPU; add --small", param_hint="--device")
    return Bench(device, small)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """check, tables and plot, in turn."""
    if context.invoked_subcommand is None:
        check()
        tables()
        plot()


if __name__ == "__main__":
    app()
