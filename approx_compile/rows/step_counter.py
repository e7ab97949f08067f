"""Count the completed optimizer steps of a model's parameters, and hold the phase that the user has set for them.

A step is a completed step of the `torch.optim` optimizer that owns the parameters. Torch's own hooks on all optimizers count it. All parameters of one
optimizer share one count, so that counting costs the same for any number of parameters.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile import _torch
from approx_compile.rows.bare_names import named_owners


@dataclass(eq=False)
class StepCount:
    """The completed optimizer steps of the parameters that share it, and the phase that they are in."""

    step: int = 0
    phase: str | None = None
    owned: bool = False
    """Whether an optimizer steps the parameters."""
    by: int | None = None
    """The id of that optimizer."""


_step_counts = WeakIdKeyDictionary()
"""The step count of every known parameter."""

_counted_optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int, list[StepCount]]] = weakref.WeakKeyDictionary()
"""For every optimizer the version of `_step_counts` that it has seen, its number of parameters then, and the counts it advances."""

_version = [0]
"""Increased when parameters are given other counts than those that optimizers have seen."""


@functools.cache
def count_optimizer_steps() -> None:
    """Count every step of every optimizer from now on."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(after_step)


@_torch.disable_dynamo
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Find the step counts of an optimizer's parameters.

    An optimizer that steps the same parameters from inside another optimizer's step takes them over, so that the step is counted only once.
    """
    parameters = sum(len(g["params"]) for g in optimizer.param_groups)
    known = _counted_optimizers.get(optimizer)
    if known is None or known[:2] != (_version[0], parameters):
        counts = _share_step_counts((p for g in optimizer.param_groups for p in g["params"]), id(optimizer))
        _counted_optimizers[optimizer] = (_version[0], parameters, counts)


@_torch.disable_dynamo
def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Advance the step counts of an optimizer's parameters: torch's hook after every step.

    Args:
        optimizer: The optimizer that has made a step.
        args: The positional arguments of its `step`, unused.
        kwargs: The keyword arguments of its `step`, unused.
    """
    for count in _counted_optimizers[optimizer][2] if optimizer in _counted_optimizers else ():
        count.step += 1


def _share_step_counts(parameters: Iterable[Tensor], by: int) -> list[StepCount]:
    """Give one count to all parameters of an optimizer that are at the same step of the same phase.

    An optimizer that counted them before must look up its counts again, so the version is increased.
    """
    shared: dict[tuple[int, str | None], StepCount] = {}
    for p in parameters:
        old = _step_counts.get(p) or StepCount()
        if old.by not in (None, by):
            _version[0] += 1
        _step_counts[p] = shared.setdefault((old.step, old.phase), StepCount(old.step, old.phase, True, by))
    return list(shared.values())


def _replace_step_counts(parameters: Iterable[Tensor], step: int | None, phase: tuple[str | None] | None) -> None:
    """Give each parameter a separate count with another step or phase. The optimizer's next step joins counts that are equal."""
    for p in parameters:
        old = _step_counts.get(p) or StepCount()
        _step_counts[p] = StepCount(old.step if step is None else step, old.phase if phase is None else phase[0], old.owned)
    _version[0] += 1


def set_step(model: nn.Module, step: int) -> None:
    """Set the number of optimizer steps that a model has completed.

    This is for training that is resumed without `load_state_dict`, or that uses no `torch.optim` optimizer.

    Args:
        model: The model, compiled or not.
        step: The number of completed steps, 0 or more.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If `step` is not an integer of 0 or more.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Linear(64, 64)
        >>> approx_compile.set_step(model, 1000)
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"set_step: got {step!r}; the number of completed optimizer steps is expected, 0 or more")
    _replace_step_counts(_parameters(require_module(model, "set_step")), step, None)


def set_phase(model: nn.Module, name: str | None) -> None:
    """Set the phase that rules with the key `phase` refer to. It holds from the model's next forward pass on.

    Args:
        model: The model, compiled or not.
        name: The phase, or None for no phase.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If `name` is neither None nor a non-empty string.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Linear(64, 64)
        >>> compiled = torch.compile(model, backend="approx", options={"rules": [{"phase": "careful", "method": "exact"}]})
        >>> approx_compile.set_phase(compiled, "careful")  # from the next forward pass on the rule holds
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"set_phase: got {name!r}; the name of a phase, as in a rule's 'phase', or None is expected")
    _replace_step_counts(_parameters(require_module(model, "set_phase")), None, (name,))


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model, with those that FSDP2 has gathered."""
    return [p for _, p in named_owners(model) if isinstance(p, nn.Parameter)]


def require_module(model: nn.Module, function: str) -> nn.Module:
    """Return the model, or raise `TypeError`, naming the public function, if it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: got {type(model).__name__}; the model (a torch.nn.Module, compiled or not) is expected")
    return model


def step_count_of(parameters: Iterable[Any]) -> StepCount | None:
    """Find the step count that holds for a graph.

    Args:
        parameters: The graph's parameters.

    Returns:
        The count of the first parameter that an optimizer steps; else of the first that has a count (frozen, or set by hand); else None.
    """
    fallback: StepCount | None = None
    for p in parameters:
        count: StepCount | None = _step_counts.get(p)
        if count is not None and (count.owned or not _counted_optimizers):  # no parameter is owned before an optimizer has made a step
            return count
        fallback = fallback or count
    return fallback


def step_counts_state(named: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Collect the step counts of a model for a checkpoint.

    Args:
        named: The model's parameters by name.

    Returns:
        A list of `{"step", "phase", "parameters"}`; parameters that are not counted are in none.
    """
    groups: dict[tuple[int, str | None], list[str]] = {}
    for name, p in named.items():
        if (count := _step_counts.get(p)) is not None:
            groups.setdefault((count.step, count.phase), []).append(name)
    return [{"step": step, "phase": phase, "parameters": names} for (step, phase), names in groups.items()]


def load_step_counts(named: Mapping[str, nn.Parameter], state: Sequence[dict[str, Any]]) -> None:
    """Restore what `step_counts_state` has collected.

    Args:
        named: The model's parameters by name.
        state: The list that `step_counts_state` returned.
    """
    for group in state:
        _replace_step_counts([named[n] for n in group["parameters"]], int(group["step"]), (group["phase"],))


def completed_steps(owner: nn.Parameter | nn.Module) -> int | None:
    """Return the completed optimizer steps of a parameter, or of a module's first parameter.

    Args:
        owner: The parameter or module.

    Returns:
        The number; None if no optimizer has stepped it and neither `set_step` nor a checkpoint has said a number.
    """
    parameter = owner if isinstance(owner, nn.Parameter) else next(owner.parameters(), None)
    count: StepCount | None = _step_counts.get(parameter) if parameter is not None else None
    return count.step if count is not None else None
