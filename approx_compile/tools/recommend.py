"""Recommend settings for a training: a short decision on what is known of the model and the run, with the measurement that each advice rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from approx_compile import _torch
from approx_compile.config import ConfigError
from approx_compile.tools import evidence
from approx_compile.tools.report.explain import Report, explain
from approx_compile.utils import printed

SMALL_BATCH = 20
"""The smallest batch of the stored trainings and of the published study's mini-batches."""

SHORT = 3
"""Epochs up to which a training counts as short: samples that are not learnt yet are all needed."""


@dataclass(frozen=True)
class Facts:
    """What a recommendation is made from.

    Attributes:
        batch: Samples of a batch; None if the inputs do not show it.
        layers: Products with a weight: linear layers and convolutions.
        convolutions: Whether there are convolutions.
        attention: Whether there are products of two activations, as in attention.
        batch_norm: Whether a BatchNorm is in training mode.
        rows: Whether the default can leave out samples in the backward pass.
        why_not: Why it cannot; empty if it can.
        fine_tuning: Whether a trained model is trained on.
        epochs: Epochs of the run; None if not said.
        device: Type of the device.
        threads: torch's threads.
    """

    batch: int | None
    layers: int
    convolutions: bool
    attention: bool
    batch_norm: bool
    rows: bool
    why_not: str
    fine_tuning: bool
    epochs: int | None
    device: str
    threads: int


@dataclass(frozen=True)
class Advice:
    """One setting to use, or to leave alone.

    Attributes:
        setting: What to do, in words.
        options: The options of the backend; None for exact training.
        expect: What to expect.
        evidence: The stored rows, or the published table, that this rests on.
        check: What to check.
    """

    setting: str
    options: Mapping[str, Any] | None
    expect: str
    evidence: str
    check: str


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` returns. `str()` of it is a short text.

    Attributes:
        facts: What it is made from.
        advice: The advice, the first the one to follow.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> found = approx_compile.recommend(torch.nn.Linear(64, 10), torch.randn(1, 64))
        >>> found.facts.batch, found.advice[0].setting
        (1, 'exact training, with Inductor alone')
    """

    facts: Facts
    advice: tuple[Advice, ...]

    def __str__(self) -> str:
        f = self.facts
        known = [f"batch {f.batch}" if f.batch is not None else "batch unknown", f"{f.layers} layers", f"BatchNorm: {'yes' if f.batch_norm else 'no'}"]
        known += [
            "fine-tuning" if f.fine_tuning else "from scratch",
            *([f"{f.epochs} epochs"] if f.epochs is not None else []),
            f"{f.device}, {f.threads} threads",
        ]
        parts = [f"For {', '.join(known)}:"]
        for i, a in enumerate(self.advice, 1):
            options = "" if a.options is None else f" options={dict(a.options)!r}" if a.options else ' torch.compile(model, backend="approx")'
            parts += [f"{i}. {a.setting}{':' + options if options else '.'}", f"   Expect: {a.expect}", f"   Evidence: {a.evidence}", f"   Check: {a.check}"]
        return printed(*parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as plain values, for JSON."""
        return asdict(self)


def recommend(
    model: Callable[..., Any], *args: Any, batch: int | None = None, fine_tuning: bool = False, epochs: int | None = None, **kwargs: Any
) -> Recommendation:
    """Say which setting to train a model with, what to expect of it, on what evidence, and what to check.

    The answer follows from the batch size, the kinds of layers, BatchNorm, the device, and whether the default can leave out samples of this model; `explain`
    finds the latter. Nothing is compiled to machine code and nothing is trained.

    Args:
        model: The model in training mode, compiled or not.
        *args: Example inputs.
        batch: Samples of a batch, if the inputs are not as large as in training.
        fine_tuning: Whether a trained model is trained on.
        epochs: Epochs of the run.
        **kwargs: Example inputs by keyword.

    Returns:
        The recommendation; `str()` of it is a short text.

    Raises:
        ConfigError: `batch` or `epochs` is no positive integer.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
        >>> found = approx_compile.recommend(model, torch.randn(256, 784), epochs=10)
        >>> found.advice[0].options
        {}
    """
    for name, number in (("batch", batch), ("epochs", epochs)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ConfigError(f"recommend: {name}: got {number!r}; an integer of at least 1 is expected, or None if it is not known")
    report = explain(model, *args, config={}, **kwargs)
    facts = _facts(model, report, (args, kwargs), batch, fine_tuning, epochs)
    return Recommendation(facts, tuple(_advice(facts)))


def _facts(model: Callable[..., Any], report: Report, inputs: Any, batch: int | None, fine_tuning: bool, epochs: int | None) -> Facts:
    plain = _torch.uncompiled(model) if isinstance(model, nn.Module) else model
    modules = list(plain.modules()) if isinstance(plain, nn.Module) else []
    sizes = [t.shape[0] for t in _torch.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    rows = any(c.decision == "rows" for c in report.cuts)
    reasons = [c.reason for c in report.cuts] or [s.reason for s in report.sites]
    return Facts(
        batch=batch if batch is not None else sizes[0] if sizes else None,
        layers=sum(s.kind != "matmul" for s in report.sites),
        convolutions=any(s.kind == "conv" for s in report.sites),
        attention=any(s.kind == "matmul" for s in report.sites) or any("attention" in type(m).__name__.lower() for m in modules),
        batch_norm=any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm) and m.training for m in modules),
        rows=rows,
        why_not="" if rows else str(next(iter(reasons), "no matrix product or convolution was found")),
        fine_tuning=fine_tuning,
        epochs=epochs,
        device=report.device,
        threads=torch.get_num_threads(),
    )


_COMPARE = "approx-compile compare FILE:run with three seeds: the accuracy must be that of exact training within its margin."
_EXACT = "exact training, with Inductor alone"


def _advice(f: Facts) -> list[Advice]:
    """The decision: the advice to follow first, then what else may be tried."""
    if f.batch == 1:
        return [
            Advice(
                _EXACT,
                None,
                "the usual speed. A batch of one sample has no samples to leave out.",
                f"{evidence.STUDY}: at batch 1 MC-approx takes 422 s an epoch and ALSH-approx 808 s, beside 362 s exact.",
                "whether a larger batch reaches the same accuracy; then ask again.",
            ),
            *_dropout(f),
        ]
    if not f.rows:
        why = f"The default leaves this model exact: {f.why_not}."
        shown = str(evidence.BATCH_NORM) if f.batch_norm else "explain(model, *inputs), which says so of this model"
        return [
            Advice(_EXACT, None, f"the usual speed and accuracy. {why}", shown, "approx_compile.explain(model, *inputs) for what keeps it exact."),
            *_dropout(f),
        ]
    return [_default(f), *_mini_batch(f), *_dropout(f)]


def _default(f: Facts) -> Advice:
    """The default of the package, with the stored training that is most like the run."""
    if f.attention and not f.fine_tuning:
        found, expect = (
            evidence.LANGUAGE,
            "no gain where all samples stay equally useful, as in language models from scratch; else fewer samples later in the run.",
        )
    elif f.fine_tuning:
        short = f.epochs is not None and f.epochs <= SHORT
        found = evidence.FINE_TUNED_SHORT if short else evidence.FINE_TUNED
        expect = "the accuracy of exact training, in less time the more epochs it has."
    else:
        found = evidence.CNN if f.convolutions else evidence.MLP
        expect = "the accuracy of exact training in less time, once samples are learnt."
        if f.epochs is not None and f.epochs <= SHORT:
            expect = "little: in so few epochs nearly all samples are needed, and the first call compiles longer."
    if f.device != "cpu":
        expect += f" No training on {f.device} is stored; the evidence is of a CPU."
    return Advice("the default", {}, expect, str(found), f"approx_compile.decisions(model) after an epoch: how many samples are kept. {_COMPARE}")


def _mini_batch(f: Facts) -> list[Advice]:
    """What the published study recommends for mini-batches."""
    if f.batch is not None and f.batch < SMALL_BATCH:
        return []
    return [
        Advice(
            "to compare with the published study, MC-approx",
            {"policy": "cost", "method": "bernoulli", "sampling": "backward", "ratio": 0.1, "min_k": 10},
            "layers whose sampled gradients are predicted to save time; on small layers none.",
            f"{evidence.STUDY}: batch 20, three hidden layers: 35.1 s an epoch beside 39.3 s exact, accuracy 98.10.",
            f"approx_compile.explain for the layers that are sampled. {_COMPARE}",
        )
    ]


def _dropout(f: Facts) -> list[Advice]:
    """Dropout that saves its work, which changes what is trained."""
    if f.layers < 2 or f.batch_norm or f.attention or f.convolutions:
        return []
    return [
        Advice(
            "if the network is trained with dropout anyway, whole units left out for a batch",
            {"method": "dropout", "ratio": 0.5},
            "shorter steps where hidden layers are wide; other results than without dropout.",
            "no training is stored; explain predicts the time of each layer on this machine.",
            f"accuracy with a few ratios. {_COMPARE}",
        )
    ]
