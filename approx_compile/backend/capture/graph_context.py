"""Read from Dynamo's graph what AOTAutograd later loses (module names, train/eval mode, parameters), and install guards on it.

The result is the pass's `Context`. Because of the guards, the graph is compiled once more when a module changes its mode, so that the code of one mode never
runs in the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from approx_compile import _torch
from approx_compile.backend.capture.annotate import SIGNATURE, full_name, last_module, sign, whole_model
from approx_compile.backend.capture.module_resolution import Layers
from approx_compile.config import ApproxConfig
from approx_compile.passes.planning.plan_validation import check_modules
from approx_compile.passes.sites.site import Context, Input, Module
from approx_compile.reasons import Reason
from approx_compile.reasons.products import CUSTOM_FUNCTION, EVAL_MODE, FUNC_TRANSFORM, TENSOR_SUBCLASS, UNTRACED_MODULE

_TRANSFORMS = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting")
"""The calls with which torch.func's transforms begin in Dynamo's graph. The call that ends a transform has the same name with "decrement"."""


def read_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: ApproxConfig) -> tuple[Context, tuple[str, ...], tuple[str, ...], nn.Module | None]:
    """Read the modules, their modes and the inputs of a Dynamo graph, and guard the modes.

    Args:
        gm: Dynamo's graph. Nodes whose products must be exact are marked in place.
        example_inputs: The values of its placeholders.
        config: The settings; a tuned plan is checked against the model's modules, and the rules by name are guarded for annotated models.

    Returns:
        The pass's context; the key of the innermost module of every call in graph order (for the cache key); the names of those of these modules that have
        parameters of their own; the root module, if there is exactly one.

    Raises:
        ConfigError: If the tuned plan of `config` names modules that the model lacks.
    """
    stacks = [n.meta.get("nn_module_stack") or {} for n in _calls(gm)]
    frame = _torch.dynamo_frame()
    layers = Layers(stacks, [n for n in gm.graph.nodes if n.op == "placeholder"], frame)
    if config.plan is not None and layers.root is not None:
        whole = whole_model(layers.root) or layers.root
        check_modules(config.plan, {n for n, _ in whole.named_modules(remove_duplicate=False)}, type(whole).__name__)
    modules = {key: Module(layers.display(key), _guard_training_mode(f.module, f.source, frame), f.batch_norm, f.linear) for key, f in layers.modules.items()}
    if layers.root is not None and layers.root_source is not None and frame is not None:
        _guard_rules(layers.root, layers.root_source, config)
    _mark_unsupported_autograd(gm)
    inputs = tuple(_inputs(gm, example_inputs))
    keys = tuple(next(reversed(stack), "") for stack in stacks)
    context = Context(modules, _root_module(layers, gm, frame), inputs, _unsupported_input_reason(example_inputs), last_module(layers.root))
    called = dict.fromkeys(k.split("@")[0] for k in keys if k)
    trained = tuple(modules[k].name for k in called if (m := layers.modules[k].module) is not None and next(m.parameters(recurse=False), None) is not None)
    return context, keys, trained, layers.root


def _guard_training_mode(module: nn.Module | None, source: Any, frame: Any) -> Reason | None:
    """Install a guard on a module's `training`, and return the reason why the module's products must be exact, or None if they need not be."""
    if module is None or source is None:
        return UNTRACED_MODULE() if frame is not None else None
    _torch.guard_attribute(source, "training")
    return None if module.training else EVAL_MODE()


def _root_module(layers: Layers, gm: fx.GraphModule, frame: Any) -> Module:
    """Return the module whose own forward is compiled. It is in no `nn_module_stack`, and the products written in its forward belong to it.

    If it can be one of several modules, its products are sampled only if all of these are in training mode.
    """
    if frame is None:
        return Module("")
    owners = layers.owners(gm, frame)
    reasons = [_guard_training_mode(module, source, frame) for module, source in owners]
    name = full_name(owners[0][0]) if len(owners) == 1 and owners[0][0] is not None else None
    return Module(name or "", next((r for r in reasons if r is not None), None))


def _guard_rules(root: nn.Module, source: Any, config: ApproxConfig) -> None:
    """Install a guard on which rules apply to a block of an annotated model.

    Blocks to which the same rules apply share code. After a later call of `annotate` the graph is compiled once more.
    """
    name = sign(root, config)
    if name is None:
        _torch.guard_absent(source, SIGNATURE)
    else:
        _torch.guard_attribute(source, name)


def _calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield every call of the graph and of the graphs inside it (checkpointed blocks), in order."""
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


def _unsupported_input_reason(example_inputs: Sequence[Any]) -> Reason | None:
    """Return the reason why the whole graph must be exact if an input is a wrapper subclass such as DTensor; else None."""
    for value in example_inputs:
        if _torch.is_wrapper_subclass(value):
            return TENSOR_SUBCLASS(kind=type(value).__name__)
    return None


def _mark_unsupported_autograd(gm: fx.GraphModule) -> None:
    """Mark the nodes inside torch.func transforms and custom autograd functions as exact, because their gradients may not be those of the chain rule."""
    depth = 0
    for body in (getattr(gm, str(n.target), None) for n in gm.graph.nodes if n.op == "get_attr"):
        if isinstance(body, fx.GraphModule):
            _mark_unsupported_autograd(body)
    for n in gm.graph.nodes:
        name = getattr(n.target, "__name__", str(n.target))
        depth += name in _TRANSFORMS
        depth -= name in tuple(t.replace("increment", "decrement") for t in _TRANSFORMS)
        if depth > 0:
            _torch.mark_exact(n, FUNC_TRANSFORM())
        if n.op == "call_function" and "autograd_function_apply" in name:
            for body in (a for a in n.args if isinstance(a, fx.Node) and a.op == "get_attr"):
                inner = getattr(gm, str(body.target), None)
                for m in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                    _torch.mark_exact(m, CUSTOM_FUNCTION())
