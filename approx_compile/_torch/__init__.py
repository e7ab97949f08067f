"""Every private name of torch that this project uses, in one place, each with what happens when it is gone."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass  # the base classes that Inductor's caches ask for

empty_strided_cpu: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
"""What the code that Inductor writes allocates with; sizes and strides must be plain tuples."""

try:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass as CustomSchedulerPass
except ImportError:  # before torch 2.13 the caches asked the passes of the scheduler, too, for the other class
    CustomSchedulerPass = CustomGraphPass  # type: ignore[assignment, misc]

try:
    from torch._dynamo.exc import ShortenTraceback

    class PassesThroughDynamo(ShortenTraceback):
        """Dynamo hands this on to the user as it is, where it wraps any other exception of a backend."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, first_useful_frame=None)

except ImportError:  # then errors arrive wrapped in BackendCompilerFailed, with the same text

    class PassesThroughDynamo(RuntimeError):  # type: ignore[no-redef]
        pass


def inductor_modes() -> tuple[str, ...]:
    return tuple(torch._inductor.list_mode_options())


@functools.cache
def inductor_options() -> frozenset[str]:
    return frozenset(torch._inductor.list_options())


def user_joint_passes() -> list[Any]:
    """The joint passes that the user set in Inductor's config."""
    own = torch._inductor.config.joint_custom_pre_pass
    return [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]


def user_scheduler_pass() -> Any:
    """The pass before fusion that the user set in Inductor's config, if any."""
    return torch._inductor.config._pre_fusion_custom_pass


class _InTurn(CustomSchedulerPass):
    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes

    def __call__(self, nodes: list[Any]) -> list[Any]:
        return functools.reduce(lambda found, run: run(found), self.passes, nodes)

    def uuid(self) -> Any:
        return tuple(p.uuid() for p in self.passes)


def in_turn(passes: Sequence[Any]) -> Any:
    """One pass of the scheduler that runs several. Where one has no uuid, neither has this: Inductor then keeps its caches out of it."""
    run = _InTurn(passes)
    return run if all(isinstance(p, CustomSchedulerPass) for p in passes) else run.__call__


def keep_dependencies(nodes: Sequence[Any], device: str, forgot: Callable[[], None]) -> None:
    """Nodes of Inductor's scheduler on a device keep what it knows of them, and their code does not show, when what they read is worked out anew: the orders
    that it has added, and the names that buffers have once they are written in place. `forgot` is called where Inductor alone would have lost some."""
    from torch._inductor.scheduler import SchedulerNode

    for node in (n for whole in nodes for n in whole.get_nodes()):
        if isinstance(node, SchedulerNode) and (where := node.get_device()) is not None and where.type == device:
            again = functools.partial(_recompute, node, node.recompute_size_and_body, forgot)
            node.recompute_size_and_body = again  # type: ignore[method-assign]


def _recompute(node: Any, recompute: Callable[..., None], forgot: Callable[[], None], *args: Any, **kwargs: Any) -> None:
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch.utils._ordered_set import OrderedSet

    added = OrderedSet(dep for dep in node.read_writes.reads if isinstance(dep, (WeakDep, StarDep)))
    recompute(*args, **kwargs)
    whole = node.read_writes.with_read(added).rename(node.mutation_renames)
    if whole.reads != node.read_writes.reads:
        node.set_read_writes(whole)
        forgot()


def activation_memory_budget() -> float:
    return float(torch._functorch.config.activation_memory_budget)


def is_wrapper_subclass(value: Any) -> bool:
    """DTensor and its like."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def no_modes() -> contextlib.AbstractContextManager[Any]:
    """Real tensors inside the block, whatever is traced outside; where the name is gone measuring there fails, and says so."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


# --- nodes of a joint graph ---


def value(n: Any) -> Any:
    """The fake tensor of a node."""
    return n.meta["val"]


def hint(size: Any) -> int:
    """An int for a size that may be symbolic, without adding a guard."""
    found = known_hint(size)
    return found if found is not None else 1024


def known_hint(size: Any) -> int | None:
    """`hint`, but None for a size that only running tells."""
    if isinstance(size, int):
        return size
    node_hint = getattr(getattr(size, "node", None), "hint", None)
    return int(node_hint) if node_hint is not None else None


def has_backward(graph: fx.Graph) -> bool:
    return any(is_backward(n) for n in graph.nodes if n.op == "call_function")


def is_backward(n: fx.Node) -> bool:
    return n.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def input_index(n: fx.Node) -> int | None:
    """Which of the backend's inputs a placeholder of the joint graph is; None for tangents and synthetic ones."""
    desc = n.meta.get("desc")
    index = getattr(desc, "idx", None)
    return index if isinstance(index, int) and type(desc).__name__ == "PlainAOTInput" else None


def is_own_state(n: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of the graph module itself (Dynamo without inlined modules)."""
    return type(n.meta.get("desc")).__name__ in ("ParamAOTInput", "BufferAOTInput")


def is_random(n: fx.Node) -> bool:
    tags = getattr(n.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "inductor_rand" in str(n.target)  # Inductor's own carry no tag


def is_pointwise(n: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(n.target, "tags", ())


@functools.cache
def pooling() -> tuple[frozenset[Any], Any]:
    """The ops of max pooling that also say where, and Inductor's own that turns what its kind says into places; where that is gone, none is found."""
    import torch._inductor.inductor_prims

    prims, aten = torch.ops.prims, torch.ops.aten
    own, places = (getattr(prims, f"_low_memory_max_pool_{n}", None) for n in ("with_offsets", "offsets_to_indices"))
    ops = (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, own)
    return frozenset(op.default for op in ops if op is not None), places.default if places is not None else None


# --- sizes with symbols ---


def size_expr(size: Any) -> Any:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, SYMBOLIC) else sympy.sympify(size)


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def symbol_sources(inputs: Sequence[Any]) -> list[tuple[sympy.Symbol, int, int | None]]:
    """For every symbol an input, and the dim of it, that has its value."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for i, value in enumerate(inputs):
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)] if isinstance(value, torch.SymInt) else []
        for d, s in sizes:
            if (e := size_expr(s)).is_Symbol:
                found.setdefault(e, (i, d))  # type: ignore[arg-type]
    return [(s, i, d) for s, (i, d) in found.items()]


def size_at(values: Sequence[Any], i: int, d: int | None) -> Any:
    """What a source of a symbol has for it: value i, or its dim d."""
    return values[i] if d is None else values[i].shape[d]


def evaluated(expression: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression's value, where some symbols' values may be symbolic sizes of another graph."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return values[expression]
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, dict(values), expression)


def has_symbol(size: Any, symbol: sympy.Symbol) -> bool:
    return not isinstance(size, int) and symbol in size_expr(size).free_symbols


def number_arguments(n: fx.Node) -> list[fx.Node]:
    """The symbolic numbers that an op takes as a value; where its schema says int it takes them as a size."""
    schema = getattr(n.target, "_schema", None)
    if schema is None:
        return []
    found = []
    for i, a in enumerate(schema.arguments):
        given = n.args[i] if i < len(n.args) else n.kwargs.get(a.name)
        if isinstance(given, fx.Node) and isinstance(given.meta.get("val"), (torch.SymInt, torch.SymFloat)) and "int" not in str(a.real_type):
            found.append(given)
    return found


def numel(n: fx.Node) -> int:
    return numel_of(value(n))


def numel_of(tensor: Any) -> int:
    return math.prod(hint(size) for size in tensor.shape)


def fake_mode_of(*nodes: fx.Node) -> Any:
    """The fake mode the graph was traced under."""
    from torch._guards import detect_fake_mode

    values = [t for n in nodes for t in torch.utils._pytree.tree_leaves((n.meta.get("val"), [m.meta.get("val") for m in n.all_input_nodes]))]
    mode = detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    assert mode is not None, f"{nodes} have no fake values"
    return mode


@functools.cache
def _decompositions() -> Any:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def trace(run: Callable[..., Any], values: Sequence[Any]) -> fx.Graph:
    """`run` on fake values as a graph of aten ops, decomposed by Inductor's table (without it some ops reach Inductor whole and it asserts)."""
    from torch.fx.experimental.proxy_tensor import make_fx

    apart = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]  # make_fx takes one value that is given twice for one input
    return make_fx(run, decomposition_table=_decompositions())(*apart).graph


def compile_kernel(run: Callable[..., Any], values: Sequence[torch.Tensor], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """`run` for these shapes as Inductor's code, without Dynamo."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(run, decomposition_table=_decompositions(), tracing_mode="fake")(*values)
    compiled: Callable[..., Any] = torch._inductor.compile(traced, list(values), options)
    return compiled


_PROVENANCE = ("partitioner_tag", "seq_nr", "nn_module_stack", "fwd_nn_module_stack", "stack_trace", "recompute", "ac_graph_id")


def copy_provenance(source: fx.Node, target: fx.Node) -> None:
    """Tag, layer, stack trace and checkpoint policy of an inserted node are those of the node it serves."""
    for key in _PROVENANCE:
        if key in source.meta:
            target.meta[key] = source.meta[key]
        else:
            target.meta.pop(key, None)


def keep_in_backward(node: fx.Node) -> None:
    """Forbid the partitioner to hoist a node of the backward pass that needs no tangent: it would draw a random number in both passes."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def must_save(node: fx.Node) -> None:
    """Forbid the partitioner to recompute a node in the backward pass."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def is_tangent(n: fx.Node) -> bool:
    """Whether a placeholder of a backward graph is the gradient of an output."""
    return n.op == "placeholder" and "tangents" in n.name


def described_outputs(output: fx.Node) -> dict[str, fx.Node]:
    """A graph's outputs by AOTAutograd's description of each."""
    described = output.meta.get("desc") or ()
    return {repr(d): n for d, n in zip(described, output.args[0], strict=False) if isinstance(n, fx.Node)}  # type: ignore[arg-type]


def output_of_tangent(n: fx.Node) -> str | None:
    """The description of the output that a backward graph's placeholder is the gradient of."""
    output = getattr(n.meta.get("desc"), "output", None)
    return repr(output) if output is not None else None


def fake_scalar(n: fx.Node, dtype: torch.dtype) -> Any:
    """A fake tensor without dims on the CPU, of the fake mode of the graph that `n` is in."""
    with _graph_mode(n.graph):
        return torch.empty((), dtype=dtype, device="cpu")


def fake_like(value: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    """A tensor with this layout and `value`'s dtype and device, fake if that is."""
    from torch._guards import detect_fake_mode

    with torch.no_grad(), detect_fake_mode([value]) or contextlib.nullcontext():
        if not offset:
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset
        return torch.empty(last + 1, dtype=value.dtype, device=value.device).as_strided(size, stride, offset)


def fake_dense(value: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the same size, dtype and device, fake if that is."""
    from torch._guards import detect_fake_mode

    with torch.no_grad(), detect_fake_mode([value]) or contextlib.nullcontext():
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _graph_mode(graph: fx.Graph) -> Any:
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([v for m in graph.nodes if isinstance(v := m.meta.get("val"), torch.Tensor)])
    assert mode is not None
    return mode


def flops(n: fx.Node) -> int:
    """Of one product or convolution, by torch's own formulas; 0 for anything else."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(getattr(n.target, "overloadpacket", None)) if n.op == "call_function" else None
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: _hinted(a.meta["val"]))
    return int(formula(*args, **kwargs, out_val=_hinted(n.meta["val"])))


def _hinted(value: Any) -> Any:
    """A tensor (or several) without memory, of the sizes that symbols stand for."""
    if isinstance(value, (tuple, list)):
        return tuple(_hinted(v) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device="meta")
    return hint(value) if isinstance(value, torch.SymInt) else value


# --- Dynamo: what the backend call can learn about the user's modules ---


def dynamo_frame() -> Any:
    """Dynamo's translator of the frame being compiled, or None outside of Dynamo."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx()
    except (ImportError, AttributeError):
        return None


def frame_scope(frame: Any) -> dict[str, dict[str, Any]]:
    """The compiled frame's variables, by the names Dynamo's sources use: L for locals (closures included), G for globals."""
    root = frame.output.root_tx if frame is not None else None
    return {"L": dict(getattr(root, "f_locals", None) or {}), "G": getattr(root, "f_globals", None) or {}}


def frame_code(frame: Any) -> Any:
    """The code object of the frame being compiled; behind a graph break that of the function that was broken, as the user wrote it."""
    code = getattr(frame.output.root_tx, "f_code", None)
    try:
        from torch._dynamo.resume_execution import ContinueExecutionCache

        return getattr(ContinueExecutionCache.generated_code_metadata.get(code), "code", code)
    except (ImportError, AttributeError):  # then the rest of a function is taken for a function
        return code


def is_rest(frame: Any) -> bool:
    """Whether the frame is the rest of some function behind a graph break: variables that are not read any more are gone there."""
    return getattr(getattr(frame.output.root_tx, "f_code", None), "co_name", "").startswith("torch_dynamo_resume_in_")


def held_modules(held: Any, source: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """The modules that a variable holds, and Dynamo's source for each: itself, what a method is bound to, what stands in a partial or a container. None for
    one that is in a function's closure, to which no guard leads."""
    from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource, UnspecializedNNModuleSource

    def below(held: Any, source: Any, depth: int) -> Iterator[tuple[torch.nn.Module, Any]]:
        def attribute(name: str) -> tuple[Any, Any]:
            return getattr(held, name), AttrSource(source, name) if source is not None else None

        inner: list[tuple[Any, Any]] = []
        if isinstance(held, torch.nn.Module):
            yield held, source if source is None or isinstance(source, UnspecializedNNModuleSource) else UnspecializedNNModuleSource(source)
        elif isinstance(held, types.MethodType):
            inner = [attribute("__self__"), (held.__func__, None)]
        elif isinstance(held, functools.partial):
            inner = [attribute("func"), attribute("args"), attribute("keywords")]
        elif isinstance(held, types.FunctionType):
            inner = [(c.cell_contents, None) for c in held.__closure__ or () if _is_filled(c)]
        elif type(held) in (tuple, list):
            inner = [(v, GetItemSource(source, i) if source is not None else None) for i, v in enumerate(held)]
        elif type(held) is dict:
            inner = [(v, DictGetItemSource(source, k) if source is not None and isinstance(k, str) else None) for k, v in held.items()]
        if depth:
            for value, own in inner:
                yield from below(value, own, depth - 1)

    return below(held, source, 4)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def module_sources(placeholder: fx.Node) -> Iterator[tuple[str, Any]]:
    """(expression, source) of every module on the way to a parameter or buffer in Dynamo's graph."""
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "NNModuleSource" in type(source).__name__:
            yield (source.name() if callable(source.name) else source.name), source
        source = getattr(source, "base", None)


def is_module_state(placeholder: fx.Node) -> bool:
    """Whether a placeholder of Dynamo's graph is a parameter or buffer that a module owns."""
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False


def variable_source(scope: str, name: str) -> Any:
    """Dynamo's source of a module held by a local or global variable."""
    from torch._dynamo.source import UnspecializedNNModuleSource

    return UnspecializedNNModuleSource(plain_source(scope, name))


def plain_source(scope: str, name: str) -> Any:
    """Dynamo's source of a local or global variable."""
    from torch._dynamo.source import GlobalSource, LocalSource

    return LocalSource(name, is_input=True) if scope == "L" else GlobalSource(name)


def child_source(source: Any, path: list[str]) -> Any:
    """The source of the module at `path` below another one, as Dynamo itself builds it."""
    from torch._dynamo.source import AttrSource, DictGetItemSource, UnspecializedNNModuleSource

    for name in path:
        source = UnspecializedNNModuleSource(DictGetItemSource(AttrSource(source, "_modules"), name))
    return source


def guard_attribute(source: Any, name: str) -> None:
    """Recompile when the attribute's value changes."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    install_guard(AttrSource(source, name).make_guard(GuardBuilder.EQUALS_MATCH))


def guard_absent(source: Any, name: str) -> None:
    """Recompile when the attribute, absent now, appears in the object's own dictionary."""
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(source.make_guard(functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=name)))


CUSTOM = "approx_compile"


def mark_exact(node: fx.Node, reason: str) -> None:
    """Leave a note on a node of Dynamo's graph that AOTAutograd carries into the joint graph."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), CUSTOM: reason}


def exact_mark(node: fx.Node) -> str | None:
    reason = (node.meta.get("custom") or {}).get(CUSTOM)
    return reason if isinstance(reason, str) else None


def compile_fx(
    gm: fx.GraphModule, example_inputs: Any, patches: dict[str, Any], inner_compile: Any = None, cached: bool = True, one_of_several: bool = False
) -> Any:
    """Inductor, or, with `inner_compile`, its front half handing the partitioned graphs to something else.

    AOTAutograd's cache would bring back compiled graphs without what an `inner_compile` put around them, so it is off then; and the backward
    graph is compiled at once. `cached`: whether Inductor's own cache of graphs is used. `one_of_several`: the graph is compiled more than once in one call
    of the backend, and each time has a context of its own: what AOTAutograd keeps there for a backward pass compiled later would be another's.
    """
    from torch._inductor.compile_fx import compile_fx as inductor

    if inner_compile is None:
        context = torch._guards.TracingContext.try_get() if one_of_several else None
        with torch._guards.tracing(copy.copy(context)) if context is not None else contextlib.nullcontext():
            return inductor(gm, example_inputs, config_patches=patches)
    patches = patches if cached else {**patches, "fx_graph_cache": False}
    with torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        return inductor(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)


def bytes_of_buffers() -> Iterator[int]:
    """Of every buffer on the CPU of the graph that Inductor is writing Python code for; of a symbolic size, its hint."""
    from torch._inductor.virtualized import V

    if V.graph.cpp_wrapper or V.graph.aot_mode:
        return
    for buffer in V.graph.buffers:
        device = buffer.get_device() if buffer.has_tensor_output() else None
        if device is not None and device.type == "cpu":
            yield V.graph.sizevars.optimization_hint(buffer.get_numel()) * buffer.get_dtype().itemsize


def laid_out(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The same values with the dims in this order in memory, the last one innermost. Inductor makes that a buffer of its own, which `contiguous` need not
    be: what is not is computed anew in every place that reads it."""
    strides, step = [0] * x.dim(), 1
    for d in reversed(order):
        strides[d], step = step, step * x.shape[d]
    from torch._inductor.inductor_prims import force_stride_order

    ordered: torch.Tensor = force_stride_order(x, strides)
    return ordered


def add_to_header(line: str) -> None:
    """Put a line at the end of the head of the Python code that Inductor is writing."""
    from torch._inductor.virtualized import V

    V.graph.wrapper_code.header.writeline(line)


def compile_graph(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
    """Inductor's back half: one graph without autograd to code."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, example_inputs, **kwargs)


def _forward_metadata() -> Any:
    context = torch._guards.TracingContext.try_get()
    return getattr(context, "fw_metadata", None)


def donated(gm: fx.GraphModule) -> set[str]:
    """The placeholders of a backward graph whose memory the compiled code may write to."""
    indices = getattr(_forward_metadata(), "bw_donated_idxs", None) or []
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return {placeholders[i] for i in indices}


def donate_nothing() -> None:
    """Tell AOTAutograd that the backward graph being compiled writes to none of its inputs. What does it refuses to run where the user keeps the graph."""
    indices = getattr(_forward_metadata(), "bw_donated_idxs", None)
    if indices:
        indices.clear()  # several descriptions of the graph have the same list


def graph_is_kept() -> bool:
    """Whether the user keeps the graph of the backward pass that the autograd engine is in, and with it what the forward pass saved."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(kept()) if kept is not None else True


@contextlib.contextmanager
def donating(indices: Sequence[int]) -> Iterator[None]:
    """Inside, a graph that is compiled may write to these of its inputs."""
    meta = _forward_metadata()
    if meta is None:
        yield
        return
    before = meta.bw_donated_idxs
    meta.bw_donated_idxs = list(indices)
    try:
        yield
    finally:
        meta.bw_donated_idxs = before


def backward_passes(output: torch.Tensor) -> Iterator[tuple[Any, fx.GraphModule]]:
    """What AOTAutograd calls for the backward pass of the compiled graph that made an output, and the graph that compiled autograd takes in its place."""
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        made_by = getattr(node, "_forward_cls", None)
        graph = getattr(getattr(made_by, "_lazy_backward_info", None), "bw_module", None)
        if isinstance(graph, fx.GraphModule):
            yield getattr(made_by, "compiled_bw", None), graph
        elif node is not None and made_by is None and len(node.next_functions) == 1:  # a view of what the graph gave
            todo.append(node.next_functions[0][0])


def settled(graph: fx.Graph) -> Callable[[Any], Any]:
    """What expressions have become by now: compiled code may have fixed a symbol to a number, or found two to be equal."""
    env = _graph_mode(graph).shape_env
    return lambda e: env.replace(sympy.sympify(e))


def guards_on(symbol: sympy.Symbol, gm: fx.GraphModule) -> list[Any]:
    """What compiled code has assumed of a symbolic size: expressions that must hold for any value it is called with."""
    env = _graph_mode(gm.graph).shape_env
    known = {env.replace(g.expr) for g in env.guards}  # sizes found equal are one symbol then
    return [e for e in known if symbol in e.free_symbols]


def first_call_is_fake() -> bool:
    """Whether whoever compiles now will first call what comes out with fake tensors (DDPOptimizer does)."""
    return bool(getattr(torch._guards.TracingContext.try_get(), "fakify_first_call", False))


def not_traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo calls the function as it is, where it meets it in code that it compiles."""
    disabled: Callable[..., Any] = torch.compiler.disable(f)
    return disabled


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A Dynamo graph to compile once more: passes before autograd edit it in place, and a copy alone would lose where its inputs come from."""
    new = copy.deepcopy(gm)
    for a, b in zip(gm.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True):
        if hasattr(a, "_dynamo_source"):
            b._dynamo_source = a._dynamo_source  # type: ignore[attr-defined]
    return new


# --- a symbol for the batch ---

try:
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

    class TraceAgain(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):  # type: ignore[misc]
        """Raised by a backend, makes Dynamo trace the frame once more. The second base makes it pass the backend call, the first is caught outside."""

except ImportError:  # then there is no symbol for the batch, and rows are not sampled
    TraceAgain = None  # type: ignore[assignment,misc]


@dataclass
class Request:
    """What was asked of one compilation: a symbol for dim 0 of the inputs that have these `names`, where tracing went all the way without one. `size`: how many
    tensors the graph had then; `why_not`: what is to be told of why it goes without one after all."""

    names: frozenset[str]
    size: int
    answered: bool = False
    why_not: Any = None


_requests: dict[Any, Request] = {}
"""By compilation, until that ends."""


def compilation() -> tuple[str, Any] | None:
    """The compilation Dynamo is in, by its number and the code it compiles: the same when it traces again."""
    number, frame = torch._guards.CompileContext.current_compile_id(), dynamo_frame()
    if number is None or frame is None:
        return None
    return f"{number.frame_id}/{number.frame_compile_id}", getattr(frame.output.root_tx, "f_code", None)


def request() -> Request | None:
    """What was asked of the compilation that Dynamo is in, which has now come to the backend."""
    found = _requests.get(key := compilation())
    if found is not None:
        _watch_end(dynamo_frame().output.root_tx, key)
    return found


def ask_for_symbol(placeholders: Sequence[fx.Node], size: int) -> None:
    """Have Dynamo trace again, with symbols for dim 0 of these inputs: this then does not return. (Where it can't be asked it does.)"""
    key, names = compilation(), frozenset(n for p in placeholders if (n := _source_name(p)) is not None)
    if TraceAgain is None or key is None or not names or key in _requests or not _listens():
        return
    _requests.clear()
    _requests[key] = Request(names, size)
    raise TraceAgain(restart_reason="approx: a symbol for the batch")


def trace_without(asked: Request, why_not: Any) -> None:
    """Have Dynamo trace again as it would by itself. `why_not` is in the request then. (Once: this returns if it has done so.)"""
    if asked.names:
        asked.names, asked.why_not = frozenset(), why_not
        raise TraceAgain(restart_reason="approx: no symbol for the batch")


def _source_name(placeholder: fx.Node) -> str | None:
    return _name_of(getattr(placeholder.meta.get("grapharg"), "source", None))


def _name_of(source: Any) -> str | None:
    name = getattr(source, "name", None)
    return name() if callable(name) else name


@functools.cache
def _listens() -> bool:
    """Have Dynamo look at the requests where it decides which sizes are symbols. (Marks on tensors would reach every other compilation that sees them.)"""
    try:
        from torch._dynamo.variables import builder
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        decide: Any = builder._automatic_dynamic
    except (ImportError, AttributeError):  # then there is no symbol for the batch
        return False

    @functools.wraps(decide)
    def decide_and_look(e: Any, tx: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        found = decide(e, tx, source, *args, **kwargs)
        asked = _requests.get(key := compilation()) if _requests else None
        if asked is not None:
            _watch_end(tx.output.root_tx, key)
            sizes = getattr(found, "dynamic_sizes", None)
            fixed = getattr(e, "_dynamo_static_indices", ())  # by the user
            if sizes and sizes[0] is DimDynamic.STATIC and 0 not in fixed and _name_of(source) in asked.names:
                sizes[0] = DimDynamic.DYNAMIC
        return found

    builder._automatic_dynamic = decide_and_look
    return True


def _watch_end(tx: Any, key: Any) -> None:
    """Dynamo's clean-up of a frame is told of: it comes before the backend's call, and when the frame is done or given up."""
    hooks = tx.output.cleanup_hooks
    if not any(isinstance(h, functools.partial) and h.func is _ended for h in hooks):
        hooks.append(functools.partial(_ended, tx, key))


def _ended(tx: Any, key: Any) -> None:
    """What fails under a symbol that was asked for, before the backend is called, is traced without one; the request ends with the compilation."""
    from torch._dynamo.exc import RestartAnalysis

    error, asked = sys.exc_info()[1], _requests.get(key)
    if asked is None or (error is None and not asked.answered):
        return
    if isinstance(error, RestartAnalysis):
        asked.answered = False
        return
    if isinstance(error, Exception) and not asked.answered:
        tx.speculation_log.clear()
        trace_without(asked, failed_with_symbol(error))
    del _requests[key]


def failed_with_symbol(error: Exception) -> str:
    """The reason, from an error of whoever traced or compiled."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"it can't be compiled with a symbol for the batch's size ({type(error).__name__}: {text[:200]})"


def tensors_in(gm: fx.GraphModule) -> int:
    """How many tensors a Dynamo graph computes: with symbolic sizes it has more nodes, but as many of these."""
    return sum(isinstance(n.meta.get("example_value"), (torch.Tensor, tuple)) for n in gm.graph.nodes if n.op.startswith("call_"))


def dynamo_flops(gm: fx.GraphModule) -> dict[fx.Node, int] | None:
    """The FLOPs of every call of a Dynamo graph, counted while it runs on fake tensors of its own; None where what the backward pass has can't be told from
    them (custom functions and ops, RNNs), or where running it might leave a mode of torch changed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    if not all(_is_plain_call(n.target) for n in gm.graph.nodes if n.op == "call_function"):
        return None
    found: dict[fx.Node, int] = {}
    counter = FlopCounterMode(display=False)

    class Count(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            value = super().run_node(n)
            if n.op.startswith("call_"):
                found[n] = counter.get_total_flops() - before
            return value

    def unreal(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return hint(value) if isinstance(value, torch.SymInt) else value
        sizes, strides = ([hint(s) for s in given] for given in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    try:
        with no_modes(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [unreal(n.meta["example_value"]) for n in gm.graph.find_nodes(op="placeholder")]
            with counter:
                Count(gm).run(*inputs)
    except Exception:  # whatever it is, whoever compiles will say
        return None
    return found


_STATEFUL = ("functorch", "torch.amp", "torch.autograd")


def _is_plain_call(target: Any) -> bool:
    """A function of torch's that keeps no state; of the ops that take graphs only a checkpoint's."""
    name = getattr(target, "__name__", "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "checkpoint" in str(target)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).startswith(("aten", "prims"))
    module = getattr(target, "__module__", None) or ""
    return not any(s in module for s in _STATEFUL) and not name.startswith(("lstm", "gru", "rnn", "_vmap", "_grad", "_jvp"))


def has_symbols(gm: fx.GraphModule) -> bool:
    """Whether any input of a Dynamo graph has a symbolic size."""
    values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
    return any(isinstance(v, SYMBOLIC) or (isinstance(v, torch.Tensor) and any(not size_expr(s).is_Integer for s in v.shape)) for v in values)


def leave_no_marks() -> None:
    """Keep the compiled function from marking what it returns and saves (the user's inputs among that) as of dynamic size: nobody but us has asked for that."""
    meta = _forward_metadata()
    if meta is None:
        return
    meta.dynamic_outputs = False
    if hasattr(meta, "dynamic_saved_tensors_idxs"):
        meta.dynamic_saved_tensors_idxs = {}


def make_equal(symbols: Sequence[sympy.Symbol], graph: fx.Graph) -> sympy.Symbol:
    """Guard that these sizes are equal, as they are now, and give the symbol that stands for all of them from now on."""
    env = _graph_mode(graph).shape_env
    for other in symbols[1:]:
        env.evaluate_expr(sympy.Eq(symbols[0], other))
    found: sympy.Symbol = env.replace(symbols[0])
    return found


def compared(a: sympy.Symbol, b: sympy.Symbol, graph: fx.Graph) -> bool:
    """Whether code assumes something of two sizes together."""
    return any({a, b} <= g.expr.free_symbols for g in _graph_mode(graph).shape_env.guards)


def backward_pass() -> int:
    """The number of the backward pass that the autograd engine is in, -1 outside of one or where torch does not tell."""
    number = getattr(torch._C, "_current_graph_task_id", None)
    return int(number()) if number is not None else -1


def seed_of(device: torch.device) -> int:
    """What torch's own random numbers on a device were last seeded with."""
    own = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    return int(own.initial_seed())


_SEED_TRACKERS: list[Any] = [t for m in (torch.cuda, torch.xpu) if hasattr(t := getattr(m, "_lazy_seed_tracker", None), "manual_seed_all_cb")]


def last_seeding() -> tuple[Any, ...]:
    """Other than before if `torch.manual_seed` has been called, with the same seed perhaps, which shows nowhere else: what it leaves with the modules of
    devices that are not in use yet. Always the same where torch leaves nothing."""
    return tuple([t.manual_seed_all_cb for t in _SEED_TRACKERS])


def last_seed(seeding: tuple[Any, ...]) -> set[int]:
    """The seed that `torch.manual_seed` was given at a seeding, in a set; none if that can't be told."""
    calls = [left[0] for left in seeding if left is not None]
    cells = [dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=False)).get("seed") for f in calls]
    return {int(c.cell_contents) % 2**64 for c in cells if c is not None}


def capturing(device: torch.device) -> bool:
    """Whether what runs on the device now is recorded as a CUDA graph, which knows of no generators but torch's own."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def run_as_is(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """An `inner_compile` that runs the partitioned graphs op by op."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]

    return make_boxed_func(gm.forward)


def mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def cache_folder() -> Any:
    """Inductor's cache folder, where whoever clears its caches clears ours."""
    from pathlib import Path

    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def trace_artifact(name: str, payload: Any) -> None:
    """An artifact in torch's structured trace (TORCH_TRACE); nothing where there is no trace."""
    try:
        from torch._logging._internal import trace_structured

        trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload, expect_trace_id=False)
    except ImportError:
        pass


def known_equal(a: Any, b: Any) -> bool:
    """a == b for sizes that may be symbolic, True only where it holds for every value, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return bool(a == b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def leaves(tree: Any) -> list[Any]:
    """What is in nested tuples, lists, dicts and registered classes."""
    return torch.utils._pytree.tree_leaves(tree)


def readable(graph: fx.Graph) -> str:
    """A graph as Python with shapes in comments."""
    return graph.python_code("self", verbose=True, include_stride=False, include_device=False).src


def compile_apart(model: Any, backend: Any) -> Any:
    """torch.compile with entries of its own, which don't count against the user's recompile limit (where torch can: 2.13 and later), and without the code that
    the user has compiled in place."""
    import inspect

    compile_any: Any = torch.compile
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    compiled = compile_any(model, backend=backend, **apart)
    in_place = [m for m in model.modules() if call_compiled_in_place(m) is not None] if isinstance(model, torch.nn.Module) else []
    if not in_place:
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        before = [m._compiled_call_impl for m in in_place]
        try:
            for m in in_place:
                m._compiled_call_impl = None
            return compiled(*args, **kwargs)
        finally:
            for m, own in zip(in_place, before, strict=True):
                m._compiled_call_impl = own

    return call


def compiler_of(compiled: Any) -> tuple[str | None, Any, dict[str, Any]]:
    """(name, backend, its keyword arguments) of something torch.compile returned, a module or a function; (None, None, {}) where Dynamo no longer shows
    them."""
    context = getattr(compiled, "dynamo_ctx", None) or _enclosed(compiled, getattr(torch._dynamo.eval_frame, "_TorchDynamoContext", ()))
    layer = getattr(context, "callback", None)
    while (inner := getattr(layer, "_torchdynamo_orig_backend", None)) is not None:
        layer = inner
    return getattr(layer, "compiler_name", None), getattr(layer, "compiler_fn", None), dict(getattr(layer, "kwargs", None) or {})


def backend_names() -> list[str]:
    """The names that torch.compile takes for a backend."""
    names: list[str] = torch._dynamo.list_backends(exclude_tags=())
    return names


def _enclosed(f: Any, kind: type | tuple[()]) -> Any:
    """The first variable of such a kind that a function closes over, None without one."""
    found = []
    for cell in getattr(f, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            found.append(cell.cell_contents)
    return next((v for v in found if isinstance(v, kind)), None)


def call_compiled_in_place(model: Any) -> Any:
    """What `model.compile(...)` put in the place of the module's call, None if nothing."""
    return model._compiled_call_impl if isinstance(model, torch.nn.Module) else None


@contextlib.contextmanager
def forgetting_shapes() -> Iterator[None]:
    """Inside, sizes are taken as static, and Dynamo's memory of sizes seen (which makes later ones dynamic) is put back afterwards."""
    try:
        from torch._dynamo.pgo import get_code_state

        state: Any = get_code_state()
        saved = copy.deepcopy(state)
    except (ImportError, AttributeError):  # then a later call with another size may compile for dynamic sizes at once
        state = saved = None
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        try:
            yield
        finally:
            if state is not None and saved is not None:
                state.clear()
                state.update(saved)
