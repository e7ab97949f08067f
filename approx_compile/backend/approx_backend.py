"""The backend object and the entry point of `torch.compile(model, backend="approx")`.

A call receives Dynamo's graph, compiles it with Inductor and this package's joint-graph pass, once for every setting that may hold during the run, and
returns one function that picks the compiled variant at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from approx_compile import _torch
from approx_compile._torch.known_faults import guarded
from approx_compile.backend import diagnostics
from approx_compile.backend.capture import graph_context
from approx_compile.backend.capture.frame_parts import begin_part
from approx_compile.backend.inductor_options import inductor_patches
from approx_compile.backend.runtime import choice_recorder, compiled_graphs
from approx_compile.backend.runtime.coverage_notice import note_graph, watch_optimizers
from approx_compile.backend.runtime.dispatch import Dispatch
from approx_compile.backend.runtime.output_probe import AdaptiveOutputs
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.backend.variants import BackendOptions, GraphCompiler, Variant, profile_digest, representative_plan
from approx_compile.config import ApproxConfig
from approx_compile.passes.joint_graph_pass import Listener
from approx_compile.passes.sites.site import Context
from approx_compile.rows.ownership import GraphName
from approx_compile.rows.step_counter import count_optimizer_steps
from approx_compile.utils import DISABLE, warn_once


class Backend:
    """The backend as an object: `torch.compile(model, backend=Backend(ApproxConfig(...)))`.

    The object checks its config when it is made. The string form, `backend="approx"`, receives its options only when the model is called for the first time.

    Args:
        config: An `ApproxConfig` or a mapping with the same keys; None for the defaults.
        inner_compile: Receives the partitioned forward and backward graphs in place of Inductor's code generation; `approx_compile.backend.run_as_is` runs
            them op by op.
        on_plan: Called with the plan of every graph in place of notices to the user.
        keep_graphs: Whether `on_plan` also gets copies of the joint graph before and after the rewrite.

    Raises:
        ConfigError: If the settings are not valid, or their steps and phases make too many different assignments.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> backend = approx_compile.Backend({"ratio": 0.5, "policy": "always"})
        >>> model = torch.compile(torch.nn.Linear(64, 64), backend=backend)
        >>> model(torch.randn(256, 64)).square().mean().backward()
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
        """Compare the settings: backends with equal settings share compiled code, as equal `options` of the string form do."""
        return isinstance(other, Backend) and self._options() == other._options()

    def __hash__(self) -> int:
        return hash(self.config)

    def __reduce__(self) -> tuple[Callable[[], Backend], tuple[()]]:
        """Pickle the arguments, so that a pickle does not depend on how the schedule is kept."""
        return partial(Backend, self.config, inner_compile=self.inner_compile, on_plan=self.on_plan, keep_graphs=self.keep_graphs), ()

    def _options(self) -> BackendOptions:
        return BackendOptions(self.config, self.inner_compile, self.on_plan, self.keep_graphs)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, **kwargs: Any) -> Any:
        """Compile one of Dynamo's graphs; `mode` is that of `torch.compile`."""
        patches = inductor_patches(self.config, mode)
        if DISABLE.value() == "1" or not torch.is_grad_enabled():  # without gradients everything is exact, and the modules' mode needs no guard
            return _torch.compile_fx(gm, example_inputs, guarded(patches), self.inner_compile, self.inner_compile is None)
        context, layers, trained, root = graph_context.read_graph(gm, example_inputs, self.config)
        note_graph(root, example_inputs)
        frame = begin_part(gm)
        assignments, index = self.schedule.relevant([context.root.name, *(m.name for m in context.modules.values())])
        if context.nothing_trains():
            assignments = assignments[:1]
        ladders = [c.by_output_ratio() if not context.nothing_trains() else c.by_output_ratio()[-1:] for c in assignments]
        configs = [config for ladder in ladders for _, config in ladder]
        compiler = GraphCompiler(self._options(), gm, example_inputs, patches, context, layers, trained, root, frame, len(configs) > 1)
        variants = compiler.compile(configs)
        if root is not None and choice_recorder.may_be_sent():
            compiled_graphs.note(root, compiler.name().key, self.config, profile_digest(example_inputs), [v.plan for v in variants])
        if self.on_plan is None:
            frame.add(representative_plan(variants, configs, self.config), "".join(v.uuid for v in variants), example_inputs, len(assignments))
            if frame.is_last:
                read = self._read_whole(frame.whole) if frame.is_split else (context, layers, trained, root)
                record = diagnostics.GraphRecord(self.config, read[3], read[1], read[0], frame.whole.code, frame.plan(), frame.assignments)
                record.notify("".join(frame.uuids), frame.inputs)
        if len(variants) == 1:
            return variants[0].call
        return self._select_at_run_time(ladders, variants, index, _parameters(example_inputs), compiler.name(), root)

    def _read_whole(self, whole: fx.GraphModule) -> tuple[Context, tuple[str, ...], tuple[str, ...], nn.Module | None]:
        """Read the graph of a frame of which the backend has got only parts."""
        return graph_context.read_graph(whole, [n.meta.get("example_value") for n in whole.graph.find_nodes(op="placeholder")], self.config)

    def _select_at_run_time(
        self,
        ladders: Sequence[Sequence[tuple[float, ApproxConfig]]],
        variants: Sequence[Variant],
        index: Sequence[int],
        parameters: Sequence[int],
        graph: GraphName,
        root: nn.Module | None,
    ) -> Callable[..., Any]:
        """Combine the variants into one function, which runs the assignment that holds, at the ratio of outputs that the assignment's control chooses.

        `ladders` holds the ratios of outputs of each assignment, and `variants` the compiled graphs in the same order. `index` maps each assignment of the
        schedule to a compiled one. `parameters` are the places of the parameters among the arguments.
        """
        remaining, compiled, name = iter(variants), [v.call for v in variants], diagnostics.model_name(root)
        by_assignment: list[Any] = []
        for i, ladder in enumerate(ladders):
            by_ratio = {ratio: next(remaining) for ratio, _ in ladder}
            samples_outputs = any(v.plan is None or any(s.products[0].decision == "sampled" for s in v.plan.sites) for v in by_ratio.values())
            calls = {r: v.call for r, v in by_ratio.items()}
            adaptive = samples_outputs and len(calls) > 1
            by_assignment.append(AdaptiveOutputs(self.config.adaptive, calls, parameters, graph + str(i or "")) if adaptive else calls[max(calls)])
        run = by_assignment[0]
        if len(by_assignment) > 1:
            if (why := _why_uncounted(root, parameters)) is not None:
                warn_once(f"approx: {name} {why}: the settings of step 0, without a phase, go on holding there")
            run = Dispatch(self.schedule, by_assignment, index, parameters, name, root)
        first_is_fake = _torch.first_call_is_fake()

        def call(*args: Any) -> Any:  # wrappers of compiled code expect a plain function
            nonlocal first_is_fake
            if first_is_fake:  # DDPOptimizer makes the first call; after it, every compiled function expects real tensors
                first_is_fake = False
                first, *_ = [f(*args) for f in compiled]
                return first
            return run(*args)

        return call


def approx(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None, **kwargs: Any) -> Any:
    """Compile one of Dynamo's graphs: the entry point behind `backend="approx"`.

    Args:
        gm: Dynamo's graph.
        example_inputs: The values of its placeholders.
        options: The keys of `ApproxConfig`.
        mode: The mode of `torch.compile`.
        **kwargs: Other arguments that `torch.compile` may pass; they have no effect.

    Returns:
        The compiled function.

    Raises:
        ConfigError: If the options are not valid.
    """
    return Backend(options)(gm, example_inputs, mode=mode, **kwargs)


def _parameters(example_inputs: Sequence[Any]) -> list[int]:
    """Return the places of the inputs that an optimizer may step: parameters, and leaves that need a gradient."""
    return [i for i, v in enumerate(example_inputs) if isinstance(v, nn.Parameter) or (isinstance(v, torch.Tensor) and v.is_leaf and v.requires_grad)]


def _why_uncounted(root: nn.Module | None, parameters: Sequence[int]) -> str | None:
    """Return the reason why the optimizer's steps cannot be counted for a graph, or None if they can."""
    if root is not None and _torch.is_sharded(root) and not _torch.sharded_parameters(root):
        return "is sharded by FSDP2, whose optimizers step other tensors than the graph reads"
    return None if parameters else "has no parameters in one of its graphs"


# Not at the first compilation, which may be inside an optimizer's step (its closure): that step would not count. And some models have no compilation at all.
count_optimizer_steps()
watch_optimizers()
