"""Compile a backward graph whose regions run on some of their tokens, between AOTAutograd and Inductor.

The graph is rewritten in place, with the number of tokens of each region as a symbol that the caller hands in, so that Inductor sees one graph. Where all
tokens may be kept, the graph is also compiled as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from approx_compile import _torch, machine
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.resolve import LEAST_ROWS, RowSettings
from approx_compile.passes.fx_utils import copy_of
from approx_compile.passes.planning.plan import RowCut
from approx_compile.passes.sites.site import PRODUCT_KEY
from approx_compile.reasons import Reason, join
from approx_compile.reasons.decisions import TOKENS_OF
from approx_compile.reasons.rows import DEFECT, FEW_FLOPS_ON_TOKENS, NO_TOKEN_REGION, UNMEASURED_NO_PARAMETERS
from approx_compile.rows.bare_names import relative_names
from approx_compile.rows.controller import StepFlops
from approx_compile.rows.ownership import UNNAMED, GraphName
from approx_compile.rows.row_compiler import Declined, _boxed, _with_donated_inputs_copied
from approx_compile.rows.source_place import source_place
from approx_compile.rows.tokens import token_cost
from approx_compile.rows.tokens.regions import Region, find_regions, gradients_of
from approx_compile.rows.tokens.rewrite import Count, rewrite
from approx_compile.rows.tokens.token_backward import RegionPlan, TokenBackward, TokenControls
from approx_compile.rows.variance_budget import unmeasured_reason
from approx_compile.utils import warn_once

log = logging.getLogger("approx_compile")

SETTINGS_KEY = "approx_compile_tokens"
"""Key in the meta of a gradient product: the index of the settings that hold for its tokens. Without it the product runs on all tokens."""


class TokenCompiler:
    """An `inner_compile` for one call of `compile_fx`, like `RowCompiler`. `ask` must be called first, with the joint graph."""

    def __init__(
        self,
        config: ApproxConfig,
        inner: Callable[..., Any] | None,
        root: nn.Module | None = None,
        name: GraphName = UNNAMED,
        parameters: Collection[int] = (),
        may_decline: bool = False,
        modules: Sequence[str] = (),
        least_share: float = 0.0,
    ) -> None:
        """Store the settings of one compilation; see `RowCompiler`.

        Args:
            config: The settings.
            inner: The compiler between AOTAutograd and code.
            root: The module that is compiled.
            name: The name of the graph.
            parameters: The places of the parameters among the inputs of the graph.
            may_decline: Whether `Declined` is raised where there is no region that is worth it, rather than all tokens kept.
            modules: The names of the modules with parameters whose calls are in the graph.
            least_share: The least share of the gradients' FLOPs in regions below which a compiler that may decline does so.
        """
        self.config = config
        self.inner = _torch.compile_graph if inner is None else inner
        self.root = root
        self.name = name
        self.parameters = frozenset(parameters)
        self.may_decline = may_decline
        self.modules = tuple(modules)
        self.least_share = least_share
        self._forward_flops = 0
        self.levels: list[RowSettings] = []
        self.cuts: list[RowCut] = []

    def ask(self, graph: fx.Graph, top: RowSettings | None, sites: Mapping[fx.Node, RowSettings | None], excluded: Collection[fx.Node] = frozenset()) -> None:
        """Note what the settings ask of each gradient product.

        Args:
            graph: The joint graph.
            top: The settings where there is no site; not used, because tokens are chosen for sites only.
            sites: The settings of gradient products, None for all tokens.
            excluded: Gradient products that must be computed from all tokens; not used, because every product has settings of its own here.

        Raises:
            Declined: If the compiler may decline, and no region is worth running on tokens.
        """
        self.levels = list(dict.fromkeys(s for s in sites.values() if s is not None))
        for node, settings in sites.items():
            if settings is not None and PRODUCT_KEY in node.meta:
                node.meta[SETTINGS_KEY] = self.levels.index(settings)
        if self.may_decline and _torch.has_backward(graph):
            regions, reason = self._worthwhile(graph)
            share = sum(r.flops for r in regions) / max(1, sum(_torch.flops(n) for n in gradients_of(graph)))
            if not regions or share < self.least_share:
                raise Declined(reason if not regions else FEW_FLOPS_ON_TOKENS(share=share))

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **kwargs: Any) -> Any:
        """Compile a forward graph as it is, or a backward graph whose regions run on some of their tokens.

        Args:
            gm: The graph. It may be edited.
            example_inputs: Fake inputs to compile it with.
            is_backward: Whether it is the backward graph.
            **kwargs: Further arguments for the inner compiler.

        Returns:
            The compiled graph.
        """
        if not is_backward:
            self._forward_flops = sum(map(_torch.flops, gm.graph.nodes))
            return self.inner(gm, example_inputs, is_backward=False, **kwargs)
        try:
            return self._backward(gm, example_inputs, kwargs)
        finally:
            _torch.clear_donated_inputs()  # the function that `_backward` returns handles donated inputs itself

    def _backward(self, gm: fx.GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Compile a backward graph with its regions on tokens; as it is where there are none, or where that fails."""
        names, donated = [n.name for n in gm.graph.find_nodes(op="placeholder")], _torch.donated_placeholders(gm)
        regions, reason = self._worthwhile(gm.graph)
        self._record_cuts(gm.graph, regions, reason)
        plain = copy_of(gm) if regions else gm
        if regions:
            try:
                return self._on_tokens(gm, plain, regions, example_inputs, kwargs, donated)
            except (ConfigError, _torch.UnwrappedBackendError):
                raise
            except Exception as e:
                if self.may_decline:
                    raise
                log.debug("approx: the graph does not compile with tokens", exc_info=True)
                defect = DEFECT(error=f"{type(e).__name__}: {str(e)[:200]}")
                warn_once(f"approx: tokens are not sampled: {defect}")
                self.cuts = []
                self._record_cuts(plain.graph, [], defect)
        return _with_donated_inputs_copied(self.inner(plain, example_inputs, is_backward=True, **kwargs), names, donated)

    def _on_tokens(
        self, gm: fx.GraphModule, plain: fx.GraphModule, regions: Sequence[Region], example_inputs: Sequence[Any], kwargs: dict[str, Any], donated: set[str]
    ) -> Any:
        """Rewrite a backward graph and compile it. `plain` is a copy of it, for all tokens."""
        names, plans = [n.name for n in gm.graph.find_nodes(op="placeholder")], [self._plan(r) for r in regions]
        gradients = _gradients_of_parameters(gm.graph, self.parameters)
        counts, seeds = _add_inputs(gm.graph, regions)
        try:
            norms = rewrite(gm.graph, regions, counts, seeds, [p.settings.method for p in plans])
            _add_outputs(gm.graph, norms)
            gm.recompile()
            inputs = [*example_inputs, seeds.meta["val"], *(c.node.meta["val"] for c in counts)]
            call = self.inner(gm, inputs, is_backward=True, **kwargs)
        finally:
            guards = _torch.take_guards([c.symbol for c in counts], gm.graph)
        adaptive = all(p.settings.ratio is None for p in plans)
        whole = self.inner(plain, example_inputs, is_backward=True, **kwargs) if adaptive else None
        total = sum(_torch.flops(n) for n in gradients_of(plain.graph)) + self._forward_flops
        work = [StepFlops(p.flops, total / len(plans)) for p in plans]
        places = {i: f"tokens of {p.place}" for i, p in enumerate(plans, 1)}
        unmeasured = unmeasured_reason(plain.graph) if gradients else UNMEASURED_NO_PARAMETERS()
        names_of_controls = keys_of_regions([p.layers for p in plans], self.modules)
        controls = TokenControls(self.config, self.root, self.name + "tokens:", [p.settings for p in plans], places, work, unmeasured, names_of_controls)
        controls.weights = token_cost.variance_weights([p.flops for p in plans])
        backward = TokenBackward(call, plans, [c.symbol for c in counts], guards, names, example_inputs, controls, donated, whole, gradients)
        return _boxed(backward)

    def _worthwhile(self, graph: fx.Graph) -> tuple[list[Region], Reason]:
        """The regions that are worth running on tokens, and why the rest of the graph is not on tokens."""
        products = {n: str(n.meta[PRODUCT_KEY]) for n in graph.nodes if SETTINGS_KEY in n.meta}
        blocked: dict[Reason, fx.Node] = {}
        regions, declined = [], dict[Reason, None]()
        device = next((n.meta["val"].device.type for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)), "cpu")
        for region in find_regions(graph, products, blocked):
            reason = None if self.config.policy == "always" else token_cost.rejection_reason(region, self._settings(region), machine.stored(device), device)
            if reason is None:
                regions.append(region)
            else:
                declined[reason] = None
        reasons = (*declined, *(reason.at(source_place(n)) for reason, n in blocked.items()))
        return regions, join(reasons) if reasons else NO_TOKEN_REGION()

    def _settings(self, region: Region) -> RowSettings:
        """The settings of a region: those of its products that keep most."""
        asked: list[RowSettings] = [self.levels[n.meta[SETTINGS_KEY]] for n in region.products]
        return max(asked, key=lambda s: 2.0 if s.ratio is None else s.ratio)

    def _plan(self, region: Region) -> RegionPlan:
        layers = dict.fromkeys(source_place(n).split(",")[0] for n in region.products)
        return RegionPlan(_torch.size_expr(region.tokens), self._settings(region), tuple(filter(None, layers)), region.flops)

    def _record_cuts(self, graph: fx.Graph, regions: Sequence[Region], reason: Reason) -> None:
        """Add a `RowCut` for each region to what is reported; without regions one that says why."""
        total = sum(_torch.flops(n) for n in gradients_of(graph))
        for i, region in enumerate(regions, 1):
            asked, plan = self._settings(region), self._plan(region)
            products = tuple(n.name for n in region.products)
            flops = (total, region.flops)
            why = TOKENS_OF(layers=plan.place)
            self.cuts.append(RowCut(asked.method, asked.ratio, _torch.hint(region.tokens), "rows", why, *flops, products, i, False, axis="tokens"))
        for asked in () if regions else self.levels[:1]:
            self.cuts.append(RowCut(asked.method, asked.ratio, 0, "exact", reason, total, 0, (), 1, True, axis="tokens"))


def keys_of_regions(layers: Sequence[Sequence[str]], modules: Sequence[str]) -> list[str]:
    """Name regions by their layers, so that regions of several graphs of the same code share a control, whatever other regions these graphs have.

    Args:
        layers: For each region the places of its products (`source_place`): names of modules, or files and lines of code outside of modules.
        modules: The names of all modules with parameters that the graphs call.

    Returns:
        The layers' names without what the names of all modules begin with; for places that are no modules, and for names that are there already, numbers.
    """
    relative = dict(zip(dict.fromkeys(modules), relative_names(modules), strict=True))
    keys: list[str] = []
    for region in layers:
        names = {relative[m] or m for place in region for m in relative if _is_below(m, place) or _is_below(place, m)}
        key, number = "+".join(sorted(names)), 2 if names else 1
        while key in ("", *keys):
            key, number = f"{'+'.join(sorted(names))}#{number}", number + 1
        keys.append(key)
    return keys


def _is_below(name: str, outer: str) -> bool:
    """Whether a name is another one behind a prefix: names of one module differ by what wraps the model."""
    return name == outer or name.endswith(f".{outer}")


def _gradients_of_parameters(graph: fx.Graph, parameters: Collection[int]) -> list[int]:
    """Return the places of the gradients of parameters among the outputs of a backward graph, given those of the parameters among the graph's inputs."""
    results = _torch.tree_leaves(next(n for n in reversed(graph.nodes) if n.op == "output").args[0])
    return [results.index(n) for i, n in _torch.gradient_outputs(graph).items() if i in parameters]


def _add_inputs(graph: fx.Graph, regions: Sequence[Region]) -> tuple[list[Count], fx.Node]:
    """Add placeholders for the seeds and for the number of tokens of each region; return the latter and the former."""
    mode = _torch.graph_fake_mode(graph)
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        seeds = graph.placeholder("token_seeds")
    with mode:
        seeds.meta["val"] = torch.empty(len(regions), dtype=torch.int64, device="cpu")
    counts, last = [], seeds
    for i, region in enumerate(regions):
        size = _torch.new_size(graph, max(LEAST_ROWS, _torch.hint(region.tokens) // 2))
        with graph.inserting_after(last):
            last = graph.placeholder(f"token_count_{i}")
        last.meta["val"] = size
        counts.append(Count(last, _torch.size_expr(size)))
    return counts, seeds


def _add_outputs(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Return further values behind the results of a graph."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.args = ((*output.args[0], *nodes),)  # type: ignore[misc]
    graph.eliminate_dead_code()
    graph.lint()
