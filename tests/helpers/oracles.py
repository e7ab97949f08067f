"""What results are compared with: gradients, relative errors, and the row weights that turn an exact backward pass into the sampled one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from approx_compile.rows import row_backward


def grads(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return the gradients of the parameters and of the inputs that need one, and clear them."""
    found = []
    for t in [*model.parameters(), *inputs]:
        if t.requires_grad:
            assert t.grad is not None
            found.append(t.grad)
            t.grad = None
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in double precision."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


class ChosenRows:
    """Stands in for `row_backward.choose_rows`: calls it and records the indices and weights that it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choices: list[tuple[Tensor, Tensor | None]] = []
        self.original = row_backward.choose_rows
        monkeypatch.setattr(row_backward, "choose_rows", self)

    def __call__(self, method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        idx, weight = self.original(method, norms_sq, k, random)
        self.choices.append((idx, weight))
        return idx, weight

    def mask(self, size: int) -> Tensor:
        """The weight of every row in the latest choice, 0 for rows left out. The exact backward pass of the output's gradient times it is the sampled one."""
        idx, weight = self.choices[-1]
        weight = torch.ones(len(idx)) if weight is None else weight
        return torch.zeros(size, dtype=weight.dtype).index_copy_(0, idx, weight)


def spread(mask: Tensor, like: Tensor) -> Tensor:
    """Expand weights per sample to a tensor whose first axis holds samples, or samples times tokens."""
    each = mask.repeat_interleave(like.shape[0] // len(mask))
    return each.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
