"""Inductor's joint-graph pass: find the sites of a graph, plan them step by step, rewrite the graph; and the key under which Inductor may cache the result."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.resolve import RowSettings
from approx_compile.kernels import availability
from approx_compile.machine import Machine, site_timings
from approx_compile.passes.cost.estimates import CostModel
from approx_compile.passes.planning.gradient_replacement import replace_gradients
from approx_compile.passes.planning.index_sharing import share_indices
from approx_compile.passes.planning.kept_channels import with_kept_channels
from approx_compile.passes.planning.plan import Candidates, Plan
from approx_compile.passes.planning.planner import begin_plan, select_candidates
from approx_compile.passes.planning.producer_narrowing import Producers
from approx_compile.passes.planning.rule_matching import row_requests
from approx_compile.passes.planning.timing_request import timing_request
from approx_compile.passes.planning.unit_choice import choose_units
from approx_compile.passes.planning.zero_skipping import skip_zeros
from approx_compile.passes.rewrite.apply_plan import apply_plan
from approx_compile.passes.rewrite.relu_max_pool import move_relu_mask_before_unpooling
from approx_compile.passes.sites.find_sites import find_sites, linear_layers_without_site
from approx_compile.passes.sites.site import PRODUCT_KEY, Context, Site

log = logging.getLogger("approx_compile")

AskRows = Callable[[fx.Graph, RowSettings | None, dict[fx.Node, RowSettings | None], set[fx.Node]], None]
"""Receives a joint graph and what is asked of the rows of the batch: where the backward pass begins, at every gradient product, and the gradient products that
must be computed from all rows."""

Listener = Callable[[Plan, fx.Graph | None, fx.Graph | None], None]
"""Receives the plan of a graph and, if they are kept, copies of the graph before and after the rewrite."""

PlanStep = Callable[[Plan], Plan]
"""One decision of planning: takes the plan made so far and returns it with that decision."""


class ApproxPass(_torch.CustomGraphPass):
    """The joint-graph pass of one compiled graph.

    `uuid` covers everything the pass reads that is not in the graph's own text: the config, every module's name and mode in graph order, which inputs are
    parameters, data or need gradients, the machine's (rounded) profile, the precision that torch allows and the code of this package.
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
        """Bind the pass to what it reads besides the graph.

        Args:
            config: The config.
            context: What is known of the graph's modules and inputs.
            layers: Keys of the modules in graph order; "" for a node without a module.
            on_plan: Receives the plan.
            keep_graphs: Whether `on_plan` also receives the graph before and after.
            ask_rows: Receives what is asked of the rows of the batch.
            machine: Profile of the machine; without one nothing is decided by time.
        """
        self.config = config
        self.machine = machine
        self.context = context
        self.on_plan = on_plan
        self.keep_graphs = keep_graphs
        self.ask_rows = ask_rows
        self._uuid = cache_key(config, context, layers, machine)

    def __call__(self, graph: fx.Graph) -> None:
        """Plan and rewrite a joint graph in place.

        Raises:
            ConfigError: A tuned plan does not fit the graph, or the backward pass would draw random choices again.
        """
        before = _copy(graph) if self.keep_graphs else None
        move_relu_mask_before_unpooling(graph)
        sites = find_sites(graph, self.context)
        plan = self._plan(graph, sites)
        if self.ask_rows is not None:
            _mark_products(sites)
            self.ask_rows(graph, *row_requests(sites, self.config))
        _refuse_redrawn(plan)
        if plan.sampled:
            apply_plan(graph, sites, plan)
        self.on_plan(plan, before, _copy(graph) if self.keep_graphs else None)

    def _plan(self, graph: fx.Graph, sites: Sequence[Site]) -> Plan:
        """Run the planning steps in order. Rows of the batch are decided later, on the backward graph (see `Plan.with_cuts`)."""
        cost = CostModel(self.machine)
        plan, inputs = begin_plan(sites, linear_layers_without_site(graph, sites, self.context), self.config, cost)
        producers = Producers(sites, cost)
        steps: tuple[PlanStep, ...] = (
            lambda plan: select_candidates(plan, inputs, self._time_sites, producers.producer_time_delta),
            lambda plan: share_indices(plan, inputs),
            lambda plan: replace_gradients(plan, inputs),
            lambda plan: choose_units(plan, inputs, producers, self.config),
            producers.narrow,
            lambda plan: skip_zeros(plan, inputs),
            lambda plan: with_kept_channels(plan, graph, sites, self.context.inputs),
        )
        for step in steps:
            plan = step(plan)
        return plan

    def _time_sites(self, sites: Sequence[tuple[Site, Candidates]]) -> list[list[float]]:
        """Measured times in us of sites: of the exact products, then of each candidate."""
        assert self.machine is not None
        with _torch.disable_torch_modes():
            requests = [timing_request(site, candidates, self.config.huge_pages) for site, candidates in sites]
            return site_timings.step_times_us(requests, self.machine, log.warning)

    def uuid(self) -> Any:
        """Return the key under which Inductor may cache what this pass makes of a graph."""
        return self._uuid


def cache_key(config: ApproxConfig, context: Context, layers: tuple[str, ...], machine: Machine | None = None) -> str:
    """Return a hash of everything that decides a rewrite besides the graph.

    Args:
        config: The config.
        context: What is known of the graph's modules and inputs.
        layers: Keys of the modules in graph order; "" for a node without a module.
        machine: Profile of the machine.
    """
    modules = [(key, context.modules[key.split("@")[0]]) if key else None for key in layers]
    first_seen: dict[str, int] = {}
    order = [(first_seen.setdefault(m[0], len(first_seen)), asdict(m[1])) if m else None for m in modules]
    profile = (machine.digest, site_timings.store_id(machine) if config.measures() else None) if machine is not None else None
    environment = (profile, code_version(), availability.environment_key())
    parts = (config.digest(), order, asdict(context.root), [asdict(i) for i in context.inputs], context.exact, context.last_module, environment)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """Return a hash of torch's version and of this package's sources, so that changed code never hits what the old code compiled."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(p for p in root.rglob("*.*") if p.suffix in (".py", ".cu", ".cuh")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _mark_products(sites: Sequence[Site]) -> None:
    """Let the gradient products of linear layers say what they are: in a backward graph alone, their two operands can't be told apart."""
    for site in sites:
        for p in site.products[1:] if site.kind == "linear" and site.blocked is None else ():
            p.node.meta[PRODUCT_KEY] = p.name


def _refuse_redrawn(plan: Plan) -> None:
    """Raise ConfigError if a recomputation in the backward pass might draw a random choice again and get another one."""
    budget = _torch.activation_memory_budget()
    if budget < 1 and plan.draws_in_forward:
        raise ConfigError(
            f"torch._functorch.config.activation_memory_budget is {budget}: the backward pass may then draw a random choice again and get another one. "
            "Use method 'topk' or 'topk_weights', sampling 'backward', or a budget of 1"
        )


def _copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new
