"""Compile a module in place, so that whatever holds it and however it is called, its calls run compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from approx_compile.backend import Backend
from approx_compile.tools.compiled_parts import compiled_parts, unwrapped


def compile_in_place(model: nn.Module, part: nn.Module, backend: Backend) -> None:
    """Compile a part of a model in place, unless something of the model is compiled with this backend already.

    `part.compile` would do for modules of the user. Dynamo skips the calls of torch's own classes, such as `nn.Sequential`, that are compiled so.

    Args:
        model: The whole model.
        part: The module to compile: the model or a submodule.
        backend: The backend.
    """
    if unwrapped(model)[1] is not None or compiled_parts(model):
        return
    if type(part).forward.__module__.startswith("torch."):
        compile_any: Any = torch.compile
        part._compiled_call_impl = compile_any(_call_of(part), backend=backend)
    else:
        part.compile(backend=backend)


def _call_of(self: nn.Module) -> Callable[..., Any]:
    """Return the call of a module as a function outside of torch's files, which Dynamo compiles. The name `self` says that the module is the root."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    return call
