"""`explain`: report what would be rewritten, why, and what it saves, without compiling to machine code or changing the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.backend import Backend
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.config import ApproxConfig
from approx_compile.passes.planning.plan import Plan
from approx_compile.tools.model_state import model_state_preserved
from approx_compile.tools.report import html
from approx_compile.tools.report.report_data import ReportData, SiteReport


@dataclass
class Report(ReportData):
    """What `explain` returns: `ReportData`, which it can write as a page."""

    def to_html(self, path: str | Path, machine: html.Peaks | None = None) -> None:
        """Write one HTML file that needs nothing else and works offline: totals, a sortable table, the graph of sites, a roofline, FLOPs before and after
        by site, the graphs with changed lines marked; dark or light as the reader's system is.

        `machine`: what knows its peaks (`html.Peaks`); without one the roofline has no roof. Raises ImportError without the libraries of
        `pip install approx-compile[report]`, OSError where `path` can't be written.
        """
        html.write(self, path, machine)


def explain(model: Callable[..., Any], *args: Any, config: ApproxConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """What `backend="approx"` would do with `model(*args, **kwargs)` in a training step, as a `Report`.

    `config`: an `ApproxConfig` or a mapping with the same keys; without one, that of what is compiled already, also in place (`model.compile`), else the
    defaults; of settings that change over the run those of step 0, of outputs whose ratio is to be found the smallest. The forward pass runs once, op by op;
    parameters, buffers, gradients, random state, hooks and the user's compiled code stay as they are. Raises `ConfigError`.
    """
    model, own = _unwrap(model)
    report = Report()
    plans: list[Plan] = []

    def listen(plan: Plan, before: fx.Graph | None, after: fx.Graph | None) -> None:
        plans.append(plan)
        for texts, graph in ((report.before, before), (report.after, after)):
            if graph is not None:
                texts.append(_torch.readable_code(graph))

    schedule = Schedule.of(ApproxConfig.of(config if config is not None else own))
    report.assignments = len(schedule.assignments)
    backend = Backend(schedule.assignments[0].rungs()[0][1], inner_compile=_torch.run_as_is, on_plan=listen, keep_graphs=True)
    with torch.enable_grad(), model_state_preserved(model), _torch.preserve_shape_history():
        _torch.compile_isolated(model, backend)(*args, **kwargs)
    if plans:
        whole = functools.reduce(Plan.joined, plans)
        report.sites, report.cuts = [SiteReport.of(s) for s in whole.sites], list(whole.cuts)
        report.unmatched, report.remarks = list(whole.unmatched), list(whole.remarks)
    return report


def _unwrap(model: Any) -> tuple[Any, ApproxConfig | None]:
    """The model below torch.compile, and the config it was compiled with, in place or not, if this is its backend."""
    if not callable(model):
        raise TypeError(f"explain: got {type(model).__name__}; a torch.nn.Module or a function is expected")
    inner = _torch.uncompiled(model)
    compiled = model if inner is not model else _torch.in_place_compiled_call(model)
    name, backend, arguments = _torch.backend_of(compiled)
    if isinstance(backend, Backend):
        return inner, backend.config
    return inner, ApproxConfig.of(arguments.get("options")) if name == "approx" else None
