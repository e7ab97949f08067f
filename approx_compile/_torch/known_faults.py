"""Table of faults of torch that silently give wrong results: the versions and devices that have each, a test that shows it, and a guard that avoids it.

This package passes `guarded` options to Inductor wherever it compiles, so `APPROX_COMPILE_DISABLE=1`, which users compare with, is correct as well.

`lost_order`: Inductor's scheduler orders the reads of a buffer that an op writes in place (a scatter, `index_put_`, a copy into an input) by a second name,
which stands for the buffer after that write. When its C++ backend fuses nodes whose loops differ, it computes anew what a node reads, and loses the second name
(torch 2.11: other added dependencies, too). Such a node may then run before the write if nodes are sorted after that. Fusion itself sorts them, and so does
`reorder_for_peak_memory`; without the latter the fault is rarer but still there. The backward pass of max pooling is a scatter into zeros, so the gradients of
a convolution before max pooling become zero. Fixed in torch 2.14 (pytorch/pytorch#185873). No option of Inductor turns such fusions off, so the guard is a
pass before fusion that makes nodes keep their dependencies. It changes no other graph and costs nothing at run time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.utils import warn_once

PASS = "_pre_fusion_custom_pass"
"""Inductor's option for a pass over the nodes of its scheduler."""


@dataclass(frozen=True)
class Fault:
    """A fault of torch.

    Attributes:
        name: Its name.
        since: The first version of torch (major, minor) that has it.
        until: The first version without it.
        device: The device type that has it.
        shows: Compiles something small with given options of Inductor, and returns whether the results are wrong.
        guard: The pass of the scheduler that avoids it.
    """

    name: str
    since: tuple[int, int]
    until: tuple[int, int]
    device: str
    shows: Callable[[Mapping[str, Any]], bool]
    guard: _torch.CustomSchedulerPass

    def in_version(self, version: str) -> bool:
        """Return whether a version of torch, as in `torch.__version__`, has the fault."""
        numbers = re.match(r"(\d+)\.(\d+)", version)
        return numbers is not None and self.since <= (int(numbers[1]), int(numbers[2])) < self.until


def guarded(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Add guards against the faults of the installed torch to options of Inductor.

    Args:
        patches: The options.

    Returns:
        The options with the guards. A pass that the user has set in the same place runs before them.
    """
    guards = [f.guard for f in FAULTS if f.in_version(torch.__version__)]
    before = patches[PASS] if PASS in patches else _torch.user_scheduler_pass()
    passes = [p for p in (before, *guards) if p is not None]
    return {**patches, PASS: passes[0] if len(passes) == 1 else _torch.chain_scheduler_passes(passes)} if guards else dict(patches)


def inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Compile with Inductor and the guards: the backend that this package is compared with.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        **kwargs: Not used.

    Returns:
        The compiled function.
    """
    return _torch.compile_fx(gm, example_inputs, guarded({}))


class KeepOrder(_torch.CustomSchedulerPass):
    """The guard against `lost_order`."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Make the nodes keep their dependencies."""
        _torch.keep_dependencies(nodes, "cpu", _tell)
        return nodes

    def uuid(self) -> str:
        """Return the guard's part of the key in Inductor's caches."""
        return hashlib.sha256(b"keep order 1").hexdigest()


def _tell() -> None:
    warn_once(
        f"approx: on CPUs torch {torch.__version__} may run what reads a tensor before what writes it in place (max pooling's gradient, scatters). This graph "
        "is compiled without that fault; under backend='inductor' its results may be wrong: compare with APPROX_COMPILE_DISABLE=1, eager or torch 2.14"
    )


def _order_is_lost(patches: Mapping[str, Any]) -> bool:
    """Whether a small graph shows the fault: loops that read a scatter's result fuse with loops that come before the scatter.

    Without `reorder_for_peak_memory`, which may happen to sort the nodes correctly.
    """

    def scatter_and_read(mask: Tensor, places: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scattered = (x + 1).scatter(1, places, x.sum(1, keepdim=True).expand(places.shape) + 2)
        hidden = torch.where(mask, 0.0, scattered.view(mask.shape))
        return torch.where(mask, 2.0, 3.0), hidden, hidden.contiguous(memory_format=torch.channels_last)

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4, 4, 4, generator=generator) < 0.5
    values = mask, torch.arange(8).expand(8, 8).contiguous(), torch.rand(8, 16, generator=generator)
    got = _torch.compile_kernel(scatter_and_read, values, {"reorder_for_peak_memory": False, **patches})(*values)
    return not all(torch.allclose(a, b) for a, b in zip(got, scatter_and_read(*values), strict=True))


FAULTS = (Fault("lost_order", (2, 11), (2, 14), "cpu", _order_is_lost, KeepOrder()),)
