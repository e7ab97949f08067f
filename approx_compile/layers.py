"""Which modules of the user's model a Dynamo graph runs: the objects behind `nn_module_stack`, their names, and the sources to guard them by.

A stack entry has the module's id and a path such as `L['self'].layers.0`. The parameters' sources lead to every module that owns one and to
its ancestors, wherever they are held (a local, a global, a closure, an attribute of some other object); the rest are found below those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from approx_compile import _torch
from approx_compile.annotate import full_name

_VARIABLE = re.compile(r"([LG])\['(\w+)'\](?:\.(.*))?")

_COMPILED_ITSELF = ("L['self']", "L['fn']")
"""How the frame of a module that was handed to torch.compile holds it; any other variable is a function's, whose name says something."""


@dataclass
class Found:
    """One entry of the stacks: its path, its class, and, if it could be traced back, the module and Dynamo's source for it."""

    path: str
    cls: type
    module: nn.Module | None = None
    source: Any = None

    @property
    def batch_norm(self) -> bool:
        return any("BatchNorm" in c.__name__ for c in self.cls.__mro__)

    @property
    def linear(self) -> bool:
        return getattr(self.cls, "forward", None) is nn.Linear.forward


class Layers:
    """`found`: every module in the stacks by id (as text); `root`: the module the graph belongs to, if it is one."""

    def __init__(self, stacks: Sequence[Mapping[str, tuple[str, type]]], placeholders: Sequence[fx.Node], frame: Any) -> None:
        self.found: dict[str, Found] = {}
        self._outer: dict[str, str] = {}
        scope = _torch.frame_scope(frame)
        known = _from_parameters(placeholders, scope)
        for stack in stacks:
            above: list[Found] = []
            for key, (path, cls) in stack.items():
                key = key.split("@")[0]
                if key not in self.found:
                    self.found[key] = _resolve(int(key), path, cls, above, known, scope)
                above.append(self.found[key])
                self._outer.setdefault(key, above[0].path)
        roots = {key: _root(found, self._outer[key], scope) for key, found in self.found.items()}
        self._roots = {key: path for key, (path, _, _) in roots.items()}
        distinct: dict[str, tuple[nn.Module | None, Any]] = {path: (module, source) for path, module, source in roots.values()}
        self._several = len(distinct) > 1
        self._root_module = {path: module for path, (module, _) in distinct.items()}
        self.root: nn.Module | None = None
        self.root_source: Any = None
        if len(distinct) == 1:
            self.root, self.root_source = next(iter(distinct.values()))
        if self.root is not None and self.root_source is None:
            self.root_source = next((f.source for f in self.found.values() if f.module is self.root), None) or known.get(id(self.root), (None, None))[1]

    def display(self, key: str) -> str:
        """The module's name below its root; below the whole model's after `annotate`; with the root's own name where there are several."""
        root, path = self._roots[key], self.found[key].path
        below = path[len(root) :].lstrip(".")
        module = self._root_module.get(root)
        prefix = full_name(module) if module is not None else None
        if prefix is None:
            called_alone = not below and root not in _COMPILED_ITSELF
            prefix = re.sub(r"[LG]\['(\w+)'\]", r"\1", root) if self._several or called_alone else ""
        return ".".join(p for p in (prefix, below) if p)


def _from_parameters(placeholders: Sequence[fx.Node], scope: Mapping[str, Any]) -> dict[int, tuple[nn.Module, Any]]:
    """{id: (module, source)} for the modules that the parameters' sources pass through."""
    known: dict[int, tuple[nn.Module, Any]] = {}
    seen: set[str] = set()
    for placeholder in placeholders:
        for expression, source in _torch.module_sources(placeholder):
            if expression in seen:
                break
            seen.add(expression)
            try:  # the expression is Dynamo's own, the one its guards evaluate
                module = eval(expression, {"__builtins__": {}}, dict(scope))
            except Exception:
                continue
            if isinstance(module, nn.Module):
                known.setdefault(id(module), (module, source))
    return known


def _resolve(key: int, path: str, cls: type, above: Sequence[Found], known: dict[int, tuple[nn.Module, Any]], scope: Mapping[str, Any]) -> Found:
    if key in known:
        return Found(path, cls, *known[key])
    for parent in reversed(above):
        if parent.module is not None and path.startswith(parent.path + "."):
            names = path[len(parent.path) + 1 :].split(".")
            module = _below(parent.module, names)
            if module is not None and id(module) == key:
                return Found(path, cls, module, _torch.child_source(parent.source, names))
    match = _VARIABLE.fullmatch(path)
    if match:
        names = match[3].split(".") if match[3] else []
        module = _below(scope[match[1]].get(match[2]), names)
        if module is not None and id(module) == key:
            return Found(path, cls, module, _torch.child_source(_torch.variable_source(match[1], match[2]), names))
    return Found(path, cls)


def _below(module: Any, names: Sequence[str]) -> nn.Module | None:
    for name in names:
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module if isinstance(module, nn.Module) else None


def _root(found: Found, outermost: str, scope: Mapping[str, Any]) -> tuple[str, nn.Module | None, Any]:
    """(path, module, source) of the root: the variable that the path starts with if it is a module, else the outermost module called."""
    match = _VARIABLE.match(found.path)
    if match and isinstance(held := scope[match[1]].get(match[2]), nn.Module):
        return f"{match[1]}['{match[2]}']", held, _torch.variable_source(match[1], match[2])
    return outermost, found.module if found.path == outermost else None, None
