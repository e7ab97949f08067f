"""torch's random number generators: their seeds, and whether they have been seeded anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch


def initial_seed(device: torch.device) -> int:
    """Return the seed that torch's default generator of a device last got."""
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    return int(generator.initial_seed())


_SEED_TRACKERS: list[Any] = [t for m in (torch.cuda, torch.xpu) if hasattr(t := getattr(m, "_lazy_seed_tracker", None), "manual_seed_all_cb")]


def seeding_marker() -> tuple[Any, ...]:
    """Return a value that changes with every call of `torch.manual_seed`, also with the same seed.

    `torch.manual_seed` leaves a callback with the modules of devices that are not in use yet. It shows a repeated seed, which nothing else does.

    Returns:
        These callbacks; always the same where torch leaves none.
    """
    return tuple([t.manual_seed_all_cb for t in _SEED_TRACKERS])


def seeds_of_marker(seeding: tuple[Any, ...]) -> set[int]:
    """Return the seed that `torch.manual_seed` was given when a marker was made.

    Args:
        seeding: What `seeding_marker` returned.

    Returns:
        A set with the seed, modulo 2**64; empty if it can't be read.
    """
    calls = [left[0] for left in seeding if left is not None]
    cells = [dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=False)).get("seed") for f in calls]
    return {int(c.cell_contents) % 2**64 for c in cells if c is not None}


def is_capturing_cuda_graph(device: torch.device) -> bool:
    """Return whether a device's current stream is recorded as a CUDA graph, which supports only torch's own generators."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def random_state_kept(devices: Iterable[torch.device]) -> contextlib.AbstractContextManager[None]:
    """Return a context after which torch's random state, of the CPU and of these devices, is what it was before."""
    return torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices if d.type == "cuda"}))
