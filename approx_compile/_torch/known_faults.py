"""Faults of torch itself that give wrong results without a word: in which versions, on which devices, a test that shows each, and what avoids it.

Whatever this package hands to Inductor goes with `guarded` patches, so `APPROX_COMPILE_DISABLE=1`, which users compare with, is right as well.

`lost_order`: Inductor's scheduler orders the reads of a buffer that an op writes in place (a scatter, `index_put_`, a copy into an input) by a second name,
which stands for the buffer after that write. Its C++ backend works out anew what a node reads when it fuses nodes whose loops differ, and forgets the second
name (torch 2.11: its other additions, too). Such a node may then run before the write, wherever nodes are sorted after that: by fusion itself, and by
`reorder_for_peak_memory`, without which the fault is rarer but not gone. With max pooling, whose backward pass is a scatter into zeros, the gradients of a
convolution in front of it become zero. Mended in torch 2.14 (pytorch/pytorch#185873). No option of Inductor turns such fusions off, so the guard is a pass
before fusion that makes nodes keep their orders. It changes no other graph, and costs nothing where the code runs.
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
"""The option of Inductor for a pass over the nodes of its scheduler."""


@dataclass(frozen=True)
class Fault:
    """A fault in the versions of torch from `since` to before `until`. `shows(patches)`: whether something small, compiled with these options of Inductor,
    gets wrong results; `guard`: the pass that avoids it."""

    name: str
    since: tuple[int, int]
    until: tuple[int, int]
    device: str
    shows: Callable[[Mapping[str, Any]], bool]
    guard: _torch.CustomSchedulerPass

    def in_version(self, version: str) -> bool:
        found = re.match(r"(\d+)\.(\d+)", version)
        return found is not None and self.since <= (int(found[1]), int(found[2])) < self.until


def guarded(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options with guards against the faults of this torch. A pass of the user's in the same place runs before ours."""
    guards = [f.guard for f in FAULTS if f.in_version(torch.__version__)]
    before = patches[PASS] if PASS in patches else _torch.user_scheduler_pass()
    passes = [p for p in (before, *guards) if p is not None]
    return {**patches, PASS: passes[0] if len(passes) == 1 else _torch.chain_scheduler_passes(passes)} if guards else dict(patches)


def inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor with the guards, as a backend: what is compared with."""
    return _torch.compile_fx(gm, example_inputs, guarded({}))


class KeepOrder(_torch.CustomSchedulerPass):
    """The guard against `lost_order`."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        _torch.keep_dependencies(nodes, "cpu", _tell)
        return nodes

    def uuid(self) -> str:
        return hashlib.sha256(b"keep order 1").hexdigest()


def _tell() -> None:
    warn_once(
        f"approx: on CPUs torch {torch.__version__} may run what reads a tensor before what writes it in place (max pooling's gradient, scatters). This graph "
        "is compiled without that fault; under backend='inductor' its results may be wrong: compare with APPROX_COMPILE_DISABLE=1, eager or torch 2.14"
    )


def _order_is_lost(patches: Mapping[str, Any]) -> bool:
    """A scatter must run before the loops that read its result, and those fuse with loops that come first. (Sorted once more for memory, the nodes may
    happen to come right.)"""

    def marked(mask: Tensor, places: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scattered = (x + 1).scatter(1, places, x.sum(1, keepdim=True).expand(places.shape) + 2)
        hidden = torch.where(mask, 0.0, scattered.view(mask.shape))
        return torch.where(mask, 2.0, 3.0), hidden, hidden.contiguous(memory_format=torch.channels_last)

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4, 4, 4, generator=generator) < 0.5
    values = mask, torch.arange(8).expand(8, 8).contiguous(), torch.rand(8, 16, generator=generator)
    got = _torch.compile_kernel(marked, values, {"reorder_for_peak_memory": False, **patches})(*values)
    return not all(torch.allclose(a, b) for a, b in zip(got, marked(*values), strict=True))


FAULTS = (Fault("lost_order", (2, 11), (2, 14), "cpu", _order_is_lost, KeepOrder()),)
