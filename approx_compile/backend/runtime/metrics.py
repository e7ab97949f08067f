"""What was saved so far, as one flat dict of numbers for any logger: `metrics(model)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from approx_compile.backend.runtime.output_probe import OutputControl
from approx_compile.rows.controller import Control, RowControl
from approx_compile.rows.ownership import controls, fixed_shares
from approx_compile.rows.step_counter import require_module

NAMES: Mapping[str, str] = {
    "approx/step": "the optimizer steps started",
    "approx/kept": "the share of the samples or tokens that the backward pass keeps now",
    "approx/kept_mean": "that share on average over all steps so far",
    "approx/needed": "the share that the measured variance of the gradient asks for",
    "approx/outputs_kept": "the ratio of sampled outputs now, where it is found during the run; else 1",
    "approx/flops_saved": "the share of the FLOPs of all training steps so far that was left out with samples or tokens",
    "approx/speedup": "1 / (1 - flops_saved), the speed-up of the step if time went as FLOPs do",
}
"""The keys of `metrics` and what they hold."""


def metrics(model: nn.Module) -> dict[str, float]:
    """Collect what was saved so far as numbers for a logger.

    With several cuts, or regions of tokens, a share is their mean, weighted by their FLOPs and the backward passes that they ran in, so that a graph for the
    smaller last batch of an epoch counts for little. The FLOPs are those of matrix products and convolutions,
    forward and backward, of the graphs whose backward pass may run on samples or tokens, at the sizes that were compiled. FLOPs that sampled products save
    are not counted; `explain` has them.

    Args:
        model: The model, compiled or not, and whatever wraps it.

    Returns:
        The values of `approx/step`, `approx/kept`, `approx/kept_mean`, `approx/needed`, `approx/outputs_kept`, `approx/flops_saved` and `approx/speedup`.
        Before the first backward pass on rows, and where all rows run, the shares are 1 and nothing is saved.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> approx_compile.metrics(torch.nn.Linear(64, 64))["approx/kept"]
        1.0
    """
    found = list(controls(require_module(model, "metrics")).values())
    rows = [(c.ratio, c.kept, c.measured, c.work, c.passes) for c in found if isinstance(c, RowControl)]
    rows += [(f.ratio, f.ratio, f.ratio, f.work, f.passes) for f in fixed_shares(model)]
    weights = [work.on_rows * passes for *_, work, passes in rows]
    kept = [_mean(values, weights) for values in ([now for now, *_ in rows], [mean for _, mean, *_ in rows], [needed for _, _, needed, *_ in rows])]
    saved = sum(w * (1 - mean) for w, (_, mean, *_) in zip(weights, rows, strict=True)) / max(1, sum(work.step * passes for *_, work, passes in rows))
    outputs = min((c.ratio for c in found if isinstance(c, OutputControl)), default=1.0)
    values = (float(_last_step(found)), *kept, outputs, saved, 1 / (1 - saved))
    return dict(zip(NAMES, values, strict=True))


def _last_step(found: Sequence[Control]) -> int:
    return max((c.step for c in found), default=0)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 1.0
