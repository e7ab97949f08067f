"""Keep together the graphs that one frame is compiled as.

Under DDP, Dynamo cuts the graph of a frame at DDP's buckets (DDPOptimizer) and calls the backend once for each part, in the order of the forward pass. What is
decided about the model, such as whether rows pay at all, and what the user is told must not depend on where these cuts are.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from approx_compile import _torch
from approx_compile.backend.dynamic_batch import NoRows
from approx_compile.passes.planning.plan import Plan


@dataclass
class FrameParts:
    """The parts of one frame's graph that the backend has been called for so far. A graph that is not cut is its own only part."""

    whole: fx.GraphModule
    """The graph of the frame."""
    is_split: bool
    calls_left: int
    """How many calls of `whole` are in parts that are still to come."""
    number: int = -1
    """The number of the part at hand, from 0."""
    no_rows: list[NoRows | None] = field(default_factory=list)
    """For each part why it has no sampled rows; None for a part that has."""
    plans: list[Plan | None] = field(default_factory=list)
    uuids: list[str] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    assignments: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the part at hand is the frame's last one."""
        return self.calls_left <= 0

    def add(self, plan: Plan | None, uuid: str, inputs: Sequence[Any], assignments: int) -> None:
        """Take up what was compiled for the part at hand.

        Args:
            plan: Its plan; None if it came from a cache.
            uuid: The part of its cache key that comes from the joint-graph pass.
            inputs: The example inputs.
            assignments: How many assignments of settings it goes through during a run.
        """
        self.plans.append(plan)
        self.uuids.append(uuid)
        self.inputs.extend(inputs)
        self.assignments = max(self.assignments, assignments)

    def plan(self) -> Plan | None:
        """Return the plan of the frame; None if some part came from a cache."""
        first, *rest = self.plans
        for other in rest:
            first = first.joined(other) if first is not None and other is not None else None
        return first


_frames: weakref.WeakKeyDictionary[fx.GraphModule, FrameParts] = weakref.WeakKeyDictionary()
"""The frames that are cut, by their whole graph."""


def begin_part(gm: fx.GraphModule) -> FrameParts:
    """Find the frame that a graph is a part of, and count the part.

    Args:
        gm: The graph that the backend was called with.
    """
    whole = _torch.whole_graph(gm)
    parts = _frames.get(whole) if whole is not gm else None
    if parts is None:
        parts = FrameParts(whole, whole is not gm, _torch.count_calls(whole))
        if parts.is_split:
            _frames[whole] = parts
    parts.number += 1
    parts.calls_left -= _torch.count_calls(gm)
    return parts
