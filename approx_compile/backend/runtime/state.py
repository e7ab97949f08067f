"""Save and load the state that a checkpoint of a run needs besides the model, the optimizer and the random state.

This state says how many rows were kept, how often rows were drawn, which step of its schedule the model is at, and what the hash tables of its weights hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from approx_compile.kernels.hash_tables import load_tables, tables_of
from approx_compile.rows.bare_names import fitted_names, named_parameters
from approx_compile.rows.ownership import controls_state, load_controls
from approx_compile.rows.step_counter import load_step_counts, require_module, step_counts_state
from approx_compile.utils import warn_once


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Collect the adaptive state of a model, the number of draws of rows, and the model's place in its schedule.

    Save it beside the state of the model and of the optimizer. A run that loads all of them, and the random state, repeats the uninterrupted run bit for bit.

    Args:
        model: The model, compiled or not, and whatever wraps it: DDP, FSDP, Fabric, a LightningModule, PEFT.

    Returns:
        A dict of numbers, strings, lists and dicts only. Its key `controls` holds ``{parameter or module: {cut or draws of a graph: state}}``. Its key
        `clocks` holds a list with one ``{step, phase, parameters}`` for every optimizer. Its key `tables`,
        which is there where layers are hashed (method `alsh`), holds ``{parameter: tables}``. Parameters and modules have the names of the bare model.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Linear(64, 64)
        >>> checkpoint = {"model": model.state_dict(), "approx": approx_compile.state_dict(model)}
        >>> model.load_state_dict(checkpoint["model"])
        <All keys matched successfully>
        >>> approx_compile.load_state_dict(model, checkpoint["approx"])
    """
    require_module(model, "state_dict")
    parameters = named_parameters(model)
    tables = tables_of(parameters)
    return {"controls": controls_state(model), "clocks": step_counts_state(parameters)} | ({"tables": tables} if tables else {})


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore the state that `state_dict` returned, before or after the model is compiled or wrapped.

    The model may be wrapped otherwise than the one that was saved. A name in the state that fits no module or parameter is left out with a warning.

    Args:
        model: The model, compiled or not, and whatever wraps it.
        state: What `state_dict` returned.

    Raises:
        KeyError: If `state` is not what `state_dict` returned. Nothing is changed then.
        TypeError: If `model` is not a module.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Linear(64, 64)
        >>> state = approx_compile.state_dict(model)
        >>> approx_compile.load_state_dict(model, state)
    """
    require_module(model, "load_state_dict")
    if set(state) - {"tables"} != {"controls", "clocks"}:
        raise KeyError(f"load_state_dict: got a dict with keys {sorted(map(str, state))}; approx_compile.state_dict(model) gives 'clocks' and 'controls'")
    parameters, tables = named_parameters(model), state.get("tables", {})
    named = [*(n for group in state["clocks"] for n in group["parameters"]), *tables]
    fitted = fitted_names(set(named), parameters)
    clocks = [{**group, "parameters": [fitted[n] for n in group["parameters"] if n in fitted]} for group in state["clocks"]]
    left_out = [*load_controls(model, state["controls"]), *(n for n in named if n not in fitted)]
    load_tables(parameters, {fitted[n]: t for n, t in tables.items() if n in fitted})
    load_step_counts(parameters, clocks)
    if left_out:
        names = list(dict.fromkeys(left_out))
        known = _listed(list(parameters))
        warn_once(f"approx: load_state_dict: the state of {_listed(names)} fits nowhere in {type(model).__name__}, which has {known}: it is left out", model)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
