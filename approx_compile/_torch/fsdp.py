"""FSDP2: the parameters that it gathers for a layer, and the sharded ones that the optimizer has."""

from __future__ import annotations

from typing import Any

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
        if not is_sharded(module):
            continue
        try:
            groups = module._get_fsdp_state()._fsdp_param_groups  # type: ignore[operator]
            found = [(p.sharded_param, p._unsharded_param) for g in groups for p in g.fsdp_params if hasattr(p, "_unsharded_param")]
        except AttributeError:
            return {}
        for sharded, gathered in found:
            pairs[id(sharded)], pairs[id(gathered)] = gathered, sharded
    return pairs


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 shards a module (`fully_shard`)."""
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def sharded_parameters(module: Any) -> list[nn.Parameter]:
    """Return the sharded parameters of a module, which its optimizer steps; none for a module that FSDP2 does not shard, and where torch does not show them.

    Args:
        module: The module.
    """
    if not is_sharded(module):
        return []
    groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None) or []
    held = [getattr(p, "sharded_param", None) for group in groups for p in getattr(group, "fsdp_params", ())]
    return [p for p in held if isinstance(p, nn.Parameter)]
