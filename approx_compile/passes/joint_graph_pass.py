"""The passes joined: find sites, plan, rewrite; and the key under which Inductor may cache what comes out."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.resolve import RowSettings
from approx_compile.kernels import availability
from approx_compile.machine import Machine, site_timings
from approx_compile.passes.planning.plan import Candidates, Plan
from approx_compile.passes.planning.planner import make_plan, needs_random_numbers
from approx_compile.passes.planning.producer_narrowing import Producers
from approx_compile.passes.planning.rule_matching import row_requests, unmatched_layers
from approx_compile.passes.planning.timing_request import timing_request
from approx_compile.passes.planning.zero_skipping import skip_zeros
from approx_compile.passes.rewrite.apply_plan import apply_plan
from approx_compile.passes.rewrite.relu_max_pool import move_relu_mask_before_unpooling
from approx_compile.passes.sites.find_sites import find_sites, linear_layers_without_site
from approx_compile.passes.sites.site import Context, Site

log = logging.getLogger("approx_compile")

AskRows = Callable[[fx.Graph, RowSettings | None, dict[fx.Node, RowSettings | None]], None]
"""Is told what is asked of the rows at the top, and at every gradient product of a joint graph."""

Listener = Callable[[Plan, fx.Graph | None, fx.Graph | None], None]
"""Gets the plan of a graph and, if it asked for them, the graph before and after."""


class ApproxPass(_torch.CustomGraphPass):
    """Inductor's joint-graph pass of one compiled graph.

    `uuid` covers everything the pass reads that is not in the graph's own text: the config, every module's name and mode in graph order,
    which inputs are parameters, data or need gradients, the machine's (rounded) profile, the precision that torch allows and the code of this package.
    """

    def __init__(
        self,
        config: ApproxConfig,
        context: Context,
        layers: tuple[str, ...],
        on_plan: Listener,
        keep_graphs: bool = False,
        ask_rows: AskRows | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.config = config
        self.machine = machine
        self.context = context
        self.on_plan = on_plan
        self.keep_graphs = keep_graphs
        self.ask_rows = ask_rows
        self._uuid = cache_key(config, context, layers, machine)

    def _ask(self, asked: Sequence[tuple[Site, Candidates]]) -> list[list[float]]:
        assert self.machine is not None
        with _torch.disable_torch_modes():
            return site_timings.step_times_us([timing_request(site, tries, self.config.huge_pages) for site, tries in asked], self.machine, log.warning)

    def __call__(self, graph: fx.Graph) -> None:
        before = _copy(graph) if self.keep_graphs else None
        move_relu_mask_before_unpooling(graph)
        sites = find_sites(graph, self.context)
        producers = Producers(sites, self.machine)
        plan = make_plan(sites, self.config, self.machine, self._ask if self.machine is not None else None, producers.beside)
        plan = replace(plan, remarks=(*plan.remarks, *unmatched_layers(linear_layers_without_site(graph, sites, self.context), self.config)))
        if self.machine is not None:
            plan = skip_zeros(sites, producers.shrink(plan), self.machine)
        if self.ask_rows is not None:
            self.ask_rows(graph, *row_requests(sites, self.config))
        _refuse_redrawn(plan)
        if plan.sampled:
            apply_plan(graph, sites, plan)
        self.on_plan(plan, before, _copy(graph) if self.keep_graphs else None)

    def uuid(self) -> Any:
        return self._uuid


def cache_key(config: ApproxConfig, context: Context, layers: tuple[str, ...], machine: Machine | None = None) -> str:
    """A hash of all that decides a rewrite besides the graph."""
    modules = [(key, context.modules[key.split("@")[0]]) if key else None for key in layers]
    first_seen: dict[str, int] = {}
    order = [(first_seen.setdefault(m[0], len(first_seen)), asdict(m[1])) if m else None for m in modules]
    profile = (machine.digest, site_timings.store_id(machine) if config.measures() else None) if machine is not None else None
    here = (profile, code_version(), availability.environment_key())
    parts = (config.digest(), order, asdict(context.root), [asdict(i) for i in context.inputs], context.exact, context.last_module, here)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """A hash of this package's sources: another version of a kernel must not hit what the old one compiled."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(p for p in root.rglob("*.*") if p.suffix in (".py", ".cu", ".cuh")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _refuse_redrawn(plan: Plan) -> None:
    budget = _torch.activation_memory_budget()
    if budget < 1 and needs_random_numbers(plan):
        raise ConfigError(
            f"torch._functorch.config.activation_memory_budget is {budget}: the backward pass may then draw a random choice again and get another one. "
            "Use method 'topk' or 'topk_weights', sampling 'backward', or a budget of 1"
        )


def _copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new
