"""Accelerate: add the backend to its list of backends, which Transformers' Trainer uses too, and keep a model's state in its checkpoints.

Example:
    from approx_compile.integrations.accelerate import ApproxState, register

    register()
    accelerator = Accelerator(dynamo_backend="approx")  # or TorchDynamoPlugin(backend="approx", options={...})
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ApproxState(model))  # for save_state and load_state
"""

from __future__ import annotations

import enum
from typing import Any

from approx_compile import _torch
from approx_compile.integrations.stateful import ApproxState

__all__ = ["ApproxState", "register"]

_WITHOUT = 'without it, compile the model first: accelerator.prepare(torch.compile(model, backend="approx"))'


def register(name: str = "approx") -> None:
    """Add the name of a backend to Accelerate's list, in this process. A second call changes nothing.

    Args:
        name: The name under which torch.compile knows the backend.

    Raises:
        ImportError: If accelerate is not installed.
        ValueError: If torch.compile does not know the name, or the name is not in lower case, which Accelerate requires.
        RuntimeError: If Accelerate's list has changed, so that nothing can be added to it.
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
    """Return the enum's values; none if it is not the enum of strings that this module expects."""
    of_text = isinstance(backends, enum.EnumMeta) and issubclass(backends, str)
    return [m.value for m in backends if backends(m.value) is m] if of_text else []


def _add(backends: Any, member: str) -> None:
    """Add a member to the tables in which Python's `enum` keeps its members, because an enum is closed once it is made.

    If these tables do not exist, nothing is changed.
    """
    try:
        by_name, by_value, names = backends._member_map_, backends._value2member_map_, backends._member_names_
        new = str.__new__(backends, member)
    except (AttributeError, TypeError):
        return
    new._name_, new._value_ = member, member
    by_name[member] = by_value[member] = new
    names.append(member)
    type.__setattr__(backends, member, new)
