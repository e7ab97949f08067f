"""What rows through BatchNorm do to the gradient: `python -m benchmarks.accuracy.row_bias`. Rows go to results/row_bias.csv.

Networks of some 3 x 3 convolutions, each with BatchNorm and ReLU, as initialised, on noise; half the rows, `batch_norm: "approximate"`. g is the exact gradient
of all parameters, e a draw's error. Columns:

- `bias`: |E e| / |g|, without what so few draws would add: they fall into blocks with means m_b, and the mean of <m_a, m_b> over pairs of blocks is
  |E e|^2 on average. Where that is below 0 (no bias that so many draws can tell) its root stands with the sign. `error`: by the jackknife over blocks.
- `noise`: the standard deviation of a single draw, (E|e|^2)^(1/2) / |g|.
- `smaller_batch`: |e| / |g| of the exact backward of the first half of the batch alone, for comparison: what a smaller batch would have been.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.common.rows import conditions, show, store

BLOCKS = 10
COLUMNS = ("layers", "norm", "batch", "ratio", "draws", "bias", "error", "noise", "smaller_batch")


def net(layers: int, norm: str, channels: int = 16) -> nn.Sequential:
    stack: list[nn.Module] = []
    for i in range(layers):
        normalisation = nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(4, channels)
        stack += [nn.Conv2d(channels if i else 3, channels, 3, padding=1, bias=False), normalisation, nn.ReLU()]
    return nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def gradient(model: nn.Module, f: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    F.cross_entropy(f(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def signed_root(v: float) -> float:
    return abs(v) ** 0.5 * (1 if v >= 0 else -1)


def pairs(means: Tensor) -> float:
    """The mean of <m_a, m_b> over pairs of different rows."""
    n = len(means)
    return ((means.sum(0).square().sum() - means.square().sum()) / (n * (n - 1))).item()


def measure(layers: int, norm: str, batch: int, ratio: float, draws: int) -> dict[str, float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, y = net(layers, norm), torch.randn(batch, 3, 8, 8), torch.randint(10, (batch,))
    rows = {"axis": "rows", "ratio": ratio} | ({"batch_norm": "approximate"} if norm == "batch" else {})
    f = torch.compile(model, backend="approx", options={"policy": "always", "grad": rows})
    exact = gradient(model, model, x, y)
    length = exact.norm().item()
    blocks, squares = torch.zeros(BLOCKS, len(exact), dtype=torch.float64), 0.0
    each = draws // BLOCKS
    for b in range(BLOCKS):
        for _ in range(each):
            e = gradient(model, f, x, y) - exact
            blocks[b] += e / each
            squares += e.square().sum().item() / (BLOCKS * each)
    left_out = [pairs(torch.cat([blocks[:b], blocks[b + 1 :]])) for b in range(BLOCKS)]
    spread = ((BLOCKS - 1) ** 2 / BLOCKS * statistics.variance(left_out)) ** 0.5  # the jackknife's
    square = pairs(blocks)
    bias = signed_root(square) / length
    smaller = gradient(model, model, x[: batch // 2], y[: batch // 2]) - exact
    return {
        "bias": bias,
        "error": spread / length**2 / max(2 * abs(bias), (spread / length**2) ** 0.5),
        "noise": squares**0.5 / length,
        "smaller_batch": smaller.norm().item() / length,
    }


def main(
    layers: Annotated[list[int] | None, typer.Option(help="numbers of convolutions; 1, 2, 4 and 8 by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="64 and 256 by default")] = None,
    ratio: Annotated[float, typer.Option(help="share of the rows kept")] = 0.5,
    draws: Annotated[int, typer.Option(min=2 * BLOCKS)] = 2000,
    threads: Annotated[int | None, typer.Option(help="torch's threads")] = None,
) -> None:
    """The bias by depth and size of the batch, and without BatchNorm."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    control = [("group", 4, 64)] if layers is None and batch is None else []
    for norm, n, b in [("batch", n, b) for n in layers or [1, 2, 4, 8] for b in batch or [64, 256]] + control:
        values = measure(n, norm, b, ratio, draws)
        rows.append(conditions() | {"layers": n, "norm": norm, "batch": b, "ratio": ratio, "draws": draws} | {k: round(v, 4) for k, v in values.items()})
        store("row_bias", rows[-1:])
    show("gradient with some of the rows against the exact one", rows, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
