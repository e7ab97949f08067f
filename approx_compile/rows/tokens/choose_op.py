"""The op that chooses the tokens of a region, within a compiled backward graph.

It is one op of its own, rather than the ops that it is made of, so that graphs stay small. The number of tokens is given, so that no step waits for the
device, and so is the seed, so that the user's random numbers stay as in an exact run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from approx_compile.rows.row_sampling import choose_rows


@torch.library.custom_op("approx_compile::choose_tokens_v1", mutates_args=())
def choose_tokens(norms_sq: Tensor, seeds: Tensor, region: int, count: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens by the norms of their gradients, as `row_sampling.choose_rows` does.

    Args:
        norms_sq: Squared gradient norms (N,).
        seeds: Seeds (regions,) int64, on the CPU.
        region: Which of the seeds to use.
        count: The number of tokens k to keep.
        method: The method, one of `ROW_METHODS`.

    Returns:
        The indices (k,) int64, sorted; the factors of their gradients (k,), in the dtype of the norms; and for every token its place among those kept, -1 for
        a token left out (N,) int64.
    """
    if count >= norms_sq.shape[0]:
        every = torch.arange(norms_sq.shape[0], device=norms_sq.device)
        return every, torch.ones_like(norms_sq), every.clone()
    random = torch.Generator(norms_sq.device).manual_seed(int(seeds[region]))
    idx, weight = choose_rows(method, norms_sq, count, random)
    weight = torch.ones(count, dtype=norms_sq.dtype, device=norms_sq.device) if weight is None else weight.to(norms_sq.dtype)
    place = torch.full((norms_sq.shape[0],), -1, dtype=torch.int64, device=norms_sq.device)
    return idx, weight, place.scatter_(0, idx, torch.arange(count, device=idx.device))


@choose_tokens.register_fake
def _(norms_sq: Tensor, seeds: Tensor, region: int, count: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    return norms_sq.new_empty((count,), dtype=torch.int64), norms_sq.new_empty((count,)), norms_sq.new_empty(norms_sq.shape, dtype=torch.int64)
