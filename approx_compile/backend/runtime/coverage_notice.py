"""Say once, after the first optimizer steps, where torch.compile gave this backend nothing of a model, or gave up compiling: it trains exactly then."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile import _torch
from approx_compile.utils import DISABLE, warn_once

FIRST_STEPS = 3
"""The optimizer steps after which it is looked whether the backend has got a graph."""

_steps = WeakIdKeyDictionary()
"""How many steps each optimizer has made."""

_parameters = WeakIdKeyDictionary()
"""The parameters of the graphs that the backend has got, as keys."""

_classes: set[type] = set()
"""The classes of the modules that such graphs belong to, and of their submodules: other models of these classes share the compiled code."""

_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def note_graph(root: nn.Module | None, inputs: Iterable[Any]) -> None:
    """Note that the backend has got a graph.

    Args:
        root: The module that it belongs to, if there is exactly one.
        inputs: The inputs of the graph.
    """
    _classes.update(type(m) for m in root.modules()) if root is not None else None
    for value in inputs:
        if isinstance(value, nn.Parameter):
            _parameters[value] = True


@functools.cache
def watch_optimizers() -> None:
    """Look after the first steps of every optimizer from now on."""
    register_optimizer_step_post_hook(_look)


@_torch.disable_dynamo
def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    steps = _steps[optimizer] = _steps.get(optimizer, 0) + 1
    limit_met = steps % 10 == FIRST_STEPS and _torch.recompile_limit_met()
    if not (steps == FIRST_STEPS or limit_met) or DISABLE.value() == "1":
        return
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p in _parameters for p in stepped) and not limit_met:
        return
    for model in _compiled_models({id(p) for p in stepped}):
        owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        if not any(type(m) in _classes for m in owners) and not any(p in _parameters for p in model.parameters()):
            warn_once(_nothing(model), model)
        elif limit_met:
            warn_once(LIMIT, model)


LIMIT = (
    "approx: torch.compile has met its limit of recompilations: functions that would need one more run op by op, exactly and slowly. TORCH_LOGS=recompiles "
    "shows what differs from call to call. Mark changing sizes with torch._dynamo.mark_dynamic, or raise torch._dynamo.config.recompile_limit"
)


def _nothing(model: nn.Module) -> str:
    recurrent = sorted({type(m).__name__ for m in model.modules() if isinstance(m, _RECURRENT)})
    if recurrent:
        todo = f"it skips {', '.join(recurrent)} unless torch._dynamo.config.allow_rnn = True is set before the first call"
    elif isinstance(model, DistributedDataParallel):
        inner = type(model.module).__name__
        todo = f"Dynamo compiles nothing of DDP around a bare nn.{inner}; compile inside: DDP(torch.compile(model, backend='approx'))"
    elif type(model).forward.__module__.startswith("torch."):
        todo = f"it skips a torch.nn.{type(model).__name__} that is compiled in place; use model = torch.compile(model, backend='approx')"
    else:
        todo = "TORCH_LOGS=graph_breaks shows why. Compile the module whose forward is called, such as model.encoder.compile(backend='approx')"
    return (
        f"approx: torch.compile gave this backend no graph of {type(model).__name__} in {FIRST_STEPS} optimizer steps, so it trains exactly, op by op: {todo}"
    )


def _compiled_models(parameters: set[int]) -> list[nn.Module]:
    """Find the modules that are compiled with this backend and have one of these parameters. Nothing registers them, so all objects are looked through."""
    found: dict[int, nn.Module] = {}
    for value in gc.get_objects():
        if not issubclass(type(value), nn.Module):
            continue
        compiled = value if "_orig_mod" in value.__dict__.get("_modules", {}) else value.__dict__.get("_compiled_call_impl")
        name, backend, _ = _torch.backend_of(compiled) if compiled is not None else (None, None, {})
        ours = name == "approx" or type(backend).__module__.startswith("approx_compile.")
        if ours and any(id(p) in parameters for p in value.parameters()):
            model = _torch.uncompiled(value)
            found[id(model)] = model
    return list(found.values())
