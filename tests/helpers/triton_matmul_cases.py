"""Run by test_triton_matmul.py in a process of its own, under Triton's interpreter: reads names of cases and prints errors against fp64, of the kernels of
matmul_kernels.py and topk.py, as JSON.

Operands are views into buffers of NaN, and so is memory that nobody wrote: what is read beyond an operand, or left out of a result, shows.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

NAN = math.nan


@dataclass(frozen=True)
class Case:
    """`op`: skip, rows or columns (skip_into with dim 0, 1). The sampled axis has `units` units, the others m, n and, for skip_into, `length` entries."""

    op: str
    dtype: str = "float32"
    unit: int = 64
    units: int = 3
    kept: int = 2
    m: int = 40
    n: int = 24
    length: int = 50
    transposed: tuple[bool, bool] = (False, False)
    scale: bool = False
    bias: bool = False
    tma: bool = True
    block: int = 32
    fill: str = ""

    def __str__(self) -> str:
        layout = "".join("NT"[t] for t in self.transposed)
        extra = [w for w in ("scale", "bias", "tma") if getattr(self, w)] + [self.fill] * bool(self.fill)
        sizes = f"{self.m}x{self.n}x{self.length}-{self.kept}of{self.units}x{self.unit}-block{self.block}"
        return "-".join([self.op, self.dtype, layout, sizes, *extra])


UNITS = ((64, 3, 2), (32, 5, 2), (24, 4, 3), (16, 5, 3), (1, 50, 17))
WIDE = ((96, 2, 1), (128, 2, 1))

AXES = (("skip", "rows", "columns"), ("float32", "float16"), UNITS, (False, True), (False, True))
GRID = list(itertools.product(*AXES))
"""The first cases are those of its points, in its order."""

CASES = (
    [
        Case(op, dtype, unit, units, kept, transposed=(a, b), scale=a != b, bias=a and op == "skip", tma=unit % 32 == 0 or op != "skip")
        for op, dtype, (unit, units, kept), a, b in GRID
    ]
    + [
        Case(op, unit=unit, units=units, kept=kept, m=24, n=24, length=24, transposed=(False, t), scale=t)
        for op, (unit, units, kept), t in itertools.product(("skip", "rows", "columns"), WIDE, (False, True))
    ]
    + [
        Case("skip", unit=unit, units=units, kept=kept, transposed=(a, b), scale=a != b)  # as on Hopper, which takes neither such operand as it lies
        for (unit, units, kept), a, b in itertools.product(((24, 4, 3), (1, 50, 17), (1, 70, 64)), (False, True), (False, True))
    ]
    + [
        case
        for op in ("skip", "rows", "columns")
        for case in (
            Case(op, tma=False, scale=True),
            Case(op, tma=False, transposed=(True, True), unit=32),
            Case(op, kept=1),
            Case(op, kept=3, scale=True),
            Case(op, unit=1, units=1, kept=1, tma=False),
            Case(op, unit=1, units=7, kept=7, m=1, n=1, length=1, tma=False),
            Case(op, unit=64, units=2, kept=1, m=1, n=1, length=1),
            Case(op, unit=16, units=8, kept=3, m=152, n=40, length=40, block=16),  # more rows of tiles than a band of programs has
            Case(op, fill="dropped", scale=True),
            Case(op, fill="dropped", unit=1, units=40, kept=11, tma=False),
            Case(op, fill="kept"),
            Case(op, fill="kept", unit=1, units=40, kept=11, tma=False),
        )
    ]
)

SCORES = {
    "one": [3.0],
    "distinct": [float(i * 37 % 101) for i in range(100)],
    "ties": [float(i % 3) for i in range(70)],
    "all-equal": [2.0] * 40,
    "zeros": [0.0, -0.0] * 20,
    "negative": [float(-i) for i in range(33)],
    "nan-above-inf": [1.0, math.inf, NAN, -math.inf, 5.0, -NAN, math.inf],
    "tiny": [1e-40, 2e-40, 0.0, 1e-38, 3e38],
    "several-thousand": [float(i * i % 4093) for i in range(5000)],
}

NORMS = [(r, c, dim, group, t) for (r, c), dim, group, t in itertools.product(((70, 300), (1, 33), (600, 1)), (0, 1), (1, 8), (False, True))]


def laid(x: Tensor, transposed: bool) -> Tensor:
    """Return the values of x in a buffer of NaN whose lines have a multiple of 16 entries."""
    if transposed:
        return laid(x.T, False).T
    buffer = torch.full((x.shape[0] + 3, -(-x.shape[1] // 16) * 16 + 16), NAN, dtype=x.dtype)
    view = buffer[: x.shape[0], : x.shape[1]]
    return view.copy_(x)


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a, b, the units kept, and the entries that they stand for."""
    g = torch.Generator().manual_seed(0)
    size = case.unit * case.units
    m, inner, n = {"skip": (case.m, size, case.n), "rows": (size, case.length, case.n), "columns": (case.m, case.length, size)}[case.op]
    a, b = (torch.randn(s, generator=g).to(getattr(torch, case.dtype)) for s in ((m, inner), (inner, n)))
    idx = torch.randperm(case.units, generator=g)[: case.kept].sort().values
    entries = (idx[:, None] * case.unit + torch.arange(case.unit)).flatten()
    lines = {"skip": (a.T, b), "rows": (a,), "columns": (b.T,)}[case.op]
    if case.fill == "dropped":
        dropped = torch.ones(size, dtype=torch.bool).index_fill(0, entries, False)
        for x in lines:
            x[dropped] = NAN
            x[dropped.nonzero()[::2, 0]] = math.inf
    if case.fill == "kept":
        lines[0][entries[0], 0] = NAN
        lines[0][entries[-1], -1] = math.inf
    return a, b, idx, entries


def exact(case: Case, a: Tensor, b: Tensor, entries: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the result in fp64, computed from the single entries."""
    a, b = a.double(), b.double()
    weight = torch.ones(len(entries)).double() if scale is None else scale.double().repeat_interleave(case.unit)
    if case.op == "skip":
        y = (a[:, entries] * weight) @ b[entries]
        return y if bias is None else y + bias.double()
    y = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    if case.op == "rows":
        y[entries] = (a[entries] @ b) * weight[:, None]
    else:
        y[:, entries] = (a @ b[:, entries]) * weight
    return y


def error(case: Case) -> float:
    """Return |Y - Y in fp64| / |Y in fp64| over the finite entries; inf if the other entries differ."""
    from approx_compile.kernels.triton import matmul_launch
    from approx_compile.kernels.triton.autotune import TileConfig

    a, b, idx, entries = operands(case)
    scale = None if not case.scale else torch.full((), 1.5).expand(len(idx)) if case.kept == case.units else torch.linspace(0.5, 2, len(idx))
    bias = torch.linspace(-1, 1, case.n).to(a.dtype) if case.bias else None
    want = exact(case, a, b, entries, scale, bias)
    a, b = laid(a, case.transposed[0]), laid(b, case.transposed[1])
    config = TileConfig(case.block, case.block, 32, 4, 2)
    if case.op == "skip":
        y = matmul_launch.skip(a, b, idx, scale, case.unit, bias, config=config, tma=case.tma)
    else:
        y = matmul_launch.skip_into(a, b, idx, scale, case.unit, 0 if case.op == "rows" else 1, config=config, tma=case.tma)
    assert y.is_contiguous() and y.dtype == a.dtype
    there = want.isfinite()
    if not torch.equal(y.double().nan_to_num(posinf=1, neginf=-1)[~there], want.nan_to_num(posinf=1, neginf=-1)[~there]):
        return math.inf
    off = (y.double() - want)[there].norm() / want[there].norm()
    return off.item() if off.isfinite() else math.inf


def largest(score: list[float], k: int) -> list[int]:
    """Select by a sort in Python: NaN first, and of equal values the first."""
    order = sorted(range(len(score)), key=lambda i: (score[i] == score[i], -score[i] if score[i] == score[i] else 0, i))
    return sorted(order[:k])


def chosen(name: str) -> list[int]:
    """Return how many of the chosen indices are wrong, for k of 1, a third and all."""
    from approx_compile.kernels.triton.topk import largest_indices

    score = SCORES[name]
    found = [(largest_indices(torch.tensor(score), k).tolist(), largest(score, k)) for k in {1, len(score) // 3 or 1, len(score)}]
    return [sum(a != b for a, b in zip(got, want, strict=True)) for got, want in found]


def norm_error(rows: int, columns: int, dim: int, group: int, transposed: bool) -> float:
    from approx_compile.kernels.triton.topk import norms_sq

    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    units = x.shape[dim] // group
    want = x.double().square().sum(1 - dim)[: units * group].view(units, group).sum(1)
    got = norms_sq(laid(x, transposed), dim, group, programs=4)
    assert got.shape == want.shape and got.dtype == torch.float32
    return float(((got.double() - want).abs() / want).max()) if units else 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    wanted = set(json.load(sys.stdin))
    json.dump(
        {
            "matmul": {str(c): error(c) for c in CASES if str(c) in wanted},
            "choose": {name: chosen(name) for name in SCORES},
            "norms": [norm_error(*case) for case in NORMS],
        },
        sys.stdout,
    )
