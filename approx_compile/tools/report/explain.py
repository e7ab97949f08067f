"""`explain`: report what would be rewritten, why, and what it saves, without compiling to machine code or changing the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from approx_compile import _torch
from approx_compile.backend import Backend
from approx_compile.backend.capture.annotate import full_name
from approx_compile.backend.runtime.output_probe import OutputControl
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.config import ApproxConfig
from approx_compile.config.words import LADDER
from approx_compile.machine import stored
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.planning.selection import PREDICTION_ERROR
from approx_compile.rows.controller import TOKEN_RUNGS, Control, RowControl
from approx_compile.rows.ownership import controls
from approx_compile.tools.compiled_parts import CompiledPart, compiled_parts, precision_of_wrapper, run_with, unwrapped
from approx_compile.tools.model_state import model_state_preserved
from approx_compile.tools.report import html
from approx_compile.tools.report.report_data import AdaptiveShares, ReportData, SiteReport
from approx_compile.tools.report.report_text import as_text, costs


@dataclass
class Report(ReportData):
    """The result of `explain`, which `to_html` writes as a page. `str(report)` says what happens in a training step, with a table of the layers.

    The fields are those of `ReportData`: `sites`, a list of `SiteReport` in execution order; `cuts`, where rows of the batch are chosen or why they are not;
    `before` and `after`, the readable joint graphs; `unmatched`, the rule patterns without a site; `remarks`; `assignments`, the number of assignments
    that the settings go through during a run; and `adaptive`, what the policy "adaptive" has chosen so far. `flops_exact` and `flops_sampled` are the totals
    of a training step, `flops_now` and `flops_possible` those of the next step and of one at a quarter of the rows.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> report = approx_compile.explain(model, torch.randn(256, 64), config={"ratio": 0.5, "policy": "always"})
        >>> [(site.name, site.decision) for site in report.sites]
        [('0', 'sampled'), ('2', 'sampled')]
        >>> report.to_html("report.html")  # needs the extra `report`
    """

    def __str__(self) -> str:
        return as_text(self)

    def costs(self) -> str:
        """Explain the predicted times term by term.

        Returns:
            A table. For every product as planned it shows the sizes, and each term of the prediction as an expression of the sizes with its time in us.
        """
        return costs(self, PREDICTION_ERROR)

    def to_html(self, path: str | Path, machine: html.Peaks | None = None) -> None:
        """Write the report as a single HTML file that loads nothing else and therefore works offline.

        The page begins with a verdict of two sentences. Below are a sortable table of the layers, where rows of the batch are chosen and, after training, the
        share kept over the steps, a roofline, the graph of layers if it branches, and the rewritten graphs with changed lines marked. Its colours are dark or
        light, as the reader's system asks for.

        Args:
            path: The file to write.
            machine: The peak rates of the machine for the roofline; None takes the stored profile of the device, and leaves out the roofline if there is none.

        Raises:
            ImportError: If the libraries of `pip install approx-compile[report]` are not installed.
            OSError: If `path` cannot be written.
        """
        html.write(self, path, machine if machine is not None else stored(self.device))


def explain(model: Callable[..., Any], *args: Any, config: ApproxConfig | Mapping[str, Any] | None = None, verbose: bool = False, **kwargs: Any) -> Report:
    """Report what `backend="approx"` would do with `model(*args, **kwargs)` in a training step.

    The forward pass runs once, op by op. If the model was trained with this backend, the report says how many rows it keeps now. Parameters, buffers,
    gradients, the random state, hooks and the user's compiled code stay as they are.

    Args:
        model: The model or function, compiled or not. That of Lightning's Fabric runs in Fabric's precision; for autocast, call `explain` under it.
        *args: Its positional arguments.
        config: An `ApproxConfig` or a mapping with the same keys. By default the settings that `model` is compiled with, also in place (`model.compile`) and
            under DDP or Fabric. If only submodules are compiled, the report is about these. If nothing is, the default settings hold. If the settings change
            during the run, those of step 0 are reported. If the ratio of sampled outputs is chosen during the run, the plan of the smallest is reported, and
            the text says which holds now.
        verbose: Whether the text has a line for every layer, with its op, shape, dtype and kept entries; otherwise equal layers share a line.
        **kwargs: The model's keyword arguments.

    Returns:
        The sites with the decision and the reason for each, the FLOPs before and after, and the graphs.

    Raises:
        ConfigError: If the settings are not valid.
        TypeError: If `model` cannot be called.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> report = approx_compile.explain(model, torch.randn(256, 64), config={"ratio": 0.5, "policy": "always"})
        >>> print(report)  # what happens in a training step, and a table of the layers
    """
    if not callable(model):
        raise TypeError(f"explain: got {type(model).__name__}; a torch.nn.Module or a function is expected")
    given, (model, found) = model, unwrapped(model)
    parts = compiled_parts(model) if config is None and found is None and isinstance(model, nn.Module) else []
    report, plans = Report(device=_device(model, args, kwargs)), list[Plan]()

    def isolated(part: CompiledPart) -> Any:
        return _torch.compile_isolated(part.module, _recorder(part.config, report, plans, "" if full_name(part.module) else part.name))

    asked = ApproxConfig.of(config) if config is not None else found or (parts[0].config if parts else ApproxConfig())
    report.assignments, report.verbose = len(Schedule.of(asked).assignments), verbose
    settings = Schedule.of(asked).assignments[0]
    unchanged = model_state_preserved(model)
    with torch.enable_grad(), unchanged, _torch.preserve_shape_history(), run_with(parts, isolated), precision_of_wrapper(given, (args, kwargs)) as inputs:
        (model if parts else _torch.compile_isolated(model, _recorder(asked, report, plans)))(*inputs[0], **inputs[1])
    if plans:
        whole = functools.reduce(Plan.joined, plans)
        report.chains = [chain for plan in plans for chain in plan.chains()]
        report.sites, report.cuts = [SiteReport.of(s) for s in whole.sites], list(whole.cuts)
        report.unmatched, report.remarks = list(whole.unmatched), list(whole.remarks)
        report.gradient_bytes, report.kept_bytes = whole.gradient_bytes, whole.kept_bytes
    trained = controls(model) if isinstance(model, nn.Module) and config is None else {}
    report.adaptive = (
        _shares(settings, list(trained.values()), any(c.axis == "tokens" for c in report.cuts))
        if settings.policy == "adaptive" or any(c.ratio is None for c in report.cuts)
        else None
    )
    return report


def _recorder(config: ApproxConfig, report: Report, plans: list[Plan], part: str = "") -> Backend:
    """Return a backend that compiles nothing to machine code. It adds its graphs to the report, and its plans, with the part's name before the sites'."""

    def listen(plan: Plan, before: fx.Graph | None, after: fx.Graph | None) -> None:
        plans.append(replace(plan, sites=tuple(replace(s, name=f"{part}.{s.name}") for s in plan.sites)) if part else plan)
        for texts, graph in ((report.before, before), (report.after, after)):
            if graph is not None:
                texts.append(_torch.readable_code(graph))

    settings = Schedule.of(config).assignments[0]
    return Backend(settings.by_output_ratio()[0][1], inner_compile=_torch.run_as_is, on_plan=listen, keep_graphs=True)


def _device(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    tensors = [*(model.parameters() if isinstance(model, nn.Module) else ()), *args, *kwargs.values()]
    return next((t.device.type for t in tensors if isinstance(t, torch.Tensor)), "cpu")


def _shares(config: ApproxConfig, trained: list[Control], on_tokens: bool) -> AdaptiveShares:
    """Collect what the controls of a model have chosen; a graph that was compiled several times has several, of which the one with most steps counts."""
    began = sorted((c for c in trained if c.step), key=lambda c: c.step)
    of_rows = [c for c in began if isinstance(c, RowControl)]
    rows = {c.level: c.ratio for c in of_rows}
    history = {c.place: tuple(c.changes) for c in of_rows}
    outputs = [c.ratio for c in began if isinstance(c, OutputControl)]
    chosen = (outputs or [1.0])[-1] if len(config.by_output_ratio()) > 1 else None
    settings, steps = config.adaptive, max((c.step for c in began), default=0)
    least = 1 / TOKEN_RUNGS if on_tokens and settings.ladder == LADDER else settings.ladder[0]
    return AdaptiveShares(rows, least, config.least_rows(), chosen, settings.outputs[0], steps, history)
