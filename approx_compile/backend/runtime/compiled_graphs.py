"""Remember what was decided for the graphs of each module, so that the ranks of a data-parallel training can compare it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from approx_compile.config import ApproxConfig
from approx_compile.passes.planning.plan import Plan


@dataclass(frozen=True)
class GraphDecisions:
    """What was decided for one graph, as plain values.

    Attributes:
        settings: The options.
        profile: The digest of the machine's profile; None without one.
        layers: What is done to each layer, by its name; None if the plan came from a cache.
    """

    settings: Mapping[str, Any]
    profile: str | None
    layers: Mapping[str, str] | None


_graphs: weakref.WeakKeyDictionary[nn.Module, dict[str, GraphDecisions]] = weakref.WeakKeyDictionary()
"""The decisions for the graphs of each compiled module, by the name of the graph."""


def note(root: nn.Module, key: str, config: ApproxConfig, profile: str | None, plans: Sequence[Plan | None]) -> None:
    """Remember what was decided for a graph.

    Args:
        root: The module that was compiled.
        key: The name of the graph within the module, the same in every process.
        config: The settings.
        profile: The digest of the machine's profile.
        plans: The plan of every assignment of the settings; None for one that comes from a cache.
    """
    layers: dict[str, str] | None = {}
    for i, plan in enumerate(plans):
        if plan is None or layers is None:
            layers = None
            continue
        for s in plan.sites:
            done = ", ".join(f"{p.name} {p.decision}{f' ({p.method} {p.ratio:g})' if p.decision == 'sampled' else ''}" for p in s.products)
            layers[f"{s.name}{f' in assignment {i}' if i else ''}"] = done
    _graphs.setdefault(root, {})[key] = GraphDecisions(config.options(), profile, layers)


def decisions_of(model: nn.Module) -> dict[str, GraphDecisions]:
    """Return what was decided for the graphs of a model and of the modules in it, by the name of the graph."""
    return {f"{name}:{key}": decisions for name, m in model.named_modules() for key, decisions in _graphs.get(m, {}).items()}
