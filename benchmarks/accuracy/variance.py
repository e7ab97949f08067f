"""Is the tangent rule right? `python -m benchmarks.accuracy.variance --data DIR`: its choice against what every sample's own gradient says.

At some steps of exact training, for one batch: all gradients G_i of single samples are computed. They give the variance of the batch's gradient,
V = sum |G_i - mean G|^2, and what sampling rows adds, A(p) = sum (1 - p_i) / p_i |G_i|^2, without an estimate. Columns:

- `rule`: the share of rows that the policy "adaptive" asks for, from the norms g of the output's gradient alone (its tau sum g^2 stands for tau V);
- `added`: A / V at that choice, which should be at most tau;
- `by_variance`: the smallest share with p in proportion to g and A <= tau V: what measuring the variances (as VCAS does) would settle on;
- `ideal`: the same with p in proportion to |G_i|;
- `correlation`: of g and |G_i|.

Rows go to results/variance.csv.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from approx_compile.rows.row_sampling import needed_share
from benchmarks.accuracy.accuracy import WORKS
from benchmarks.accuracy.study import load, loss
from benchmarks.common.rows import conditions, show, store

COLUMNS = ("work", "step", "tau", "rule", "added", "by_variance", "ideal", "correlation")
CHUNK = 16


def norms(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """g_i, |G_i| and V of a batch."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, p, (x[None],)), y[None])

    squares, total = [], torch.zeros(sum(p.numel() for p in parameters.values()))
    for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        each = vmap(grad(one), (None, 0, 0))(parameters, a, b)
        rows = torch.cat([v.flatten(1) for v in each.values()], 1)
        squares.append(rows.square().sum(1))
        total += rows.sum(0)
    sample_sq = torch.cat(squares).double()
    out = model(x)
    (tangent,) = torch.autograd.grad(loss(out, y), out)
    g = tangent.flatten(1).double().norm(dim=1)
    return g, sample_sq.sqrt(), (sample_sq.sum() - total.double().square().sum() / len(x)).item()


def added(p: Tensor, sample_norms: Tensor) -> float:
    return ((1 - p) / p.clamp_min(1e-30) * sample_norms.square()).sum().item()


def smallest(score: Tensor, sample_norms: Tensor, bound: float) -> float:
    """The smallest mean p = min(1, c score) with A(p) <= bound, by bisection on c."""
    low, high = 1e-12, 1e12
    for _ in range(200):
        c = (low * high) ** 0.5
        low, high = (low, c) if added((c * score).clamp(max=1), sample_norms) <= bound else (c, high)
    return (high * score).clamp(max=1).mean().item()


def rule_probabilities(g: Tensor, tau: float) -> Tensor:
    """p of the rule: min(1, c g) with the mean that `needed_share` asks for."""
    share, low, high = needed_share(g.square(), tau).item(), 1e-12, 1e18
    for _ in range(200):
        c = (low * high) ** 0.5
        low, high = (low, c) if (c * g).clamp(max=1).mean() >= share else (c, high)
    return (high * g).clamp(max=1)


def main(
    directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
    work: Annotated[list[str] | None, typer.Option(help="works of accuracy.py without BatchNorm")] = None,
    tau: Annotated[list[float] | None, typer.Option(help="0.025 and 0.1 by default")] = None,
    threads: Annotated[int | None, typer.Option(help="torch's threads")] = None,
) -> None:
    """Train exactly, and look at steps 0, 50, 200, 600, 1200, ..."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for name in work or ["mnist-mlp", "fashion-mlp", "char-transformer"]:
        w = WORKS[name]
        x, y, _, _ = load(w, directory)
        steps = min(1300, w.epochs * (len(x) // w.batch))
        torch.manual_seed(0)
        model = w.make(1.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=w.lr, fused=True)
        order = torch.Generator().manual_seed(0)
        for step in range(steps):
            batch = torch.randint(len(x), (w.batch,), generator=order)
            if step in (0, 50, 200, 600, 1200, steps - 1):
                seen = batch[:256]
                g, sample_norms, variance = norms(model, x[seen], y[seen])
                for t in tau or [0.025, 0.1]:
                    p = rule_probabilities(g, t)
                    shares = {"rule": p.mean().item(), "added": added(p, sample_norms) / variance, "by_variance": smallest(g, sample_norms, t * variance)}
                    correlation = torch.corrcoef(torch.stack([g, sample_norms]))[0, 1].item()
                    shares |= {"ideal": smallest(sample_norms, sample_norms, t * variance), "correlation": correlation}
                    rows.append(conditions() | {"work": name, "step": step, "tau": t} | {k: round(v, 4) for k, v in shares.items()})
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
    show("the tangent rule against measured variances", rows, COLUMNS)
    store("variance", rows)


if __name__ == "__main__":
    typer.run(main)
