"""Notify the user of what was decided for a graph, once for each model and settings.

After a hit in Inductor's cache the pass does not run. The notice then comes from the summary that the compiling process has stored.

Programs that set their root logger to INFO see the package's logs, too, so INFO is one line for each compiled graph. Whatever comes for each layer or during
training is DEBUG.
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
from approx_compile.config.words import nearest
from approx_compile.passes.planning.plan import Plan, ProductPlan
from approx_compile.passes.sites.site import Context
from approx_compile.reasons import join
from approx_compile.rows.ownership import controls, waiting_states
from approx_compile.utils import forget_messages, log_once, percent, warn_once, write_atomically

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
                log.debug("%s: %s (%s %s %s)", site.name, site.decision, site.op, site.shape, site.reason_with_notes)
                for p in site.products:
                    log.debug("%s.%s: %s, %d of %d (%s)", site.name, p.name, p.decision, p.k, p.size, p.reason)
            plan = self.plan
            _torch.trace_artifact("approx_compile_plan", lambda: json.dumps(plan.to_dict()))
        else:
            stored = _load_summary(path)
            if stored is None:
                return
            summary = stored
            _torch.trace_artifact("approx_compile_plan", lambda: json.dumps(summary))
        self._notify_of_summary(summary)

    def _notify_of_summary(self, summary: dict[str, Any]) -> None:
        sites, sampled = summary["sites"], summary["sampled"]
        for remark in summary["remarks"]:
            warn_once(f"approx: {remark}")
        if not sites:
            return
        name, model = model_name(self.root), (whole_model(self.root) or self.root) if self.root is not None else None
        log.info("a graph of %s: %d of %d layers approximated%s", name, sampled, sites, "" if self.plan is not None else " (from Inductor's cache)")
        for pattern in self._unmatched_in_model(summary["unmatched"]):
            hint = nearest(pattern, [module for module, _ in model.named_modules() if module]) if model is not None else ""
            warn_once(f"approx: rule pattern {pattern!r} matches no site of {name}.{hint} approx_compile.explain(model, *inputs) lists the sites")
        sliced = any(p.kind is not None and p.index is not None for p in self.config.patterns())
        if sliced and self.root is not None and len(_graphs_seen(self.config, self.root, self.layers)) > 1:
            warn_once(f"approx: {name} is compiled as several graphs; slices such as conv[1::4] count from 0 in each of them")
        if not sampled and (self.context.root.exact or self.context.nothing_trains()):
            return
        if sampled:
            look = "decisions(model)" if summary["adaptive"] else "explain(model, *inputs)"
            what = summary["what"].format(name=name, start=_start(model))
            log_once(f"approx: {what}. See approx_compile.{look}. Compare accuracy: APPROX_COMPILE_DISABLE=1.", model)
        elif self.config.method != "exact" and self.config.ratio < 1:
            reasons = "; ".join(f"{count}x {reason}" for reason, count in summary["reasons"][:3])
            advice = "".join(f" {a}" for a in summary["advice"])
            warn_once(f"approx: nothing was approximated in {name}: {reasons}.{advice} approx_compile.explain(model, *inputs) shows every layer", model)

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
    reasons = Counter(s.reason_with_notes for s in plan.sites if s.decision == "exact")
    counts = {"sites": len(plan.sites), "sampled": plan.sampled}
    details = {"unmatched": list(plan.unmatched), "remarks": list(plan.remarks), "reasons": [list(r) for r in reasons.most_common()]}
    advice = list(join(r for r, _ in reasons.most_common(3)).advice)
    adaptive = len(config.by_output_ratio()) > 1 or any(c.decision == "rows" and c.ratio is None for c in plan.cuts)
    return counts | details | {"advice": advice, "what": _description(plan, config, assignments), "adaptive": adaptive}


def _description(plan: Plan, config: ApproxConfig, assignments: int) -> str:
    """Describe in sentences what happens in the forward and in the backward pass. `{name}` stands for the model's name, `{start}` for `_start(model)`."""
    layers = f"of {len(plan.sites)} {'layer' if len(plan.sites) == 1 else 'layers'}"
    sentences = [f"{{name}}: {_forward(plan, config, layers)}"]
    decisions = [{p.decision for p in s.products[1:]} for s in plan.sites]
    rows, replaced = (sum(kind in d for d in decisions) for kind in ("rows", "replaced"))
    gradients = [p for s in plan.sites for p in s.products[1:] if p.decision == "sampled"]
    unit = "tokens" if any(c.axis == "tokens" for c in plan.cuts) else "samples"
    if rows and any(c.decision == "rows" and c.ratio is None for c in plan.cuts):
        sentences.append(f"Backward {{start}} and may use fewer {unit} later ({rows} {layers})")
    elif rows:
        shares = [c.ratio for c in plan.cuts if c.decision == "rows" and c.ratio is not None]
        sentences.append(f"Backward on {_range(shares)} of the {unit} ({rows} {layers})")
    if gradients:
        sentences.append(f"Gradients sampled in {sum('sampled' in d for d in decisions)} {layers} ({_methods_and_shares(gradients)})")
    if replaced:
        sentences.append(f"Gradients replaced in {replaced} {layers}")
    if assignments > 1:
        sentences.append(f"This is the most that any of {assignments} assignments of steps and phases does")
    return ". ".join(sentences)


def _start(model: nn.Module | None) -> str:
    """Say how many samples an adaptive backward pass begins with: all, unless a loaded state or an earlier compilation has fewer."""
    kept = [] if model is None else [*(s["changes"][-1][1] for s in waiting_states(model)), *(c.ratio for c in controls(model).values())]
    if min(kept, default=1.0) < 1:
        return f"goes on with the {percent(min(kept))} found before"
    return "starts on the whole batch"


def _forward(plan: Plan, config: ApproxConfig, layers: str) -> str:
    """Describe the forward pass. A sampled one is written in capitals, because its failures are silent."""
    sampled = [s.products[0] for s in plan.sites if s.products[0].name == "output" and s.products[0].decision == "sampled"]
    if not sampled:
        return "forward exact"
    because = f"because the options include {_key_that_samples(config)!r}. This can cost accuracy"
    if len(config.by_output_ratio()) > 1:
        methods = ", ".join(sorted({p.method for p in sampled}))
        return f"forward starts exact; LATER FORWARD PASSES MAY BE SAMPLED in {len(sampled)} {layers} ({methods}), {because}"
    return f"FORWARD PASS SAMPLED in {len(sampled)} {layers} ({_methods_and_shares(sampled)}), {because}"


def _key_that_samples(config: ApproxConfig) -> str:
    """Return the key of the options that asks for sampled outputs."""
    given = config.model_fields_set
    asks = {"method": config.method != "exact", "output": config.output is not None and config.output.samples, "rules": any(r.samples for r in config.rules)}
    asks["sampling"] = config.sampling != "backward"
    keys = [k for k in ("plan", "ratio", "method", "sampling", "output", "rules") if k in given and asks.get(k, True)]
    return keys[0] if keys else "policy"


def _methods_and_shares(products: Sequence[ProductPlan]) -> str:
    return f"{', '.join(sorted({p.method for p in products}))}, keeps {_range([p.ratio for p in products])}"


def _range(shares: Sequence[float]) -> str:
    least, most = percent(min(shares)), percent(max(shares))
    return least if least == most else f"{least} to {most}"


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
        return summary if {"sites", "sampled", "unmatched", "reasons", "advice", "remarks", "what", "adaptive"} <= set(summary) else None
    except (OSError, ValueError, TypeError):
        return None


def forget() -> None:
    """Forget which notices were given, so that each is given again: for tests, and for a new model in the same process."""
    forget_messages()
    _seen_graphs.clear()
