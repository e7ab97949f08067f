"""What is packed into the flat buffer, and the checksums of index sets, against masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from approx_compile.backend.runtime.choice_recorder import KeptAxis
from approx_compile.distributed import packing
from approx_compile.distributed.gradient_slices import KeptSlices, indices_of_blocks


def _axis(dim: int, size: int, unit: int, keep: int, seed: int = 0) -> KeptAxis:
    idx = torch.randperm(size // unit, generator=torch.Generator().manual_seed(seed))[:keep].sort().values
    return KeptAxis(dim, unit, size, keep * unit, idx, "layer")


def _mask(shape: tuple[int, ...], axes: tuple[KeptAxis, ...]) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    for a in axes:
        kept = torch.zeros(a.size, dtype=torch.bool)
        for i in a.idx.tolist():
            kept[i * a.unit : (i + 1) * a.unit] = True
        mask &= kept.reshape([-1 if d == a.dim else 1 for d in range(len(shape))])
    return mask


CASES = [
    ((12,), ((0, 12, 1, 5),)),
    ((12,), ((0, 12, 4, 2),)),
    ((6, 8), ((0, 6, 1, 3),)),
    ((6, 8), ((1, 8, 2, 3),)),
    ((6, 8), ((0, 6, 2, 2), (1, 8, 4, 1))),
    ((6, 8), ((1, 8, 1, 3),)),
    ((6, 8), ((0, 6, 1, 2), (1, 8, 1, 3))),
    ((6, 8), ((0, 6, 3, 1), (1, 8, 1, 5))),
    ((4, 6, 3), ((0, 4, 1, 3), (2, 3, 1, 2))),
    ((4, 6, 3, 3), ((0, 4, 1, 3), (1, 6, 1, 2))),
    ((4, 6, 3, 3), ((1, 6, 3, 1),)),
]


@pytest.mark.parametrize("shape, axes", CASES)
def test_kept_blocks_are_those_of_the_mask(shape, axes) -> None:
    kept = tuple(_axis(*a, seed=i) for i, a in enumerate(axes))
    blocks, block = indices_of_blocks(torch.Size(shape), kept)
    marked = torch.zeros(shape, dtype=torch.bool)
    marked.view(-1, block)[blocks] = True
    assert torch.equal(marked, _mask(shape, kept)) and blocks.unique().numel() == blocks.numel()


def test_packed_slices_come_back_in_their_places() -> None:
    slices = [None if i == 2 else KeptSlices(tuple(_axis(*a, seed=i) for a in axes), 0) for i, (_, axes) in enumerate(CASES)]
    gradients = [torch.randn(shape) for shape, _ in CASES]
    segments = packing.lay_out(gradients, slices)
    flat = packing.pack(gradients, segments, None)
    masks = [torch.ones(g.shape, dtype=torch.bool) if s is None else _mask(g.shape, s.axes) for g, s in zip(gradients, slices, strict=True)]
    assert flat.numel() == sum(int(m.sum()) for m in masks)
    into = [torch.zeros_like(g) for g in gradients]
    packing.unpack(flat, into, segments)
    assert all(torch.equal(got, g * m) for got, g, m in zip(into, gradients, masks, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 64])
def test_checksums_name_the_parameter_on_which_one_rank_differs(dtype: torch.dtype, world: int) -> None:
    same, other = KeptSlices((_axis(0, 512, 1, 256),), 0), KeptSlices((_axis(0, 512, 1, 256, seed=1),), 0)
    sums = sum((packing.checksums_of([same, same], dtype) / world for _ in range(world - 1)), packing.checksums_of([same, other], dtype) / world)
    assert packing.disagreement(sums).tolist() == [False, True]


def test_index_sets_that_differ_in_one_index_have_different_checksums() -> None:
    sets = [torch.tensor([*range(i), *range(i + 1, 64)]) for i in range(64)]
    sums = [packing.checksums_of([KeptSlices((KeptAxis(0, 1, 64, 63, idx, ""),), 0)], torch.float32) for idx in sets]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(sums, 2))
