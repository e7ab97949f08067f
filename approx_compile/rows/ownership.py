"""Find the controls and the draws that belong to a model, and the state that was loaded for them.

Models of one class share compiled code, so controls and draws belong to a parameter that the graph reads: the first one whose gradient it computes. Where
none is known (as for a graph of frozen parameters) they belong to the module that was compiled. In checkpoints they are named by the bare model's name of
this owner, and by a name of the graph that does not depend on sizes, precision or wrappers (`GraphName`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.rows.agreement import pool_of
from approx_compile.rows.bare_names import Owner, fitted_names, named_owners
from approx_compile.rows.controller import Checkpointed, Control, Draws, Observing, StepFlops
from approx_compile.rows.step_counter import completed_steps
from approx_compile.rows.variance_budget import VarianceBudget

_known = WeakIdKeyDictionary()
"""For each owner a dictionary from the key of a cut to its control, of a graph's outputs to their control, or of a graph to its draws."""

_waiting = WeakIdKeyDictionary()
"""The state that was loaded for a model and that no graph has taken up yet, for each module and parameter of the model."""


_fixed = WeakIdKeyDictionary()
"""For each owner a dictionary from the key of a cut with a fixed share of the rows to this share and its FLOPs."""


class GraphName(NamedTuple):
    """The name of a graph, of one of its cuts, or of its outputs in checkpoints.

    Attributes:
        key: The name.
        former: The name in checkpoints of earlier versions, which could depend on sizes and wrappers.
    """

    key: str
    former: str = ""

    def __add__(self, suffix: str) -> GraphName:  # type: ignore[override]
        """Name a part of the graph."""
        return GraphName(self.key + suffix, self.former + suffix)


UNNAMED = GraphName("")


class _LoadedState:
    """The loaded states of one model that no graph has taken up yet."""

    def __init__(self, states: Mapping[tuple[str, str], Mapping[str, Any]], names: WeakIdKeyDictionary) -> None:
        """Store the states by (name of the owner, key) and the name of every owner of the model."""
        self.states = dict(states)
        self._names = names
        self._count = Counter(key for _, key in self.states)

    def take(self, owner: Owner, keys: Sequence[str]) -> Mapping[str, Any] | None:
        """Return the state of an owner's control or draws, once. `keys` are their names, the likeliest first.

        A state of another owner is meant if it is the only one with its key: earlier versions chose owners in another way.
        """
        for key in keys:
            place = (self._names.get(owner, ""), key)
            if place not in self.states and self._count[key] == 1:
                place = next((p for p in self.states if p[1] == key), place)
            state: Mapping[str, Any] | None = self.states.pop(place, None)
            if state is not None:
                return state
        return None


C = TypeVar("C", bound=Observing)
K = TypeVar("K", bound=Checkpointed)


def control_for(owner: Owner, settings: AdaptiveTable, name: GraphName, kind: type[C]) -> C:
    """Return the control of a cut, or of a graph's outputs, or the budget of a graph, and tell it whom it agrees with, and how many optimizer steps were made.

    It is that of an earlier compilation of the same code if there is one with the same settings, else a new one. A new one takes up the state that was loaded
    for it, if any.

    Args:
        owner: The parameter or module that it belongs to.
        settings: The settings of the policy.
        name: The name of the cut, of the outputs or of the budget.
        kind: The class of the control or budget.
    """
    control = _known.setdefault(owner, {}).get(name.key)
    if not isinstance(control, kind) or control.settings != settings:
        control = _begin(owner, name, kind(settings, name.key))  # type: ignore[call-arg]
    control.pool = pool_of(owner)
    if isinstance(control, Control):
        control.completed = completed_steps(owner)
    return control


def draws_for(owner: Owner, name: GraphName) -> Draws:
    """Return the draws of a graph for an owner: those of an earlier compilation, or new ones with the loaded state if there is one."""
    registered = _known.setdefault(owner, {}).get(name.key)
    return registered if isinstance(registered, Draws) else _begin(owner, name, Draws(name.key))


class FixedShare(NamedTuple):
    """A share of the rows that one cut keeps in every pass.

    Attributes:
        ratio: The share.
        work: The FLOPs that it decides about.
        passes: The backward passes that have begun.
    """

    ratio: float
    work: StepFlops
    passes: int


def note_fixed_share(owner: Owner, name: GraphName, ratio: float, work: StepFlops) -> None:
    """Note a pass in which a cut keeps a fixed share of the rows, for `fixed_shares`."""
    known = _fixed.setdefault(owner, {})
    before = known.get(name.key)
    known[name.key] = FixedShare(ratio, work, before.passes + 1 if before is not None else 1)


def fixed_shares(model: nn.Module) -> list[FixedShare]:
    """Return the share of the rows of every cut of a model whose share is fixed and whose backward pass has run."""
    return [share for _, owner in named_owners(model) for share in _fixed.get(owner, {}).values()]


def _begin(owner: Owner, name: GraphName, new: K) -> K:
    """Register a new control or new draws, and load the state that waits for them, if any."""
    new.former_name = name.former
    _known[owner][name.key] = new
    loaded: _LoadedState | None = _waiting.get(owner)
    if loaded is not None and (state := loaded.take(owner, name)) is not None:
        new.load_state_dict(state)
    return new


def _checkpointed(model: nn.Module) -> Iterable[tuple[str, Owner, str, Checkpointed]]:
    """Yield the name of the owner, the owner, the key and the control or draws, for all of a model."""
    return ((name, owner, key, c) for name, owner in named_owners(model) for key, c in _known.get(owner, {}).items())


def controls_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the state of all controls and draws of a model, by the bare name of the parameter or module and then by the key of the cut or graph."""
    by_name: dict[str, dict[str, Any]] = {}
    for (name, key), state in _unused(model).items():
        by_name.setdefault(name, {})[key] = dict(state)
    for name, _, key, c in _checkpointed(model):
        by_name.setdefault(name, {})[key] = c.state_dict()
    return by_name


def load_controls(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Load what `controls_state` returned: at once for what is compiled, else when it is compiled.

    Args:
        model: The model, wrapped or not.
        state: The state.

    Returns:
        The names in the state that no parameter or module of the model has.
    """
    names = WeakIdKeyDictionary()
    for name, owner in named_owners(model):
        names[owner] = name
    fitted = fitted_names(state, set(names.values()))
    loaded = _LoadedState({(fitted[n], key): s for n, by_key in state.items() if n in fitted for key, s in by_key.items()}, names)
    for _, owner, key, c in _checkpointed(model):
        if (found := loaded.take(owner, (key, c.former_name))) is not None:
            c.load_state_dict(found)
    for owner in names:
        _waiting[owner] = loaded
    return [n for n in state if n not in fitted]


def controls(model: nn.Module) -> dict[str, Control]:
    """Return the controls of a model, by the name of the parameter or module and the key of the cut.

    Args:
        model: The model, compiled or not, wrapped or not. The names are those of the bare model.

    Returns:
        The controls; none before the first training step, and where nothing is decided during the run.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> approx_compile.controls(torch.nn.Linear(64, 64))
        {}
    """
    return {".".join(p for p in (name, key) if p): c for name, _, key, c in _checkpointed(model) if isinstance(c, Control)}


def budgets(model: nn.Module) -> dict[str, VarianceBudget]:
    """Return the budgets of a model, by the name of the parameter or module and the key of the graph."""
    return {".".join(p for p in (name, key) if p): b for name, _, key, b in _checkpointed(model) if isinstance(b, VarianceBudget)}


def waiting_states(model: nn.Module) -> list[Mapping[str, Any]]:
    """Return the states of controls that were loaded for a model and that no graph has taken up yet."""
    return [state for state in _unused(model).values() if "changes" in state]


def unused_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters and modules for which a state was loaded that no graph has taken up yet."""
    return list(dict.fromkeys(name for name, _ in _unused(model)))


def _unused(model: nn.Module) -> dict[tuple[str, str], Mapping[str, Any]]:
    distinct = {id(loaded): loaded for _, owner in named_owners(model) if (loaded := _waiting.get(owner)) is not None}
    return {place: state for loaded in distinct.values() for place, state in loaded.states.items()}
