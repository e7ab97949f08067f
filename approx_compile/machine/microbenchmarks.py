"""How each of a machine's quantities is measured. `measure` yields them table by table; `machine` rounds and stores.

| table | over | unit | what runs |
|---|---|---|---|
| `linear.output`, `.grad_input`, `.grad_weight` | M, K, N | GFLOP/s | X W^T, dY W, dY^T X of X (M, K), W (N, K), dY (M, N) |
| `bmm` | M, K, N | GFLOP/s | (B, M, K) (B, K, N) for a B of some work |
| `conv.output`, `.grad_input`, `.grad_weight` | places, C, O, taps | GFLOP/s | a convolution and its backward, channels last; places: pixels of all samples |
| `LOWERING.linear.PRODUCT`, `.conv.` | as above | GFLOP/s | on GPUs, kernels of ours by the sizes kept, half of the axis; coupled gradients with their zeros |
| `norms` | bytes | GB/s | squared norms along the last axis of a matrix, of the bytes read |
| `take`, `untake` | run, bytes | GB/s | half of the entries gathered, and put back, into memory in use: contiguous entries per index, bytes of all |
| `read` | bytes | GB/s | a sum |
| `fresh` | allocated | GB/s | what allocating a tensor adds to writing it: on CPUs the C library maps large ones anew each time, page by page |
| `select.METHOD` | units, lead | us | norms to indices, `lead` independent ones at once |
| `kernel`, `extern` | | us | a launch of a generated kernel and of a library call on next to no data |

Full measurements run `norms`, `take` and `untake` as Inductor compiles them (what training runs); quick ones have no time to compile and run eager
ops that move the same bytes. Operands of products take turns, so that none is in a nearer cache than in a training step. On CPUs with one thread the clock
counts CPU time, so that a busy machine does not disturb it. Of several runs the fastest counts. Nothing here draws random numbers, but for the selections
that do, and those leave the generator's state as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import Progress
from torch import Tensor

from approx_compile import _torch
from approx_compile.kernels import availability, skip_conv, skip_matmul
from approx_compile.kernels.availability import CUSTOM_KERNELS, DEFAULT_UNITS
from approx_compile.kernels.estimators import Estimator, select
from approx_compile.kernels.gather import Axis, norms_sq, take, untake
from approx_compile.machine import huge_pages
from approx_compile.machine.timer import BenchmarkTimer, Run

Axes = dict[str, tuple[float, ...]]
Found = tuple[str, str, Axes, tuple[float, ...]]

PRODUCTS = ("output", "grad_input", "grad_weight")
SELECTIONS = ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta")
_LONGEST_S = 0.3
_WIDTH = 1024


@dataclass(frozen=True)
class Grid:
    """The sizes at which a measurement looks."""

    linear: Axes
    bmm: Axes
    conv: Axes
    sizes: tuple[float, ...]
    runs: tuple[float, ...]
    allocated: tuple[float, ...]
    select: Axes


FULL = Grid(
    linear={"M": (1, 4, 16, 64, 256, 1024), "K": (4, 16, 64, 256, 1024, 4096), "N": (4, 16, 64, 256, 1024, 4096)},
    bmm={"M": (4, 16, 64, 256, 1024), "K": (4, 16, 64, 256, 1024), "N": (4, 16, 64, 256, 1024)},
    conv={"places": (256, 2304, 16384), "C": (4, 16, 64, 256), "O": (4, 16, 64, 256), "taps": (1, 9)},
    sizes=(2**14, 2**17, 2**20, 2**23, 2**26),
    runs=(1, 16, 256),
    allocated=(2**20, 2**24, 2**25, 2**27),
    select={"units": (16, 128, 1024, 4096), "lead": (1, 16)},
)
GPU = Grid(
    linear={"M": (64, 512, 4096, 16384), "K": (64, 512, 4096), "N": (64, 512, 4096, 16384)},
    bmm={"M": (16, 128, 1024), "K": (16, 128, 1024), "N": (16, 128, 1024)},
    conv={"places": (2048, 16384, 131072), "C": (16, 64, 256, 640), "O": (16, 64, 256, 640), "taps": (1, 9)},
    sizes=(2**16, 2**20, 2**24, 2**27, 2**30),
    runs=(1, 16, 64, 256),
    allocated=(2**20, 2**25, 2**28),
    select={"units": (16, 128, 1024, 4096), "lead": (1, 16)},
)
QUICK = Grid(
    linear={"M": (1, 32, 512), "K": (8, 64, 1024), "N": (8, 64, 1024)},
    bmm={"M": (8, 64, 256), "K": (8, 64, 256), "N": (8, 64, 256)},
    conv={"places": (256, 4096), "C": (16, 128), "O": (16, 128), "taps": (1, 9)},
    sizes=(2**16, 2**20, 2**24),
    runs=(1, 16, 256),
    allocated=(2**20, 2**24, 2**25),
    select={"units": (16, 256, 2048), "lead": (1, 16)},
)


def names(dtypes: list[str]) -> list[str]:
    """Every table that a profile of these dtypes has."""
    by_dtype = [*(f"linear.{p}" for p in PRODUCTS), "bmm", *(f"conv.{p}" for p in PRODUCTS), "norms", "take", "untake"]
    return [f"{n}.{d}" for n in by_dtype for d in dtypes] + [f"select.{m}" for m in SELECTIONS] + ["read", "fresh", "kernel", "extern"]


def measure(device: str, quick: bool, progress: bool) -> list[Found]:
    """Every table of `names`, in some order."""
    grid = QUICK if quick else GPU if device == "cuda" else FULL
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
    bar = Progress(disable=not progress)
    found: list[Found] = []
    with bar, torch.no_grad(), torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        clock = BenchmarkTimer(device, 1e-3 if quick else 3e-3)
        steps = list(_steps(device, dtypes, grid, quick, clock))
        task = bar.add_task("measuring", total=len(steps))
        for title, step in steps:
            bar.update(task, description=f"measuring {title}")
            found.append(step())
            bar.advance(task)
    return found


def _steps(device: str, dtypes: list[torch.dtype], grid: Grid, quick: bool, clock: BenchmarkTimer) -> Iterator[tuple[str, Callable[[], Found]]]:
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        for product in PRODUCTS:
            yield f"linear {name}", partial(_rates, f"linear.{product}", dtype, grid.linear, partial(_linear, product, device, dtype), clock)
            yield f"conv {name}", partial(_rates, f"conv.{product}", dtype, grid.conv, partial(_conv, product, device, dtype), clock)
        for lowering in (
            n for n in CUSTOM_KERNELS if not quick and availability.unavailable_reason(n, torch.device(device)) is None
        ):  # compiled and tuned first: no quick matter
            yield from _own_steps(lowering, device, dtype, grid, clock)
        yield f"bmm {name}", partial(_rates, "bmm", dtype, grid.bmm, partial(_bmm, device, dtype), clock)
        for kind in ("norms", "take", "untake"):
            yield f"{kind} {name}", partial(_moves, kind, device, dtype, grid, quick, clock)
    yield "memory", partial(_read, device, grid, clock)
    yield "memory", partial(_fresh, device, grid, clock)
    for method in SELECTIONS:
        yield "selection", partial(_selection, method, device, grid, clock)
    for kind in ("kernel", "extern"):
        yield "launches", partial(_launch, kind, device, quick, clock)


# --- products ---


def _rates(name: str, dtype: torch.dtype, axes: Axes, make: Callable[..., tuple[float, Run]], clock: BenchmarkTimer) -> Found:
    """GFLOP/s at every point, in order of work; where a call would take too long it is not made and the rate of its next smaller neighbour holds."""
    rates: dict[tuple[float, ...], float] = {}
    for point in itertools.product(*axes.values()):
        near = [rates[s] for i, axis in enumerate(axes.values()) if (s := _smaller(point, i, axis)) is not None]
        flops, run = make(*(int(p) for p in point))
        if near and flops / (max(near) * 1e9) > _LONGEST_S:
            rates[point] = max(near)
        else:
            rates[point] = flops / clock(run) / 1e9
    return f"{name}.{str(dtype).removeprefix('torch.')}", "GFLOP/s", axes, tuple(rates.values())


def _smaller(point: tuple[float, ...], i: int, axis: tuple[float, ...]) -> tuple[float, ...] | None:
    at = axis.index(point[i])
    return (*point[:i], axis[at - 1], *point[i + 1 :]) if at else None


def _filled(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, 0.5, dtype=dtype, device=device)


def _linear(product: str, device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[float, Run]:
    def made() -> Run:
        x, w, dy = (_filled(device, dtype, *s) for s in ((m, k), (n, k), (m, n)))
        a, b = {"output": (x, w.t()), "grad_input": (dy, w), "grad_weight": (dy.t(), x)}[product]
        return partial(torch.mm, a, b)

    return 2.0 * m * k * n, _in_turn(made, (m * k + k * n + m * n) * dtype.itemsize)


def _bmm(device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[float, Run]:
    batch = max(1, min(16, 2**27 // (m * k * n)))

    def made() -> Run:
        return partial(torch.bmm, _filled(device, dtype, batch, m, k), _filled(device, dtype, batch, k, n))

    return 2.0 * batch * m * k * n, _in_turn(made, batch * (m * k + k * n) * dtype.itemsize)


_SAMPLES = 16
"""Of convolutions: with fewer and one thread torch runs those of one tap by another, slower, library."""


def _conv(product: str, device: str, dtype: torch.dtype, places: int, c: int, o: int, taps: int) -> tuple[float, Run]:
    side, kernel = min(32, round((places / _SAMPLES) ** 0.5)), round(taps**0.5)
    samples = max(_SAMPLES, places // side**2)
    places = samples * side**2
    rest = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    mask = [product == "grad_input", product == "grad_weight", False]

    def made() -> Run:
        x, dy = (_filled(device, dtype, samples, n, side, side).to(memory_format=torch.channels_last) for n in (c, o))
        w = _filled(device, dtype, o, c, kernel, kernel).to(memory_format=torch.channels_last)
        if product == "output":
            return partial(torch.ops.aten.convolution, x, w, None, *rest)
        return partial(torch.ops.aten.convolution_backward, dy, x, w, None, *rest, mask)

    return 2.0 * places * c * o * taps, _in_turn(made, places * (c + o) * dtype.itemsize)


_COLD = 2**23


def _in_turn(made: Callable[[], Run], size: int) -> Run:
    """Calls on several sets of operands of `size` bytes in turn, so that none is still in the fastest caches: in training it would not be. At least two sets:
    a step of one site goes through six tensors (operands, output, gradients), twice those of one product, before it meets the first again."""
    turns = itertools.cycle([made() for _ in range(max(2, min(64, _COLD // size)))])
    return lambda: next(turns)()


# --- the same by kernels of ours ---


def _own_steps(lowering: str, device: str, dtype: torch.dtype, grid: Grid, clock: BenchmarkTimer) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Where a lowering has kernels for a dtype (on GPUs for fp32 where TF32 is allowed): of sizes that its groups divide, and not the smallest, where no
    kernel pays. In groups of `UNITS[lowering][0]`; those of other sizes are predicted from that (`available.as_measured`)."""
    unit = DEFAULT_UNITS[lowering][0]
    if lowering == "cuda" and dtype == torch.float32:
        return
    title = f"{lowering} {str(dtype).removeprefix('torch.')}"
    linear = {"M": grid.linear["M"][1:], "K": tuple(k for k in grid.linear["K"] if k % unit == 0), "N": grid.linear["N"][1:]}
    conv = grid.conv | {"places": grid.conv["places"][1:], "C": tuple(c for c in grid.conv["C"] if c % unit == 0), "O": grid.conv["O"][1:]}
    free = dtype != torch.float32 or device != "cuda"
    for product in PRODUCTS:
        if free or availability.allows_tf32(conv=False):
            yield title, partial(_rates, f"{lowering}.linear.{product}", dtype, linear, partial(_own_linear, unit, product, device, dtype), clock)
        if lowering == "triton" and (free or availability.allows_tf32(conv=True)):
            yield title, partial(_rates, f"{lowering}.conv.{product}", dtype, conv, partial(_own_conv, unit, product, device, dtype), clock)


def _own_linear(unit: int, product: str, device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[float, Run]:
    """k entries kept of 2 k."""

    def made() -> Run:
        x, w, dy = (_filled(device, dtype, *s) for s in ((m, 2 * k), (n, 2 * k), (m, n)))
        idx = torch.arange(0, 2 * k // unit, 2, device=device)
        return {
            "output": partial(skip_matmul.skip_matmul, x, w.t(), idx, None, unit),
            "grad_input": partial(skip_matmul.skip_matmul_into, dy, w, idx, None, unit, 1),
            "grad_weight": partial(skip_matmul.skip_matmul_into, dy.t(), x, idx, None, unit, 1),
        }[product]

    return 2.0 * m * k * n, _in_turn(made, 2 * (m * k + k * n + m * n) * dtype.itemsize)


def _own_conv(unit: int, product: str, device: str, dtype: torch.dtype, places: int, c: int, o: int, taps: int) -> tuple[float, Run]:
    """c input channels kept of 2 c."""
    side, kernel = 16, round(taps**0.5)
    rest = ([1, 1], [kernel // 2] * 2, [1, 1])

    def made() -> Run:
        x, dy = (_filled(device, dtype, max(1, places // side**2), n, side, side).to(memory_format=torch.channels_last) for n in (2 * c, o))
        w = _filled(device, dtype, o, 2 * c, kernel, kernel).to(memory_format=torch.channels_last)
        idx = torch.arange(0, 2 * c // unit, 2, device=device)
        return {
            "output": partial(skip_conv.skip_conv, x, w, idx, None, unit, *rest),
            "grad_input": partial(skip_conv.skip_conv_input, dy, w, idx, None, unit, [side, side], *rest),
            "grad_weight": partial(skip_conv.skip_conv_weight, x, dy, idx, None, unit, [kernel, kernel], *rest),
        }[product]

    return 2.0 * places * c * o * taps, _in_turn(made, places * (2 * c + o) * dtype.itemsize)


# --- what sampling adds ---


_GENERATED_AT = 2**20


def _moves(kind: str, device: str, dtype: torch.dtype, grid: Grid, quick: bool, clock: BenchmarkTimer) -> Found:
    """Bandwidths of reading norms, of gathering half of the units and of putting them back, for runs of contiguous entries per index.

    With t(run, bytes) the seconds per byte of eager ops and g(run) those of the generated kernel at a size that caches hold, the rate is
    1 / (g(run) + max(0, t(run, bytes) - t(run, 1 MiB))): what another size costs is the memory's doing, not the kernel's.
    """
    rates = []
    runs = (1.0,) if kind == "norms" else grid.runs
    for run in runs:

        def per_byte(size: float, make: Callable[..., Run], run: int = int(run)) -> float:
            rows = max(32, int(size) // (_WIDTH * dtype.itemsize))
            x = _filled(device, dtype, rows, _WIDTH // 2 if kind == "untake" else _WIDTH)
            return clock(make(kind, run, x, torch.arange(0, _WIDTH // run, 2, device=device))) / (rows * _WIDTH * dtype.itemsize)

        eager = [per_byte(size, _eager) for size in grid.sizes]
        if not quick:
            here, generated = per_byte(_GENERATED_AT, _eager), per_byte(_GENERATED_AT, _generated)
            eager = [generated + max(0.0, t - here) for t in eager]
        rates += [1e-9 / t for t in eager]
    axes: Axes = {"bytes": grid.sizes} if kind == "norms" else {"run": runs, "bytes": grid.sizes}
    return f"{kind}.{str(dtype).removeprefix('torch.')}", "GB/s", axes, tuple(rates)


def _generated(kind: str, run: int, x: Tensor, idx: Tensor) -> Run:
    """The kernel that the pass inserts, as Inductor compiles it."""
    axis = Axis(1)
    whole: Callable[[Tensor, Tensor], Tensor] = {
        "norms": lambda x, idx: norms_sq(x, axis, run),
        "take": lambda x, idx: take(x, axis, idx, None, run),
        "untake": lambda x, idx: untake(x, axis, idx, None, run, _WIDTH),
    }[kind]
    compiled = _torch.compile_kernel(whole, [x, idx])
    return lambda: compiled(x, idx)


def _eager(kind: str, run: int, x: Tensor, idx: Tensor) -> Run:
    """Eager ops that move the same bytes, into memory that is already theirs (new memory has a table of its own)."""

    part = x.unflatten(1, (-1, run))
    made = torch.zeros(x.shape[0], _WIDTH // run if kind == "untake" else len(idx), run, dtype=x.dtype, device=x.device)

    def put_back() -> Tensor:
        return made.zero_().index_copy_(1, idx, part)

    runs: dict[str, Run] = {"norms": partial(torch.sum, x), "take": partial(torch.index_select, part, 1, idx, out=made), "untake": put_back}
    return runs[kind]


def _read(device: str, grid: Grid, clock: BenchmarkTimer) -> Found:
    values = [size / clock(_filled(device, torch.float32, int(size) // 4).sum) / 1e9 for size in grid.sizes]
    return "read", "GB/s", {"bytes": grid.sizes}, tuple(values)


_LEAST_SHARE = 0.01


def _fresh(device: str, grid: Grid, clock: BenchmarkTimer) -> Found:
    """A difference, which for memory that is not new is noise: at least a hundredth of the write counts."""
    values = []
    for size in grid.allocated:
        x = _filled(device, torch.float32, int(size) // 4)
        written, fresh = clock(partial(x.fill_, 0.5)), clock(partial(_made, x))
        values.append(size / max(fresh - written, _LEAST_SHARE * written) / 1e9)
    return "fresh", "GB/s", {"allocated": grid.allocated}, tuple(values)


def _made(x: Tensor) -> Tensor:
    """A new tensor like x, written once; on CPUs where compiled code gets its own (`pages`)."""
    new = huge_pages.empty_strided_cpu(tuple(x.shape), x.stride(), x.dtype) if x.device.type == "cpu" else torch.empty_like(x)
    return new.fill_(0.5)


def _selection(method: str, device: str, grid: Grid, clock: BenchmarkTimer) -> Found:
    values = []
    for units, lead in itertools.product(*grid.select.values()):
        how = Estimator(method, int(units), int(units) // 2, weight=1 if method == "topk_weights" else None)
        norms = torch.linspace(1, 2, int(units * lead), device=device).view(int(lead), int(units))
        given = norms[0] if lead == 1 else norms
        values.append(clock(partial(select, how, given, given)) * 1e6)
    return f"select.{method}", "us", grid.select, tuple(values)


def _launch(kind: str, device: str, quick: bool, clock: BenchmarkTimer) -> Found:
    """A library call is timed by itself; a generated kernel, where there is time to compile, as what ten more links add to a chain of kernel and call."""
    x = _filled(device, torch.float32, 16, 16)  # Inductor writes products of vectors as loops
    extern = clock(partial(torch.mm, x, x))
    if kind == "extern":
        return kind, "us", {}, (extern * 1e6,)
    kernel = clock(partial(torch.mul, x, 2))
    if not quick:
        short, long = (clock(partial(_torch.compile_kernel(partial(_chain, links), [x]), x)) for links in (2, 12))
        kernel = max(kernel, (long - short) / 10 - extern)
    return kind, "us", {}, (kernel * 1e6,)


def _chain(links: int, x: Tensor) -> Tensor:
    for _ in range(links):
        x = torch.mm(x.sin(), x)
    return x
