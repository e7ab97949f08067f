"""Figure 1 of Adelman et al.: the error of sampled matrix products by the share of the axis that is kept: `python -m benchmarks.accuracy.estimator_error`.

A and B are 100 x 100 with independent normal entries of variance 1, drawn anew for each of 1,000 runs: both of mean 1 (figure 1 a), or A of mean 0 (b). The
error is |A'B' - AB| / (|A| |B|) in Frobenius norms, with its mean over the runs. Rows are appended to benchmarks/results/estimator_error.csv. It takes a
minute.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from approx_compile.kernels.estimators import make_estimator
from approx_compile.kernels.gather import Axis, sample
from benchmarks.common.rows import conditions, show, store

METHODS = ("topk", "bernoulli", "crs", "wta", "uniform")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def mean_error(method: str, ratio: float, mean: float, runs: int, size: int = 100) -> tuple[float, float]:
    """The mean of the error over runs from a fixed seed, and its standard error; `mean` is that of the entries of A."""
    torch.manual_seed(0)
    estimator = make_estimator(method, size, ratio, 1, 1)
    errors = torch.zeros(runs)
    for i in range(runs):
        a, b = torch.randn(size, size) + mean, torch.randn(size, size) + 1
        exact = a @ b
        product = exact
        if estimator is not None:  # else it has room for all entries, and keeps them
            *_, kept_a, kept_b = sample(estimator, a, b, Axis(1), Axis(0))
            product = kept_a @ kept_b
        errors[i] = (product - exact).norm() / (a.norm() * b.norm())
    return errors.mean().item(), errors.std().item() / runs**0.5


def main(runs: Annotated[int, typer.Option(help="pairs of matrices")] = 1000) -> None:
    """Measure all methods and ratios, and store the rows."""
    rows, measured = [], conditions()
    for mean in (1.0, 0.0):
        for method in METHODS:
            for ratio in RATIOS:
                error, uncertainty = mean_error(method, ratio, mean, runs)
                setting = {"mean": mean, "method": method, "ratio": ratio, "runs": runs}
                rows.append(measured | setting | {"error": round(error, 5), "standard_error": round(uncertainty, 6)})
    show("error of sampled products", rows, ("mean", "method", "ratio", "error", "standard_error"))
    store("estimator_error", rows)


if __name__ == "__main__":
    typer.run(main)
