"""Scores to select entries by, and selections as the weight of every entry."""

from __future__ import annotations

import torch
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, select

METHODS = ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta")
RANDOM = ("crs", "bernoulli", "uniform", "wta")
DRAWS = 20_000
KINDS = ("constant", "1/i", "1/i^2", "dominant", "half zeros", "all zero")
"""The kinds of `scores`."""


def i_power(power: float, size: int) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** -power


def shuffled(x: Tensor, seed: int = 0) -> Tensor:
    return x[torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))]


def scores(kind: str, size: int = 24) -> Tensor:
    """Scores of one of `KINDS`, in double precision."""
    if kind == "dominant":
        x = torch.ones(size, dtype=torch.float64)
        x[size // 3] = 1e3
        return x
    if kind == "half zeros":
        return torch.cat([i_power(0.5, size // 2), torch.zeros(size - size // 2, dtype=torch.float64)])
    made = {"constant": i_power(0, size), "1/i": i_power(1, size), "1/i^2": i_power(2, size), "all zero": torch.zeros(size, dtype=torch.float64)}
    return shuffled(made[kind])


def split(score: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of two operands whose product is `score`."""
    a = torch.linspace(0.5, 2, score.shape[-1], dtype=score.dtype).expand_as(score).contiguous()
    return a.square(), (score / a).square()


def weights_of(estimator: Estimator, a_sq: Tensor, b_sq: Tensor) -> Tensor:
    """A selection as the weight of every entry of the axis, 0 where dropped: (.., units) -> (.., size)."""
    idx, scale = select(estimator, a_sq, b_sq)
    scale = torch.ones(idx.shape, dtype=torch.float64) if scale is None else scale.double()
    dense = torch.zeros(*idx.shape[:-1], estimator.size // estimator.unit, dtype=torch.float64).scatter(-1, idx, scale)
    return dense.repeat_interleave(estimator.unit, -1)


def draws(estimator: Estimator, score: Tensor, n: int = DRAWS) -> Tensor:
    """n independent selections as weights, (n, size)."""
    return weights_of(estimator, *(v.expand(n, -1) for v in split(score)))


def pick(x: Tensor, dims: tuple[int, int], entries: Tensor, scale: Tensor | None = None) -> Tensor:
    """x[.., entries, ..] * scale, chunk by chunk; entries and scale are (leads, n)."""
    lead_dim, dim = dims
    chunks = []
    for i, chunk in enumerate(x.chunk(entries.shape[0], lead_dim)):
        chunk = chunk.index_select(dim, entries[i])
        chunks.append(chunk if scale is None else chunk * scale[i].reshape([-1 if d == dim else 1 for d in range(x.dim())]))
    return torch.cat(chunks, lead_dim)
