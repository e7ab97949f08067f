"""The Triton kernels of convolutions that skip input channels: their values in the interpreter, and their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracles import relative

from approx_compile.kernels.skip_conv import skip_conv, skip_conv_input, skip_conv_weight

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from helpers.gpu_code import Code, compile_for

from approx_compile.kernels.triton import autotune, conv_kernels, conv_launch
from approx_compile.kernels.triton.autotune import DeviceLimits, TileConfig

CASES: dict[str, dict[str, Any]] = {
    "3x3": {},
    "3x3 stride 2": {"stride": (2, 2), "unit": 32, "kept": [1], "scaled": False, "weight": "channels-last"},
    "3x3 even image, stride 2, fp16": {"image": (8, 6), "stride": (2, 2), "dtype": "float16"},
    "1x1": {"kernel": (1, 1), "padding": (0, 0), "outputs": 40, "unit": 64, "kept": [0, 2], "inputs": 192},
    "1x1 stride 2, fp16": {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2), "dtype": "float16", "scaled": False},
    "5x5 batch 1": {"kernel": (5, 5), "padding": (2, 2), "samples": 1, "image": (5, 7), "unit": 32, "kept": [0]},
    "dilated": {"padding": (2, 2), "dilation": (2, 2), "samples": 1, "kept": [0, 1]},
    "unlike in each direction": {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "weight": "odd", "scaled": False},
    "no padding, all channels": {"padding": (0, 0), "image": (6, 5), "kept": [0, 1, 2, 3], "outputs": 37},
    "unit of two steps, fp16": {"kernel": (2, 2), "padding": (1, 1), "unit": 64, "kept": [0], "dtype": "float16", "image": (4, 4), "weight": "channels-last"},
    "unit of 128": {"kernel": (1, 2), "padding": (0, 0), "inputs": 256, "unit": 128, "kept": [1], "image": (3, 4), "weight": "channels-last"},
    "strided index and scale": {"strided": True, "kept": [0, 1, 3], "image": (4, 5), "samples": 1},
    "as shipped, many groups": {
        "kernel": (1, 1),
        "padding": (0, 0),
        "inputs": 1120,
        "kept": list(range(0, 70, 2)),
        "image": (3, 4),
        "outputs": 136,
        "shipped": True,
    },
    "as shipped, fp16": {"inputs": 192, "unit": 64, "kept": [0, 2], "image": (3, 5), "dtype": "float16", "shipped": True, "scaled": False},
}
USUAL = {
    "image": (6, 5), "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "unit": 16, "kept": [1, 2], "dtype": "float32", "scaled": True,
    "weight": "contiguous", "shipped": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """The errors of the cases that are to be tested, by name and product."""
    names = [i.callspec.params["name"] for i in request.session.items if getattr(i, "originalname", "") == "test_kernels_compute_what_the_reference_does"]
    child = Path(__file__).parents[1] / "helpers" / "conv_child.py"
    given = json.dumps({name: USUAL | CASES[name] for name in names})
    done = subprocess.run([sys.executable, str(child)], input=given, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.slow
@pytest.mark.sample(5)
@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_the_reference_does(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    bound = 6e-4 if CASES[name].get("dtype") == "float16" else 1e-6  # fp16: two roundings, of w scale and of the result
    for product, error in interpreted[name].items():
        assert error < bound, (product, error)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "None"),
    "dtype": ({"dtype": torch.float64}, "one of bfloat16, float16 and float32 is needed"),
    "unit": ({"unit": 8}, "groups of 8 channels: there are kernels for 16, 32, 64, 128"),
    "layout": ({"layout": torch.contiguous_format}, "activations are not channels-last"),
    "empty": ({"samples": 0}, "there is nothing to compute"),
    "size": ({"samples": 2**20}, "a tensor has 2**31 entries or more"),
    "dilation": ({"dilation": 2}, "stride and dilation are both above 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    case, reason = REFUSED[name]
    made = {"samples": 8, "unit": 16, "dtype": torch.float16, "layout": torch.channels_last, "dilation": 1} | case
    g = conv_launch.conv_constants((8, 64, 9, 9), (24, 64, 3, 3), (8, 24, 4, 4), (2, 2), (0, 0), (made["dilation"],) * 2)
    dy = torch.empty((made["samples"], 24, 4, 4), dtype=made["dtype"], device="meta").to(memory_format=made["layout"])
    w = torch.empty((24, 64, 3, 3), dtype=made["dtype"], device="meta")
    assert reason in str(conv_launch.unsupported_reason("grad_input", g, made["unit"], torch.arange(2), dy, w))


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let fp32 convolutions use tensor cores; restore the setting at the end of the test."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_fp32_without_tf32_is_refused() -> None:
    g = wide(channels=64)
    x, w = torch.empty(8, 64, 32, 32).to(memory_format=torch.channels_last), torch.empty(64, 64, 3, 3)
    assert conv_launch.unsupported_reason("output", g, 16, torch.arange(2), x, w) is None
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert "without tf32" in str(conv_launch.unsupported_reason("output", g, 16, torch.arange(2), x, w))


def test_candidates_depend_on_what_the_choice_is_kept_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that share a choice are offered the same tiles. Under deterministic algorithms the first is taken, whichever batch comes first."""
    offered: dict[Any, set[tuple[TileConfig, ...]]] = {}

    def pick(kernel: Any, key: Any, candidates: Any, device: Any, launch: Any) -> TileConfig:
        offered.setdefault(key, set()).add(tuple(candidates()))
        raise InterruptedError

    monkeypatch.setattr(autotune, "fastest_config", pick)
    monkeypatch.setattr(autotune, "device_limits", lambda _: DeviceLimits("none", 80, 4, 163 * 1024))
    for samples in (11, 13, 16, 20):
        x, dy = (torch.empty(samples, c, 3, 8, dtype=torch.float16).to(memory_format=torch.channels_last) for c in (64, 24))
        dw = torch.empty(24, 64, 1, 1, dtype=torch.float16)
        with pytest.raises(InterruptedError):
            conv_launch.grad_weight(dw, x, dy, torch.arange(2), None, 16, [1, 1], [1, 1], [0, 0], [1, 1])
    assert len(offered) == 1 and all(len(found) == 1 for found in offered.values())


# --- machine code ---

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def wide(stride: int = 1, channels: int = 640) -> conv_launch.ConvConstants:
    out = (32 - 1) // stride + 1
    return conv_launch.conv_constants((8, channels, 32, 32), (channels, channels, 3, 3), (8, channels, out, out), (stride,) * 2, (1, 1), (1, 1))


def code(product: str, arch: int, dtype: torch.dtype, config: TileConfig, g: conv_launch.ConvConstants, unit: int = 64) -> Code:
    """Return the code that the launcher would have compiled for a weight in channels-last without a scale (fp32: packed for grad_input)."""
    kernel = getattr(conv_kernels, product)
    constants: dict[str, Any] = {n: v for n, v in conv_launch.launch_constants(config).items() if n.startswith("BLOCK")} | g._asdict() | {"UNIT": unit}
    if product != "grad_weight":
        packed = product == "grad_input" and dtype == torch.float32
        constants |= {"PACKED": packed, "w_n" if product == "grad_input" and not packed else "w_k": 1}
    types = {"idx": "*i64", "scale": "*fp32", "sums": "*fp32"} | dict.fromkeys(("x", "w", "y", "dy", "dx"), TYPES[dtype])
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = tuple(n for n in signature if n not in (*constants, "places", "kept"))
    return compile_for(kernel, arch, signature, constants, aligned, config.warps, config.stages)


def shipped() -> list[Any]:
    """Yield every configuration that exists, by product, architecture and dtype, with a length of the axis (or a unit) for which it is taken."""
    return [
        pytest.param(product, arch, dtype, config, run, id=f"{product}-sm_{arch}-{str(dtype)[6:]}-{config.block_m}x{config.block_n}x{config.block_k}")
        for product, runs in conv_launch.BLOCK_K_CHOICES.items()
        for arch in (80, 90)
        for dtype in TYPES
        for run in (runs if product != "grad_weight" else runs[:1])
        if run <= 128 // dtype.itemsize
        for config in conv_launch.candidate_configs(product, dtype.itemsize, run, arch // 10)
    ]


@pytest.mark.slow
@pytest.mark.sample(6)
@pytest.mark.parametrize(("product", "arch", "dtype", "config", "length"), shipped())
def test_machine_code(product: str, arch: int, dtype: torch.dtype, config: TileConfig, length: int) -> None:
    """The code uses tensor cores and asynchronous copies of 16 bytes, and spills no registers."""
    check(product, arch, dtype, config, wide(channels=10 * length), unit=length if product == "output" else 32)


@pytest.mark.parametrize("product", conv_launch.BLOCK_K_CHOICES)
def test_machine_code_of_another_shape(product: str) -> None:
    """A strided convolution whose channels fill no tile."""
    check(product, 90, torch.bfloat16, conv_launch.candidate_configs(product, 2, 64, 9)[0], wide(stride=2, channels=192), unit=64)


@pytest.mark.sample(4)
@pytest.mark.parametrize("unit", [16, 128])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("product", conv_launch.BLOCK_K_CHOICES)
def test_machine_code_of_other_groups(product: str, arch: int, unit: int) -> None:
    """The largest tile; with 16 channels the gradients' zeros are written in short pieces."""
    g, length = wide(channels=5 * unit), min(unit, 64) if product == "output" else 64
    check(product, arch, torch.bfloat16, conv_launch.candidate_configs(product, 2, length, arch // 10)[0], g, unit)


def check(product: str, arch: int, dtype: torch.dtype, config: TileConfig, g: conv_launch.ConvConstants, unit: int) -> None:
    made = code(product, arch, dtype, config, g, unit)
    assert (made.spills, made.stack) == (0, 0)
    assert {"HGMMA" if arch == 90 else "HMMA", "LDGSTS"} <= made.opcodes
    # sm_90 multiplies fp32 with its contraction axis contiguous only, and a weight gradient's is not: it is transposed on its way, by 4 bytes
    assert made.copy_bits == ({32} if (product, arch, dtype) == ("grad_weight", 90, torch.float32) else {128})
    assert made.shared <= config.shared_bytes(dtype.itemsize)


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code_of_the_small_kernels(arch: int) -> None:
    signature = dict.fromkeys(conv_kernels.add_shares.arg_names, "i32") | {"sums": "*fp32", "idx": "*i64", "scale": "*fp32", "dw": "*bf16"}
    shares = compile_for(conv_kernels.add_shares, arch, signature, {"C": 640, "UNIT": 64, "BLOCK": 32}, ("sums", "idx", "scale", "dw"))
    signature = dict.fromkeys(conv_kernels.pack.arg_names, "i32") | {"w": "*bf16", "idx": "*i64", "scale": "*fp32", "out": "*bf16"}
    packing = compile_for(conv_kernels.pack, arch, signature, {"KW": 3, "UNIT": 64, "BLOCK": 64, "out_c": 1}, ("w", "idx", "scale", "out", "out_o", "out_t"))
    assert shares.spills == packing.spills == 0


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.usefixtures("tf32")
def test_on_a_gpu(stride: int, dtype: torch.dtype) -> None:
    """The ops as a graph calls them, tuned, equal fp64."""
    idx, scale = torch.tensor([0, 2, 3, 9], device="cuda"), torch.rand(4, device="cuda") + 0.5
    x = torch.randn(16, 640, 15, 17, device="cuda").to(dtype, memory_format=torch.channels_last)
    w = (torch.randn(160, 640, 3, 3, device="cuda") / 40).to(dtype)
    geometry = ((stride,) * 2, (1, 1), (1, 1))
    dy = torch.randn_like(skip_conv(x, w, idx, scale, 64, *geometry))
    for op, args in (
        (skip_conv, (x, w, idx, scale, 64, *geometry)),
        (skip_conv_input, (dy, w, idx, scale, 64, (15, 17), *geometry)),
        (skip_conv_weight, (x, dy, idx, scale, 64, (3, 3), *geometry)),
    ):
        first, second, *rest = args
        expected = op(first.double(), second.double(), *rest)
        assert relative(op(*args), expected) < {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-3}[dtype]
