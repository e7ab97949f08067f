"""Dynamo graph in; Inductor, with our pass on the joint graph, out.

Here are the things only this moment knows: the layers' names, which modules train, which inputs are parameters. They become the pass's
`Context`, and guards, so that a switch of mode compiles once more and never runs the other mode's code.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx, nn

from approx_compile import _torch, machine
from approx_compile._torch.known_faults import guarded
from approx_compile.backend import diagnostics
from approx_compile.backend.capture.annotate import SIGNATURE, full_name, last_module, sign, whole_model
from approx_compile.backend.capture.module_resolution import Layers
from approx_compile.backend.runtime.output_probe import Outputs
from approx_compile.backend.runtime.schedule import Dispatch, Schedule, count_steps
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.machine import huge_pages
from approx_compile.passes.joint_graph_pass import ApproxPass, Listener
from approx_compile.passes.planning.plan import Plan, RowCut
from approx_compile.passes.planning.plan_validation import check_modules
from approx_compile.passes.sites.site import Context, Input, Module
from approx_compile.rows import early_decline
from approx_compile.rows.opaque_backward import shown_as_one_op
from approx_compile.rows.row_compiler import Declined, RowCompiler
from approx_compile.utils import say_once, warn_once

log = logging.getLogger("approx_compile")

DISABLE = "APPROX_COMPILE_DISABLE"
_TRANSFORMS = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting")


class Backend:
    """The backend as an object: `torch.compile(model, backend=Backend(ApproxConfig(...)))`.

    Checks its config at once, where the string form first sees its options when the model is first called. `inner_compile`: what gets the
    partitioned forward and backward graphs in place of Inductor's code generation; `approx_compile.backend.run_as_is` runs them op by op.
    """

    def __init__(
        self,
        config: ApproxConfig | Mapping[str, Any] | None = None,
        *,
        inner_compile: Callable[..., Any] | None = None,
        on_plan: Listener | None = None,
        keep_graphs: bool = False,
    ) -> None:
        self.config = ApproxConfig.of(config)
        self.schedule = Schedule.of(self.config)
        self.inner_compile = inner_compile
        self.on_plan = on_plan
        self.keep_graphs = keep_graphs

    def __eq__(self, other: object) -> bool:
        """Equal settings share compiled code, as equal `options` of the string form do."""
        return isinstance(other, Backend) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.config)

    def _key(self) -> tuple[Any, ...]:
        return (self.config, self.inner_compile, self.on_plan, self.keep_graphs)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, **kwargs: Any) -> Any:
        patches = inductor_patches(self.config, mode)
        if os.environ.get(DISABLE) == "1" or not torch.is_grad_enabled():  # no gradient: exact, and no guard on the modules' mode
            return _torch.compile_fx(gm, example_inputs, guarded(patches), self.inner_compile, self.inner_compile is None)
        context, layers, root = read_graph(gm, example_inputs, self.config)
        configs, which = self.schedule.relevant([context.root.name, *(m.name for m in context.modules.values())])
        if context.nothing_trains():
            configs = configs[:1]
        rungs = [c.rungs() if not context.nothing_trains() else c.rungs()[-1:] for c in configs]
        flat = [config for own in rungs for _, config in own]
        work = _Work(self, gm, example_inputs, patches, context, layers, root, len(flat) > 1)
        variants = work.compile(flat)
        if self.on_plan is None:
            record = diagnostics.Record(self.config, root, layers, context, gm.code, _standing_for_all(variants, flat, self.config), len(configs))
            record.announce("".join(v.uuid for v in variants), example_inputs)
        if len(variants) == 1:
            return variants[0].call
        return self._switching(rungs, variants, which, _parameters(example_inputs), work.key(), root)

    def _switching(
        self, rungs: Sequence[Sequence[tuple[float, Any]]], variants: Sequence[_Variant], which: Sequence[int], parameters: Sequence[int], key: str, root: Any
    ) -> Any:
        """One function of all that was compiled: the assignment that holds, and of its rungs the one that its control says."""
        left, compiled, name = iter(variants), [v.call for v in variants], diagnostics.name_of(root)
        calls: list[Any] = []
        for i, own in enumerate(rungs):
            by_ratio = {ratio: next(left) for ratio, _ in own}
            found = any(v.plan is None or any(s.products[0].decision == "sampled" for s in v.plan.sites) for v in by_ratio.values())
            ladder = {r: v.call for r, v in by_ratio.items()}
            calls.append(Outputs(self.config.adaptive, ladder, parameters, f"{key}{i or ''}") if found and len(ladder) > 1 else ladder[max(ladder)])
        run = calls[0]
        if len(calls) > 1:
            if (why := _uncounted(root, parameters)) is not None:
                warn_once(f"approx: {name} {why}: the settings of step 0, without a phase, go on holding there")
            count_steps()
            run = Dispatch(self.schedule, calls, which, parameters, name)
        first_is_fake = _torch.first_call_is_fake()

        def call(*args: Any) -> Any:  # a plain function is what wrappers of compiled code expect
            nonlocal first_is_fake
            if first_is_fake:  # DDPOptimizer's, after which every compiled function expects real tensors
                first_is_fake = False
                first, *_ = [f(*args) for f in compiled]
                return first
            return run(*args)

        return call


class _Variant(NamedTuple):
    """A graph compiled with settings that hold at some steps."""

    call: Any
    uuid: str
    plan: Plan | None


@dataclass(frozen=True)
class NoRows:
    """Why the rows of a graph are not sampled, and the cuts that might have been."""

    reason: str
    cuts: tuple[RowCut, ...] = ()


@dataclass
class _Work:
    """One call of the backend: a Dynamo graph to be compiled, once or with several settings."""

    backend: Backend
    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    patches: dict[str, Any]
    context: Context
    layers: tuple[str, ...]
    root: nn.Module | None
    several: bool

    def compile(self, configs: Sequence[ApproxConfig]) -> list[_Variant]:
        """The graph with each of the settings. Those with rows come first: if they are worth it in none, or fail under the symbol that was asked for, Dynamo
        traces again without one."""
        rowed = [i for i, c in enumerate(configs) if c.asks_for_rows()]
        if not rowed:
            return [self._one(c, None) for c in configs]
        asked, first = _torch.request(), False
        if asked is not None:
            first, asked.answered = not asked.answered, True
        symbols: Sequence[sympy.Symbol] | NoRows = self._symbols(asked if first else None)
        refused: dict[int, NoRows] = {}
        done: dict[int, _Variant] = {}
        for i in rowed:
            if isinstance(symbols, NoRows):
                refused[i] = symbols
                continue
            rows = RowCompiler(symbols, configs[i], self.backend.inner_compile, self.root, self.key(), asked is not None)
            try:
                with _said_if_done():
                    done[i] = self._one(configs[i], rows, again=asked is None)
            except Declined as e:
                refused[i] = NoRows(str(e), tuple(rows.cuts))
            except (ConfigError, _torch.PassesThroughDynamo):
                raise
            except Exception as e:
                log.debug("approx: the graph does not compile with rows", exc_info=True)
                refused[i] = NoRows(_defect(e) or _torch.failed_with_symbol(e))
        if asked is not None and first and len(refused) == len(rowed) and _torch.has_symbols(self.gm):
            _torch.trace_without(asked, NoRows(refused[rowed[0]].reason, tuple(cut for r in refused.values() for cut in r.cuts)))
        return [done[i] if i in done else self._one(c, None, refused.get(i)) for i, c in enumerate(configs)]

    def _one(self, config: ApproxConfig, rows: RowCompiler | None, no_rows: NoRows | None = None, again: bool = False) -> _Variant:
        """With rows, or with the reason why not and the cuts that might have been, or without a word of rows. `again`: the graph may be compiled once more."""
        backend, plans = self.backend, list[tuple[Plan, fx.Graph | None, fx.Graph | None]]()
        profile = _profile(self.example_inputs) if config.asks_for_products() else None
        approx = ApproxPass(config, self.context, self.layers, lambda *found: plans.append(found), backend.keep_graphs, rows.ask if rows else None, profile)
        inner = rows if rows is not None else backend.inner_compile
        gm = _torch.copy_of(self.gm) if self.several or again else self.gm
        patches = huge_pages.patches(config, self.patches) | self.patches | {"joint_custom_pre_pass": _after_users(approx)}
        compiled = _torch.compile_fx(gm, self.example_inputs, guarded(patches), inner, backend.inner_compile is None, self.several)
        compiled = shown_as_one_op(compiled) if rows is not None else compiled
        whole: Plan | None = None
        for plan, before, after in plans:  # graphs inside the graph have passes of their own
            plan = plan.without_rows(no_rows.reason, no_rows.cuts) if no_rows is not None else plan.with_cuts(rows.cuts) if rows is not None else plan
            whole = plan if whole is None else whole.joined(plan)
            if backend.on_plan is not None:
                backend.on_plan(plan, before, after)
        return _Variant(compiled, approx.uuid(), whole)

    def _symbols(self, asked: _torch.Request | None) -> Sequence[sympy.Symbol] | NoRows:
        """The symbols that may be the batch's size, or why rows can't be sampled. May have Dynamo trace again, with a symbol or without."""
        if self.context.nothing_trains():
            return NoRows("no module is in training mode")
        if self.context.exact is not None:
            return NoRows(self.context.exact)
        if asked is not None and asked.why_not is not None:
            return asked.why_not if isinstance(asked.why_not, NoRows) else NoRows(asked.why_not)
        if asked is not None and _torch.tensors_in(self.gm) < asked.size:
            _torch.trace_without(asked, NoRows("with a symbol for the batch's size Dynamo can't trace all of it"))
        return batch_symbols(self.gm, self.backend.config)

    def key(self) -> str:
        """Names the graph, the same in another process, whatever the sizes."""
        named = repr([self.context.modules[k.split("@")[0]].name if k else "" for k in self.layers])
        return hashlib.sha256(named.encode()).hexdigest()[:12] + ":"


def _standing_for_all(variants: Sequence[_Variant], configs: Sequence[ApproxConfig], config: ApproxConfig) -> Plan | None:
    """The plan that the user is told of: the one that samples most. A pattern of a rule is unmatched if it is so wherever the rule holds."""
    plans = [v.plan for v in variants if v.plan is not None]
    if len(plans) < len(variants):
        return None
    if len(plans) == 1:
        return plans[0]
    matched = {p.text for plan, c in zip(plans, configs, strict=True) for p in c.patterns() if p.text not in plan.unmatched}
    return replace(max(plans, key=lambda p: p.sampled), unmatched=tuple(p.text for p in config.patterns() if p.text not in matched))


@contextlib.contextmanager
def _said_if_done() -> Iterator[None]:
    """Warnings of what fails inside are not for the user: it is compiled in another way."""
    with warnings.catch_warnings(record=True) as found:
        yield
    for w in found:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)


def _defect(error: Exception) -> str | None:
    """What is to be said of an error that this package's own code has raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    if not Path(last.filename).is_relative_to(Path(__file__).parent.parent):
        return None
    text = f"a defect of approx_compile ({type(error).__name__}: {str(error)[:200]}, {Path(last.filename).name}:{last.lineno}); please report it"
    warn_once(f"approx: rows are not sampled: {text}")
    return text


def _parameters(example_inputs: Sequence[Any]) -> list[int]:
    """The places of what an optimizer may own: parameters, and leaves that need a gradient."""
    return [i for i, v in enumerate(example_inputs) if isinstance(v, nn.Parameter) or (isinstance(v, torch.Tensor) and v.is_leaf and v.requires_grad)]


def _uncounted(root: nn.Module | None, parameters: Sequence[int]) -> str | None:
    """Why nobody counts the steps of a graph, if so."""
    if root is not None and any(c.__name__ == "FSDPModule" for c in type(root).__mro__):
        return "is sharded by FSDP2, whose optimizers step other tensors than the graph reads"
    return None if parameters else "has no parameters in one of its graphs"


def _profile(example_inputs: Sequence[Any]) -> machine.Machine | None:
    """The profile of the device that the model is on, if that can be measured."""
    devices = {v.device.type for v in example_inputs if isinstance(v, torch.Tensor)}
    device = next(iter(devices - {"cpu"}), "cpu")
    return machine.current(device, say_once) if device in machine.DEVICES else None


def approx(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None, **kwargs: Any) -> Any:
    """The entry point behind `backend="approx"`; `options` has the keys of `ApproxConfig`."""
    return Backend(options)(gm, example_inputs, mode=mode, **kwargs)


def inductor_patches(config: ApproxConfig, mode: str | None) -> dict[str, Any]:
    """Inductor's options: those of `torch.compile(mode=...)` or of the `inductor` key's mode, then the `inductor` key's own."""
    own = dict(config.inductor)
    own_mode = own.pop("mode", None)
    if mode is not None and mode not in _torch.inductor_modes():
        raise ConfigError(f"mode: got {mode!r}; valid are {', '.join(_torch.inductor_modes())}")
    if mode is not None and own_mode is not None and mode != own_mode:
        raise ConfigError(f"mode: torch.compile got {mode!r} and options['inductor']['mode'] {own_mode!r}; give one")
    return _torch.mode_options(mode or own_mode) | {str(k).replace("-", "_"): v for k, v in own.items()}


def _after_users(ours: ApproxPass) -> Any:
    """The user's own joint pass, if torch._inductor.config has one, runs first."""
    theirs = _torch.user_joint_passes()
    return [*theirs, ours] if theirs else ours


# --- a symbol for the batch ---


def batch_symbols(gm: fx.GraphModule, config: ApproxConfig) -> list[sympy.Symbol] | NoRows:
    """The symbols that may stand for the batch, dim 0 of the model's data, the likeliest first; or why there is none. Where the size is still a number
    Dynamo is asked to trace once more: this then does not return."""
    data = [n for n in gm.graph.find_nodes(op="placeholder") if _is_data(n)]
    if not data:
        return NoRows("the graph has no input with samples")
    size, outputs = _batch_size(gm, data)
    batched = [n for n in data if _torch.hint(_first_dim(n)) == size]
    found = dict.fromkeys(e for n in batched if (e := _torch.size_expr(_first_dim(n))).is_Symbol)
    if found:
        made = [s for o in outputs for d in o.shape for s in _torch.size_expr(d).free_symbols]
        rows = {s: sum(_torch.numel_of(_value(n)) for n in batched if _torch.size_expr(_first_dim(n)) == s) for s in found}
        return sorted(found, key=lambda s: (s in made, rows[s]), reverse=True)
    if size <= config.least_rows():
        return NoRows(f"a batch of {size}, min_k is {config.least_rows()}")
    if (certain := early_decline.why_not(gm, config, size)) is not None:
        return NoRows(*certain)
    _torch.ask_for_symbol([n for n in batched if _torch.size_expr(_first_dim(n)).is_Integer], _torch.tensors_in(gm))
    return NoRows(f"the model fixes the size of the batch to {size}")


def _batch_size(gm: fx.GraphModule, data: Sequence[fx.Node]) -> tuple[int, list[torch.Tensor]]:
    """The size of dim 0 that most of the data has which has the size of an output's; of any data if there is none, as where the loss is inside. And the
    outputs that get a gradient."""
    returned = next(n for n in reversed(gm.graph.nodes) if n.op == "output").all_input_nodes
    outputs = [v for n in returned if isinstance(v := n.meta.get("example_value"), torch.Tensor) and v.is_floating_point() and v.requires_grad]
    of_outputs = {_torch.hint(o.shape[0]) for o in outputs if o.dim()}
    weight: dict[int, int] = {}
    for n in data:
        size = _torch.hint(_first_dim(n))
        weight[size] = weight.get(size, 0) + _torch.numel_of(_value(n))
    return max(weight, key=lambda s: (s in of_outputs, weight[s])), outputs


def _value(n: fx.Node) -> Any:
    return n.meta["example_value"]


def _first_dim(n: fx.Node) -> Any:
    return _value(n).shape[0]


def _is_data(n: fx.Node) -> bool:
    value = n.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and not isinstance(value, nn.Parameter) and not _torch.is_module_state(n)


# --- reading Dynamo's graph ---


def read_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: ApproxConfig) -> tuple[Context, tuple[str, ...], nn.Module | None]:
    """The pass's context, the layer key of every call in graph order (for the cache key), and the root module if there is one."""
    stacks = [n.meta.get("nn_module_stack") or {} for n in _calls(gm)]
    frame = _torch.dynamo_frame()
    layers = Layers(stacks, [n for n in gm.graph.nodes if n.op == "placeholder"], frame)
    if config.plan is not None and layers.root is not None:
        whole = whole_model(layers.root) or layers.root
        check_modules(config.plan, {n for n, _ in whole.named_modules(remove_duplicate=False)}, type(whole).__name__)
    modules = {key: Module(layers.display(key), _watched(f.module, f.source, frame), f.batch_norm, f.linear) for key, f in layers.found.items()}
    if layers.root is not None and layers.root_source is not None and frame is not None:
        _guard_rules(layers.root, layers.root_source, config)
    _mark_foreign(gm)
    inputs = tuple(_inputs(gm, example_inputs))
    keys = tuple(next(reversed(stack), "") for stack in stacks)
    return Context(modules, _own(layers, gm, frame), inputs, _foreign_inputs(example_inputs), last_module(layers.root)), keys, layers.root


_UNWATCHED = "the module could not be traced back to the model, so a change of its train/eval mode would go unnoticed"


def _watched(module: nn.Module | None, source: Any, frame: Any) -> str | None:
    """Guard a module's mode; the reason why its products must be exact, if so."""
    if module is None or source is None:
        return _UNWATCHED if frame is not None else None
    _torch.guard_attribute(source, "training")
    return None if module.training else "the module is in eval mode"


def _own(layers: Layers, gm: fx.GraphModule, frame: Any) -> Module:
    """The module whose own forward is compiled: it is in no stack, and products written in its forward are its own. Of several that might be it all must
    train."""
    if frame is None:
        return Module("")
    owners = layers.owners(gm, frame)
    reasons = [_watched(module, source, frame) for module, source in owners]
    name = full_name(owners[0][0]) if len(owners) == 1 and owners[0][0] is not None else None
    return Module(name or "", next((r for r in reasons if r is not None), None))


def _guard_rules(root: nn.Module, source: Any, config: ApproxConfig) -> None:
    """Blocks of an annotated model share code as long as the rules say the same of them; a later `annotate` compiles anew."""
    name = sign(root, config)
    if name is None:
        _torch.guard_absent(source, SIGNATURE)
    else:
        _torch.guard_attribute(source, name)


def _calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Every call of the graph and of the graphs inside it (checkpointed blocks), in order."""
    for n in gm.graph.nodes:
        if n.op in ("call_function", "call_method", "call_module"):
            yield n
        elif n.op == "get_attr" and isinstance(body := getattr(gm, str(n.target), None), fx.GraphModule):
            yield from _calls(body)


def _inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Iterator[Input]:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for n, value in zip(placeholders, example_inputs, strict=False):
        tensor = value if isinstance(value, torch.Tensor) else None
        yield Input(
            parameter=isinstance(value, nn.Parameter) or _torch.is_module_state(n),
            requires_grad=tensor is not None and tensor.requires_grad,
            floating=tensor is not None and tensor.is_floating_point(),
        )


def _foreign_inputs(example_inputs: Sequence[Any]) -> str | None:
    for value in example_inputs:
        if _torch.is_wrapper_subclass(value):
            return f"the graph has {type(value).__name__} inputs, whose products are distributed or packed"
    return None


def _mark_foreign(gm: fx.GraphModule) -> None:
    """Note on the nodes of transforms and custom autograd functions that their products' gradients are not the chain rule's own."""
    depth = 0
    for body in (getattr(gm, str(n.target), None) for n in gm.graph.nodes if n.op == "get_attr"):
        if isinstance(body, fx.GraphModule):
            _mark_foreign(body)
    for n in gm.graph.nodes:
        name = getattr(n.target, "__name__", str(n.target))
        depth += name in _TRANSFORMS
        depth -= name in tuple(t.replace("increment", "decrement") for t in _TRANSFORMS)
        if depth > 0:
            _torch.mark_exact(n, "inside a torch.func transform")
        if n.op == "call_function" and "autograd_function_apply" in name:
            for body in (a for a in n.args if isinstance(a, fx.Node) and a.op == "get_attr"):
                inner = getattr(gm, str(body.target), None)
                for m in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                    _torch.mark_exact(m, "inside a custom autograd.Function")


run_as_is = _torch.run_as_is
