"""Pack the slices of a bucket of gradients that are to be exchanged into one flat buffer, and put them back.

The buffer of a bucket holds, one after the other, the whole gradient or its kept slices for each parameter, and at its end the checksums of the index sets.

A checksum is `BITS` bits of a hash of the indices, each sent as the pair (b, 1 - b). After the sum over the ranks one of a pair is zero if, and only if, all
ranks have the same bit. The test is exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from approx_compile.backend.runtime.choice_recorder import KeptAxis
from approx_compile.distributed.gradient_slices import KeptSlices, entries_of, indices_of_blocks

BITS = 16
"""Bits of a checksum. Index sets that differ have the same one with a probability of 2^-16 in each step."""


@dataclass(frozen=True)
class Segment:
    """The place of one gradient in the flat buffer.

    Attributes:
        start: Its first entry.
        size: The number of its entries there.
        blocks: The numbers of the kept blocks of the gradient; None for the whole gradient.
        block: The entries of a block.
        columns: For a matrix of which single columns are kept: the kept rows, None for all, and the kept columns.
    """

    start: int
    size: int
    blocks: Tensor | None = None
    block: int = 1
    columns: tuple[Tensor | None, Tensor] | None = None


def lay_out(gradients: Sequence[Tensor], slices: Sequence[KeptSlices | None]) -> list[Segment]:
    """Assign each gradient its place in the flat buffer.

    Args:
        gradients: The gradients of a bucket, contiguous.
        slices: For each the slices to be sent, None for the whole gradient.
    """
    start, segments = 0, []
    for g, kept in zip(gradients, slices, strict=True):
        if kept is None:
            segment = Segment(start, g.numel())
        else:
            blocks, block = indices_of_blocks(g.shape, kept.axes)
            segment = Segment(start, blocks.numel() * block, blocks, block, _columns(g, kept.axes) if block == 1 else None)
        segments.append(segment)
        start += segment.size
    return segments


def _columns(gradient: Tensor, axes: Sequence[KeptAxis]) -> tuple[Tensor | None, Tensor] | None:
    """The kept rows, None for all, and the kept columns of a matrix; None for what is no matrix."""
    return (entries_of(axes[0]) if len(axes) == 2 else None, axes[-1].idx) if gradient.dim() == 2 else None


def pack(gradients: Sequence[Tensor], segments: Sequence[Segment], checksums: Tensor | None) -> Tensor:
    """Copy the slices to be sent into a new flat buffer.

    Args:
        gradients: The gradients of a bucket, contiguous.
        segments: Their places.
        checksums: Their checksums (parameters, 2, BITS), or None.
    """
    size = segments[-1].start + segments[-1].size
    flat = gradients[0].new_empty(size + (checksums.numel() if checksums is not None else 0))
    for g, s in zip(gradients, segments, strict=True):
        place = flat[s.start : s.start + s.size]
        if s.blocks is None:
            place.copy_(g.reshape(-1))
        elif s.columns is not None:  # row by row: on CPUs faster than single entries from anywhere
            rows, columns = s.columns
            some = g if rows is None else g.index_select(0, rows)
            torch.gather(some, 1, columns.expand(some.shape[0], -1), out=place.view(some.shape[0], -1))
        elif s.block == 1:
            torch.gather(g.view(-1), 0, s.blocks, out=place)
        else:
            torch.index_select(g.view(-1, s.block), 0, s.blocks, out=place.view(-1, s.block))
    if checksums is not None:
        flat[size:].copy_(checksums.flatten())
    return flat


def unpack(flat: Tensor, gradients: Sequence[Tensor], segments: Sequence[Segment]) -> None:
    """Copy exchanged slices back into the gradients; what was not exchanged stays as it is."""
    for g, s in zip(gradients, segments, strict=True):
        place = flat[s.start : s.start + s.size].to(g.dtype)
        if s.blocks is None:
            g.view(-1).copy_(place)
        elif s.block == 1:
            g.view(-1).index_copy_(0, s.blocks, place)
        else:
            g.view(-1, s.block).index_copy_(0, s.blocks, place.view(-1, s.block))


def checksums_of(kept: Sequence[KeptSlices], dtype: torch.dtype) -> Tensor:
    """Compute the checksums of the index sets of several parameters.

    Args:
        kept: The slices of each parameter.
        dtype: The dtype of the result.

    Returns:
        (parameters, 2, BITS): the bits of the hash of each, and their complements.
    """
    hashes = torch.stack([_hash([a.idx for a in k.axes]) for k in kept])
    bits = (hashes.unsqueeze(-1) >> torch.arange(20, 20 + BITS, device=hashes.device)) & 1
    return torch.stack([bits, 1 - bits], 1).to(dtype)


_PRIMES = (6364136223846793005, 1442695040888963407)


def _hash(index_sets: Sequence[Tensor]) -> Tensor:
    """A hash of several index sets, by arithmetic modulo 2^64 on the device."""
    total = torch.zeros((), dtype=torch.int64, device=index_sets[0].device)
    for idx in index_sets:
        mixed = (idx + 1) * _PRIMES[0] + torch.arange(idx.shape[0], device=idx.device) * _PRIMES[1]
        mixed = (mixed ^ (mixed >> 29)) * _PRIMES[0]
        total = total * _PRIMES[1] + (mixed ^ (mixed >> 32)).sum()
    return (total ^ (total >> 31)) * _PRIMES[0]


def disagreement(sums: Tensor) -> Tensor:
    """Return for each parameter whether the ranks' index sets differ.

    Args:
        sums: The sum or mean over the ranks of what `checksums_of` returned.

    Returns:
        (parameters,) bool.
    """
    return ((sums[:, 0] != 0) & (sums[:, 1] != 0)).any(1)
