"""Dynamo: the frame being compiled, the sources of its variables, guards on them, and functions that are compiled already."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis as RestartAnalysis  # what a part of torch raises during a compilation to have Dynamo trace the frame again

try:
    from torch._dynamo.exc import ShortenTraceback

    class UnwrappedBackendError(ShortenTraceback):
        """An error that Dynamo passes to the user unchanged. It wraps any other exception of a backend."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, first_useful_frame=None)

except ImportError:  # then Dynamo wraps such errors in BackendCompilerFailed, with the same text

    class UnwrappedBackendError(RuntimeError):  # type: ignore[no-redef]
        pass


def dynamo_frame() -> Any:
    """Return Dynamo's translator of the frame being compiled, None outside of Dynamo."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx()
    except (ImportError, AttributeError):
        return None


def frame_scope(frame: Any) -> dict[str, dict[str, Any]]:
    """Return the variables of the compiled frame under the names that Dynamo's sources use.

    Args:
        frame: What `dynamo_frame` returned.

    Returns:
        "L": local variables, closures included; "G": global variables.
    """
    root = frame.output.root_tx if frame is not None else None
    return {"L": dict(getattr(root, "f_locals", None) or {}), "G": getattr(root, "f_globals", None) or {}}


def frame_code(frame: Any) -> Any:
    """Return the code object of the frame being compiled, as the user wrote it: behind a graph break that of the function that was broken."""
    code = getattr(frame.output.root_tx, "f_code", None)
    try:
        from torch._dynamo.resume_execution import ContinueExecutionCache

        return getattr(ContinueExecutionCache.generated_code_metadata.get(code), "code", code)
    except (ImportError, AttributeError):  # then the rest of a function counts as a function of its own
        return code


def is_resume_function(frame: Any) -> bool:
    """Return whether the frame is the rest of a function behind a graph break. Variables that are no longer read do not exist there."""
    return getattr(getattr(frame.output.root_tx, "f_code", None), "co_name", "").startswith("torch_dynamo_resume_in_")


def count_calls(gm: fx.GraphModule) -> int:
    """Count the calls of a Dynamo graph, without those in graphs inside it."""
    return sum(n.op.startswith("call_") for n in gm.graph.nodes)


def whole_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Find the graph of the frame that Dynamo is compiling.

    Args:
        gm: The graph that a backend was called with.

    Returns:
        The frame's graph if DDPOptimizer has cut it and `gm` is a part of it; else `gm`.
    """
    tracing = torch._guards.TracingContext.try_get()
    if getattr(tracing, "ddp_optimizer_ctx", None) is None:  # also where this torch has no such attribute; then each part is taken for a whole graph
        return gm
    whole = getattr(getattr(getattr(dynamo_frame(), "output", None), "graph", None), "owning_module", None)
    return whole if isinstance(whole, fx.GraphModule) and count_calls(whole) > count_calls(gm) else gm


def reachable_modules(held: Any, source: Any) -> Iterator[tuple[torch.nn.Module, Any]]:
    """Find the modules that a variable holds.

    They may be the variable itself, what a method is bound to, or stand in a `functools.partial`, a container or a closure.

    Args:
        held: The variable's value.
        source: Dynamo's source of it, None without one.

    Returns:
        Pairs of a module and Dynamo's source of it. The source is None for a module in a closure, on which no guard can be put.
    """
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
            for value, value_source in inner:
                yield from below(value, value_source, depth - 1)

    return below(held, source, 4)


def _is_filled(cell: Any) -> bool:
    """Whether a closure's cell has a value."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def module_sources(placeholder: fx.Node) -> Iterator[tuple[str, Any]]:
    """Yield the modules on the path to a parameter or buffer of Dynamo's graph.

    Args:
        placeholder: The placeholder of the parameter or buffer.

    Yields:
        The expression and the source of each module, the innermost first.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "NNModuleSource" in type(source).__name__:
            yield (source.name() if callable(source.name) else source.name), source
        source = getattr(source, "base", None)


def is_module_state(placeholder: fx.Node) -> bool:
    """Return whether a placeholder of Dynamo's graph is a parameter or buffer that a module owns."""
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False


def module_variable_source(scope: str, name: str) -> Any:
    """Return Dynamo's source of a module that a variable holds.

    Args:
        scope: "L" for a local variable, "G" for a global one.
        name: The variable's name.

    Returns:
        The source.
    """
    from torch._dynamo.source import UnspecializedNNModuleSource

    return UnspecializedNNModuleSource(variable_source(scope, name))


def variable_source(scope: str, name: str) -> Any:
    """Return Dynamo's source of a variable.

    Args:
        scope: "L" for a local variable, "G" for a global one.
        name: The variable's name.

    Returns:
        The source.
    """
    from torch._dynamo.source import GlobalSource, LocalSource

    return LocalSource(name, is_input=True) if scope == "L" else GlobalSource(name)


def child_source(source: Any, path: list[str]) -> Any:
    """Return Dynamo's source of a module below another one, as Dynamo itself builds it.

    Args:
        source: The source of the outer module.
        path: Names of the children on the way.

    Returns:
        The source of the inner module.
    """
    from torch._dynamo.source import AttrSource, DictGetItemSource, UnspecializedNNModuleSource

    for name in path:
        source = UnspecializedNNModuleSource(DictGetItemSource(AttrSource(source, "_modules"), name))
    return source


def guard_attribute(source: Any, name: str) -> None:
    """Install a guard that recompiles when an attribute's value changes.

    Args:
        source: Dynamo's source of the object.
        name: The attribute's name.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    install_guard(AttrSource(source, name).make_guard(GuardBuilder.EQUALS_MATCH))


def guard_absent(source: Any, name: str) -> None:
    """Install a guard that recompiles when an attribute that is absent now appears in the object's dictionary.

    Args:
        source: Dynamo's source of the object.
        name: The attribute's name.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(source.make_guard(functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=name)))


def disable_dynamo(f: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dynamo call a function without tracing it."""
    disabled: Callable[..., Any] = torch.compiler.disable(f)
    return disabled


def copy_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a Dynamo graph to compile it once more.

    Passes before autograd edit a graph in place. `copy.deepcopy` alone would lose the sources of the inputs.

    Args:
        gm: The graph.

    Returns:
        The copy.
    """
    new = copy.deepcopy(gm)
    for a, b in zip(gm.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True):
        if hasattr(a, "_dynamo_source"):
            b._dynamo_source = a._dynamo_source  # type: ignore[attr-defined]
    return new


def compile_isolated(model: Any, backend: Any) -> Any:
    """Compile a model separately from what the user has compiled.

    The result has cache entries of its own, which do not count against the user's recompile limit, and ignores `model.compile()`.

    Args:
        model: A module or a function.
        backend: The backend.

    Returns:
        The compiled model.
    """
    compile_any: Any = torch.compile
    compiled = compile_any(model, backend=backend, isolate_recompiles=True)
    in_place = [m for m in model.modules() if in_place_compiled_call(m) is not None] if isinstance(model, torch.nn.Module) else []
    if not in_place:
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        before = [m._compiled_call_impl for m in in_place]
        try:
            for m in in_place:
                m._compiled_call_impl = None
            return compiled(*args, **kwargs)
        finally:
            for m, compiled_call in zip(in_place, before, strict=True):
                m._compiled_call_impl = compiled_call

    return call


def backend_of(compiled: Any) -> tuple[str | None, Any, dict[str, Any]]:
    """Find the backend of something that torch.compile returned.

    Args:
        compiled: A module or a function.

    Returns:
        (name, backend, keyword arguments of the backend); (None, None, {}) where Dynamo does not show them.
    """
    context = getattr(compiled, "dynamo_ctx", None) or _enclosed(compiled, getattr(torch._dynamo.eval_frame, "_TorchDynamoContext", ()))
    layer = _innermost(getattr(context, "callback", None))
    return getattr(layer, "compiler_name", None), getattr(layer, "compiler_fn", None), dict(getattr(layer, "kwargs", None) or {})


def unwrapped_backend(backend: Any) -> Any:
    """Return what was given to torch.compile as its backend, or what the name that was given stands for.

    Args:
        backend: What Dynamo calls, which may be a wrapper of the backend.

    Returns:
        The backend.
    """
    layer = _innermost(backend)
    return getattr(layer, "compiler_fn", layer)


def _innermost(layer: Any) -> Any:
    """Return what is below all the functions that Dynamo puts around a backend."""
    while (inner := getattr(layer, "_torchdynamo_orig_backend", None)) is not None:
        layer = inner
    return layer


def backend_names() -> list[str]:
    """List the names of the backends that torch.compile knows."""
    names: list[str] = torch._dynamo.list_backends(exclude_tags=())
    return names


def _enclosed(f: Any, kind: type | tuple[()]) -> Any:
    """The first variable of a given type in a function's closure, None without one."""
    values = []
    for cell in getattr(f, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return next((v for v in values if isinstance(v, kind)), None)


def uncompiled(model: Any) -> Any:
    """Find what `torch.compile` was given.

    Args:
        model: A module or a function, compiled or not.

    Returns:
        The module or function below `torch.compile`; `model` itself if it is none of its results, or was compiled in place (`model.compile()`).
    """
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        if (inner := getattr(model, name, None)) is not None:
            return inner
    return model


def in_place_compiled_call(model: Any) -> Any:
    """Return the compiled call that `model.compile(...)` has set on a module, None without one."""
    return model._compiled_call_impl if isinstance(model, torch.nn.Module) else None


@contextlib.contextmanager
def preserve_shape_history() -> Iterator[None]:
    """Take sizes as static inside the block, and restore Dynamo's history of sizes afterwards.

    Dynamo makes a size symbolic that has changed between calls. The calls inside the block must not do that to the user's own calls.

    Yields:
        Nothing.
    """
    try:
        from torch._dynamo.pgo import get_code_state

        state: Any = get_code_state()
        saved = copy.deepcopy(state)
    except (ImportError, AttributeError):  # then a later call with another size may compile for symbolic sizes at once
        state = saved = None
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        try:
            yield
        finally:
            if state is not None and saved is not None:
                state.clear()
                state.update(saved)


def recompile_limit_met() -> bool:
    """Return whether Dynamo has given up compiling a function anew because it has compiled it too often already."""
    counted: dict[str, int] = torch._dynamo.utils.counters.get("unimplemented", {})
    return any(reason.startswith("Dynamo recompile limit exceeded") for reason in counted)
