"""Huge pages for large new buffers on CPUs: which graphs ask for them, for which buffers, and that nothing else changes."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import mlp
from helpers.oracles import grads
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomSchedulerPass
from torch._inductor.utils import fresh_cache, run_and_get_code

from approx_compile import ApproxConfig, Backend
from approx_compile.machine import huge_pages

pytestmark = pytest.mark.usefixtures("one_thread")
needs_pages = pytest.mark.skipif(not huge_pages.offered(), reason="this system has no huge pages for programs that ask")
LINE = "from approx_compile.machine.huge_pages import empty_strided_cpu"
LARGE, SMALL = 1100, 64
EXACT = {"policy": "always", "method": "exact"}


def code_of(model: nn.Module, x: Tensor, backend: Any) -> list[str]:
    """Return the Python code of the forward and of the backward pass."""
    torch._dynamo.reset()
    model.zero_grad()
    f = torch.compile(model, backend=backend)

    def step() -> None:
        f(x).sum().backward()

    _, code = run_and_get_code(step)
    assert len(code) == 2
    return list(code)


def flags_at(address: int) -> set[str]:
    """Return the kernel's flags of the memory area that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            inside = int(area[1], 16) <= address < int(area[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("no area of this process has the address")


@pytest.mark.slow
@needs_pages
def test_graphs_with_large_buffers_ask() -> None:
    x = torch.randn(1024, LARGE)
    with fresh_cache():
        asking = code_of(mlp(LARGE, 2048, 3), x, Backend(EXACT))
        assert all(LINE in c for c in asking)
        assert all(c.index(LINE) > c.index("empty_strided_cpu = ") for c in asking)  # the one that counts is the later one
        assert not any(LINE in c for c in code_of(mlp(SMALL, 64, 3), torch.randn(32, SMALL), Backend(EXACT)))
        assert not any(LINE in c for c in code_of(mlp(LARGE, 2048, 3), x, Backend(EXACT | {"huge_pages": False})))  # in spite of what the cache has
        assert not any(LINE in c for c in code_of(mlp(LARGE, 2048, 3), x, "inductor"))


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_pages
@pytest.mark.parametrize("settings", [EXACT, {"policy": "always", "ratio": 0.5}], ids=["exact", "sampled"])
def test_no_value_changes(settings: dict[str, Any]) -> None:
    x, found = torch.randn(1024, LARGE), []
    for asks in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = mlp(LARGE, 2048, 3)
        torch.compile(model, backend=Backend(settings | {"huge_pages": asks}))(x).square().sum().backward()
        found.append(grads(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_pages
@pytest.mark.parametrize(
    ("size", "stride", "dtype"), [((2048, 2048), (2048, 1), torch.float32), ((3, 1000, 1001), (1, 3003, 3), torch.float64), ((2**23,), (1,), torch.int8)]
)
def test_a_large_buffer_is_advised(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> None:
    new = huge_pages.empty_strided_cpu(size, stride, dtype)
    assert new.shape == size and new.stride() == stride and new.dtype == dtype and new.device.type == "cpu"
    assert "hg" in flags_at(new.data_ptr() + new.nbytes // 2)
    new.zero_()


@needs_pages
def test_a_small_buffer_is_not_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, ...]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *args: advised.append(args))
    assert huge_pages.empty_strided_cpu((2047, 1024), (1024, 1), torch.float32).shape == (2047, 1024)
    assert huge_pages.empty_strided_cpu((0, 2**30), (2**30, 1), torch.float32).numel() == 0
    assert not advised
    new = huge_pages.empty_strided_cpu((2048, 1024), (1024, 1), torch.float32)
    ((first, length, advice),) = advised
    assert first % mmap.PAGESIZE == length % mmap.PAGESIZE == 0 and advice == mmap.MADV_HUGEPAGE
    assert new.data_ptr() <= first < first + length <= new.data_ptr() + new.nbytes and length > new.nbytes - 2 * mmap.PAGESIZE


def test_systems_without_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    for text, asks in (("always [madvise] never", True), ("[always] madvise never", False), ("always madvise [never]", False), (None, False)):
        setting.unlink(missing_ok=True)
        if text is not None:
            setting.write_text(text)
        huge_pages.offered.cache_clear()
        monkeypatch.setattr(sys, "platform", "linux")
        assert huge_pages.offered() is asks
        assert huge_pages.setting() == (text and text.split("[")[1].split("]")[0])
        assert bool(huge_pages.patches(ApproxConfig(), {})) is asks
        monkeypatch.setattr(sys, "platform", "darwin")
        huge_pages.offered.cache_clear()
        assert not huge_pages.offered()
    huge_pages.offered.cache_clear()


class Theirs(CustomSchedulerPass):
    def __call__(self, nodes: list[Any]) -> list[Any]:
        return nodes

    def uuid(self) -> str:
        return "theirs"


@needs_pages
def test_a_pass_of_the_users_stays() -> None:
    theirs = Theirs()
    assert huge_pages.patches(ApproxConfig(), {"_pre_fusion_custom_pass": theirs}) == {}
    with torch._inductor.config.patch(_pre_fusion_custom_pass=theirs):
        assert huge_pages.patches(ApproxConfig(), {}) == {}
    assert isinstance(huge_pages.patches(ApproxConfig(), {})["_pre_fusion_custom_pass"], huge_pages.HugePages)
    assert huge_pages.patches(ApproxConfig(huge_pages=False), {}) == {}
