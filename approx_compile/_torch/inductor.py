"""Inductor: its options, its two compilers, custom passes, the code that it generates, and its cache."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass  # the base class that Inductor's caches ask for

from approx_compile._torch.fake_tensors import inductor_decompositions

empty_strided_cpu: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
"""What the code that Inductor writes allocates with; sizes and strides must be plain tuples."""


try:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass as CustomSchedulerPass
except ImportError:  # before torch 2.13 the caches asked the passes of the scheduler, too, for the other class
    CustomSchedulerPass = CustomGraphPass  # type: ignore[assignment, misc]


def inductor_modes() -> tuple[str, ...]:
    return tuple(torch._inductor.list_mode_options())


@functools.cache
def inductor_options() -> frozenset[str]:
    return frozenset(torch._inductor.list_options())


def mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def user_joint_passes() -> list[Any]:
    """The joint passes that the user set in Inductor's config."""
    own = torch._inductor.config.joint_custom_pre_pass
    return [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]


def user_scheduler_pass() -> Any:
    """The pass before fusion that the user set in Inductor's config, if any."""
    return torch._inductor.config._pre_fusion_custom_pass


class _PassChain(CustomSchedulerPass):
    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes

    def __call__(self, nodes: list[Any]) -> list[Any]:
        return functools.reduce(lambda found, run: run(found), self.passes, nodes)

    def uuid(self) -> Any:
        return tuple(p.uuid() for p in self.passes)


def chain_scheduler_passes(passes: Sequence[Any]) -> Any:
    """One pass of the scheduler that runs several. Where one has no uuid, neither has this: Inductor then keeps its caches out of it."""
    run = _PassChain(passes)
    return run if all(isinstance(p, CustomSchedulerPass) for p in passes) else run.__call__


def keep_dependencies(nodes: Sequence[Any], device: str, forgot: Callable[[], None]) -> None:
    """Nodes of Inductor's scheduler on a device keep what it knows of them, and their code does not show, when what they read is worked out anew: the orders
    that it has added, and the names that buffers have once they are written in place. `forgot` is called where Inductor alone would have lost some."""
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


def compile_graph(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
    """Inductor's back half: one graph without autograd to code."""
    from torch._inductor.compile_fx import compile_fx_inner

    return compile_fx_inner(gm, example_inputs, **kwargs)


def compile_kernel(run: Callable[..., Any], values: Sequence[torch.Tensor], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """`run` for these shapes as Inductor's code, without Dynamo."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(run, decomposition_table=inductor_decompositions(), tracing_mode="fake")(*values)
    compiled: Callable[..., Any] = torch._inductor.compile(traced, list(values), options)
    return compiled


def run_as_is(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """An `inner_compile` that runs the partitioned graphs op by op."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]

    return make_boxed_func(gm.forward)


def force_memory_order(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The same values with the dims in this order in memory, the last one innermost. Inductor makes that a buffer of its own, which `contiguous` need not
    be: what is not is computed anew in every place that reads it."""
    strides, step = [0] * x.dim(), 1
    for d in reversed(order):
        strides[d], step = step, step * x.shape[d]
    from torch._inductor.inductor_prims import force_stride_order

    ordered: torch.Tensor = force_stride_order(x, strides)
    return ordered


def cpu_buffer_bytes() -> Iterator[int]:
    """Of every buffer on the CPU of the graph that Inductor is writing Python code for; of a symbolic size, its hint."""
    from torch._inductor.virtualized import V

    if V.graph.cpp_wrapper or V.graph.aot_mode:
        return
    for buffer in V.graph.buffers:
        device = buffer.get_device() if buffer.has_tensor_output() else None
        if device is not None and device.type == "cpu":
            yield V.graph.sizevars.optimization_hint(buffer.get_numel()) * buffer.get_dtype().itemsize


def append_to_header(line: str) -> None:
    """Put a line at the end of the head of the Python code that Inductor is writing."""
    from torch._inductor.virtualized import V

    V.graph.wrapper_code.header.writeline(line)


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
