"""Measure each quantity of a device's profile: rates of products and kernels, bandwidths of memory, times of selections and launches.

`measure` returns the tables; `calibration` rounds and stores them.

| table | over | unit | what runs |
|---|---|---|---|
| `linear.output`, `.grad_input`, `.grad_weight` | M, K, N | GFLOP/s | X W^T, dY W, dY^T X of X (M, K), W (N, K), dY (M, N) |
| `bmm` | M, K, N | GFLOP/s | (B, M, K) (B, K, N) for a B of some work |
| `conv.output`, `.grad_input`, `.grad_weight` | places, C, O, taps | GFLOP/s | a convolution and its backward, channels last; places: pixels of all samples |
| `LOWERING.linear.PRODUCT`, `.conv.` | as above | GFLOP/s | on GPUs, custom kernels, by kept sizes: half of the axis; coupled gradients with their zeros |
| `norms` | bytes | GB/s | squared norms along the last axis of a matrix, per byte read |
| `take`, `untake` | run, bytes | GB/s | gather half of the entries, or put them back, in memory in use; run: entries per index, bytes: of all |
| `read` | bytes | GB/s | a sum |
| `fresh` | allocated | GB/s | what allocating a tensor adds to writing it: on CPUs the C library maps large ones anew each time, page by page |
| `select.METHOD` | units, lead | us | norms to indices, `lead` independent selections at once |
| `kernel`, `extern` | | us | a launch of a generated kernel, and of a library call, on next to no data |

Full measurements run `norms`, `take` and `untake` as Inductor compiles them, because that is what training runs. Quick ones have no time to compile and
run eager ops that move the same bytes. Products cycle through several sets of operands, so that no operand is in a faster cache than in a training step.
The fastest of several runs counts (`BenchmarkTimer`). Nothing here draws random numbers, except the selections that are random, and these leave the state
of the generator as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from approx_compile import _torch
from approx_compile.config.words import ESTIMATORS, PRODUCTS
from approx_compile.kernels import availability, skip_conv, skip_matmul
from approx_compile.kernels.availability import CUSTOM_KERNELS, DEFAULT_UNITS
from approx_compile.kernels.estimators import Estimator, select
from approx_compile.kernels.gather import Axis, norms_sq, take, untake
from approx_compile.machine import huge_pages
from approx_compile.machine.benchmark_grids import FULL_GRID, GPU_GRID, QUICK_GRID, Axes, Grid
from approx_compile.machine.timer import BenchmarkTimer, Run

_MAX_CALL_S = 0.3
"""Products that are predicted to take longer are not run."""

_WIDTH = 1024
"""Entries per row of the matrices whose entries are gathered."""


class Measurement(NamedTuple):
    """One measured table: its name and unit, the sizes along its axes, the values at every combination of sizes (the last axis fastest)."""

    name: str
    unit: str
    axes: Axes
    values: tuple[float, ...]


def measure(device: str, quick: bool, progress: bool) -> list[Measurement]:
    """Measure every table of a profile.

    Args:
        device: "cpu" or "cuda".
        quick: Whether to measure at few sizes and without compiling anything.
        progress: Whether to show a bar on the terminal.

    Returns:
        The tables of `profile.required_tables` and those of the custom kernels that run here, in some order.
    """
    grid = QUICK_GRID if quick else GPU_GRID if device == "cuda" else FULL_GRID
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
    bar = Progress(disable=not progress)
    measured: list[Measurement] = []
    with bar, torch.no_grad(), torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        timer = BenchmarkTimer(device, 1e-3 if quick else 3e-3)
        steps = list(_steps(device, dtypes, grid, quick, timer))
        task = bar.add_task("measuring", total=len(steps))
        for title, step in steps:
            bar.update(task, description=f"measuring {title}")
            measured.append(step())
            bar.advance(task)
    return measured


def _steps(device: str, dtypes: list[torch.dtype], grid: Grid, quick: bool, timer: BenchmarkTimer) -> Iterator[tuple[str, Callable[[], Measurement]]]:
    """Yield a title and a function that measures one table, for every table."""
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for product in PRODUCTS:
            yield f"linear {name}", partial(_rates, f"linear.{product}", dtype, grid.linear, partial(_linear, product, device, dtype), timer)
            yield f"conv {name}", partial(_rates, f"conv.{product}", dtype, grid.conv, partial(_conv, product, device, dtype), timer)
        if not quick:  # custom kernels are compiled and tuned first, which takes long
            for lowering in CUSTOM_KERNELS:
                if availability.unavailable_reason(lowering, torch.device(device)) is None:
                    yield from custom_kernel_steps(lowering, device, dtype, grid, timer)
        yield f"bmm {name}", partial(_rates, "bmm", dtype, grid.bmm, partial(_bmm, device, dtype), timer)
        for kind in ("norms", "take", "untake"):
            yield f"{kind} {name}", partial(measure_moves, kind, device, dtype, grid, quick, timer)
    yield "memory", partial(_read, device, grid, timer)
    yield "memory", partial(_fresh, device, grid, timer)
    for method in ESTIMATORS:
        yield "selection", partial(_selection, method, device, grid, timer)
    for kind in ("kernel", "extern"):
        yield "launches", partial(_launch, kind, device, quick, timer)


# --- products ---


def _rates(name: str, dtype: torch.dtype, axes: Axes, make: Callable[..., tuple[float, Run]], timer: BenchmarkTimer) -> Measurement:
    """Measure GFLOP/s at every point of a grid, from less work to more.

    `make` returns the FLOPs and the call for a point. A call that is predicted to take too long is not made; the best rate among the neighbours that are
    one size smaller along one axis stands in for it.
    """
    rates: dict[tuple[float, ...], float] = {}
    for point in itertools.product(*axes.values()):
        near = [rates[s] for i, axis in enumerate(axes.values()) if (s := _smaller(point, i, axis)) is not None]
        flops, run = make(*(int(p) for p in point))
        if near and flops / (max(near) * 1e9) > _MAX_CALL_S:
            rates[point] = max(near)
        else:
            rates[point] = flops / timer(run) / 1e9
    return Measurement(f"{name}.{str(dtype).removeprefix('torch.')}", "GFLOP/s", axes, tuple(rates.values()))


def _smaller(point: tuple[float, ...], i: int, axis: tuple[float, ...]) -> tuple[float, ...] | None:
    at = axis.index(point[i])
    return (*point[:i], axis[at - 1], *point[i + 1 :]) if at else None


def _filled(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, 0.5, dtype=dtype, device=device)


def _linear(product: str, device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[float, Run]:
    def make() -> Run:
        x, w, dy = (_filled(device, dtype, *s) for s in ((m, k), (n, k), (m, n)))
        a, b = {"output": (x, w.t()), "grad_input": (dy, w), "grad_weight": (dy.t(), x)}[product]
        return partial(torch.mm, a, b)

    return 2.0 * m * k * n, _in_turn(make, (m * k + k * n + m * n) * dtype.itemsize)


def _bmm(device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[float, Run]:
    batch = max(1, min(16, 2**27 // (m * k * n)))

    def make() -> Run:
        return partial(torch.bmm, _filled(device, dtype, batch, m, k), _filled(device, dtype, batch, k, n))

    return 2.0 * batch * m * k * n, _in_turn(make, batch * (m * k + k * n) * dtype.itemsize)


_MIN_SAMPLES = 16
"""Samples of a convolution. With fewer and one thread torch runs convolutions of one tap by another, slower library."""


def _conv(product: str, device: str, dtype: torch.dtype, places: int, c: int, o: int, taps: int) -> tuple[float, Run]:
    side, kernel = min(32, round((places / _MIN_SAMPLES) ** 0.5)), round(taps**0.5)
    samples = max(_MIN_SAMPLES, places // side**2)
    places = samples * side**2
    rest = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    mask = [product == "grad_input", product == "grad_weight", False]

    def make() -> Run:
        x, dy = (_filled(device, dtype, samples, n, side, side).to(memory_format=torch.channels_last) for n in (c, o))
        w = _filled(device, dtype, o, c, kernel, kernel).to(memory_format=torch.channels_last)
        if product == "output":
            return partial(torch.ops.aten.convolution, x, w, None, *rest)
        return partial(torch.ops.aten.convolution_backward, dy, x, w, None, *rest, mask)

    return 2.0 * places * c * o * taps, _in_turn(make, places * (c + o) * dtype.itemsize)


_COLD_BYTES = 2**23
"""The sets of operands take this much together, more than the fastest caches hold."""


def _in_turn(make: Callable[[], Run], size: int) -> Run:
    """Return a call that cycles through several sets of operands of `size` bytes each.

    The operands have left the fastest caches when they are used again, as in training. There are at least two sets: a training step of one site goes
    through six tensors (operands, output, gradients), twice those of one product, before it meets the first again.
    """
    calls = itertools.cycle([make() for _ in range(max(2, min(64, _COLD_BYTES // size)))])
    return lambda: next(calls)()


# --- sampled products by custom kernels ---


def custom_kernel_steps(lowering: str, device: str, dtype: torch.dtype, grid: Grid, timer: BenchmarkTimer) -> Iterator[tuple[str, Callable[[], Measurement]]]:
    """Yield the measurements of a lowering's custom kernels for one dtype.

    The sizes are those that the kernels' groups divide, without the smallest, where no kernel pays. The groups have `DEFAULT_UNITS[lowering][0]` entries;
    the rates of other groups are predicted from these (`availability.runs_at_measured_rate`).

    Args:
        lowering: "triton" or "cuda".
        device: "cpu" or "cuda".
        dtype: The dtype of the operands.
        grid: The sizes of the library's products, of which some are taken.
        timer: Times each call.

    Yields:
        A title and a function that measures one table. Nothing if the lowering has no kernels for the dtype; for float32 on GPUs there are some only
        where TF32 is allowed.
    """
    unit = DEFAULT_UNITS[lowering][0]
    if lowering == "cuda" and dtype == torch.float32:
        return
    title = f"{lowering} {str(dtype).removeprefix('torch.')}"
    linear = {"M": grid.linear["M"][1:], "K": tuple(k for k in grid.linear["K"] if k % unit == 0), "N": grid.linear["N"][1:]}
    conv = grid.conv | {"places": grid.conv["places"][1:], "C": tuple(c for c in grid.conv["C"] if c % unit == 0), "O": grid.conv["O"][1:]}
    free = dtype != torch.float32 or device != "cuda"
    for product in PRODUCTS:
        if free or availability.allows_tf32(conv=False):
            yield title, partial(_rates, f"{lowering}.linear.{product}", dtype, linear, partial(_skip_linear, unit, product, device, dtype), timer)
        if lowering == "triton" and (free or availability.allows_tf32(conv=True)):
            yield title, partial(_rates, f"{lowering}.conv.{product}", dtype, conv, partial(_skip_conv, unit, product, device, dtype), timer)


def _skip_linear(unit: int, product: str, device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[float, Run]:
    """Make products that keep k of 2 k entries of the contraction axis."""

    def make() -> Run:
        x, w, dy = (_filled(device, dtype, *s) for s in ((m, 2 * k), (n, 2 * k), (m, n)))
        idx = torch.arange(0, 2 * k // unit, 2, device=device)
        return {
            "output": partial(skip_matmul.skip_matmul, x, w.t(), idx, None, unit),
            "grad_input": partial(skip_matmul.skip_matmul_into, dy, w, idx, None, unit, 1),
            "grad_weight": partial(skip_matmul.skip_matmul_into, dy.t(), x, idx, None, unit, 1),
        }[product]

    return 2.0 * m * k * n, _in_turn(make, 2 * (m * k + k * n + m * n) * dtype.itemsize)


def _skip_conv(unit: int, product: str, device: str, dtype: torch.dtype, places: int, c: int, o: int, taps: int) -> tuple[float, Run]:
    """Make convolutions that keep c of 2 c input channels."""
    side, kernel = 16, round(taps**0.5)
    rest = ([1, 1], [kernel // 2] * 2, [1, 1])

    def make() -> Run:
        x, dy = (_filled(device, dtype, max(1, places // side**2), n, side, side).to(memory_format=torch.channels_last) for n in (2 * c, o))
        w = _filled(device, dtype, o, 2 * c, kernel, kernel).to(memory_format=torch.channels_last)
        idx = torch.arange(0, 2 * c // unit, 2, device=device)
        return {
            "output": partial(skip_conv.skip_conv, x, w, idx, None, unit, *rest),
            "grad_input": partial(skip_conv.skip_conv_input, dy, w, idx, None, unit, [side, side], *rest),
            "grad_weight": partial(skip_conv.skip_conv_weight, x, dy, idx, None, unit, [kernel, kernel], *rest),
        }[product]

    return 2.0 * places * c * o * taps, _in_turn(make, places * (2 * c + o) * dtype.itemsize)


# --- what sampling adds ---


_GENERATED_BYTES = 2**20
"""The size at which generated kernels are timed: caches hold it."""


def measure_moves(kind: str, device: str, dtype: torch.dtype, grid: Grid, quick: bool, timer: BenchmarkTimer) -> Measurement:
    """Measure the bandwidth of computing norms, of gathering half of the units, or of putting them back.

    With t(run, bytes) the seconds per byte of eager ops and g(run) those of the generated kernel at a size that caches hold, the rate is
    1 / (g(run) + max(0, t(run, bytes) - t(run, 1 MiB))). This assumes that a change of size affects the memory only, so that eager ops show it as well.

    Args:
        kind: "norms", "take" (gather) or "untake" (put back).
        device: "cpu" or "cuda".
        dtype: The dtype of the entries.
        grid: The sizes in bytes, and the runs of contiguous entries per index.
        quick: Whether to leave out the generated kernel, so that the rates are those of eager ops.
        timer: Times each call.

    Returns:
        The table, in GB/s of all entries (not only those that are gathered).
    """
    rates = []
    runs = (1.0,) if kind == "norms" else grid.runs
    for run in runs:

        def per_byte(size: float, make: Callable[..., Run], run: int = int(run)) -> float:
            rows = max(32, int(size) // (_WIDTH * dtype.itemsize))
            x = _filled(device, dtype, rows, _WIDTH // 2 if kind == "untake" else _WIDTH)
            return timer(make(kind, run, x, torch.arange(0, _WIDTH // run, 2, device=device))) / (rows * _WIDTH * dtype.itemsize)

        eager = [per_byte(size, _eager) for size in grid.sizes]
        if not quick:
            here, generated = per_byte(_GENERATED_BYTES, _eager), per_byte(_GENERATED_BYTES, _generated)
            eager = [generated + max(0.0, t - here) for t in eager]
        rates += [1e-9 / t for t in eager]
    axes: Axes = {"bytes": grid.sizes} if kind == "norms" else {"run": runs, "bytes": grid.sizes}
    return Measurement(f"{kind}.{str(dtype).removeprefix('torch.')}", "GB/s", axes, tuple(rates))


def _generated(kind: str, run: int, x: Tensor, idx: Tensor) -> Run:
    """Return a call of the kernel that the pass inserts, as Inductor compiles it."""
    axis = Axis(1)
    whole: Callable[[Tensor, Tensor], Tensor] = {
        "norms": lambda x, idx: norms_sq(x, axis, run),
        "take": lambda x, idx: take(x, axis, idx, None, run),
        "untake": lambda x, idx: untake(x, axis, idx, None, run, _WIDTH),
    }[kind]
    compiled = _torch.compile_kernel(whole, [x, idx])
    return lambda: compiled(x, idx)


def _eager(kind: str, run: int, x: Tensor, idx: Tensor) -> Run:
    """Return eager ops that move the same bytes, into memory allocated before (new memory has a table of its own)."""
    part = x.unflatten(1, (-1, run))
    out = torch.zeros(x.shape[0], _WIDTH // run if kind == "untake" else len(idx), run, dtype=x.dtype, device=x.device)

    def put_back() -> Tensor:
        return out.zero_().index_copy_(1, idx, part)

    runs: dict[str, Run] = {"norms": partial(torch.sum, x), "take": partial(torch.index_select, part, 1, idx, out=out), "untake": put_back}
    return runs[kind]


def _read(device: str, grid: Grid, timer: BenchmarkTimer) -> Measurement:
    values = [size / timer(_filled(device, torch.float32, int(size) // 4).sum) / 1e9 for size in grid.sizes]
    return Measurement("read", "GB/s", {"bytes": grid.sizes}, tuple(values))


_MIN_SHARE_OF_WRITE = 0.01


def _fresh(device: str, grid: Grid, timer: BenchmarkTimer) -> Measurement:
    """Measure what allocating adds to writing. Where memory is reused the difference is noise, so at least a hundredth of the write counts."""
    values = []
    for size in grid.allocated:
        x = _filled(device, torch.float32, int(size) // 4)
        written, fresh = timer(partial(x.fill_, 0.5)), timer(partial(_new_like, x))
        values.append(size / max(fresh - written, _MIN_SHARE_OF_WRITE * written) / 1e9)
    return Measurement("fresh", "GB/s", {"allocated": grid.allocated}, tuple(values))


def _new_like(x: Tensor) -> Tensor:
    """Allocate a tensor like x and write it once; on CPUs it is allocated as compiled code allocates (`huge_pages`)."""
    new = huge_pages.empty_strided_cpu(tuple(x.shape), x.stride(), x.dtype) if x.device.type == "cpu" else torch.empty_like(x)
    return new.fill_(0.5)


def _selection(method: str, device: str, grid: Grid, timer: BenchmarkTimer) -> Measurement:
    values = []
    for units, lead in itertools.product(*grid.select.values()):
        estimator = Estimator(method, int(units), int(units) // 2, weight=1 if method == "topk_weights" else None)
        norms = torch.linspace(1, 2, int(units * lead), device=device).view(int(lead), int(units))
        given = norms[0] if lead == 1 else norms
        values.append(timer(partial(select, estimator, given, given)) * 1e6)
    return Measurement(f"select.{method}", "us", grid.select, tuple(values))


def _launch(kind: str, device: str, quick: bool, timer: BenchmarkTimer) -> Measurement:
    """Measure the launch of a library call ("extern") or of a generated kernel ("kernel").

    The kernel's launch is, where there is time to compile, what ten more links add to a chain of kernels and library calls, less the library calls.
    """
    x = _filled(device, torch.float32, 16, 16)  # Inductor writes products of vectors as loops
    extern = timer(partial(torch.mm, x, x))
    if kind == "extern":
        return Measurement(kind, "us", {}, (extern * 1e6,))
    kernel = timer(partial(torch.mul, x, 2))
    if not quick:
        short, long = (timer(partial(_torch.compile_kernel(partial(_chain, links), [x]), x)) for links in (2, 12))
        kernel = max(kernel, (long - short) / 10 - extern)
    return Measurement(kind, "us", {}, (kernel * 1e6,))


def _chain(links: int, x: Tensor) -> Tensor:
    for _ in range(links):
        x = torch.mm(x.sin(), x)
    return x
