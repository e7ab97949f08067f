"""Check at import that torch still has every private name that this package uses.

`NAMES` is the table of these names: what each is used for, and what happens when torch no longer has it. A name with a `fallback` gives one warning, and the
fallback holds: results stay correct, at most something is slower or exact. Any other name raises `ImportError`. So a new torch never changes results in
silence, as it could where a name is read with a default, monkeypatched, or called as a hook.

The check imports nothing. A name in a module that is not loaded yet is looked for in the text of that module's source file.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from approx_compile.utils import warn_once


@dataclass(frozen=True)
class PrivateName:
    """A private name of torch.

    Attributes:
        name: The dotted name. What follows a colon is a word in the code of that object: an attribute of its instances, a key, a variable of a closure.
        used_for: What this package does with it.
        fallback: What holds without the name; None: the package can't be imported then.
    """

    name: str
    used_for: str
    fallback: str | None = None


_AOT = "torch._functorch._aot_autograd"
_BUILDER = "torch._dynamo.variables.builder"
_INDUCTOR = "torch._inductor"
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"
_LAYERS = "a layer's name, mode and parameters"
_GUARDS = "guards on a layer's mode and attributes"
_RETRACE = "no symbol is asked for the batch's size, so rows of models that were traced without one are not sampled"
_NO_SEEDING = "the same seed given twice is not noticed: sampled rows then go on from the first one's"
_NO_EXPLAIN = "explain and tune don't find the options of a model that is compiled already"
_NO_FSDP = "controls and steps of models that FSDP2 shards are not in their checkpoints"
_ORDER = "the guard against torch's fault `lost_order`"
_FREE = "no guard on the batch's size that changes nothing"
_NOT_FREE = "rows of some convolutional models are not sampled, or only rows in a number that torch's guard allows"
_CODE = "additions to the code that Inductor writes"

NAMES: tuple[PrivateName, ...] = (
    # Dynamo
    PrivateName("torch.multiprocessing.reductions.StorageWeakRef", "the hash tables of a weight"),
    PrivateName("torch._dynamo.utils.counters", "whether Dynamo has given up compiling a function anew"),
    PrivateName("torch._dynamo.symbolic_convert.InstructionTranslator.current_tx", "the frame being compiled"),
    PrivateName("torch._dynamo.symbolic_convert.InstructionTranslator:f_locals", _LAYERS),
    PrivateName("torch._dynamo.symbolic_convert.InstructionTranslator:f_globals", _LAYERS),
    PrivateName("torch._dynamo.symbolic_convert.InstructionTranslator:f_code", "the code object of the frame being compiled"),
    PrivateName("torch._dynamo.symbolic_convert.InstructionTranslator:speculation_log", "tracing a frame again after a failure"),
    PrivateName("torch._dynamo.output_graph.OutputGraph:root_tx", "the frame being compiled"),
    PrivateName("torch._dynamo.output_graph.OutputGraph:cleanup_hooks", "the end of a request for a symbol"),
    PrivateName("torch._dynamo.output_graph.OutputGraph:_dynamo_source", "which parameters belong to which layer"),
    PrivateName(
        "torch._dynamo.resume_execution.ContinueExecutionCache.generated_code_metadata",
        "the function that a graph break has cut",
        "the rest of a function behind a graph break is taken for a function of its own, and its products stay exact",
    ),
    PrivateName("torch._dynamo.resume_execution:torch_dynamo_resume_in", "the rest of a function behind a graph break"),
    PrivateName("torch._dynamo.source.AttrSource", _GUARDS),
    PrivateName("torch._dynamo.source.AttrSource:base", _GUARDS),
    PrivateName("torch._dynamo.source.DictGetItemSource", _GUARDS),
    PrivateName("torch._dynamo.source.GetItemSource", _GUARDS),
    PrivateName("torch._dynamo.source.GlobalSource", _GUARDS),
    PrivateName("torch._dynamo.source.LocalSource", _GUARDS),
    PrivateName("torch._dynamo.source.UnspecializedNNModuleSource", _GUARDS),
    PrivateName("torch._dynamo.source:ParamBuffer", "which inputs of a graph are parameters of a module"),
    PrivateName("torch._dynamo.guards.GuardBuilder.EQUALS_MATCH", _GUARDS),
    PrivateName("torch._dynamo.guards.GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT", _GUARDS),
    PrivateName("torch._dynamo.guards.install_guard", _GUARDS),
    PrivateName("torch._dynamo.exc.ShortenTraceback", "errors in options", "errors in options arrive wrapped in BackendCompilerFailed"),
    PrivateName("torch._dynamo.exc.UnspecializeRestartAnalysis", "asking for a symbol", _RETRACE),
    PrivateName("torch._dynamo.exc.TensorifyScalarRestartAnalysis", "asking for a symbol", _RETRACE),
    PrivateName("torch._dynamo.exc.RestartAnalysis", "the end of a request for a symbol"),
    PrivateName(f"{_BUILDER}._automatic_dynamic", "asking for a symbol", _RETRACE),
    PrivateName(f"{_BUILDER}._automatic_dynamic:_dynamo_static_indices", "sizes that the user has marked as static"),
    PrivateName(f"{_BUILDER}.GraphArg:source", "asking for a symbol"),
    PrivateName(f"{_BUILDER}:grapharg", "asking for a symbol"),
    PrivateName(f"{_BUILDER}:example_value", "sizes of the inputs of a graph"),
    PrivateName(
        "torch._dynamo.pgo.get_code_state",
        "keeping Dynamo's history of sizes",
        "after explain or tune, a call with another size may compile for symbolic sizes at once",
    ),
    PrivateName("torch._dynamo.config.patch", "keeping Dynamo's history of sizes"),
    PrivateName("torch._dynamo.list_backends", "the names of backends"),
    PrivateName("torch._dynamo.eval_frame._TorchDynamoContext", "the options of a compiled model", _NO_EXPLAIN),
    PrivateName("torch._dynamo.eval_frame._TorchDynamoContext:callback", "the options of a compiled model", _NO_EXPLAIN),
    PrivateName("torch._dynamo.eval_frame.OptimizedModule:dynamo_ctx", "the options of a compiled model", _NO_EXPLAIN),
    PrivateName("torch._dynamo.eval_frame.OptimizedModule:_orig_mod", "the module below a compiled one"),
    PrivateName("torch._dynamo.eval_frame:_torchdynamo_orig_callable", "the function below a compiled one"),
    PrivateName("torch._dynamo.eval_frame:_torchdynamo_orig_backend", "the options of a compiled model", _NO_EXPLAIN),
    PrivateName("torch:compiler_name", "the options of a compiled model", _NO_EXPLAIN),
    PrivateName("torch:compiler_fn", "the options of a compiled model", _NO_EXPLAIN),
    PrivateName("torch.nn.Module:_compiled_call_impl", "models compiled in place"),
    PrivateName("torch.nn.Module:_modules", "guards on a module's children"),
    PrivateName("torch.nn.Module:_buffers", "a model's state"),
    # Contexts of a compilation
    PrivateName("torch._guards.CompileContext.current_compile_id", "which compilation asked for a symbol"),
    PrivateName("torch._guards.TracingContext.try_get", "AOTAutograd's metadata"),
    PrivateName("torch._guards.TracingContext:fw_metadata", "AOTAutograd's metadata"),
    PrivateName("torch._guards.TracingContext:fakify_first_call", "a first call with fake tensors (DDPOptimizer)"),
    PrivateName(
        "torch._guards.TracingContext:ddp_optimizer_ctx",
        "which graphs are parts of one model (DDPOptimizer)",
        "each bucket of DDP counts as a model of its own when it is decided whether rows pay",
    ),
    PrivateName("torch._guards.tracing", "one graph compiled several times"),
    PrivateName("torch._guards.detect_fake_mode", "the fake mode of a graph"),
    # AOTAutograd
    PrivateName(f"{_AOT}.schemas.ViewAndMutationMeta:bw_donated_idxs", "inputs that the backward graph may write to"),
    PrivateName(f"{_AOT}.schemas.ViewAndMutationMeta:dynamic_outputs", "no marks on the user's tensors"),
    PrivateName(
        f"{_AOT}.schemas.ViewAndMutationMeta:dynamic_saved_tensors_idxs", "no marks on the user's tensors", "a tensor that is saved may be marked dynamic"
    ),
    PrivateName(f"{_AOT}.descriptors:PlainAOTInput", "which input a placeholder is"),
    PrivateName(f"{_AOT}.descriptors:ParamAOTInput", "parameters of a graph module"),
    PrivateName(f"{_AOT}.descriptors:BufferAOTInput", "buffers of a graph module"),
    PrivateName(f"{_AOT}.descriptors.GradAOTOutput:grad_of", "which output of a graph is whose gradient"),
    PrivateName(f"{_AOT}.runtime_wrappers:_lazy_backward_info", "the backward graph of a compiled function"),
    PrivateName(f"{_AOT}.runtime_wrappers:compiled_bw", "the backward graph of a compiled function"),
    PrivateName(f"{_AOT}.runtime_wrappers:bw_module", "the backward graph of a compiled function"),
    PrivateName(f"{_AOT}.runtime_wrappers:bw_module_fn", "the backward graph of a compiled function"),
    PrivateName("torch.autograd.function.FunctionMeta:_forward_cls", "the backward graph of a compiled function"),
    PrivateName("torch._functorch.partitioners:partitioner_tag", "which nodes are of the backward pass"),
    PrivateName("torch._functorch.partitioners:must_be_in_backward", "random numbers that are drawn once"),
    PrivateName("torch._functorch.config.patch", "compiling with an `inner_compile`"),
    PrivateName("torch._functorch.config.activation_memory_budget", "whether nodes are recomputed"),
    PrivateName("torch._functorch.config:enable_autograd_cache", "compiling with an `inner_compile`"),
    PrivateName("torch._functorch.config:force_non_lazy_backward_lowering", "compiling with an `inner_compile`"),
    PrivateName("functorch.compile.make_boxed_func", "running a graph op by op"),
    PrivateName(f"{_AOT}.utils:_boxed_call", "freeing the inputs of the backward pass early"),
    # The autograd engine, random numbers
    PrivateName("torch._C._current_graph_task_id", "which backward pass is running", "two backward passes of one forward pass can't be told apart"),
    PrivateName("torch._C._current_autograd_node", "what lies below a graph"),
    PrivateName("torch._C._autograd._get_current_graph_task_keep_graph", "`retain_graph=True`", "every graph is taken for one that is kept: more memory"),
    PrivateName("torch.Tensor._backward_hooks", "hooks below a compiled graph"),
    PrivateName("torch.Tensor._version", "values that the user has changed in place"),
    PrivateName("torch.cuda._lazy_seed_tracker", "a new call of torch.manual_seed", _NO_SEEDING),
    PrivateName("torch.cuda._LazySeedTracker:manual_seed_all_cb", "a new call of torch.manual_seed", _NO_SEEDING),
    PrivateName("torch.cuda.random.manual_seed_all:seed", "the seed of torch.manual_seed", _NO_SEEDING),
    # Inductor
    PrivateName(f"{_INDUCTOR}.compile", "measurements and small kernels"),
    PrivateName(f"{_INDUCTOR}.compile_fx.compile_fx", "compiling a graph"),
    PrivateName(f"{_INDUCTOR}.compile_fx.compile_fx_inner", "compiling a part of the backward pass"),
    PrivateName(f"{_INDUCTOR}.config.joint_custom_pre_pass", "the pass over the joint graph"),
    PrivateName(f"{_INDUCTOR}.config._pre_fusion_custom_pass", _ORDER),
    PrivateName(f"{_INDUCTOR}.config:fx_graph_cache", "compiling without Inductor's cache"),
    PrivateName(f"{_INDUCTOR}.custom_graph_pass.CustomGraphPass", "the key of the pass in Inductor's caches"),
    PrivateName(f"{_INDUCTOR}.custom_graph_pass.CustomSchedulerPass", "the key of the guards in Inductor's caches"),
    PrivateName(f"{_INDUCTOR}.decomposition.select_decomp_table", "tracing a replacement"),
    PrivateName(f"{_INDUCTOR}.dependencies.StarDep", _ORDER),
    PrivateName(f"{_INDUCTOR}.dependencies.WeakDep", _ORDER),
    PrivateName(f"{_INDUCTOR}.scheduler.SchedulerNode", _ORDER),
    PrivateName(f"{_INDUCTOR}.scheduler:recompute_size_and_body", _ORDER),
    PrivateName(f"{_INDUCTOR}.scheduler:mutation_renames", _ORDER),
    PrivateName(f"{_INDUCTOR}.scheduler:set_read_writes", _ORDER),
    PrivateName("torch.utils._ordered_set.OrderedSet", _ORDER),
    PrivateName(f"{_INDUCTOR}.virtualized.V", _CODE),
    PrivateName(f"{_INDUCTOR}.graph:wrapper_code", _CODE),
    PrivateName(f"{_INDUCTOR}.graph:aot_mode", _CODE),
    PrivateName(f"{_INDUCTOR}.graph:cpp_wrapper", _CODE),
    PrivateName(f"{_INDUCTOR}.graph:buffers", "the sizes of a graph's buffers"),
    PrivateName(f"{_INDUCTOR}.sizevars:optimization_hint", "the sizes of a graph's buffers"),
    PrivateName(f"{_INDUCTOR}.codegen.cpp.CppKernel:need_use_acc_helper", _FREE, _NOT_FREE),
    PrivateName(f"{_INDUCTOR}.codegen.cpp:guard_or_false", _FREE, _NOT_FREE),
    PrivateName("torch._C._select_conv_backend", _FREE, _NOT_FREE),
    PrivateName("torch._C._conv_determine_backend_memory_format", _FREE, _NOT_FREE),
    PrivateName("torch._subclasses.fake_impls:_select_conv_backend", _FREE, _NOT_FREE),
    PrivateName("torch._subclasses.fake_tensor.FakeTensor:fake_device", _FREE, _NOT_FREE),
    PrivateName("torch._dynamo.output_graph.OutputGraph:compiler_fn", "whether Dynamo compiles for this package", _NOT_FREE),
    PrivateName(f"{_INDUCTOR}.inductor_prims.force_stride_order", "a buffer in a given memory order"),
    PrivateName(f"{_INDUCTOR}.inductor_prims:_low_memory_max_pool_with_offsets", "ReLU before max pooling", "a ReLU before max pooling is not moved behind it"),
    PrivateName(
        f"{_INDUCTOR}.inductor_prims:_low_memory_max_pool_offsets_to_indices", "ReLU before max pooling", "a ReLU before max pooling is not moved behind it"
    ),
    PrivateName(f"{_INDUCTOR}.inductor_prims:inductor_rand", "which nodes draw random numbers"),
    PrivateName(f"{_INDUCTOR}.cpp_builder.get_cpp_compiler", "the C++ compiler that `approx-compile doctor` shows"),
    PrivateName(f"{_INDUCTOR}.list_mode_options", "Inductor's modes"),
    PrivateName(f"{_INDUCTOR}.list_options", "Inductor's options"),
    PrivateName(f"{_INDUCTOR}.runtime.cache_dir_utils.cache_dir", "the folder of measurements"),
    PrivateName("torch._C._dynamo.guards._empty_strided_cpu", "tensors without the dispatcher's cost"),
    PrivateName("torch._logging._internal.trace_structured", "artifacts in TORCH_TRACE", "TORCH_TRACE has no artifacts of approx_compile"),
    # Fake tensors, symbols, ops
    PrivateName("torch._subclasses.fake_tensor.FakeTensorMode", "counting FLOPs"),
    PrivateName("torch.fx.experimental.proxy_tensor.make_fx", "tracing a replacement"),
    PrivateName(f"{_SYMBOLS}.statically_known_true", "comparing symbolic sizes"),
    PrivateName(f"{_SYMBOLS}.DimDynamic.DYNAMIC", "asking for a symbol"),
    PrivateName(f"{_SYMBOLS}.DimDynamic.STATIC", "asking for a symbol"),
    PrivateName(f"{_INDUCTOR}.config.triton.cudagraphs", "whether a probe may run a graph several times"),
    PrivateName(f"{_SYMBOLS}.ShapeEnv._maybe_guard_rel", "inputs of one size"),
    PrivateName(f"{_SYMBOLS}.ShapeEnv.create_symbol", "the number of tokens of a region"),
    PrivateName(f"{_SYMBOLS}.ShapeEnv.create_symintnode", "the number of tokens of a region"),
    PrivateName("torch._dynamo.source.ConstantSource", "the number of tokens of a region"),
    PrivateName(f"{_SYMBOLS}.StatelessSymbolicContext:dynamic_sizes", "asking for a symbol"),
    PrivateName("torch.fx.experimental.sym_node.SymNode:hint", "the size that a symbol stands for"),
    PrivateName("torch.utils._sympy.functions.FloorDiv", "samples that own several rows"),
    PrivateName("torch.utils._sympy.interp.sympy_interp", "sizes of another graph"),
    PrivateName("torch.utils._sympy.reference.PythonReferenceAnalysis", "sizes of another graph"),
    PrivateName("torch.utils._python_dispatch._disable_current_modes", "measuring inside a compilation"),
    PrivateName("torch.utils._python_dispatch.is_traceable_wrapper_subclass", "DTensor and its like"),
    PrivateName("torch.utils._pytree.tree_leaves", "nested inputs"),
    PrivateName("torch._ops.HigherOrderOperator", "ops that take graphs"),
    PrivateName("torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam:_unsharded_param", "the names of FSDP2's gathered parameters", _NO_FSDP),
    PrivateName("torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam:sharded_param", "the names of FSDP2's gathered parameters", _NO_FSDP),
    PrivateName("torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState:_fsdp_param_groups", "the names of FSDP2's gathered parameters", _NO_FSDP),
    PrivateName("torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule:_get_fsdp_state", "the names of FSDP2's gathered parameters", _NO_FSDP),
    PrivateName("torch.nn.parallel.DistributedDataParallel:_join_config", "ranks that run out of data"),
    PrivateName("torch.nn.parallel.DistributedDataParallel:_divide_by_initial_world_size", "ranks that run out of data"),
    PrivateName("torch.distributed.fsdp.FullyShardedDataParallel:_fsdp_wrapped_module", "the module that FSDP wraps"),
    PrivateName("torch._ops.OpOverload", "what kind of op a node calls"),
    PrivateName("torch._ops.OpOverload:_schema", "the types of an op's arguments"),
    PrivateName("torch._ops.OpOverload:tags", "which ops are random, pointwise"),
    PrivateName("torch._ops.OpOverloadPacket", "what kind of op a node calls"),
    *(
        PrivateName(f"torch.ops.aten.{op}", "rules for ops")
        for op in (
            "_conj _convolution _embedding_bag_forward_only _fft_c2c _fft_c2r _fft_r2c _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data "
            "_to_copy _unsafe_index _unsafe_index_put _unsafe_view"
        ).split()
    ),
)
"""Every private name of torch that the package uses."""


_NOT_LOADED = object()


def exists(name: str) -> bool:
    """Whether the installed torch has a name, told without an import.

    Args:
        name: A name as in `PrivateName.name`.

    Returns:
        Whether it is there. Where its module is not loaded and has no source file, True.
    """
    path, _, word = name.partition(":")
    parts = path.split(".")
    loaded = next(i for i in range(len(parts), -1, -1) if not i or ".".join(parts[:i]) in sys.modules)
    try:
        target = functools.reduce(getattr, parts[loaded:], sys.modules[".".join(parts[:loaded])]) if loaded else _NOT_LOADED
    except AttributeError:
        target = _NOT_LOADED
    if target is _NOT_LOADED:
        return _is_in_source(parts, loaded, word)
    return not word or _mentions(target, word)


def missing() -> list[PrivateName]:
    """List the names of the table that the installed torch should have and does not.

    Returns:
        The entries, in the order of the table.
    """
    return [n for n in NAMES if not exists(n.name)]


def check() -> None:
    """Warn once of the missing names that have a fallback.

    Raises:
        ImportError: Names without a fallback are missing.
    """
    gone = missing()
    if fatal := [f"{n.name} ({n.used_for})" for n in gone if n.fallback is None]:
        raise ImportError(f"approx_compile uses private names that torch {torch.__version__} does not have: {', '.join(fatal)}. Use torch 2.13")
    if gone:
        effects = "; ".join(f"{n.name}: {n.fallback}" for n in gone)
        warn_once(f"approx: torch {torch.__version__} does not have private names that approx_compile uses. Results stay correct, but: {effects}")


def _is_in_source(parts: list[str], loaded: int, word: str) -> bool:
    """Whether a name is in the source file of a module that is not loaded. `loaded`: how many parts name a package that is."""
    spec, depth = None, loaded
    places = getattr(sys.modules[".".join(parts[:loaded])], "__path__", None) if loaded else sys.path
    while places is not None and (below := PathFinder.find_spec(".".join(parts[: depth + 1]), list(places))) is not None:
        spec, places, depth = below, below.submodule_search_locations, depth + 1
        if depth == len(parts):
            break
    if spec is None:
        return False
    text = _source(spec.origin)
    return text is None or all(w in text for w in (*parts[depth:], *([word] if word else [])))


@functools.cache
def _source(origin: str | None) -> str | None:
    path = Path(origin or "")
    return path.read_text() if path.suffix == ".py" and path.is_file() else None


def _mentions(owner: Any, word: str) -> bool:
    """Whether an object has an attribute, or its code (a class's methods, a module's functions) names it."""
    if hasattr(owner, word):
        return True
    if isinstance(owner, types.ModuleType):
        text = _source(getattr(owner, "__file__", None))
        return text is None or word in text
    return any(word in _words_of(c) for c in (owner.__mro__ if inspect.isclass(owner) else (owner,)))


@functools.cache
def _words_of(owner: Any) -> frozenset[str]:
    """The fields of a class and what its methods' code names; what a function's code names."""
    words = (w for f in _functions(owner) for group in _words(f.__code__) for w in group if isinstance(w, str))
    return frozenset((*vars(owner).get("__annotations__", ()), *words))


def _functions(owner: Any) -> Iterator[types.FunctionType]:
    for value in vars(owner).values() if inspect.isclass(owner) else (owner,):
        function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
        if isinstance(function, types.FunctionType):
            yield function


def _words(code: types.CodeType) -> Iterator[tuple[Any, ...]]:
    """The names and constants of a function's code and of the functions inside it."""
    yield from (code.co_names, code.co_varnames, code.co_cellvars, code.co_consts)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
        elif isinstance(constant, tuple):
            yield constant
