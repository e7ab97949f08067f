"""torch's random number generators: their seeds, and whether they have been seeded anew."""

from __future__ import annotations

from typing import Any

import torch


def initial_seed(device: torch.device) -> int:
    """What torch's own random numbers on a device were last seeded with."""
    own = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    return int(own.initial_seed())


_SEED_TRACKERS: list[Any] = [t for m in (torch.cuda, torch.xpu) if hasattr(t := getattr(m, "_lazy_seed_tracker", None), "manual_seed_all_cb")]


def seeding_marker() -> tuple[Any, ...]:
    """Other than before if `torch.manual_seed` has been called, with the same seed perhaps, which shows nowhere else: what it leaves with the modules of
    devices that are not in use yet. Always the same where torch leaves nothing."""
    return tuple([t.manual_seed_all_cb for t in _SEED_TRACKERS])


def seeds_of_marker(seeding: tuple[Any, ...]) -> set[int]:
    """The seed that `torch.manual_seed` was given at a seeding, in a set; none if that can't be told."""
    calls = [left[0] for left in seeding if left is not None]
    cells = [dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=False)).get("seed") for f in calls]
    return {int(c.cell_contents) % 2**64 for c in cells if c is not None}


def is_capturing_cuda_graph(device: torch.device) -> bool:
    """Whether what runs on the device now is recorded as a CUDA graph, which knows of no generators but torch's own."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
