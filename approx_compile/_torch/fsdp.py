"""FSDP2: the parameters that it gathers for a layer, and the sharded ones that the optimizer has."""

from __future__ import annotations

from torch import nn


def gathered_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """Pair each sharded parameter of a model with the gathered one, which the compiled graphs read.

    Args:
        model: The model.

    Returns:
        The other parameter of each pair, by the id of either; nothing for parameters that FSDP2 has not gathered yet, and where torch does not show them.
    """
    pairs: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            continue
        try:
            groups = module._get_fsdp_state()._fsdp_param_groups  # type: ignore[operator]
            found = [(p.sharded_param, p._unsharded_param) for g in groups for p in g.fsdp_params if hasattr(p, "_unsharded_param")]
        except AttributeError:
            return {}
        for sharded, gathered in found:
            pairs[id(sharded)], pairs[id(gathered)] = gathered, sharded
    return pairs
