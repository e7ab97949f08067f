"""What a checkpoint of a run needs besides the model, the optimizer and the random state: how many rows were kept, how often rows were drawn, and which
step it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from approx_compile import _torch
from approx_compile.backend.runtime.step_counter import load_step_counts, step_counts_state
from approx_compile.rows.controller import controls_state, load_controls


def state_dict(model: nn.Module) -> dict[str, Any]:
    """The adaptive state of a model, compiled or not, the number of rows' draws made, and its place in its schedule. Numbers, strings and lists only.

    `controls`: {parameter or module: {cut or draws of a graph: state}}; `clocks`: [{step, phase, parameters}], one for every optimizer. Save it beside the
    model's and the optimizer's; a run that loads all of them and the random state repeats the uninterrupted one bit for bit.
    """
    model = _torch.uncompiled(model)
    return {"controls": controls_state(model), "clocks": step_counts_state(dict(model.named_parameters()))}


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take up the state that `state_dict` gave, before or after the model is compiled. Raises KeyError for a name the model lacks, and for anything that
    is no such state; nothing is changed then."""
    model = _torch.uncompiled(model)
    if set(state) != {"controls", "clocks"}:
        raise KeyError(f"load_state_dict: got a dict with keys {sorted(map(str, state))}; approx_compile.state_dict(model) gives 'clocks' and 'controls'")
    parameters = dict(model.named_parameters())
    known = {**dict(model.named_modules()), **parameters}
    names = [*((n, known) for n in state["controls"]), *((n, parameters) for group in state["clocks"] for n in group["parameters"])]
    for name, among in names:
        if name not in among:
            raise KeyError(f"state for {name!r}, which {type(model).__name__} does not have; it has {', '.join(list(parameters)[:8])}, ...")
    load_controls(model, state["controls"])
    load_step_counts(parameters, state["clocks"])
