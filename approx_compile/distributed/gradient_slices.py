"""Keep for every parameter the slices outside of which its gradient is equal on all ranks, until the gradient is exchanged."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile import _torch
from approx_compile.backend.runtime.choice_recorder import KeptAxis


@dataclass(frozen=True)
class KeptSlices:
    """The slices of one parameter's gradient that are to be exchanged: the kept entries of each of some dims.

    Attributes:
        axes: The kept entries, by dim.
        token: Equal for two gradients only if their indices are equal.
    """

    axes: tuple[KeptAxis, ...]
    token: Any


@dataclass(frozen=True)
class _Expected:
    """A gradient on its way to the parameter. Holding it keeps the autograd engine from adding to it in place."""

    gradient: Tensor
    slices: KeptSlices


class GradientSlices:
    """What is known of the gradients of one model's parameters since they were last exchanged.

    A gradient is sent in slices only if all that was accumulated in it since then came from one compiled graph, with the same indices each time. What
    arrives from anywhere else (another graph, a penalty on the weights, an eager step) makes it whole, because every gradient that reaches a parameter is
    compared with the one that was announced.
    """

    def __init__(self, names: Mapping[Tensor, str]) -> None:
        """Store the names of the parameters, for messages."""
        self.names = names
        self.by_data: dict[str, str] = {}
        self.arrived = False
        """Whether any gradient has arrived since the last exchange."""
        self._expected = WeakIdKeyDictionary()
        self._known = WeakIdKeyDictionary()
        self._watched = WeakIdKeyDictionary()

    def note(self, sites: Sequence[tuple[str, str]]) -> None:
        """Take up the layers whose choice depends on the data, each with its method."""
        self.by_data |= dict(sites)

    def expect(self, parameter: Tensor, node: Any, gradient: Tensor, axes: Sequence[KeptAxis], token: Any) -> None:
        """Take up what is known of a gradient on its way to a parameter; see `choice_recorder.Listener`."""
        self._watch(parameter, node)
        twice = parameter in self._expected
        self._expected[parameter] = _Expected(gradient, KeptSlices(() if twice else tuple(sorted(axes, key=lambda a: a.dim)), token))

    def _watch(self, parameter: Tensor, node: Any) -> None:
        """Have every gradient that arrives at a parameter compared with the one that was announced."""
        known = self._watched.get(parameter)
        if known is not None and known[0] is node:
            return
        if known is not None:
            known[1].remove()
        of = weakref.ref(parameter)

        def hook(gradients: Sequence[Tensor | None]) -> None:
            if (p := of()) is not None:
                self._arrive(p, gradients[0])

        self._watched[parameter] = (node, node.register_prehook(hook))

    def _arrive(self, parameter: Tensor, gradient: Tensor | None) -> None:
        self.arrived = True
        expected = self._expected.pop(parameter, None)
        if gradient is None:
            return
        new: KeptSlices | None = None
        if expected is not None and expected.slices.axes and gradient.data_ptr() == expected.gradient.data_ptr():
            new = expected.slices
        if parameter in self._known:
            before = self._known[parameter]
            new = new if new is not None and before is not None and before.token == new.token else None
        self._known[parameter] = new

    def of(self, parameter: Tensor) -> KeptSlices | None:
        """Return the slices of a parameter's gradient that are to be exchanged; None for the whole gradient."""
        slices: KeptSlices | None = self._known.get(parameter)
        return slices

    @property
    def is_backward(self) -> bool:
        """Whether gradients of a backward pass are being exchanged, rather than zeros for a rank that has no more data (`join`)."""
        return self.arrived or _torch.current_backward_id() >= 0

    def clear(self) -> None:
        """Forget everything that was known of the gradients, which have been exchanged."""
        self.arrived = False
        self._expected.clear()
        self._known.clear()


def indices_of_blocks(shape: torch.Size, axes: Sequence[KeptAxis]) -> tuple[Tensor, int]:
    """Return where the kept slices of a contiguous tensor lie in memory.

    Args:
        shape: The tensor's shape.
        axes: The kept entries, in the order of their dims.

    Returns:
        The numbers of the kept blocks (n,) int64, and the entries of a block: the tensor, viewed as (blocks, entries), has all kept entries in these blocks.
    """
    last = axes[-1]
    block = last.unit * shape[last.dim + 1 :].numel()
    blocks = torch.zeros((), dtype=torch.int64, device=last.idx.device)
    position = {a.dim: a for a in axes}
    for dim in range(last.dim + 1):
        axis = position.get(dim)
        if dim == last.dim:
            size, along = last.size // last.unit, last.idx
        elif axis is not None:
            size, along = shape[dim], entries_of(axis)
        else:
            size, along = shape[dim], torch.arange(shape[dim], device=last.idx.device)
        blocks = blocks.unsqueeze(-1) * size + along
    return blocks.flatten(), block


def entries_of(axis: KeptAxis) -> Tensor:
    """The single entries of an axis that are kept."""
    if axis.unit == 1:
        return axis.idx
    return (axis.idx.unsqueeze(-1) * axis.unit + torch.arange(axis.unit, device=axis.idx.device)).flatten()
