"""What the user is told: once per model and settings, and also when a cache hit means that the pass did not run."""

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
from approx_compile.config.selectors import Pattern
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.sites.site import Context
from approx_compile.utils import emitted, log_once, warn_once, write_atomically

log = logging.getLogger("approx_compile")


@dataclass
class Record:
    """One compiled graph: where it comes from, and its plan once the pass has run (or a stored summary of it)."""

    config: ApproxConfig
    root: nn.Module | None
    layers: tuple[str, ...]
    context: Context
    text: str
    plan: Plan | None = None
    assignments: int = 1

    def announce(self, uuid: str, example_inputs: Sequence[Any]) -> None:
        """Say what was decided. After a cache hit the summary stored by the process that compiled is used."""
        path = _torch.cache_folder() / "approx_compile" / f"{_shapes_key(uuid, self.text, example_inputs)}.json"
        if self.plan is not None:
            summary = _summary(self.plan, self.config, self.assignments)
            _store(path, summary)
            for site in self.plan.sites:
                log.info("%s: %s (%s %s %s)", site.name, site.decision, site.op, site.shape, site.reason)
                for p in site.products:
                    log.debug("%s.%s: %s, %d of %d (%s)", site.name, p.name, p.decision, p.k, p.size, p.reason)
            plan = self.plan
            _torch.trace_artifact("approx_compile_plan", lambda: json.dumps(plan.to_dict()))
        else:
            found = _load(path)
            if found is None:
                return
            summary = found
            log.info("%s of %s sites sampled (from Inductor's cache)", summary["sampled"], summary["sites"])
            _torch.trace_artifact("approx_compile_plan", lambda: json.dumps(summary))
        self._tell(summary)

    def _tell(self, summary: dict[str, Any]) -> None:
        sites, sampled = summary["sites"], summary["sampled"]
        for remark in summary["remarks"]:
            warn_once(f"approx: {remark}")
        if not sites:
            return
        name = name_of(self.root)
        for pattern in self._nowhere(summary["unmatched"]):
            warn_once(f"approx: rule pattern {pattern!r} matches no site of {name}; approx_compile.explain(model, *inputs) lists the sites")
        sliced = any(p.kind is not None and p.index is not None for p in self.config.patterns())
        if sliced and self.root is not None and len(_graphs(self.config, self.root, self.layers)) > 1:
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

    def _nowhere(self, unmatched: Sequence[str]) -> list[str]:
        """Patterns that match nothing in this graph, less those that may match in another graph of the same model."""
        if self.root is None:
            return list(unmatched)
        model = whole_model(self.root) or self.root
        owners = [(full_name(m) if model is not self.root else n) or n for n, m in model.named_modules()]
        seen = {m.name for m in self.context.modules.values()}
        weighty = [n for n, m in zip(owners, model.modules(), strict=False) if any(p.dim() > 1 for p in m.parameters(recurse=False))]
        whole = all(n in seen for n in weighty)
        if whole:
            return list(unmatched)
        parsed = [Pattern.parse(t) for t in unmatched]
        return [p.text for p in parsed if p.is_name and not any(p.matches_name(n) for n in owners)]


_seen_graphs: dict[tuple[str, int], set[tuple[str, ...]]] = {}


def _graphs(config: ApproxConfig, root: nn.Module | None, layers: tuple[str, ...]) -> set[tuple[str, ...]]:
    graphs = _seen_graphs.setdefault((config.digest(), id(root)), set())
    graphs.add(layers)
    return graphs


def name_of(root: nn.Module | None) -> str:
    return type(root).__name__ if root is not None else "the function"


def _summary(plan: Plan, config: ApproxConfig, assignments: int) -> dict[str, Any]:
    reasons = Counter(s.reason for s in plan.sites if s.decision == "exact")
    counts = {"sites": len(plan.sites), "sampled": plan.sampled}
    told = {"unmatched": list(plan.unmatched), "remarks": list(plan.remarks), "reasons": [list(r) for r in reasons.most_common()]}
    return counts | told | {"what": _what(plan, config, assignments)}


def _what(plan: Plan, config: ApproxConfig, assignments: int) -> str:
    decisions = [{p.decision for p in s.products} for s in plan.sites]
    own, rows, replaced = (sum(bool(d & kinds) for d in decisions) for kinds in ({"sampled", "coupled"}, {"rows"}, {"replaced"}))
    said = [f"{own} of {len(plan.sites)} sites of {{name}} are sampled ({_how(plan, config)})"] if own or not (rows or replaced) else []
    if replaced:
        said.append(f"gradients of {replaced} of {len(plan.sites)} sites of {{name}} are replaced")
    if rows:
        shares = ", ".join(f"{c.ratio:g}" if c.ratio is not None else "as many as the gradient's variance asks for" for c in plan.cuts)
        said.append(f"the backward pass of {rows} of {len(plan.sites)} sites of {{name}} runs on rows of the batch ({shares})")
    if assignments > 1:
        said.append(f"these are the most of {assignments} assignments that its steps and phases go through")
    return "; ".join(said)


def _how(plan: Plan, config: ApproxConfig) -> str:
    """By what methods and ratios; where nothing is sampled, by those that the settings at the top have."""
    if config.plan is not None:
        return "by a tuned plan"
    found = [p for s in plan.sites for p in s.products if p.decision == "sampled"]
    methods = sorted({p.method for p in found}) or [config.method]
    ratios = sorted({p.ratio for p in found}) or [config.ratio]
    if len(config.rungs()) > 1:
        return f"{', '.join(methods)}, at the ratio that the gradient's error allows"
    return f"{', '.join(methods)}, ratio {ratios[0]:g}" + (f" to {ratios[-1]:g}" if len(ratios) > 1 else "")


def _shapes_key(uuid: str, text: str, example_inputs: Sequence[Any]) -> str:
    shapes = [(str(tuple(v.shape)), str(v.dtype)) if isinstance(v, torch.Tensor) else type(v).__name__ for v in example_inputs]
    return hashlib.sha256(repr((uuid, text, shapes, torch.is_grad_enabled())).encode()).hexdigest()


def _store(path: Any, summary: dict[str, Any]) -> None:
    """Store the summary for warm starts; a folder that can't be written only costs the notice after a warm start."""
    try:
        write_atomically(path, json.dumps(summary))
    except OSError as e:
        log.debug("summary not stored: %s", e)


def _load(path: Any) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return found if {"sites", "sampled", "unmatched", "reasons", "remarks", "what"} <= set(found) else None
    except (OSError, ValueError, TypeError):
        return None


def forget() -> None:
    """Say everything again (for tests, and for whoever starts a new model in one process)."""
    emitted.clear()
    _seen_graphs.clear()
