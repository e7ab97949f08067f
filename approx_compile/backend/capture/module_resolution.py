"""Find which modules of the user's model a Dynamo graph runs: the objects behind `nn_module_stack`, their names, and the sources to guard them by.

A stack entry has the module's id and a path such as `L['self'].layers.0`. The sources of parameters lead to every module that owns a parameter, and to that
module's ancestors, wherever they are held (a local, a global, a closure, an attribute of some other object). The other modules are found below those.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from approx_compile import _torch
from approx_compile.backend.capture.annotate import full_name

_VARIABLE = re.compile(r"([LG])\['(\w+)'\](?:\.(.*))?")

_COMPILED_ITSELF = ("L['self']", "L['fn']")
"""The variables in which a frame holds the module that was given to torch.compile. Any other variable belongs to a function, and its name is shown."""


@dataclass
class StackModule:
    """A module in the stacks: its path, its class, and, if it could be found, the module object and Dynamo's source for it."""

    path: str
    cls: type
    module: nn.Module | None = None
    source: Any = None

    @property
    def batch_norm(self) -> bool:
        """Whether it is a batch normalization of any kind."""
        return any("BatchNorm" in c.__name__ for c in self.cls.__mro__)

    @property
    def linear(self) -> bool:
        """Whether its forward is that of `nn.Linear`."""
        return getattr(self.cls, "forward", None) is nn.Linear.forward


class Layers:
    """The modules of one graph.

    Args:
        stacks: The `nn_module_stack` of every call of the graph.
        placeholders: The graph's placeholders.
        frame: Dynamo's translator of the frame, or None.

    Attributes:
        modules: Every module in the stacks, by its id as text.
        root: The module that the graph belongs to, if there is exactly one.
        root_source: Dynamo's source for `root`, if known.
    """

    def __init__(self, stacks: Sequence[Mapping[str, tuple[str, type]]], placeholders: Sequence[fx.Node], frame: Any) -> None:
        self.modules: dict[str, StackModule] = {}
        self._outer: dict[str, str] = {}
        scope = _torch.frame_scope(frame)
        known = self._known = _from_parameters(placeholders, scope)
        for stack in stacks:
            above: list[StackModule] = []
            for key, (path, cls) in stack.items():
                key = key.split("@")[0]
                if key not in self.modules:
                    self.modules[key] = _resolve(int(key), path, cls, above, known, scope)
                above.append(self.modules[key])
                self._outer.setdefault(key, above[0].path)
        roots = {key: _root(entry, self._outer[key], scope) for key, entry in self.modules.items()}
        self._roots = {key: path for key, (path, _, _) in roots.items()}
        distinct: dict[str, tuple[nn.Module | None, Any]] = {path: (module, source) for path, module, source in roots.values()}
        self._several = len(distinct) > 1
        self._root_module = {path: module for path, (module, _) in distinct.items()}
        self.root: nn.Module | None = None
        self.root_source: Any = None
        if len(distinct) == 1:
            self.root, self.root_source = next(iter(distinct.values()))
        if self.root is not None and self.root_source is None:
            self.root_source = next((f.source for f in self.modules.values() if f.module is self.root), None) or known.get(id(self.root), (None, None))[1]

    def owners(self, gm: fx.GraphModule, frame: Any) -> list[tuple[nn.Module | None, Any]]:
        """Find the modules whose forward may contain the calls that have no stack.

        Args:
            gm: Dynamo's graph.
            frame: Dynamo's translator of the frame.

        Returns:
            Modules and their sources. This is the module whose own method is compiled, or else all modules that the compiled function holds or calls, or whose
            parameters it reads. (None, None) stands for a module that cannot be found. The list is empty for a function of tensors alone.
        """
        scope, code = _torch.frame_scope(frame), _torch.frame_code(frame)
        names = _arguments(code)
        if _torch.is_resume_function(frame) and names[:1] and names[0] not in scope["L"]:
            return [(None, None)]
        first = scope["L"].get(names[0]) if names else None
        spread = isinstance(first, tuple) and not code.co_argcount
        held: list[tuple[nn.Module | None, Any]] = []
        held += [reached for n, v in scope["L"].items() for reached in _torch.reachable_modules(v, _torch.variable_source("L", n))]
        for module, source in held:
            if source is not None and module is not None and _is_method(module, code) and module is (first[0] if spread and first else first):
                return [(module, source)]
        if _torch.is_resume_function(frame) and any(n not in scope["L"] for n in names):
            return [(None, None)]
        for n in code.co_names:
            held += [reached for reached in _torch.reachable_modules(scope["G"].get(n), _torch.variable_source("G", n)) if reached[1] is not None]
        held += [f for key, f in self._known.items() if str(key) not in self.modules]
        held += [(f.module, f.source) for key, f in self.modules.items() if f.path == self._outer[key]]
        bare = [n for n in gm.graph.nodes if n.op.startswith("call_") and not n.meta.get("nn_module_stack")]
        for placeholder in dict.fromkeys(p for n in bare for p in n.all_input_nodes if p.op == "placeholder"):
            held += [(_evaluated(e, scope), source) for e, source in _torch.module_sources(placeholder)]
        return list({id(m): (m, s) for m, s in sorted(held, key=lambda f: f[1] is not None)}.values())

    def display(self, key: str) -> str:
        """Name a module for the user and for rules.

        Args:
            key: The module's id as text.

        Returns:
            Its name below the root, or after `annotate` its name in the whole model. If there are several roots, the name begins with the root's variable.
        """
        root, path = self._roots[key], self.modules[key].path
        below = path[len(root) :].lstrip(".")
        root_module, module = self._root_module.get(root), self.modules[key].module
        if root_module is not None and module is not None and _below(root_module, below.split(".") if below else []) is not module:
            # the path of the call is not the module's name, for example where a list or an alias holds it
            below = next((name for name, m in root_module.named_modules() if m is module), below)
        prefix = full_name(root_module) if root_module is not None else None
        if prefix is None:
            called_alone = not below and root not in _COMPILED_ITSELF
            prefix = re.sub(r"[LG]\['(\w+)'\]", r"\1", root) if self._several or called_alone else ""
        return ".".join(p for p in (prefix, below) if p)


def _from_parameters(placeholders: Sequence[fx.Node], scope: Mapping[str, Any]) -> dict[int, tuple[nn.Module, Any]]:
    """Return the modules that the sources of parameters pass through, with their sources, by id."""
    known: dict[int, tuple[nn.Module, Any]] = {}
    seen: set[str] = set()
    for placeholder in placeholders:
        for expression, source in _torch.module_sources(placeholder):
            if expression in seen:
                break
            seen.add(expression)
            module = _evaluated(expression, scope)
            if module is not None:
                known.setdefault(id(module), (module, source))
    return known


def _evaluated(expression: str, scope: Mapping[str, Any]) -> nn.Module | None:
    """Evaluate one of Dynamo's own expressions, as its guards do; return the module that it stands for, or None if it is not a module."""
    try:
        module = eval(expression, {"__builtins__": {}}, dict(scope))
    except Exception:
        return None
    return module if isinstance(module, nn.Module) else None


def _arguments(code: Any) -> list[str]:
    """Return the names of a function's positional arguments, or the name of the `*args` that takes all of them."""
    count = code.co_argcount or (bool(code.co_flags & inspect.CO_VARARGS) and 1)
    start = 0 if code.co_argcount else code.co_kwonlyargcount
    return list(code.co_varnames[start : start + count])


def _is_method(module: nn.Module, code: Any) -> bool:
    """Tell whether the code belongs to one of the module's methods, or to a function assigned to the module, with or without wrappers."""
    values = [v for cls in type(module).__mro__ for v in vars(cls).values()] + list(vars(module).values())
    return any(code in _codes(v) for v in values)


def _codes(value: Any) -> Iterator[Any]:
    """Yield the code objects that a method or its wrappers run."""
    for _ in range(8):
        if isinstance(value, types.FunctionType):
            yield value.__code__
        inner = [getattr(value, n, None) for n in ("__func__", "func", "fget", "__wrapped__")]
        value = next((v for v in inner if v is not None), None)
        if value is None:
            return


def _resolve(key: int, path: str, cls: type, above: Sequence[StackModule], known: dict[int, tuple[nn.Module, Any]], scope: Mapping[str, Any]) -> StackModule:
    """Find the module of a stack entry: by the parameters' sources, below an outer entry of the stack, or below a variable of the frame."""
    if key in known:
        return StackModule(path, cls, *known[key])
    for parent in reversed(above):
        if parent.module is not None and path.startswith(parent.path + "."):
            names = path[len(parent.path) + 1 :].split(".")
            module = _below(parent.module, names)
            if module is not None and id(module) == key:
                return StackModule(path, cls, module, _torch.child_source(parent.source, names))
    match = _VARIABLE.fullmatch(path)
    if match:
        names = match[3].split(".") if match[3] else []
        module = _below(scope[match[1]].get(match[2]), names)
        if module is not None and id(module) == key:
            return StackModule(path, cls, module, _torch.child_source(_torch.module_variable_source(match[1], match[2]), names))
    steps = path.split(".")
    for i in range(len(steps) - 1, 0, -1):  # below a module in a container, such as L['args'][0]
        _, source = known.get(id(outer := _evaluated(".".join(steps[:i]), scope)), (None, None))
        module = _below(outer, steps[i:])
        if source is not None and module is not None and id(module) == key:
            return StackModule(path, cls, module, _torch.child_source(source, steps[i:]))
    return StackModule(path, cls)


def _below(module: Any, names: Sequence[str]) -> nn.Module | None:
    """Return the submodule that these names lead to, or None if there is none."""
    for name in names:
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module if isinstance(module, nn.Module) else None


def _root(entry: StackModule, outermost: str, scope: Mapping[str, Any]) -> tuple[str, nn.Module | None, Any]:
    """Return the root of an entry as (path, module, source).

    The root is the first module on the entry's path, which is a variable of the frame or the module that a bound method in a variable belongs to. If there is
    none, it is the outermost module of the stack.
    """
    match = _VARIABLE.match(entry.path)
    if match and isinstance(held := scope[match[1]].get(match[2]), nn.Module):
        return f"{match[1]}['{match[2]}']", held, _torch.module_variable_source(match[1], match[2])
    steps = entry.path.split(".")
    for i in range(1, len(steps)):
        if (module := _evaluated(path := ".".join(steps[:i]), scope)) is not None:
            return path, module, None
    return outermost, entry.module if entry.path == outermost else None, None
