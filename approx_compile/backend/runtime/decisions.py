"""Show what the policy "adaptive" has decided so far, as a table and as a plot: `decisions(model)`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from approx_compile.rows.controller import Control, controls


@dataclass(frozen=True)
class Decisions:
    """What the policy "adaptive" has decided for a model so far. `str()` is a table; `plot(path)` draws the share kept over the steps.

    Attributes:
        cuts: The controls of the model, by name. The control of a cut chooses the share of the rows; its `measured` is the share that is needed. The control
            of sampled outputs chooses their ratio; its `measured` is the relative squared error of the gradient.
    """

    cuts: dict[str, Control]

    def __str__(self) -> str:
        if not self.cuts:
            return "no cut has run yet: either nothing was trained, or all rows run (approx_compile.explain(model, *inputs) says why)"
        out = io.StringIO()
        table = Table("cut or outputs", "steps", "measured", "kept now", "kept on average", "changes")
        for name, c in self.cuts.items():
            table.add_row(name, str(c.step), f"{c.measured:.3g}", f"{c.ratio:g}", f"{c.kept:.3f}", str(len(c.changes) - 1))
        Console(file=out, width=120).print(table)
        return out.getvalue().rstrip()

    def plot(self, path: str | Path) -> None:
        """Draw the share kept over the steps, one line for each control.

        Args:
            path: The file of the picture. Its extension decides the format.

        Raises:
            ImportError: If matplotlib is not installed (`pip install approx-compile[examples]`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("decisions(model).plot needs matplotlib: pip install 'approx-compile[examples]'") from None
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for name, c in self.cuts.items():
            steps = [*(s for s, _ in c.changes), c.step]
            shares = [*(r for _, r in c.changes), c.ratio]
            axes.step(steps, shares, where="post", label=name)
        axes.set(xlabel="steps", ylabel="share kept", ylim=(0, 1.05))
        if self.cuts:
            axes.legend()
        figure.savefig(path, dpi=110, bbox_inches="tight")


def decisions(model: nn.Module) -> Decisions:
    """Collect what the policy "adaptive" has decided for a model so far.

    Args:
        model: The model, compiled or not.

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
    return Decisions(controls(model))
