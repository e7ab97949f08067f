"""The variance that leaving out tokens really adds, at frozen weights along a training: whether the whole gradient gets what `tau` asks for.

`python -m benchmarks.accuracy.token_variance --data DIR [--work NAME ..] [--tau TAU ..]` trains the works of `minilm` (with its data) or transformers of
`accuracy` on tokens. After some steps the weights and all shares stand still for some batches: for each of them, every parameter's gradient is computed on
all tokens, g, and on chosen ones, g'. `added` is the mean of |g' - g|^2 over the variance of g from batch to batch. `measured` is the running mean that the
training itself has, from one batch at a time. No time is measured. Rows go to results/token_variance.csv.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import PropertyMock, patch

import torch
import typer
from torch import Tensor

from approx_compile.rows.controller import TokenControl
from approx_compile.rows.ownership import budgets, controls
from approx_compile.rows.row_backward import all_rows
from approx_compile.rows.tokens.token_backward import TokenBackward
from approx_compile.rows.tokens.token_variance import TokenBudget
from benchmarks.accuracy import accuracy, minilm
from benchmarks.accuracy.study import Training, Work, load, loss, start, tokens
from benchmarks.common.rows import conditions, show, store

STEPS = (12, 25, 50, 100, 200, 290, 400, 580, 860)
WORKS = minilm.WORKS | accuracy.WORKS
COLUMNS = ("work", "tau", "step", "kept", "measured", "added")


@contextmanager
def standing_still(t: Training) -> Iterator[None]:
    """Inside, no share changes, no pass counts, and nothing is measured."""
    counted = [*controls(t.model).values(), *budgets(t.model).values()]
    before = [c.passes for c in counted]
    off = PropertyMock(return_value=False)
    with (
        patch.object(TokenControl, "should_observe", off),
        patch.object(TokenBudget, "is_half_done", off),
        patch.object(TokenBudget, "is_due", lambda self: False),
        patch.object(TokenBackward, "_is_worthwhile", lambda *_: True),
    ):
        yield
    for c, passes in zip(counted, before, strict=True):
        c.passes = passes


def gradients(t: Training, x: Tensor, y: Tensor) -> list[Tensor]:
    t.model.zero_grad()
    loss(t.compiled(x), y).backward()
    return [p.grad for p in t.model.parameters() if p.grad is not None]


def square(values: list[Tensor]) -> float:
    return sum(v.double().square().sum().item() for v in values)


def added_variance(t: Training, work: Work, x: Tensor, y: Tensor, batches: int) -> float:
    """The mean of |g' - g|^2 over the variance of g."""
    random = torch.Generator().manual_seed(99)
    added, own, total = [], 0.0, None
    for _ in range(batches):
        batch = torch.randint(len(x), (work.batch,), generator=random)
        with all_rows():
            exact = [g.clone() for g in gradients(t, x[batch], y[batch])]
        added.append(square([a - b for a, b in zip(gradients(t, x[batch], y[batch]), exact, strict=True)]))
        own += square(exact)
        total = exact if total is None else [a.add_(b) for a, b in zip(total, exact, strict=True)]
    t.model.zero_grad()
    assert total is not None
    return statistics.mean(added) / ((own - square(total) / batches) / (batches - 1))


def rows_of(name: str, tau: float, seed: int, directory: Path, steps: int, batches: int) -> Iterator[dict[str, Any]]:
    """Train on tokens; a row for each of the steps at which the weights stand still."""
    work = WORKS[name]
    x, y, _, _ = load(work, directory)
    t = start(work, tokens(tau), seed, steps, None)
    order: tuple[Tensor, ...] = ()
    for step in range(1, steps + 1):
        at = (step - 1) % (len(x) // work.batch)
        if at == 0:
            order = torch.randperm(len(x), generator=t.order).split(work.batch)
        gradients(t, x[order[at]], y[order[at]])
        t.optimizer.step()
        if step in STEPS:
            with standing_still(t):
                kept = statistics.mean(c.wanted for c in controls(t.model).values() if isinstance(c, TokenControl))
                (budget,) = budgets(t.model).values()
                found = {"kept": kept, "measured": budget.added, "excess": budget.excess, "added": added_variance(t, work, x, y, batches)}
            yield conditions() | {"work": name, "tau": tau, "seed": seed, "step": step, "batches": batches} | {k: round(v, 4) for k, v in found.items()}


def main(
    directory: Annotated[Path, typer.Option("--data", help="where the data set lies")],
    work: Annotated[list[str] | None, typer.Option(help="minilm-mean by default")] = None,
    tau: Annotated[list[float] | None, typer.Option(help="0.025 by default")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    steps: Annotated[int, typer.Option(help="of the training")] = 580,
    batches: Annotated[int, typer.Option(min=4, help="for which the weights stand still")] = 24,
    threads: Annotated[int | None, typer.Option(help="torch's threads")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    found = []
    for name in work or ["minilm-mean"]:
        for asked in tau or [0.025]:
            torch._dynamo.reset()
            for row in rows_of(name, asked, seed, directory, steps, batches):
                store("token_variance", [row])
                found.append(row)
                print(*(f"{k} {row[k]}" for k in COLUMNS), flush=True)
    show("variance added by tokens left out", found, COLUMNS)


if __name__ == "__main__":
    typer.run(main)
