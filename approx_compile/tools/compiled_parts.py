"""Find what of a model is compiled with this backend, and with which settings: the model itself, under wrappers, or some of its submodules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from approx_compile import _torch
from approx_compile.backend import Backend
from approx_compile.config import ApproxConfig
from approx_compile.rows.bare_names import wrapped_children

_CALLED_LIKE_THE_MODEL = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "_FabricModule")
"""The classes of wrappers that are called as the module inside is called."""


@dataclass(frozen=True)
class CompiledPart:
    """A submodule that is compiled with this backend.

    Attributes:
        name: Its name in the model.
        holder: The module whose call runs compiled code: the result of `torch.compile`, or the module that was compiled in place.
        module: The module itself.
        config: The settings that it is compiled with.
    """

    name: str
    holder: nn.Module
    module: nn.Module
    config: ApproxConfig


def unwrapped(model: Any) -> tuple[Any, ApproxConfig | None]:
    """Find the module or function below compilation and data parallelism, and its settings.

    Args:
        model: The model, compiled or not, in place or not, and wrapped or not.

    Returns:
        The module or function, and the settings of the outermost compilation with this backend; None if there is none.
    """
    layers = list(_layers(model))
    return layers[-1], next((config for layer in layers if (config := _config_of(layer)) is not None), None)


@contextlib.contextmanager
def precision_of_wrapper(model: Any, inputs: Any) -> Iterator[Any]:
    """Run what is inside the block in the precision in which Lightning's Fabric calls a model.

    Args:
        model: The model, compiled or not, and wrapped or not. Without a wrapper of Fabric nothing changes.
        inputs: The model's arguments.

    Yields:
        The arguments in this precision.
    """
    fabric = next((m for m in _layers(model) if _has_class(m, ("_FabricModule",))), None)
    precision: Any = fabric._strategy.precision if fabric is not None else None  # type: ignore[union-attr]
    with precision.forward_context() if precision is not None else contextlib.nullcontext():
        yield precision.convert_input(inputs) if precision is not None else inputs


def _layers(model: Any) -> Iterator[Any]:
    """Yield the model and, one inside the other, what compilation and data parallelism wrap; the module or function below them comes last."""
    while True:
        yield model
        inner = _torch.uncompiled(model)
        if inner is model and _has_class(model, _CALLED_LIKE_THE_MODEL):
            inner = getattr(model, wrapped_children(model)[-1])
        if inner is model:
            return
        model = inner


def _has_class(model: Any, names: tuple[str, ...]) -> bool:
    return isinstance(model, nn.Module) and any(c.__name__ in names for c in type(model).__mro__)


def compiled_parts(model: nn.Module) -> list[CompiledPart]:
    """Find the submodules that are compiled with this backend, without those inside another one.

    Args:
        model: The model, which is not compiled itself.

    Returns:
        The compiled submodules, in the order of registration.
    """
    found: list[CompiledPart] = []
    for name, module in model.named_modules():
        if module is not model and not any(p.name == name or name.startswith(f"{p.name}.") for p in found) and (config := _config_of(module)) is not None:
            found.append(CompiledPart(name, module, _torch.uncompiled(module), config))
    return found


@contextlib.contextmanager
def run_with(parts: list[CompiledPart], compiled: Callable[[CompiledPart], Any]) -> Iterator[None]:
    """Have calls of compiled submodules run other code inside the block.

    Args:
        parts: The submodules.
        compiled: Returns for each of them what its calls run.

    Yields:
        Nothing.
    """
    before = [p.holder.__dict__.get("_compiled_call_impl") for p in parts]
    try:
        for p in parts:
            p.holder.__dict__["_compiled_call_impl"] = compiled(p)
        yield
    finally:
        for p, call in zip(parts, before, strict=True):
            p.holder.__dict__["_compiled_call_impl"] = call


def config_of_parts(parts: list[CompiledPart]) -> ApproxConfig | None:
    """Return the settings that all compiled submodules share; None if there are none, or they differ."""
    configs = {p.config for p in parts}
    return configs.pop() if len(configs) == 1 else None


def _config_of(model: Any) -> ApproxConfig | None:
    """Return the settings of the outermost compilation of a module or function; None if it is not compiled with this backend."""
    compiled = model if _torch.uncompiled(model) is not model else _torch.in_place_compiled_call(model)
    name, backend, arguments = _torch.backend_of(compiled)
    if isinstance(backend, Backend):
        return backend.config
    return ApproxConfig.of(arguments.get("options")) if name == "approx" else None
