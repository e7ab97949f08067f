"""Notify the user of what was decided for a graph, once for each model and settings.

After a hit in Inductor's cache the pass does not run. The notice then comes from the summary that the compiling process has stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from approx_compile import _torch
from approx_compile.backend.capture.annotate import full_name, whole_model
from approx_compile.config import ApproxConfig
from approx_compile.config.selectors import LayerPattern
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.sites.site import Context
from approx_compile.utils import emitted, log_once, warn_once, write_atomically

log = logging.getLogger("approx_compile")


@dataclass
class GraphRecord:
    """One compiled graph: where it comes from, and its plan if the pass has run."""

    config: ApproxConfig
    root: nn.Module | None
    """The module that the graph belongs to, if there is exactly one."""
    layers: tuple[str, ...]
    """The key of the innermost module of every call, in graph order."""
    context: Context
    text: str
    """The code of Dynamo's graph."""
    plan: Plan | None = None
    """None after a hit in Inductor's cache."""
    assignments: int = 1
    """How many assignments of settings the graph goes through during a run."""

    def notify(self, uuid: str, example_inputs: Sequence[Any]) -> None:
        """Log the plan, notify the user of a summary of it, and store the summary for processes that hit the cache.

        Args:
            uuid: The part of the cache key that comes from the joint-graph pass.
            example_inputs: The graph's inputs, whose shapes belong to the summary's key.
        """
        path = _torch.cache_folder() / "approx_compile" / f"{_summary_key(uuid, self.text, example_inputs)}.json"
        if self.plan is not None:
            summary = _summary(self.plan, self.config, self.assignments)
            _store_summary(path, summary)
            for site in self.plan.sites:
                log.info("%s: %s (%s %s %s)", site.name, site.decision, site.op, site.shape, site.reason)
                for p in site.products:
                    log.debug("%s.%s: %s, %d of %d (%s)", site.name, p.name, p.decision, p.k, p.size, p.reason)
            plan = self.plan
            _torch.trace_artifact("approx_compile_plan", lambda: json.dumps(plan.to_dict()))
        else:
            stored = _load_summary(path)
            if stored is None:
                return
            summary = stored
            log.info("%s of %s sites sampled (from Inductor's cache)", summary["sampled"], summary["sites"])
            _torch.trace_artifact("approx_compile_plan", lambda: json.dumps(summary))
        self._notify_of_summary(summary)

    def _notify_of_summary(self, summary: dict[str, Any]) -> None:
        sites, sampled = summary["sites"], summary["sampled"]
        for remark in summary["remarks"]:
            warn_once(f"approx: {remark}")
        if not sites:
            return
        name = model_name(self.root)
        for pattern in self._unmatched_in_model(summary["unmatched"]):
            warn_once(f"approx: rule pattern {pattern!r} matches no site of {name}; approx_compile.explain(model, *inputs) lists the sites")
        sliced = any(p.kind is not None and p.index is not None for p in self.config.patterns())
        if sliced and self.root is not None and len(_graphs_seen(self.config, self.root, self.layers)) > 1:
            warn_once(f"approx: {name} is compiled as several graphs; slices such as conv[1::4] count from 0 in each of them")
        if not sampled and (self.context.root.exact or self.context.nothing_trains()):
            return
        if sampled:
            log_once(
                f"approx: {summary['what'].format(name=name)}. Evaluation stays exact. "
                "Check the accuracy against a run with APPROX_COMPILE_DISABLE=1; approx_compile.explain(model, *inputs) shows what was rewritten and why"
            )
        elif self.config.method != "exact" and self.config.ratio < 1:
            reasons = "; ".join(f"{count}x {reason}" for reason, count in summary["reasons"][:3])
            warn_once(f"approx: nothing was approximated in {name}: {reasons}. approx_compile.explain(model, *inputs) shows every site")

    def _unmatched_in_model(self, unmatched: Sequence[str]) -> list[str]:
        """Return those of the patterns without a match in this graph that cannot match in another graph of the same model either."""
        if self.root is None:
            return list(unmatched)
        model = whole_model(self.root) or self.root
        names = [(full_name(m) if model is not self.root else n) or n for n, m in model.named_modules()]
        in_graph = {m.name for m in self.context.modules.values()}
        with_matrices = [n for n, m in zip(names, model.modules(), strict=False) if any(p.dim() > 1 for p in m.parameters(recurse=False))]
        if all(n in in_graph for n in with_matrices):  # the graph is the whole model
            return list(unmatched)
        parsed = [LayerPattern.parse(t) for t in unmatched]
        return [p.text for p in parsed if p.is_name and not any(p.matches_name(n) for n in names)]


_seen_graphs: dict[tuple[str, int], set[tuple[str, ...]]] = {}
"""The graphs that were compiled for each pair of settings (their digest) and root module (its id). A graph stands as the keys of its modules."""


def _graphs_seen(config: ApproxConfig, root: nn.Module | None, layers: tuple[str, ...]) -> set[tuple[str, ...]]:
    graphs = _seen_graphs.setdefault((config.digest(), id(root)), set())
    graphs.add(layers)
    return graphs


def model_name(root: nn.Module | None) -> str:
    """Name a model in notices.

    Args:
        root: The module that was compiled; None for a function.

    Returns:
        The name of its class, or "the function".
    """
    return type(root).__name__ if root is not None else "the function"


def _summary(plan: Plan, config: ApproxConfig, assignments: int) -> dict[str, Any]:
    reasons = Counter(s.reason for s in plan.sites if s.decision == "exact")
    counts = {"sites": len(plan.sites), "sampled": plan.sampled}
    details = {"unmatched": list(plan.unmatched), "remarks": list(plan.remarks), "reasons": [list(r) for r in reasons.most_common()]}
    return counts | details | {"what": _description(plan, config, assignments)}


def _description(plan: Plan, config: ApproxConfig, assignments: int) -> str:
    decisions = [{p.decision for p in s.products} for s in plan.sites]
    sampled, rows, replaced = (sum(bool(d & kinds) for d in decisions) for kinds in ({"sampled", "coupled"}, {"rows"}, {"replaced"}))
    parts = []
    if sampled or not (rows or replaced):
        parts.append(f"{sampled} of {len(plan.sites)} sites of {{name}} are sampled ({_methods_and_ratios(plan, config)})")
    if replaced:
        parts.append(f"gradients of {replaced} of {len(plan.sites)} sites of {{name}} are replaced")
    if rows:
        shares = ", ".join(f"{c.ratio:g}" if c.ratio is not None else "as many as the gradient's variance asks for" for c in plan.cuts)
        parts.append(f"the backward pass of {rows} of {len(plan.sites)} sites of {{name}} runs on rows of the batch ({shares})")
    if assignments > 1:
        parts.append(f"these are the most of {assignments} assignments that its steps and phases go through")
    return "; ".join(parts)


def _methods_and_ratios(plan: Plan, config: ApproxConfig) -> str:
    """Describe the methods and ratios of the sampled products, or those of the top-level settings if nothing is sampled."""
    if config.plan is not None:
        return "by a tuned plan"
    products = [p for s in plan.sites for p in s.products if p.decision == "sampled"]
    methods = sorted({p.method for p in products}) or [config.method]
    ratios = sorted({p.ratio for p in products}) or [config.ratio]
    if len(config.rungs()) > 1:
        return f"{', '.join(methods)}, at the ratio that the gradient's error allows"
    return f"{', '.join(methods)}, ratio {ratios[0]:g}" + (f" to {ratios[-1]:g}" if len(ratios) > 1 else "")


def _summary_key(uuid: str, text: str, example_inputs: Sequence[Any]) -> str:
    shapes = [(str(tuple(v.shape)), str(v.dtype)) if isinstance(v, torch.Tensor) else type(v).__name__ for v in example_inputs]
    return hashlib.sha256(repr((uuid, text, shapes, torch.is_grad_enabled())).encode()).hexdigest()


def _store_summary(path: Any, summary: dict[str, Any]) -> None:
    """Store the summary for processes that hit the cache. If the folder cannot be written, those processes give no notice."""
    try:
        write_atomically(path, json.dumps(summary))
    except OSError as e:
        log.debug("summary not stored: %s", e)


def _load_summary(path: Any) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_text())
        return summary if {"sites", "sampled", "unmatched", "reasons", "remarks", "what"} <= set(summary) else None
    except (OSError, ValueError, TypeError):
        return None


def forget() -> None:
    """Forget which notices were given, so that each is given again: for tests, and for a new model in the same process."""
    emitted.clear()
    _seen_graphs.clear()
