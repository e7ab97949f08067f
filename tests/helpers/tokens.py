"""Transformer blocks whose gradients can be weighted token by token, the oracle of token rows; and the tokens that a compiled backward pass has chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approx_compile.rows.row_sampling import choose_rows
from approx_compile.rows.tokens import choose_op


class _Weighted(torch.autograd.Function):
    """The identity; its gradient is multiplied by a weight for each token, all leading axes merged."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return g * weight.to(g.dtype).view(*g.shape[:-1], 1), None


class Block(nn.Module):
    """A transformer block with three regions of tokens: the MLP, the output projection, and the projections to queries, keys and values."""

    def __init__(self, width: int, heads: int = 2, pre_norm: bool = True, batch_first: bool = True, dropout: float = 0.0, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.pre_norm, self.batch_first = heads, pre_norm, batch_first
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width)] if fused else [nn.Linear(width, width) for _ in range(3)])
        self.out, self.wide, self.narrow = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = nn.Dropout(dropout)
        self.weights: dict[str, Tensor] = {}
        """The weight of each token's gradient where a region begins: "mlp", "out", "qkv"."""

    def _entering(self, region: str, y: Tensor) -> Tensor:
        return _Weighted.apply(y, self.weights[region]) if region in self.weights else y  # type: ignore[no-untyped-call, no-any-return]

    def _attention(self, x: Tensor) -> Tensor:
        parts = [self._entering("qkv", layer(x)) for layer in self.qkv]
        parts = list(parts[0].chunk(3, -1)) if len(parts) == 1 else parts
        split = [p.unflatten(-1, (self.heads, -1)).permute(*((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3))) for p in parts]
        y = F.scaled_dot_product_attention(*split)
        return self._entering("out", self.out(y.permute(*((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3))).reshape(x.shape)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self._entering("mlp", self.narrow(F.gelu(self.wide(x))))

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.norms
        if self.pre_norm:
            x = x + self.dropout(self._attention(attention(x)))
            return x + self.dropout(self._mlp(mlp(x)))  # type: ignore[no-any-return]
        x = attention(x + self.dropout(self._attention(x)))
        return mlp(x + self.dropout(self._mlp(x)))  # type: ignore[no-any-return]


REGIONS = ("mlp", "out", "qkv")
"""The regions of a block in the order in which the backward pass runs them."""


class ChosenTokens:
    """Stands in for `choose_op.choose_rows`: calls it and records what it returned as the weight of every token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: list[Tensor] = []
        monkeypatch.setattr(choose_op, "choose_rows", self)

    def __call__(self, method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        idx, weight = choose_rows(method, norms_sq, k, random)
        every = torch.zeros_like(norms_sq)
        self.weights.append(every.index_copy_(0, idx, torch.ones_like(norms_sq[idx]) if weight is None else weight.to(every.dtype)))
        return idx, weight

    def apply(self, blocks: list[Block], skip: int = 0) -> None:
        """Let blocks weight their gradients as the latest backward pass did, except in its first `skip` regions."""
        latest = iter(self.weights[skip:])
        for block in reversed(blocks):
            block.weights = {region: next(latest) for region in REGIONS}
