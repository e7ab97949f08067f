"""Compile one Dynamo graph with each of several settings: the assignments of a schedule, and the ratios that an adaptive output may take.

If the settings allow it, a variant is first compiled with a backward pass on sampled rows. If rows turn out not to pay, or compiling with them fails, the
graph is compiled without rows, and the plan says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx, nn

from approx_compile import _torch, machine
from approx_compile._torch.known_faults import guarded
from approx_compile.backend import dynamic_batch
from approx_compile.backend.capture.frame_parts import FrameParts
from approx_compile.backend.dynamic_batch import NoRows
from approx_compile.backend.inductor_options import after_user_passes
from approx_compile.backend.runtime import choice_recorder
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.machine import huge_pages
from approx_compile.passes.joint_graph_pass import ApproxPass, Listener
from approx_compile.passes.planning.plan import Plan
from approx_compile.passes.sites.site import Context
from approx_compile.reasons import Reason
from approx_compile.reasons.rows import DEFECT, NOT_TRAINING, SYMBOL_BREAKS
from approx_compile.rows import early_decline
from approx_compile.rows.bare_names import relative_names
from approx_compile.rows.nonlinear_below import with_hooks_noted
from approx_compile.rows.opaque_backward import expose_to_compiled_autograd
from approx_compile.rows.ownership import GraphName
from approx_compile.rows.row_compiler import Declined, RowCompiler
from approx_compile.rows.tokens.token_compiler import TokenCompiler
from approx_compile.rows.tokens.token_preference import LEAST_COVERED, prefers_tokens
from approx_compile.utils import log_once, warn_once

log = logging.getLogger("approx_compile")


@dataclass(frozen=True)
class BackendOptions:
    """The settings of a `Backend`. Backends with equal options share compiled code."""

    config: ApproxConfig
    inner_compile: Callable[..., Any] | None = None
    """Receives the partitioned forward and backward graphs in place of Inductor's code generation."""
    on_plan: Listener | None = None
    """Called with every plan and, with `keep_graphs`, the joint graph before and after the rewrite."""
    keep_graphs: bool = False


class Variant(NamedTuple):
    """A graph compiled with settings that hold at some steps."""

    call: Any
    """The compiled function."""
    uuid: str
    """The part of the cache key that comes from the joint-graph pass."""
    plan: Plan | None
    """None after a hit in Inductor's cache, because the pass did not run then."""


@dataclass
class GraphCompiler:
    """Compiles the Dynamo graph of one call of the backend, once or with several settings."""

    options: BackendOptions
    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    patches: dict[str, Any]
    """Options of Inductor."""
    context: Context
    layers: tuple[str, ...]
    """The key of the innermost module of every call, in graph order."""
    trained: Sequence[str]
    """The names of the modules with parameters whose calls are in the graph, in graph order."""
    root: nn.Module | None
    """The module that the graph belongs to, if there is exactly one."""
    frame: FrameParts
    """The frame that the graph is a part of."""
    several: bool
    """Whether the graph is compiled with more than one setting."""

    def compile(self, configs: Sequence[ApproxConfig]) -> list[Variant]:
        """Compile the graph with each of the settings.

        Settings with sampled rows are compiled first. If Dynamo was asked for a symbol for the batch's size and rows pay under none of the settings in no part
        of the frame, Dynamo is made to trace the frame again without the symbol; this method does not return then.

        Args:
            configs: Settings without a schedule, one for each variant.

        Returns:
            The variants, in the order of `configs`.

        Raises:
            ConfigError: If a setting cannot be applied to this graph.
        """
        with_rows = [i for i, c in enumerate(configs) if c.asks_for_rows() and not c.asks_for_rows("tokens")]
        if not with_rows:
            return [self._compile_without_symbol(c) for c in configs]
        request, is_first = _torch.current_request(), False
        if request is None and (variants := self._compile_on_tokens(configs, with_rows)) is not None:
            return variants
        if request is not None:
            is_first, request.answered = not request.answered, True
        symbols = self._batch_symbols(request, is_first)
        declined: dict[int, NoRows] = {}
        compiled: dict[int, Variant] = {}
        for i in with_rows:
            result = symbols if isinstance(symbols, NoRows) else self._compile_with_rows(configs[i], symbols, request is not None)
            if isinstance(result, NoRows):
                declined[i] = result
            else:
                compiled[i] = result
        reason = declined[with_rows[0]].reason if not compiled else None
        self.frame.no_rows.append(NoRows(reason, tuple(cut for no_rows in declined.values() for cut in no_rows.cuts)) if reason is not None else None)
        is_end = (is_first or self.frame.is_split) and self.frame.is_last
        if request is not None and is_end and all(self.frame.no_rows) and _torch.has_symbols(self.frame.whole):
            _torch.retrace_without_symbol(request, list(self.frame.no_rows))
        return [compiled[i] if i in compiled else self._compile_without_symbol(c, declined.get(i)) for i, c in enumerate(configs)]

    def name(self) -> GraphName:
        """Name the graph by its modules with parameters, as they stand below the module that they have in common.

        Returns:
            Short digests, the same in every process. The name is the same for all sizes and precisions of the inputs and whatever wraps the model. The
            former name is made from the modules of all calls.
        """
        called = [self.context.modules[k.split("@")[0]].name if k else "" for k in self.layers]
        return GraphName(_digest(relative_names(self.trained)), _digest(called))

    def _compile_with_rows(self, config: ApproxConfig, symbols: Sequence[sympy.Symbol], symbol_was_requested: bool) -> Variant | NoRows:
        """Compile the graph with a backward pass on sampled rows, or return the reason why that is not done.

        A failure is such a reason too. Only errors in the settings and errors that Dynamo passes to the user unchanged are raised.
        """
        elsewhere = early_decline.flops_elsewhere(self.gm, self.frame.whole, config) if self.frame.is_split else 0
        rows = RowCompiler(symbols, config, self.options.inner_compile, self.root, self.name(), symbol_was_requested, elsewhere)
        try:
            with _warnings_if_successful():
                return self._compile_one(config, rows, may_compile_again=not symbol_was_requested)
        except Declined as e:
            return NoRows(e.reason, tuple(rows.cuts))
        except (ConfigError, _torch.UnwrappedBackendError, _torch.RestartAnalysis):
            raise
        except Exception as e:
            log.debug("approx: the graph does not compile with rows", exc_info=True)
            return NoRows(_internal_defect(e) or _torch.symbol_failure_reason(e))

    def _compile_on_tokens(self, configs: Sequence[ApproxConfig], with_rows: Sequence[int]) -> list[Variant] | None:
        """Compile the graph with tokens under all settings that leave open whether samples or tokens are chosen; None where samples are preferred.

        Args:
            configs: The settings of the variants.
            with_rows: Which of them ask for samples or leave that open.
        """
        if not all(configs[i].leaves_axis_open() for i in with_rows) or self.context.nothing_trains() or self.context.exact is not None:
            return None
        if not prefers_tokens(self.frame.whole):
            return None
        compiled: dict[int, Variant] = {}
        declined: dict[int, NoRows] = {}
        least_share = LEAST_COVERED if len(with_rows) == 1 else 0.0  # settings of other times may keep most layers exact
        for i in with_rows:
            try:
                with _warnings_if_successful():
                    compiled[i] = self._with_tokens(configs[i].on_tokens(), may_decline=not self.frame.is_split, least_share=least_share)
            except Declined as e:
                declined[i] = NoRows(e.reason)
            except (ConfigError, _torch.UnwrappedBackendError, _torch.RestartAnalysis):
                raise
            except Exception as e:
                log.debug("approx: the graph does not compile with tokens", exc_info=True)
                declined[i] = NoRows(DEFECT(error=f"{type(e).__name__}: {str(e)[:200]}"))
                warn_once(f"approx: tokens are not sampled; samples are, where that is possible: {declined[i].reason}")
        if not compiled:
            return None
        self.frame.no_rows.append(None)
        return [compiled[i] if i in compiled else self._compile_without_symbol(c, declined.get(i)) for i, c in enumerate(configs)]

    def _with_tokens(self, config: ApproxConfig, may_decline: bool = False, least_share: float | None = None) -> Variant:
        """Compile the graph with tokens.

        Args:
            config: The settings.
            may_decline: Whether `Declined` is raised where that is not worth it.
            least_share: The least share of the FLOPs in regions; None where the graph is not compiled again if this fails.
        """
        parameters = [i for i, v in enumerate(self.context.inputs) if v.parameter and v.requires_grad]
        compiler = TokenCompiler(config, self.options.inner_compile, self.root, self.name(), parameters, may_decline, self.trained, least_share or 0.0)
        return self._compile_one(config, compiler, may_compile_again=least_share is not None)

    def _compile_without_symbol(self, config: ApproxConfig, no_rows: NoRows | None = None) -> Variant:
        """Compile the graph without a symbol for the batch's size: with tokens, or exactly. `no_rows` is the reason why not with rows."""
        if not config.asks_for_rows("tokens"):
            return self._compile_one(config, None, no_rows)
        if self.context.nothing_trains() or self.context.exact is not None:
            return self._compile_one(config, None, NoRows(self.context.exact or NOT_TRAINING()))
        return self._with_tokens(config)

    def _compile_one(
        self, config: ApproxConfig, rows: RowCompiler | TokenCompiler | None, no_rows: NoRows | None = None, may_compile_again: bool = False
    ) -> Variant:
        """Compile the graph with one setting: on sampled rows if `rows` is given, else without them. The plan then shows the reason `no_rows`, if any."""
        options, planned = self.options, list[tuple[Plan, fx.Graph | None, fx.Graph | None]]()
        profile = _device_profile(self.example_inputs) if config.asks_for_products() else None
        approx = ApproxPass(config, self.context, self.layers, lambda *plan: planned.append(plan), options.keep_graphs, rows.ask if rows else None, profile)
        inner: Callable[..., Any] | None = rows if rows is not None else options.inner_compile
        if choice_recorder.may_be_sent() and config.asks_for_products():
            inner = choice_recorder.ChoiceRecorder(_torch.compile_graph if inner is None else inner, planned, self.example_inputs)
        gm = _torch.copy_dynamo_graph(self.gm) if self.several or may_compile_again else self.gm
        patches = huge_pages.patches(config, self.patches) | self.patches | {"joint_custom_pre_pass": after_user_passes(approx)}
        compiled = _torch.compile_fx(gm, self.example_inputs, guarded(patches), inner, options.inner_compile is None, self.several)
        if rows is not None:
            compiled = expose_to_compiled_autograd(compiled) if isinstance(rows, RowCompiler) else with_hooks_noted(compiled)
        whole: Plan | None = None
        for plan, before, after in planned:  # the pass also runs on graphs inside the graph
            plan = plan.without_rows(no_rows.reason, no_rows.cuts) if no_rows is not None else plan.with_cuts(rows.cuts) if rows is not None else plan
            whole = plan if whole is None else whole.joined(plan)
            if options.on_plan is not None:
                options.on_plan(plan, before, after)
        return Variant(compiled, approx.uuid(), whole)

    def _batch_symbols(self, request: _torch.SymbolRequest | None, is_first: bool) -> Sequence[sympy.Symbol] | NoRows:
        """Return the symbols that may be the batch's size, or the reason why rows cannot be sampled. May make Dynamo trace again, with or without a symbol."""
        if self.context.nothing_trains():
            return NoRows(NOT_TRAINING())
        if self.context.exact is not None:
            return NoRows(self.context.exact)
        if request is not None and request.why_not is not None:
            why_not = request.why_not
            return why_not[self.frame.number] if isinstance(why_not, list) else NoRows(why_not)
        if request is not None and is_first and _torch.count_tensors(self.frame.whole) < request.size:
            _torch.retrace_without_symbol(request, SYMBOL_BREAKS())
        return dynamic_batch.batch_symbols(self.gm, self.options.config, self.frame.whole)


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(repr(list(names)).encode()).hexdigest()[:12] + ":"


def representative_plan(variants: Sequence[Variant], configs: Sequence[ApproxConfig], config: ApproxConfig) -> Plan | None:
    """Choose the plan that notices to the user describe: the one that samples most.

    Args:
        variants: All variants of a graph.
        configs: The settings of each variant.
        config: The user's settings.

    Returns:
        The plan, whose `unmatched` holds the patterns that match no site in any variant whose settings have them. None if a variant comes from a cache.
    """
    plans = [v.plan for v in variants if v.plan is not None]
    if len(plans) < len(variants):
        return None
    if len(plans) == 1:
        return plans[0]
    matched = {p.text for plan, c in zip(plans, configs, strict=True) for p in c.patterns() if p.text not in plan.unmatched}
    return replace(max(plans, key=lambda p: p.sampled), unmatched=tuple(p.text for p in config.patterns() if p.text not in matched))


@contextlib.contextmanager
def _warnings_if_successful() -> Iterator[None]:
    """Show the warnings of the block only if it succeeds. After a failure the graph is compiled in another way, and they do not concern the user."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for w in caught:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)


def _internal_defect(error: Exception) -> Reason | None:
    """Describe an error that this package's own code has raised, and warn the user of it; return None for any other error."""
    *_, last = traceback.extract_tb(error.__traceback__)
    if not Path(last.filename).is_relative_to(Path(__file__).parent.parent):
        return None
    defect = DEFECT(error=f"{type(error).__name__}: {str(error)[:200]}, {Path(last.filename).name}:{last.lineno}")
    warn_once(f"approx: rows are not sampled: {defect}")
    return defect


def _device_profile(example_inputs: Sequence[Any]) -> machine.Machine | None:
    """Return the profile of the device that the model is on, if that device can be measured."""
    devices = {v.device.type for v in example_inputs if isinstance(v, torch.Tensor)}
    device = next(iter(devices - {"cpu"}), "cpu")
    return machine.current(device, log_once) if device in machine.DEVICES else None


def profile_digest(example_inputs: Sequence[Any]) -> str | None:
    """Return the digest of the profile of the device that a model is on, without measuring one; None without a profile."""
    device = next((v.device.type for v in example_inputs if isinstance(v, torch.Tensor)), "cpu")
    profile = machine.stored(device)
    return profile.digest if profile is not None else None
