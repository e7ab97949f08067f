"""How much variance do rows through BatchNorm add? `python -m benchmarks.accuracy.floor --data DIR`: with and without a floor under the norms, in training.

A small ResNet-20 is trained exactly on some images of CIFAR-10. After some epochs, for one batch: V is the variance of the exact gradient over other batches
of the same size, and A the mean of |g' - g|^2 over draws of the rows, `batch_norm: "approximate"`. Columns:

- `correct`: the share of the batch that is classified correctly;
- `floor`: the least norm that a row counts with, as a share of the mean norm (`row_sampling.FLOOR`); `uniform`: rows are drawn without regard to norms;
- `added`: A / V, and `error`: the standard error of A / V over the draws.

Rows go to results/floor.csv.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.rows import row_backward
from approx_compile.rows.row_sampling import choose_rows, with_floor
from benchmarks.accuracy.study import loss
from benchmarks.common.rows import conditions, show, store
from examples import data, models

COLUMNS = ("images", "epoch", "correct", "ratio", "floor", "draws", "added", "error")
BATCH = 128


def gradient(model: nn.Module, f: Any, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of all parameters. Running statistics of BatchNorm are left as they were."""
    buffers = [b.clone() for b in model.buffers()]
    grads = torch.autograd.grad(loss(f(x), y), list(model.parameters()))
    for b, before in zip(model.buffers(), buffers, strict=True):
        b.copy_(before)
    return torch.cat([g.flatten() for g in grads]).double()


def own_variance(model: nn.Module, x: Tensor, y: Tensor, batches: int) -> float:
    found = torch.stack([gradient(model, model, x[i], y[i]) for i in torch.randint(len(x), (batches, BATCH), generator=torch.Generator().manual_seed(1))])
    return found.var(0).sum().item()


class Rows:
    """A model whose backward pass runs on rows, compiled once: its share of the rows and its floor can be set between calls."""

    def __init__(self, model: nn.Module) -> None:
        self.ratio, self.floor = 0.5, "0"
        row_backward.FLOOR = 0.0  # type: ignore[attr-defined]
        row_backward.choose_rows = self.choose  # type: ignore[attr-defined,assignment]
        row_backward.RowBackward._counts = lambda backward, *_: [int(self.ratio * BATCH)] * len(backward.levels)  # type: ignore[method-assign]
        options = {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5, "batch_norm": "approximate"}}
        self.call = torch.compile(model, backend=Backend(options, inner_compile=run_as_is))

    def choose(self, method: str, norms_sq: Tensor, k: int, random: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        if self.floor == "uniform":
            return choose_rows("uniform", norms_sq, k, random)
        return choose_rows(method, with_floor(norms_sq, float(self.floor)), k, random)


def measure(model: nn.Module, rows: Rows, x: Tensor, y: Tensor, draws: int) -> tuple[float, float]:
    """The mean of |g' - g|^2 over draws, and its standard error."""
    exact = gradient(model, model, x, y)
    errors = torch.stack([(gradient(model, rows.call, x, y) - exact).square().sum() for _ in range(draws)])
    return errors.mean().item(), errors.std().item() / draws**0.5


def main(
    directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
    images: Annotated[int, typer.Option(help="training images")] = 4000,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 8,
    epochs: Annotated[int, typer.Option(help="epochs of the training")] = 24,
    at: Annotated[list[int] | None, typer.Option(help="epochs after which to measure; by default 1/6, 1/2, 3/4 and all")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="shares of the rows; 0.5, 0.25 and 0.125 by default")] = None,
    floor: Annotated[list[str] | None, typer.Option(help="floors, or uniform; 0, 0.5, 1, 2 and uniform by default")] = None,
    draws: Annotated[int, typer.Option(min=2)] = 32,
    threads: Annotated[int | None, typer.Option(help="torch's threads")] = None,
) -> None:
    """Train exactly, and measure after some epochs."""
    if threads is not None:
        torch.set_num_threads(threads)
    d = data.load("cifar10", directory)
    x, y = d.train_x[:images], d.train_y[:images]
    torch.manual_seed(0)
    model = models.build("resnet-20", d.shape, d.classes, width)
    sampled = Rows(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    order = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
        if epoch not in (at or [max(1, epochs // 6), epochs // 2, epochs * 3 // 4, epochs]):
            continue
        seen = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))[:BATCH]
        correct = (model(x[seen]).argmax(1) == y[seen]).double().mean().item()
        variance = own_variance(model, x, y, 16)
        for r in ratio or [0.5, 0.25, 0.125]:
            for fl in floor or ["0", "0.5", "1", "2", "uniform"]:
                sampled.ratio, sampled.floor = r, fl
                added, error = measure(model, sampled, x[seen], y[seen], draws)
                said = {"images": images, "width": width, "epoch": epoch, "correct": round(correct, 3), "ratio": r, "floor": fl, "draws": draws}
                rows.append(conditions() | said | {"added": float(f"{added / variance:.4g}"), "error": float(f"{error / variance:.2g}")})
                store("floor", rows[-1:])
    show("variance that rows through BatchNorm add, over the gradient's own", rows, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
