"""What the default makes of a model if it chooses samples, with the ops that stop rows and the lines of the model that they come from. No code is generated."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import models
import torch
from torch import fx

from approx_compile import Backend
from approx_compile.backend import diagnostics, dynamic_batch, run_as_is
from approx_compile.passes.planning.plan import Plan
from approx_compile.rows import coverage, partition, row_compiler, row_cost, stages

BATCH = 12
ON = 0.9
"""The share of the backward pass's FLOPs on rows from which a model's rows are "on" rather than "partly"."""


def count_small_work() -> None:
    """Rows are sampled in models that are too small for it to pay: the question here is whether they could be."""
    row_cost.ANY_SIZE = True


@dataclass
class Decision:
    """`share`: of the backward pass's FLOPs, over all graphs; `graphs`: how many the model came to; `ops`: what stops rows, op by op."""

    decision: str
    share: float
    reason: str
    graphs: int
    ops: list[str] = field(default_factory=list)


class Watched:
    """The plans as `on_plan` gets them, graph by graph, and the ops at which rows end."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.ops: dict[str, None] = {}
        self.symbols = ""
        """Which symbols might have been the batch in the last graph, and the sizes of its inputs."""

    def __call__(self, plan: Plan, before: Any, after: Any) -> None:
        self.plans.append(plan)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def decision(self) -> Decision:
        cuts = [c for plan in self.plans for c in plan.cuts]
        on = [c for c in cuts if c.decision == "rows"]
        first = [plan.cuts[0] for plan in self.plans if plan.cuts]
        total, rows = sum(c.flops_all for c in first), sum(c.flops_on_rows for c in first if c.decision == "rows")
        without = sum(1 for plan in self.plans if not plan.cuts and plan.sites)
        share = rows / total if total else 0.0
        told = [c for plan in self.plans if plan.cuts for c in ([plan.cuts[0]] if plan.cuts[0].decision == "exact" else plan.cuts)]
        reasons = Counter(dict.fromkeys((c.reason for c in told if c.stops), 1))
        reasons.update(s.reason_with_notes for plan in self.plans if not plan.cuts for s in plan.sites if s.decision == "exact")
        reason = "; ".join(r for r, _ in reasons.most_common(3)) if self.plans else "torch.compile makes no graph of it"
        decision = "declined" if not on else "on" if share >= ON and not without else "partly"
        wrong_symbol = [self.symbols] if not rows and self.symbols else []
        return Decision(decision, share, reason, len(self.plans), [*self.ops, *wrong_symbol])


@contextmanager
def watching(once: bool = False) -> Iterator[Watched]:
    """Inside, whatever is compiled tells why it stops rows. `once`: a graph without rows is not traced again without a symbol, which would take a third
    of the time and decide nothing."""
    watched, plain, symbol, ask = Watched(), stages.assign_stages, dynamic_batch.batch_symbols, row_compiler.RowCompiler.ask

    def batch_symbols(gm: fx.GraphModule, *more: Any) -> Any:
        found = symbol(gm, *more)
        if isinstance(found, dynamic_batch.NoRows):  # its reason is the plan's
            return found
        sizes = {n.name: str([*n.meta["example_value"].shape]) for n in gm.graph.find_nodes(op="placeholder") if dynamic_batch.is_data(n)}
        watched.symbols = f"batch: {', '.join(map(str, found))}; inputs: {', '.join(f'{name} {size}' for name, size in sizes.items())}"
        return found

    def assign(graph: fx.Graph, work: Any, *more: Any) -> None:
        plain(graph, work, *more)
        for line in frontier(graph, work):
            watched.ops.setdefault(line)

    def ask_once(self: row_compiler.RowCompiler, *more: Any) -> None:
        try:
            ask(self, *more)
        except row_compiler.Declined:
            self.default = stages.ALL_ROWS
            for n in more[2]:
                n.meta[row_compiler.LEVEL] = stages.ALL_ROWS

    coverage.assign_stages = partition.assign_stages = assign
    dynamic_batch.batch_symbols = batch_symbols
    if once:
        row_compiler.RowCompiler.ask = ask_once  # type: ignore[method-assign]
    try:
        yield watched
    finally:
        coverage.assign_stages = partition.assign_stages = plain
        dynamic_batch.batch_symbols = symbol
        row_compiler.RowCompiler.ask = ask  # type: ignore[method-assign]


def frontier(graph: fx.Graph, work: Any) -> Iterator[str]:
    """The ops that block rows although everything above them runs on rows (for a merge in an unknown order with the op of the forward pass that began it),
    and what else is blocked behind them: it would stop rows next, unless it only follows from the first."""
    known = work.batch_dims
    behind: Counter[str] = Counter()
    for n in graph.nodes:
        if n not in known.blocked or work.stage.get(n) != work.post:
            continue
        if any(work.stage.get(a) == work.post for a in n.all_input_nodes):
            if not any(a in known.unlocated for a in n.all_input_nodes):
                behind[f"{n.target} [{line_of(n)}]: {known.blocked[n]}"] += 1
            continue
        yield f"{described(n)}: {known.blocked[n]}"
        for a in n.all_input_nodes:
            if a in known.unlocated:
                root = unlocated_root(a, known)
                yield f"    because of {described(root)}: {known.blocked.get(root, 'saved in an order that is not known')}"
    yield from (f"    behind it, {count}x {what}" for what, count in behind.most_common(8))


def unlocated_root(n: fx.Node, known: Any) -> fx.Node:
    while (before := next((a for a in n.all_input_nodes if a in known.unlocated), None)) is not None:
        n = before
    return n


def described(n: fx.Node) -> str:
    value = n.meta.get("val")
    shape = str(tuple(value.shape)) if isinstance(value, torch.Tensor) else ""
    given = ", ".join(f"{a.name}{tuple(a.meta['val'].shape)}" for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor))
    side = "backward of " if n.meta.get("partitioner_tag") == "is_backward" or "tangent" in n.name else ""
    return f"{n.name} = {n.target}({given}) -> {shape} [{side}{line_of(n)}]"


def line_of(n: fx.Node) -> str:
    """The model's own line that an op comes from."""
    found = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)', n.meta.get("stack_trace") or "")
    if not found:
        return "no source line"
    path, line, function, code = next((f for f in reversed(found) if "/torch/" not in f[0]), found[-1])
    return f"{'/'.join(path.split('/')[-2:])}:{line} {function}: {code.strip()}"


ROWS: dict[str, Any] = {"grad": {"axis": "rows"}}
"""The default where it chooses samples."""


def decide(entry: models.Model, config: Any = ROWS, once: bool = False) -> Decision:
    """One training forward pass of the model as the library makes it, dropout and all."""
    fresh()
    model, data = entry.make().train(), entry.data(BATCH)
    with watching(once) as watched:
        models.run(compiled(model, config, watched), data)
    return watched.decision()


def compiled(model: Callable[..., Any], config: Any, listener: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=Backend(config, inner_compile=run_as_is, on_plan=listener))


def fresh() -> None:
    torch._dynamo.reset()
    diagnostics.forget()
    torch.manual_seed(0)


def main(chosen: list[models.Model]) -> None:
    """Decisions for people: a line a model, the ops below it."""
    warnings.simplefilter("ignore")
    count_small_work()
    counts: Counter[str] = Counter()
    for entry in chosen:
        try:
            found = decide(entry, once=True)
        except Exception as e:
            found = Decision("raises", 0.0, f"{type(e).__name__}: {str(e)[:300]}", 0)
        counts[found.decision] += 1
        print(f"{found.decision:9} {found.share:4.0%}  {entry.name}  ({found.graphs} graphs)  {found.reason}", flush=True)
        for op in found.ops:
            print(f"                {op}", flush=True)
    print(", ".join(f"{n} {what}" for what, n in counts.most_common()))
