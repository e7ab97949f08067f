"""Which tile sizes a product runs with: a few candidates that fit the device and the shape, timed at the first call, remembered on disk.

`triton.autotune` does not serve: it would time during the capture of a CUDA graph, knows no deterministic mode, and takes two devices of one architecture for
the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

MAX_CANDIDATES = 4
"""Candidates that are timed: each costs a compilation."""

_FILE = "config.json"
_RESERVED = 2048
"""Bytes of shared memory that a kernel may need beside its tiles: barriers, scales, reductions."""

_memory: dict[Hashable, TileConfig] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class TileConfig:
    """Rows and columns of the result that one program computes, the run of the contraction axis that it reads at a time, warps, and runs in flight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Tiles of both operands in flight; the result on its way out takes their place."""
        return max(self.stages * (self.block_m + self.block_n) * self.block_k * itemsize, self.block_m * self.block_n * itemsize) + _RESERVED

    def cost(self, m: int, n: int, processors: int) -> int:
        """Rounds of tiles over the processors times the work of a tile, in which reading its operands counts like 64 rows and columns more."""
        tiles: int = triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n)
        return math.ceil(tiles / processors) * (self.block_m * self.block_n + 64 * (self.block_m + self.block_n))


@dataclass(frozen=True)
class DeviceLimits:
    """What the choice depends on. `shared`: bytes of shared memory that a program may have."""

    name: str
    arch: int
    processors: int
    shared: int


def device_limits(x: torch.Tensor) -> DeviceLimits:
    """`arch` is 0 for what is no NVIDIA GPU."""
    return _device(x.device)


@functools.cache
def _device(device: torch.device) -> DeviceLimits:
    p: Any = torch.cuda.get_device_properties(device)
    return DeviceLimits(p.name, 0 if torch.version.hip else p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)


def device_context(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: the tensor's, inside."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def promising_configs(configs: Sequence[TileConfig], m: int, n: int, itemsize: int, device: DeviceLimits) -> list[TileConfig]:
    """The configurations for an m x n result, the most promising first: those that fit into shared memory, at most `MAX_CANDIDATES`, no tile mostly empty."""
    fit = [c for c in configs if c.shared_bytes(itemsize) <= device.shared]
    small = [c for c in fit if c.block_m < 2 * max(m, 64) and c.block_n < 2 * max(n, 64)]
    return sorted(small or fit, key=lambda c: c.cost(m, n, device.processors))[:MAX_CANDIDATES]


def next_power_of_two(size: int) -> int:
    """Sizes up to the next power of two share a choice: a batch of another size is not tuned again."""
    return 1 << max(size - 1, 0).bit_length()


def fastest_config(
    kernel: Any, key: tuple[Hashable, ...], candidates: Callable[[], Sequence[TileConfig]], device: DeviceLimits, run: Callable[[TileConfig], None]
) -> TileConfig:
    """The fastest of `candidates` (which depend on `key` and `device` alone) for `run`, which launches the kernel: by an earlier call, an earlier process, or
    timing.

    The first one, without timing, under `torch.use_deterministic_algorithms` (another order of sums is another result) and, for a key not seen before,
    while a CUDA graph is captured: the graph keeps it, the next call outside decides.
    """
    fixed = torch.are_deterministic_algorithms_enabled()
    place = (kernel, key, device, fixed)
    found = _memory.get(place)
    if found is not None:
        return found
    configs = candidates()
    if not fixed and len(configs) > 1:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        with _lock:  # one timing at a time
            full = (kernel.cache_key, triton.__version__, device, key, tuple(configs))
            found = _memory.get(place) or _stored(full, configs) or _fastest(full, configs, run)
    return _memory.setdefault(place, found or configs[0])


def _folder(full: tuple[Any, ...]) -> Any:
    return get_cache_manager(hashlib.sha256(repr(full).encode()).hexdigest())


def _stored(full: tuple[Any, ...], configs: Sequence[TileConfig]) -> TileConfig | None:
    """The choice on disk; a damaged or foreign file is none."""
    path = _folder(full).get_file(_FILE)
    try:
        found = TileConfig(**json.loads(Path(path).read_text())) if path else None
    except (OSError, ValueError, TypeError):
        return None
    return found if found in configs else None


def _fastest(full: tuple[Any, ...], configs: Sequence[TileConfig], run: Callable[[TileConfig], None]) -> TileConfig:
    times_ms = {c: _time_ms(c, run) for c in configs}
    best = min(times_ms, key=times_ms.__getitem__)
    if math.isinf(times_ms[best]):
        raise RuntimeError(f"none of the {len(configs)} configurations runs on {full[2].name}: {full[3]}; lowering='inductor' needs none")
    _folder(full).put(json.dumps(asdict(best)), _FILE, binary=False)
    return best


def _time_ms(config: TileConfig, run: Callable[[TileConfig], None]) -> float:
    """The median time, inf where the device has too little of something."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return math.inf
