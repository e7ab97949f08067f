"""Choose the tile configuration of a Triton kernel: a few candidates that fit the device and the shape, timed at the first call, remembered on disk.

`triton.autotune` is not used: it would time during the capture of a CUDA graph, knows no deterministic mode, and treats two devices of one architecture as
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
"""Candidates that are timed at most; each costs a compilation."""

_FILE = "config.json"
_RESERVED = 2048
"""Bytes of shared memory that a kernel may need besides its tiles, for barriers, scales and reductions."""

_memory: dict[Hashable, TileConfig] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and resources of a program (a thread block).

    Attributes:
        block_m: Rows of the result that a program computes.
        block_n: Columns of the result that a program computes.
        block_k: Entries of the contraction axis that a step reads.
        warps: Warps of a program.
        stages: Steps whose operands are in flight at once.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Return the bytes of shared memory of a program: the tiles of both operands in flight, or the result's tile, which replaces them at the end."""
        return max(self.stages * (self.block_m + self.block_n) * self.block_k * itemsize, self.block_m * self.block_n * itemsize) + _RESERVED

    def cost(self, m: int, n: int, processors: int) -> int:
        """Estimate the time of an m x n result, without a unit: rounds of tiles over the processors times the work of a tile.

        Reading a tile's operands is counted like 64 more rows and columns.
        """
        tiles: int = triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n)
        return math.ceil(tiles / processors) * (self.block_m * self.block_n + 64 * (self.block_m + self.block_n))


@dataclass(frozen=True)
class DeviceLimits:
    """What the choice of a configuration depends on.

    Attributes:
        name: The device's name.
        arch: Its compute capability as a number, such as 90; 0 for a device that is no NVIDIA GPU.
        processors: Its multiprocessors.
        shared: Bytes of shared memory that a program may have.
    """

    name: str
    arch: int
    processors: int
    shared: int


def device_limits(x: torch.Tensor) -> DeviceLimits:
    """Return the limits of the tensor's CUDA device."""
    return _device(x.device)


@functools.cache
def _device(device: torch.device) -> DeviceLimits:
    p: Any = torch.cuda.get_device_properties(device)
    return DeviceLimits(p.name, 0 if torch.version.hip else p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)


def device_context(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def promising_configs(configs: Sequence[TileConfig], m: int, n: int, itemsize: int, device: DeviceLimits) -> list[TileConfig]:
    """Return the configurations worth timing for an m x n result: at most `MAX_CANDIDATES`, those with the least estimated cost first.

    Left out are those that do not fit into shared memory, and those whose tiles would be mostly empty if there are others.

    Args:
        configs: All configurations for the kernel.
        m: Rows of the result.
        n: Columns of the result.
        itemsize: Bytes of an entry of the operands.
        device: The device.
    """
    fit = [c for c in configs if c.shared_bytes(itemsize) <= device.shared]
    small = [c for c in fit if c.block_m < 2 * max(m, 64) and c.block_n < 2 * max(n, 64)]
    return sorted(small or fit, key=lambda c: c.cost(m, n, device.processors))[:MAX_CANDIDATES]


def next_power_of_two(size: int) -> int:
    """Round a size up to a power of two. Sizes up to it share a choice, so that a slightly different batch is not timed again."""
    return 1 << max(size - 1, 0).bit_length()


def config_for_result(
    kernel: Any,
    x: torch.Tensor,
    size: tuple[int, int],
    key: tuple[Hashable, ...],
    candidates: Callable[[DeviceLimits], Sequence[TileConfig]],
    run: Callable[[TileConfig], None],
) -> TileConfig:
    """Return the fastest configuration for a launch with an operand `x`. Results whose sizes have the same next powers of two share it.

    Args:
        kernel: The Triton kernel.
        x: An operand; its device and dtype belong to the key.
        size: Rows and columns of the result.
        key: What else the choice depends on.
        candidates: Makes all configurations for the kernel on a device, of which the promising ones are timed.
        run: Launches the kernel with a configuration.
    """
    device, m, n = device_limits(x), next_power_of_two(size[0]), next_power_of_two(size[1])
    return fastest_config(kernel, (*key, m, n, x.dtype), lambda: promising_configs(candidates(device), m, n, x.element_size(), device), device, run)


def fastest_config(
    kernel: Any, key: tuple[Hashable, ...], candidates: Callable[[], Sequence[TileConfig]], device: DeviceLimits, run: Callable[[TileConfig], None]
) -> TileConfig:
    """Return the fastest configuration for a launch: known from an earlier call or an earlier process, or timed now.

    The first candidate is taken without timing under `torch.use_deterministic_algorithms`, since another configuration may sum in another order, and while a
    CUDA graph is captured if the key is new. The graph keeps that configuration; the next call outside of a capture decides for later ones.

    Args:
        kernel: The Triton kernel.
        key: What the choice depends on besides the device.
        candidates: Makes the candidates, which depend on `key` and `device` alone.
        device: The device.
        run: Launches the kernel with a configuration.

    Raises:
        RuntimeError: No candidate runs on the device.
    """
    fixed = torch.are_deterministic_algorithms_enabled()
    entry = (kernel, key, device, fixed)
    config = _memory.get(entry)
    if config is not None:
        return config
    configs = candidates()
    if not fixed and len(configs) > 1:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        with _lock:  # one timing at a time
            stored_key = (kernel.cache_key, triton.__version__, device, key, tuple(configs))
            config = _memory.get(entry) or _stored(stored_key, configs) or _fastest(stored_key, configs, run)
    return _memory.setdefault(entry, config or configs[0])


def _folder(stored_key: tuple[Any, ...]) -> Any:
    return get_cache_manager(hashlib.sha256(repr(stored_key).encode()).hexdigest())


def _stored(stored_key: tuple[Any, ...], configs: Sequence[TileConfig]) -> TileConfig | None:
    """Read the choice from disk; None if there is none, the file is damaged, or it names no candidate."""
    path = _folder(stored_key).get_file(_FILE)
    try:
        config = TileConfig(**json.loads(Path(path).read_text())) if path else None
    except (OSError, ValueError, TypeError):
        return None
    return config if config in configs else None


def _fastest(stored_key: tuple[Any, ...], configs: Sequence[TileConfig], run: Callable[[TileConfig], None]) -> TileConfig:
    times_ms = {c: _time_ms(c, run) for c in configs}
    best = min(times_ms, key=times_ms.__getitem__)
    if math.isinf(times_ms[best]):
        raise RuntimeError(f"none of the {len(configs)} configurations runs on {stored_key[2].name}: {stored_key[3]}; lowering='inductor' needs none")
    _folder(stored_key).put(json.dumps(asdict(best)), _FILE, binary=False)
    return best


def _time_ms(config: TileConfig, run: Callable[[TileConfig], None]) -> float:
    """Time a configuration (median, in ms); inf if the device has not enough of a resource."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return math.inf
