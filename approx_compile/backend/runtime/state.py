"""Save and load the state that a checkpoint of a run needs besides the model, the optimizer and the random state.

This state says how many rows were kept, how often rows were drawn, which step of its schedule the model is at, and what the hash tables of its weights hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from approx_compile import _torch
from approx_compile.kernels.hash_tables import load_tables, tables_of
from approx_compile.rows.controller import controls_state, load_controls
from approx_compile.rows.step_counter import load_step_counts, step_counts_state


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Collect the adaptive state of a model, the number of draws of rows, and the model's place in its schedule.

    Save it beside the state of the model and of the optimizer. A run that loads all of them, and the random state, repeats the uninterrupted run bit for bit.

    Args:
        model: The model, compiled or not.

    Returns:
        A dict of numbers, strings, lists and dicts only. Its key `controls` holds ``{parameter or module: {cut or draws of a graph: state}}``. Its key
        `clocks` holds a list with one ``{step, phase, parameters}`` for every optimizer. Its key `tables`,
        which is there where layers are hashed (method `alsh`), holds ``{parameter: tables}``.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Linear(64, 64)
        >>> checkpoint = {"model": model.state_dict(), "approx": approx_compile.state_dict(model)}
        >>> model.load_state_dict(checkpoint["model"])
        <All keys matched successfully>
        >>> approx_compile.load_state_dict(model, checkpoint["approx"])
    """
    model = _torch.uncompiled(model)
    parameters = dict(model.named_parameters())
    tables = tables_of(parameters)
    return {"controls": controls_state(model), "clocks": step_counts_state(parameters)} | ({"tables": tables} if tables else {})


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore the state that `state_dict` returned, before or after the model is compiled.

    Args:
        model: The model, compiled or not.
        state: What `state_dict` returned.

    Raises:
        KeyError: If `state` names a parameter or module that the model lacks, or is not what `state_dict` returned. Nothing is changed then.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Linear(64, 64)
        >>> state = approx_compile.state_dict(model)
        >>> approx_compile.load_state_dict(model, state)
    """
    model = _torch.uncompiled(model)
    if set(state) - {"tables"} != {"controls", "clocks"}:
        raise KeyError(f"load_state_dict: got a dict with keys {sorted(map(str, state))}; approx_compile.state_dict(model) gives 'clocks' and 'controls'")
    parameters = dict(model.named_parameters())
    known = {**dict(model.named_modules()), **parameters}
    names = [
        *((n, parameters) for n in state.get("tables", {})),
        *((n, known) for n in state["controls"]),
        *((n, parameters) for group in state["clocks"] for n in group["parameters"]),
    ]
    for name, valid in names:
        if name not in valid:
            raise KeyError(f"state for {name!r}, which {type(model).__name__} does not have; it has {', '.join(list(parameters)[:8])}, ...")
    load_controls(model, state["controls"])
    load_tables(parameters, state.get("tables", {}))
    load_step_counts(parameters, state["clocks"])
