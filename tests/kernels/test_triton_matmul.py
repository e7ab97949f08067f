"""The Triton kernels of sampled matmuls, without a GPU: their values under Triton's interpreter, their machine code, and the ops on a CPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sampling import all_but, spread
from helpers.triton_matmul_cases import AXES, CASES, GRID, NORMS, SCORES, largest
from torch import Tensor

from approx_compile.kernels import skip_matmul
from approx_compile.kernels.triton import matmul_kernels

pytest.importorskip("triton", reason="Triton is not installed (extra `triton`)")

from helpers.gpu_code import Code, instead_of_running

from approx_compile.kernels.triton import autotune, matmul_launch, topk
from approx_compile.kernels.triton.autotune import DeviceLimits, TileConfig

CHILD = Path(__file__).parents[1] / "helpers" / "triton_matmul_cases.py"

pytestmark = pytest.mark.usefixtures("one_thread")


# --- values, by the interpreter ---


POINTS = [{str(i): values.index(v) for i, (values, v) in enumerate(zip(AXES, point, strict=True))} for point in GRID]
KEPT = [CASES[i] for i in spread(POINTS, 24)] + CASES[len(GRID) :]
"""The cases in `make test`: of the grid so many that every pair of its values is met, and all others."""


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The errors of the products that are to be tested, and what else the child finds."""
    names = [str(i.callspec.params["case"]) for i in request.session.items if getattr(i, "originalname", "") == "test_product"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(CHILD)], env=environment, input=json.dumps(names), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", all_but(KEPT, CASES), ids=str)
def test_product(interpreted: dict[str, Any], case: Any) -> None:
    """fp32: sums of at most 192 terms; fp16: one rounding of the result, 2^-11 at most, and of a scaled operand."""
    assert interpreted["matmul"][str(case)] < {"float32": 5e-7, "float16": 5e-4}[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_choose(interpreted: dict[str, Any], name: str) -> None:
    assert interpreted["choose"][name] and not any(interpreted["choose"][name])


@pytest.mark.slow
def test_norms(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["norms"]) == len(NORMS) and max(interpreted["norms"]) < 1e-6


# --- machine code of what is shipped ---

SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that a program may have (CUDA C++ Programming Guide, technical specifications: 163 and 227 KB)."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHIPPED = [(arch, dtype, c) for arch, dtype in itertools.product((80, 90), DTYPES) for c in matmul_launch.candidate_configs(dtype.itemsize, 64, arch)]


def named(value: Any) -> str:
    return f"{value.block_m}x{value.block_n}x{value.block_k}-warps{value.warps}-stages{value.stages}" if isinstance(value, TileConfig) else str(value)


def matrix(dtype: torch.dtype, rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.empty(columns, rows, dtype=dtype).T if transposed else torch.empty(rows, columns, dtype=dtype)


def skip_code(arch: int, dtype: torch.dtype, c: TileConfig, unit: int, layout: str, scale: bool = False, m: int = 200, kept: int = 6) -> Code:
    """`layout`: of both operands, N for rows, T for columns that are contiguous. With a bias."""
    a, b = matrix(dtype, m, unit * 16, layout[0] == "T"), matrix(dtype, unit * 16, 224, layout[1] == "T")
    idx, bias = torch.arange(kept), torch.empty(224, dtype=dtype)
    with instead_of_running(matmul_kernels.skip_kernel, arch) as codes, instead_of_running(matmul_kernels.pack_kernel, arch) as packing:
        matmul_launch.skip(a, b, idx, torch.ones(kept) if scale else None, unit, bias, c, tma=arch == 90)
    assert not any(code.spills for code in packing)
    return codes[0]


def into_code(arch: int, dtype: torch.dtype, c: TileConfig, unit: int, layout: str, dim: int, length: int = 208, kept: int = 6) -> Code:
    size = (224, unit * 16) if dim == 1 else (unit * 16, 224)
    a, b = matrix(dtype, size[0], length, layout[0] == "T"), matrix(dtype, length, size[1], layout[1] == "T")
    with instead_of_running(matmul_kernels.into_kernel, arch) as codes, instead_of_running(matmul_kernels.pack_kernel, arch) as packing:
        matmul_launch.skip_into(a, b, torch.arange(kept), torch.ones(kept), unit, dim, c, tma=arch == 90)
    assert not any(code.spills for code in packing)
    return codes[0]


def check(code: Code, arch: int, dtype: torch.dtype, c: TileConfig, tma: bool, scaled: bool = False) -> None:
    assert not code.spills and not code.stack
    assert code.shared <= c.shared_bytes(dtype.itemsize) <= SHARED[arch]
    assert code.shared > (c.stages - 2) * (c.block_m + c.block_n) * c.block_k * dtype.itemsize  # the pipeline is as deep as was asked for, or one less
    assert {80: "HMMA", 90: "HGMMA"}[arch] in code.opcodes
    assert ("UTMALDG" if tma else "LDGSTS") in code.opcodes
    assert code.copy_bits <= {128, 32 * scaled}  # tiles move in pieces of 16 bytes, scales one by one


@pytest.mark.sample(6)
@pytest.mark.parametrize(("arch", "dtype", "c"), SHIPPED, ids=named)
def test_code_of_skip(arch: int, dtype: torch.dtype, c: TileConfig) -> None:
    """Every configuration with units of 64, scaled in bf16 (which takes most registers), in the layout of a linear layer's output: X W^T."""
    scale = dtype == torch.bfloat16
    check(skip_code(arch, dtype, c, 64, "NT", scale), arch, dtype, c, arch == 90, scale)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("arch", "dtype", "c"), [s for s in SHIPPED if s[1] != torch.float16], ids=named)
def test_code_of_skip_into(arch: int, dtype: torch.dtype, c: TileConfig) -> None:
    """In the layout of grad_input, columns of dY W. Both ways of reading, TMA for the whole operand and copies for the chosen columns, are in the code."""
    code = into_code(arch, dtype, c, 64, "NN", dim=1)
    check(code, arch, dtype, c, tma=arch == 90)
    assert "LDGSTS" in code.opcodes


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("c", matmul_launch.candidate_configs(4, 0, 90)[:2], ids=named)
@pytest.mark.parametrize(("layout", "dim"), [("TN", 1), ("TN", 0)])
def test_code_of_transposed_fp32_on_hopper(layout: str, dim: int, c: TileConfig) -> None:
    """A weight's gradient, dY^T X: TF32 is multiplied there with the contraction axis contiguous only."""
    check(into_code(90, torch.float32, c, 64, layout, dim), 90, torch.float32, c, tma=True)


@pytest.mark.slow
@pytest.mark.sample(4)
@pytest.mark.parametrize(("arch", "dtype", "c"), [s for s in SHIPPED if s[1] != torch.float16], ids=named)
def test_code_of_rows(arch: int, dtype: torch.dtype, c: TileConfig) -> None:
    """Rows that lie apart, as sampled tokens do: X^T dY."""
    check(skip_code(arch, dtype, c, 1, "TN", m=208), arch, dtype, c, tma=False)


@pytest.mark.slow
@pytest.mark.sample(4)
@pytest.mark.parametrize(("arch", "unit"), [*itertools.product((80, 90), (128, 96, 64, 32)), (90, 16)])
def test_code_of_other_layouts_and_units(arch: int, unit: int) -> None:
    dtype = torch.bfloat16
    c = matmul_launch.candidate_configs(2, unit, arch)[0]
    check(skip_code(arch, dtype, c, unit, "TN", m=208), arch, dtype, c, tma=arch == 90 and unit % c.block_k == 0)
    whole = matmul_launch.candidate_configs(2, 0, arch)[0]
    check(into_code(arch, dtype, whole, unit, "NN", dim=0), arch, dtype, whole, tma=arch == 90)


@pytest.mark.slow
def test_code_of_single_entries() -> None:
    """Triton makes a constant of a size that is 1."""
    c, dtype = matmul_launch.candidate_configs(2, 64, 90)[-1], torch.bfloat16
    for code in (
        skip_code(90, dtype, c, 64, "NT", m=1),
        skip_code(90, dtype, c, 64, "NT", kept=1),
        into_code(90, dtype, c, 64, "NN", dim=1, kept=1),
        into_code(90, dtype, c, 64, "TN", dim=0, length=1, kept=1),
    ):
        assert not code.spills


@pytest.mark.parametrize("arch", [80, 90])
def test_code_of_selection_and_norms(arch: int) -> None:
    with instead_of_running(topk.topk_kernel, arch) as codes:
        topk.largest_indices(torch.empty(topk.MAX_UNITS), 16)
    assert not codes[0].spills
    with instead_of_running(topk.norms_sq_kernel, arch) as codes:
        topk.norms_sq(torch.empty(256, 128), 0, 1)
        topk.norms_sq(torch.empty(256, 128), 1, 64)
    assert len(codes) == 2 and not any(code.spills for code in codes)


# --- which configuration, and which operands ---

H200 = DeviceLimits("NVIDIA H200", 90, 132, SHARED[90])


def test_configurations_fit() -> None:
    large = autotune.promising_configs(matmul_launch.candidate_configs(2, 64, 90), 8192, 4096, 2, H200)
    assert len(large) == autotune.MAX_CANDIDATES and large[0].block_m * large[0].block_n == 128 * 256
    small = autotune.promising_configs(matmul_launch.candidate_configs(2, 64, 90), 64, 64, 2, H200)
    assert small == [c for c in matmul_launch.candidate_configs(2, 64, 90) if (c.block_m, c.block_n) == (64, 64)]
    less = DeviceLimits("less shared memory", 86, 46, 101_376)
    assert len(autotune.promising_configs(matmul_launch.candidate_configs(2, 64, 86), 4096, 4096, 2, less)) == len(matmul_launch.candidate_configs(2, 64, 86))
    assert all(c.block_k == 32 for c in matmul_launch.candidate_configs(2, 32, 90)) and all(c.block_k == 64 for c in matmul_launch.candidate_configs(2, 1, 90))
    assert all(c.block_k == 32 for c in matmul_launch.candidate_configs(4, 64, 90))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TileConfig]:
    """Empty the caches, and replace a GPU's times by others under which the last configuration is the fastest."""
    import triton

    seen: list[TileConfig] = []

    def time_ms(config: TileConfig, run: Any) -> float:
        seen.append(config)
        return 1 / len(seen)

    monkeypatch.setattr(autotune, "_time_ms", time_ms)
    monkeypatch.setattr(autotune, "_memory", {})
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def pick(key: str = "key", device: DeviceLimits = H200) -> TileConfig:
    return autotune.fastest_config(matmul_kernels.skip_kernel, (key,), lambda: matmul_launch.candidate_configs(2, 64, 90), device, lambda c: None)


def test_choice_is_timed_once_and_stored(timed: list[TileConfig], tmp_path: Path) -> None:
    every = matmul_launch.candidate_configs(2, 64, 90)
    assert pick() == every[-1] and timed == every
    assert pick() == every[-1] and len(timed) == len(every)  # from memory
    autotune._memory.clear()
    assert pick() == every[-1] and len(timed) == len(every)  # from disk
    pick("another shape")
    pick(device=DeviceLimits("NVIDIA H100", 90, 132, SHARED[90]))
    assert len(timed) == 3 * len(every)
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")
    autotune._memory.clear()
    pick()
    assert len(timed) == 4 * len(every)


def test_choice_is_the_first_where_results_must_repeat(timed: list[TileConfig]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert pick() == matmul_launch.candidate_configs(2, 64, 90)[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not timed


def test_choice_waits_for_the_end_of_a_capture(timed: list[TileConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    every = matmul_launch.candidate_configs(2, 64, 90)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert pick() == every[0] and not timed
    assert pick() == every[-1] and timed == every


@pytest.mark.parametrize("arch", [80, 90])
def test_fp32_is_served_in_every_layout_where_it_may_be_tf32(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "device_limits", lambda x: DeviceLimits("none", arch, 4, SHARED[arch]))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for torch.backends.cuda.matmul.fp32_precision in ("tf32", "ieee"):
            allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
            for t, u in itertools.product((False, True), repeat=2):
                a, b = matrix(torch.float32, 64, 128, t), matrix(torch.float32, 128, 256, u)
                assert matmul_launch.can_skip(a, b, 64) == matmul_launch.can_skip_into(a, b, 64, 0) == matmul_launch.can_skip_into(a, b, 64, 1) == allowed
            assert matmul_launch.can_skip(matrix(torch.float32, 64, 128, True), matrix(torch.float32, 128, 256, False), 1) == allowed  # rows
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_operands_that_are_read_in_wide_pieces() -> None:
    x = torch.empty(64, 128, dtype=torch.bfloat16)
    assert (
        matmul_launch.reads_in_16_bytes(x, 1, 8)
        and matmul_launch.reads_in_16_bytes(x.T, 0, 8)
        and matmul_launch.reads_in_16_bytes(x, 0, 1)
        and matmul_launch.reads_in_16_bytes(x, 1, None)
    )
    assert not matmul_launch.reads_in_16_bytes(x, 1, 4) and not matmul_launch.reads_in_16_bytes(x.T, 0, 1)  # 8 and 2 bytes at a time
    assert not matmul_launch.reads_in_16_bytes(x[:, ::2], 0, 64) and not matmul_launch.reads_in_16_bytes(
        torch.empty(64, 100), 0, 64
    )  # no stride of 1; lines not aligned
    assert (
        not matmul_launch.reads_in_16_bytes(x[:, :100], 0, 64)
        and matmul_launch.reads_in_16_bytes(x[:50], 0, 1)
        and not matmul_launch.reads_in_16_bytes(x[:50].T[:, :40], 0, 1)
    )
    assert not matmul_launch.reads_in_16_bytes(torch.empty(1, 64).expand(8, 64), 0, 64)


# --- the ops ---


def made(unit: int = 4, transposed: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = torch.randn(6, 16), torch.randn(16, 8)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    return a, b, torch.tensor([0, 2]) if unit > 1 else torch.tensor([1, 5, 15]), torch.tensor([0.5, 3.0] if unit > 1 else [0.5, 3.0, 1.0])


@pytest.mark.sample(3)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("unit", [1, 4])
def test_ops(unit: int, scaled: bool, transposed: bool) -> None:
    """The reference implementations on a CPU pass everything that torch checks of an op."""
    a, b, idx, scale = made(unit, transposed)
    entries = (idx[:, None] * unit + torch.arange(unit)).flatten()
    given = scale if scaled else None
    weight = scale.repeat_interleave(unit) if scaled else torch.ones(len(entries))
    bias = torch.randn(8)
    torch.testing.assert_close(skip_matmul.skip_matmul(a, b, idx, given, unit, bias), (a[:, entries] * weight) @ b[entries] + bias)
    torch.testing.assert_close(skip_matmul.skip_matmul(a, b, idx, given, unit), (a[:, entries] * weight) @ b[entries])
    inner = (torch.randn(16, 5), torch.randn(5, 16))
    product = inner[0] @ inner[1]
    for dim in (0, 1):
        want = torch.zeros(16, 16).index_copy_(dim, entries, product.index_select(dim, entries) * (weight[:, None] if dim == 0 else weight))
        torch.testing.assert_close(skip_matmul.skip_matmul_into(*inner, idx, given, unit, dim), want)
        torch.library.opcheck(torch.ops.approx_compile.skip_matmul_into.default, (*inner, idx, given, unit, dim))
        torch.testing.assert_close(
            skip_matmul.axis_norms_sq(a, dim, unit), a.square().sum(1 - dim)[: a.shape[dim] // unit * unit].unflatten(0, (-1, unit)).sum(1)
        )
        torch.library.opcheck(torch.ops.approx_compile.axis_norms_sq.default, (a, dim, unit))
    for args in ((a, b, idx, given, unit), (a, b, idx, given, unit, bias)):
        torch.library.opcheck(torch.ops.approx_compile.skip_matmul.default, args)
    torch.library.opcheck(torch.ops.approx_compile.choose.default, (torch.randn(9), 3))


@pytest.mark.parametrize("name", SCORES)
def test_choose_of_the_op(name: str) -> None:
    score = SCORES[name]
    for k in {0, 1, len(score) // 2, len(score)}:
        assert skip_matmul.choose(torch.tensor(score), k).tolist() == largest(score, k)


@pytest.mark.parametrize(("m", "size", "n", "kept"), [(0, 8, 3, 1), (3, 8, 0, 1), (3, 0, 4, 0), (3, 8, 4, 0), (1, 1, 1, 1), (1, 8, 1, 8)])
def test_ops_on_empty_and_single_axes(m: int, size: int, n: int, kept: int) -> None:
    idx, bias = torch.arange(kept), torch.randn(n)
    a, b = torch.randn(m, size), torch.randn(size, n)
    torch.testing.assert_close(skip_matmul.skip_matmul(a, b, idx, None, 1, bias), a[:, :kept] @ b[:kept] + bias)
    x, z = torch.randn(m, n), torch.randn(n, size)
    want = x @ z
    want[:, kept:] = 0
    torch.testing.assert_close(skip_matmul.skip_matmul_into(x, z, idx, None, 1, 1), want)
    torch.testing.assert_close(skip_matmul.skip_matmul_into(z.T, x.T, idx, None, 1, 0), want.T.contiguous())
    assert skip_matmul.axis_norms_sq(a, 1, 1).shape == (size,)


def test_ops_keep_the_dtype_and_sum_wide() -> None:
    a, b = torch.full((2, 4096), 1.0, dtype=torch.bfloat16), torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    y = skip_matmul.skip_matmul(a, b, torch.arange(32), None, 64)
    assert y.dtype == torch.bfloat16 and (y == 2048).all()
    assert skip_matmul.axis_norms_sq(a, 0, 1).tolist() == [4096, 4096]
    assert skip_matmul.axis_norms_sq(a.double(), 0, 1).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.randn(15, 8)}, r"operands \(6, 16\) torch.float32 and \(15, 8\)"),
        ({"unit": 5}, "unit 5 for an axis of 16 entries"),
        ({"unit": 0}, "unit 0"),
        ({"idx": torch.arange(5)}, "expected at most 4"),
        ({"idx": torch.tensor([0, 1], dtype=torch.int32)}, "torch.int64"),
        ({"scale": torch.ones(3)}, r"scale \(3,\) torch.float32; expected \(2,\)"),
        ({"scale": torch.ones(2).double()}, "torch.float32"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    a, b, idx, scale = made()
    with pytest.raises(ValueError, match=message):
        skip_matmul.skip_matmul(**{"a": a, "b": b, "idx": idx, "scale": scale, "unit": 4} | change)


def test_bad_dims_and_counts() -> None:
    a, b, idx, _ = made()
    with pytest.raises(ValueError, match="dim is 2"):
        skip_matmul.skip_matmul_into(a, b, idx, None, 1, 2)
    with pytest.raises(ValueError, match="7 of scores"):
        skip_matmul.choose(torch.randn(6), 7)
    with pytest.raises(ValueError, match="group 0"):
        skip_matmul.axis_norms_sq(a, 0, 0)
