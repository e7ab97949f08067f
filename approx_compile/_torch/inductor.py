"""Inductor: its options, its two compilers, custom passes, the code that it generates, and its cache."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass  # the base classes that Inductor's caches ask for
from torch._inductor.custom_graph_pass import CustomSchedulerPass as CustomSchedulerPass

from approx_compile._torch.fake_tensors import inductor_decompositions
from approx_compile._torch.needless_guards import free_sums

empty_strided_cpu: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
"""The function that Inductor's generated code allocates with. Sizes and strides must be plain tuples."""


def inductor_modes() -> tuple[str, ...]:
    """List the names of Inductor's modes, which `torch.compile(mode=...)` takes."""
    return tuple(torch._inductor.list_mode_options())


@functools.cache
def inductor_options() -> frozenset[str]:
    """List the names of Inductor's options."""
    return frozenset(torch._inductor.list_options())


def mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """Return the options of Inductor that a mode stands for.

    Args:
        mode: The mode's name; None: no options.
        dynamic: Not used; torch.compile passes it.

    Returns:
        Inductor's options.
    """
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def user_joint_passes() -> list[Any]:
    """List the passes over the joint graph that the user set in Inductor's config."""
    custom = torch._inductor.config.joint_custom_pre_pass
    return [] if custom is None else list(custom) if isinstance(custom, (list, tuple)) else [custom]


def user_scheduler_pass() -> Any:
    """Return the pass before fusion that the user set in Inductor's config, None without one."""
    return torch._inductor.config._pre_fusion_custom_pass


class _PassChain(CustomSchedulerPass):
    """Passes over the nodes of the scheduler, run one after the other."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes

    def __call__(self, nodes: list[Any]) -> list[Any]:
        return functools.reduce(lambda result, run: run(result), self.passes, nodes)

    def uuid(self) -> Any:
        return tuple(p.uuid() for p in self.passes)


def chain_scheduler_passes(passes: Sequence[Any]) -> Any:
    """Make one pass of the scheduler that runs several in order.

    Args:
        passes: The passes.

    Returns:
        The combined pass. If one of them has no uuid, the result has none either: Inductor then does not cache what it compiles with it.
    """
    run = _PassChain(passes)
    return run if all(isinstance(p, CustomSchedulerPass) for p in passes) else run.__call__


def keep_dependencies(nodes: Sequence[Any], device: str, forgot: Callable[[], None]) -> None:
    """Make nodes of Inductor's scheduler keep dependencies that Inductor itself would lose.

    When Inductor computes anew what a node reads, it forgets what the node's code does not show: the orders that it has added, and the names that buffers have
    after they are written in place.

    Args:
        nodes: Nodes of the scheduler, changed in place.
        device: The device type whose nodes are changed.
        forgot: Called where Inductor alone would have lost dependencies.
    """
    from torch._inductor.scheduler import SchedulerNode

    for node in (n for whole in nodes for n in whole.get_nodes()):
        if isinstance(node, SchedulerNode) and (where := node.get_device()) is not None and where.type == device:
            again = functools.partial(_recompute_and_keep, node, node.recompute_size_and_body, forgot)
            node.recompute_size_and_body = again  # type: ignore[method-assign]


def _recompute_and_keep(node: Any, recompute: Callable[..., None], forgot: Callable[[], None], *args: Any, **kwargs: Any) -> None:
    from torch._inductor.dependencies import StarDep, WeakDep
    from torch.utils._ordered_set import OrderedSet

    added = OrderedSet(dep for dep in node.read_writes.reads if isinstance(dep, (WeakDep, StarDep)))
    recompute(*args, **kwargs)
    whole = node.read_writes.with_read(added).rename(node.mutation_renames)
    if whole.reads != node.read_writes.reads:
        node.set_read_writes(whole)
        forgot()


def compile_fx(
    gm: fx.GraphModule, example_inputs: Any, patches: dict[str, Any], inner_compile: Any = None, cached: bool = True, one_of_several: bool = False
) -> Any:
    """Compile a Dynamo graph with Inductor, or with Inductor's front half and another back half.

    AOTAutograd's cache returns compiled graphs without what an `inner_compile` puts around them, so the cache is off then. The backward graph is compiled at
    once then, not at the first backward pass.

    Args:
        gm: The graph.
        example_inputs: Its inputs, as Dynamo gives them.
        patches: Options of Inductor.
        inner_compile: Compiles the partitioned graphs in place of Inductor; None: Inductor does.
        cached: Whether Inductor's cache of graphs is used.
        one_of_several: Whether the graph is compiled more than once in one call of the backend. Each compilation then has a copy of the tracing context,
            because AOTAutograd keeps state there for a backward pass that is compiled later.

    Returns:
        The compiled function.
    """
    from torch._inductor.compile_fx import compile_fx as inductor

    free_sums()
    if inner_compile is None:
        context = torch._guards.TracingContext.try_get() if one_of_several else None
        with torch._guards.tracing(copy.copy(context)) if context is not None else contextlib.nullcontext():
            return inductor(gm, example_inputs, config_patches=patches)
    patches = patches if cached else {**patches, "fx_graph_cache": False}
    with torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        return inductor(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)


def compile_graph(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
    """Compile one graph without autograd to code: Inductor's back half.

    Args:
        gm: The graph.
        example_inputs: Its inputs.
        **kwargs: Further arguments of Inductor's `compile_fx_inner`.

    Returns:
        The compiled function.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, example_inputs, **kwargs)


def compile_kernel(run: Callable[..., Any], values: Sequence[torch.Tensor], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile a function for the shapes of given values with Inductor, without Dynamo.

    Args:
        run: The function, of tensors.
        values: Tensors with the shapes, dtypes and devices.
        options: Options of Inductor.

    Returns:
        The compiled function.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(run, decomposition_table=inductor_decompositions(), tracing_mode="fake")(*values)
    compiled: Callable[..., Any] = torch._inductor.compile(traced, list(values), options)
    return compiled


def run_as_is(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Run a partitioned graph op by op: an `inner_compile` that compiles nothing.

    Args:
        gm: The graph.
        *args: Not used.
        **kwargs: Not used.

    Returns:
        The graph's forward, with the boxed calling convention.
    """
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]

    return make_boxed_func(gm.forward)


def force_memory_order(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Copy a tensor to a buffer with a given order of dims in memory.

    Inductor materialises the result. It need not do so for `contiguous`: what is no buffer is recomputed wherever it is read.

    Args:
        x: The tensor.
        order: The dims from the outermost to the innermost in memory.

    Returns:
        The same values, with x's shape.
    """
    strides, step = [0] * x.dim(), 1
    for d in reversed(order):
        strides[d], step = step, step * x.shape[d]
    from torch._inductor.inductor_prims import force_stride_order

    ordered: torch.Tensor = force_stride_order(x, strides)
    return ordered


def cpu_buffer_bytes() -> Iterator[int]:
    """Yield the size of every CPU buffer of the graph that Inductor is generating Python code for.

    Yields:
        Bytes; for a symbolic size those of its hint. Nothing where Inductor generates a C++ wrapper.
    """
    from torch._inductor.virtualized import V

    if V.graph.cpp_wrapper or V.graph.aot_mode:
        return
    for buffer in V.graph.buffers:
        device = buffer.get_device() if buffer.has_tensor_output() else None
        if device is not None and device.type == "cpu":
            yield V.graph.sizevars.optimization_hint(buffer.get_numel()) * buffer.get_dtype().itemsize


def append_to_header(line: str) -> None:
    """Append a line to the header of the Python code that Inductor is generating.

    Args:
        line: The line.
    """
    from torch._inductor.virtualized import V

    V.graph.wrapper_code.header.writeline(line)


def cache_folder() -> Any:
    """Return the folder of Inductor's cache. What is stored there goes when the user clears that cache."""
    from pathlib import Path

    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that Inductor uses on CPUs, None if it finds none that runs."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except Exception:  # InvalidCxxCompiler, or what running a broken one raises
        return None


def trace_artifact(name: str, payload: Any) -> None:
    """Write an artifact to torch's structured trace (TORCH_TRACE), if there is one.

    Args:
        name: The artifact's name.
        payload: A function that returns the artifact as JSON text.
    """
    try:
        from torch._logging._internal import trace_structured

        trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload, expect_trace_id=False)
    except ImportError:
        pass


def uses_cuda_graphs() -> bool:
    """Return whether Inductor's settings ask for CUDA graphs."""
    return bool(torch._inductor.config.triton.cudagraphs)
