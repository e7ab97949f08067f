"""Show what the policy "adaptive" has decided so far, as a table and as a plot: `decisions(model)`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from torch import nn

from approx_compile.rows.controller import Control, RowControl
from approx_compile.rows.ownership import budgets, controls, waiting_states
from approx_compile.rows.step_counter import require_module
from approx_compile.rows.variance_budget import VarianceBudget
from approx_compile.utils import counted, percent, printed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 4
"""The most lines of a plot."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Colours that people with a colour vision deficiency can tell apart (Okabe and Ito)."""


@dataclass(frozen=True)
class Decisions:
    """What the policy "adaptive" has decided for a model so far. `str()` is a table; `plot(path)` draws the share kept over the steps.

    Attributes:
        cuts: The controls of the model, by name. The control of a cut chooses the share of the rows; its `measured` is the share that is needed. The control
            of sampled outputs chooses their ratio; its `measured` is the relative squared error ``|g' - g|^2 / |g|^2`` of the gradient g.
        waiting: The loaded states of controls that have not run since.
        budgets: What was measured of the variance that leaving out samples adds to the whole gradient, by the name of the graph.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> print(approx_compile.decisions(torch.nn.Linear(64, 64)))  # says that nothing has run yet
    """

    cuts: dict[str, Control]
    waiting: tuple[Mapping[str, Any], ...] = ()
    budgets: dict[str, VarianceBudget] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.cuts:
            return printed(_loaded(self.waiting) if self.waiting else NOTHING)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("what", "step", "measured", "kept", "so far"):
            table.add_column(title, overflow="fold", no_wrap=title in ("what", "step"))
        for label, c in self._labelled().items():
            table.add_row(label, str(c.step), _measured(c), f"{percent(c.ratio)} now, {percent(c.kept)} on average", _so_far(c))
        lines = [line for b in self.budgets.values() if (line := _variance(b)) is not None]
        return printed(table, *dict.fromkeys(lines), *([_loaded(self.waiting)] if self.waiting else []))

    def _labelled(self) -> dict[str, Control]:
        """Return the controls by what they decide about, with the name of the first parameter where several decide about the same."""
        count = Counter(c.place for c in self.cuts.values())
        labels: dict[str, Control] = {}
        for name, c in self.cuts.items():
            label = c.place if count[c.place] == 1 else f"{c.place} from {name.removesuffix(c.name).rstrip('.') or 'the model'}"
            labels[label if label not in labels else f"{label} ({sum(known.startswith(label) for known in labels) + 1})"] = c
        return labels

    def to_tensorboard(self, writer: Any, prefix: str = "approx") -> None:
        """Write the share kept over the optimizer steps as scalars, one series for each control, from the first step to the present one.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or anything with its method `add_scalar(tag, value, step)`.
            prefix: What the names of the series begin with: ``{prefix}/kept/{what the control decides about}``.
        """
        for label, c in self._labelled().items():
            for step, ratio in c.changes:
                writer.add_scalar(f"{prefix}/kept/{label}", ratio, step)
            if c.changes[-1][0] != c.step:
                writer.add_scalar(f"{prefix}/kept/{label}", c.ratio, c.step)

    def plot(self, path: str | Path) -> None:
        """Draw the share kept over the steps, one line for each control, labelled at its end; the four controls with the most changes if there are more.

        Args:
            path: The file of the picture. Its extension decides the format.

        Raises:
            ImportError: If matplotlib is not installed (`pip install approx-compile[report]`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("decisions(model).plot needs matplotlib: pip install 'approx-compile[report]'") from None
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        draw_shares(axes, {label: (c.changes, c.step) for label, c in self._labelled().items()}, COLORS)
        if len(self.cuts) > LINES:
            axes.set_title(f"the {LINES} of {len(self.cuts)} controls with the most changes")
        figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_shares(axes: Axes, shares: Mapping[str, tuple[Sequence[tuple[int, float]], int]], colors: Sequence[str]) -> None:
    """Draw shares over the steps, one line for each, labelled at its end; those with the most changes if there are more than `LINES`.

    Args:
        axes: Where to draw.
        shares: For each label the changes as (step, share), and the last step.
        colors: The colours of the lines.
    """
    shown = sorted(shares.items(), key=lambda item: -len(item[1][0]))[:LINES]
    ends = _spread([changes[-1][1] for _, (changes, _) in shown])
    for (label, (changes, last)), end, color in zip(shown, ends, colors, strict=False):
        steps, values = zip(*changes, (last, changes[-1][1]), strict=True)
        axes.step(steps, values, where="post", color=color, linewidth=2)
        axes.annotate(label, (last, end), (6, 0), textcoords="offset points", color=color, va="center", annotation_clip=False)
    axes.set(xlabel="steps", ylabel="share kept", ylim=(0, 1.05))
    axes.yaxis.set_major_formatter(lambda share, _: percent(share))
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


NOTHING = (
    "No backward pass has chosen its share of the rows yet: either nothing was trained, or all rows run, or the settings fix the share. "
    "approx_compile.explain(model, *inputs) says which, and why."
)


def _loaded(waiting: Sequence[Mapping[str, Any]]) -> str:
    step, kept = max(int(s["step"]) for s in waiting), ", ".join(sorted({percent(s["changes"][-1][1]) for s in waiting}))
    return f"A state was loaded (step {step}, {kept} kept) and has not run yet: it holds from the first training step of the compiled model."


def _measured(c: Control) -> str:
    if isinstance(c, RowControl):
        return f"{c.unit} needed {percent(c.measured)}"
    return f"squared gradient error {c.measured:.3g}"


def _variance(b: VarianceBudget) -> str | None:
    """Say how much variance was measured and what was asked for; None if nothing is to be measured."""
    if b.declined is not None:
        return f"The variance added to the whole gradient is not measured: {b.declined}."
    if not b.measurements:
        return None
    passes, added = b.measurements[-1]
    asked = "what is cheapest (tau auto)" if b.settings.tau == "auto" else f"at most {percent(b.settings.tau)}"
    found = f"Variance added to the whole gradient: {percent(added)} of the gradient's own in pass {passes}; asked: {asked}."
    mean = f"By the mean of {counted(len(b.measurements), 'measurement')} it is {b.excess:.2g} times what the norms say"
    return f"{found} {mean}" + (f", so that these may add {percent(b.tau)}." if b.tau is not None else ".")


def _so_far(c: Control) -> str:
    if len(c.changes) > 1:
        changes = len(c.changes) - 1
        return f"{counted(changes, 'change')}, the last after step {c.changes[-1][0]}"
    if not isinstance(c, RowControl):
        return "still exact: no measured ratio is good enough" if c.step > c.settings.every else "still exact"
    if c.unit == "tokens":
        return "still all tokens: most of them still matter" if c.measured < 1 else "still all tokens: nothing measured yet"
    return "still the whole batch: most samples still matter" if c.measured < 1 else "still the whole batch: nothing measured yet"


def _spread(heights: Sequence[float], least: float = 0.06) -> list[float]:
    """Move heights apart, upwards from the lowest, so that labels there do not overlap."""
    places = list(heights)
    order = sorted(range(len(places)), key=places.__getitem__)
    for below, i in itertools.pairwise(order):
        places[i] = max(places[i], places[below] + least)
    return places


def decisions(model: nn.Module) -> Decisions:
    """Collect what the policy "adaptive" has decided for a model so far.

    Args:
        model: The model, compiled or not, and whatever wraps it.

    Returns:
        The decisions, which can be printed and plotted.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
        >>> compiled = torch.compile(model, backend="approx")
        >>> compiled(torch.randn(512, 1024)).square().mean().backward()
        >>> print(approx_compile.decisions(model))  # a table with a line for each control
    """
    require_module(model, "decisions")
    return Decisions(controls(model), tuple(waiting_states(model)), budgets(model))
