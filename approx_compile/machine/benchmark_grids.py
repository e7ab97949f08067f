"""The sizes at which the quantities of a profile are measured: on CPUs, on GPUs, and in a quick measurement."""

from __future__ import annotations

from dataclasses import dataclass

Axes = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Grid:
    """The sizes at which quantities are measured.

    Attributes:
        linear: Sizes of matrix products: M, K, N.
        bmm: Sizes of batched matrix products: M, K, N.
        conv: Sizes of convolutions: places (pixels of all samples), C, O (channels), taps (of the kernel).
        sizes: Bytes of the tensors that are read, gathered from or put back into.
        runs: Contiguous entries per index of a gather.
        allocated: Bytes of new tensors.
        select: Sizes of selections: units to choose from, independent selections at once (lead).
    """

    linear: Axes
    bmm: Axes
    conv: Axes
    sizes: tuple[float, ...]
    runs: tuple[float, ...]
    allocated: tuple[float, ...]
    select: Axes


FULL_GRID = Grid(
    linear={"M": (1, 4, 16, 64, 256, 1024), "K": (4, 16, 64, 256, 1024, 4096), "N": (4, 16, 64, 256, 1024, 4096)},
    bmm={"M": (4, 16, 64, 256, 1024), "K": (4, 16, 64, 256, 1024), "N": (4, 16, 64, 256, 1024)},
    conv={"places": (256, 2304, 16384), "C": (4, 16, 64, 256), "O": (4, 16, 64, 256), "taps": (1, 9)},
    sizes=(2**14, 2**17, 2**20, 2**23, 2**26),
    runs=(1, 16, 256),
    allocated=(2**20, 2**24, 2**25, 2**27),
    select={"units": (16, 128, 1024, 4096), "lead": (1, 16)},
)


GPU_GRID = Grid(
    linear={"M": (64, 512, 4096, 16384), "K": (64, 512, 4096), "N": (64, 512, 4096, 16384)},
    bmm={"M": (16, 128, 1024), "K": (16, 128, 1024), "N": (16, 128, 1024)},
    conv={"places": (2048, 16384, 131072), "C": (16, 64, 256, 640), "O": (16, 64, 256, 640), "taps": (1, 9)},
    sizes=(2**16, 2**20, 2**24, 2**27, 2**30),
    runs=(1, 16, 64, 256),
    allocated=(2**20, 2**25, 2**28),
    select={"units": (16, 128, 1024, 4096), "lead": (1, 16)},
)


QUICK_GRID = Grid(
    linear={"M": (1, 32, 512), "K": (8, 64, 1024), "N": (8, 64, 1024)},
    bmm={"M": (8, 64, 256), "K": (8, 64, 256), "N": (8, 64, 256)},
    conv={"places": (256, 4096), "C": (16, 128), "O": (16, 128), "taps": (1, 9)},
    sizes=(2**16, 2**20, 2**24),
    runs=(1, 16, 256),
    allocated=(2**20, 2**24, 2**25),
    select={"units": (16, 256, 2048), "lead": (1, 16)},
)
