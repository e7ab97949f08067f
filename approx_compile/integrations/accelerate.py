"""Add the backend to Accelerate's list of backends, from which Transformers' Trainer takes its names, too.

from approx_compile.integrations.accelerate import register

register()
Accelerator(dynamo_backend="approx")  # or TorchDynamoPlugin(backend="approx", options={...}), TrainingArguments(torch_compile_backend="approx")
"""

from __future__ import annotations

import enum
from typing import Any

from approx_compile import _torch

_WITHOUT = 'without it, compile the model first: accelerator.prepare(torch.compile(model, backend="approx"))'


def register(name: str = "approx") -> None:
    """Add the name of a backend to Accelerate's list, in this process. A second call changes nothing.

    Args:
        name: The name under which torch.compile knows the backend.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: torch.compile does not know the name, or it is not in lower case, as Accelerate writes it.
        RuntimeError: Accelerate's list has changed, so that nothing can be added to it.
    """
    known = _torch.backend_names()
    if name not in known or name != name.lower():
        raise ValueError(f"register: got {name!r}; the name, in lower case, of a backend that torch.compile knows is expected: {', '.join(known)}")
    try:
        import accelerate
        from accelerate.utils import DynamoBackend
    except ImportError as e:
        raise ImportError(f"register needs accelerate, with its enum DynamoBackend ({e}): pip install 'approx-compile[integrations]'; {_WITHOUT}") from None
    member = name.upper()
    if member not in _members(DynamoBackend):
        _add(DynamoBackend, member)
    if member not in _members(DynamoBackend):
        raise RuntimeError(f"register: accelerate {accelerate.__version__} has changed its list of backends, {DynamoBackend!r}; {_WITHOUT}")


def _members(backends: Any) -> list[str]:
    """The enum's values; none if it is not the enum of strings that this module knows."""
    of_text = isinstance(backends, enum.EnumMeta) and issubclass(backends, str)
    return [m.value for m in backends if backends(m.value) is m] if of_text else []


def _add(backends: Any, member: str) -> None:
    """Add a member where Python's `enum` keeps the others, as an enum is closed once it is made. Without such a place nothing is changed."""
    try:
        by_name, by_value, names = backends._member_map_, backends._value2member_map_, backends._member_names_
        new = str.__new__(backends, member)
    except (AttributeError, TypeError):
        return
    new._name_, new._value_ = member, member
    by_name[member] = by_value[member] = new
    names.append(member)
    type.__setattr__(backends, member, new)
