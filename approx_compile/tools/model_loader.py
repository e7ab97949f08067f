"""Load the model that a command line names as `package.module:factory` or `path/to/file.py:factory`. The factory returns `(model, example_inputs)`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.convolution, torch.ops.aten._convolution)


SHOWN = 8
"""The most functions that the message about a missing one lists."""


class FactoryError(ValueError):
    """The factory cannot be found or imported, fails, or does not return a model that runs on its example inputs."""


@dataclass(frozen=True)
class Example:
    """A model and the arguments that it is called with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def forward_flops(self) -> int:
        """Count the FLOPs of the products in one forward pass as torch runs it, without compiling.

        Returns:
            FLOPs of matrix products and convolutions.

        Raises:
            FactoryError: If the model fails on its example inputs.
        """
        counter = FlopCounterMode(display=False)
        try:
            with counter:
                self.model(*self.args, **self.kwargs)
        except Exception as e:
            raise FactoryError(f"the model fails on its example inputs: {type(e).__name__}: {e}") from e
        return sum(flops for op, flops in counter.get_flop_counts().get("Global", {}).items() if op in _PRODUCTS)


def load(spec: str) -> Example:
    """Load the example that a specification names.

    The factory takes no arguments. The example inputs that it returns are a tensor, a sequence of positional arguments, or a mapping of keyword arguments.

    Args:
        spec: `package.module:factory` or `path/to/file.py:factory`.

    Returns:
        The model and its arguments.

    Raises:
        FactoryError: If the factory cannot be found or imported, fails, or returns something else.
    """
    factory = load_function(spec)
    try:
        made = factory()
    except (Exception, SystemExit) as e:
        raise FactoryError(f"model: {spec} raised {type(e).__name__}: {e}") from e
    if not isinstance(made, (tuple, list)) or len(made) != 2 or not callable(made[0]):
        raise FactoryError(f"model: {spec} returned {_described(made)}; (model, example_inputs) is expected")
    model, inputs = made
    if isinstance(inputs, Mapping):
        return Example(model, (), dict(inputs))
    if isinstance(inputs, Tensor):
        return Example(model, (inputs,), {})
    if isinstance(inputs, (tuple, list)):
        return Example(model, tuple(inputs), {})
    raise FactoryError(
        f"model: {spec} returned {type(inputs).__name__} as example inputs; a tensor, a tuple of arguments or a dict of keyword arguments is expected"
    )


def load_function(spec: str) -> Callable[..., Any]:
    """Load the function that a specification names.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`.

    Returns:
        The function.

    Raises:
        FactoryError: If it cannot be found or imported.
    """
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise FactoryError(f"model: got {spec!r}; package.module:factory or path/to/file.py:factory is expected")
    module = _module(place)
    function: Any = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")]
    near = difflib.get_close_matches(name, functions, n=1)
    has = f" It has {', '.join(functions[:SHOWN])}{', ...' if len(functions) > SHOWN else ''}." if functions else " It has no functions."
    raise FactoryError(f"model: {place} has no function {name!r}." + (f" Did you mean {near[0]!r}?" if near else "") + has)


def _module(place: str) -> ModuleType:
    path = Path(place)
    is_file = place.endswith(".py")
    if is_file and not path.is_file():
        raise FactoryError(f"model: there is no file {place}")
    # the folder of the file, or the working folder, becomes importable, as with `python file.py` and `python -m package.module`
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_file:
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look up a class's module by its name
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as e:
        raise FactoryError(f"model: importing {place} failed: {type(e).__name__}: {e}") from e


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
    return type(value).__name__
