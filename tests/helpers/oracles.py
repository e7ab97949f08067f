"""What results are compared with: gradients, relative errors, and the row weights that turn an exact backward pass into the sampled one."""

from __future__ import annotations

from collections.abc import Callable

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


def grads_under_a_tangent(f: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Run `f`, which is the model or its compiled form, and a backward pass from a random output gradient, the same in every call; return the gradients."""
    out = f(*inputs)
    torch.manual_seed(0)
    out.backward(torch.randn_like(out))
    return grads(model, *inputs)


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


def over_halves(monkeypatch: pytest.MonkeyPatch, gradients: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[bool]]:
    """Run a backward pass on the even rows and on the odd ones, with weight 2.

    Wherever the cut is, the mean of both is the exact gradient if all above it is exact and all below it is linear and keeps samples apart.

    Args:
        monkeypatch: Puts the choice of rows in place.
        gradients: Runs a step that chooses rows, and returns its gradients.

    Returns:
        The mean of every gradient, and whether the two differ.
    """
    first = [0]

    def half(method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(first[0], len(norms_sq), 2)
        assert k == len(rows)
        return rows, torch.full((k,), 2.0, dtype=norms_sq.dtype)

    monkeypatch.setattr(row_backward, "choose_rows", half)
    found = []
    for first[0] in (0, 1):
        found.append(gradients())
    return [(a + b) / 2 for a, b in zip(*found, strict=True)], [not torch.allclose(a, b, rtol=1e-2) for a, b in zip(*found, strict=True)]


def spread(mask: Tensor, like: Tensor) -> Tensor:
    """Expand weights per sample to a tensor whose first axis holds samples, or samples times tokens."""
    each = mask.repeat_interleave(like.shape[0] // len(mask))
    return each.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
