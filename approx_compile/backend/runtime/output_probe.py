"""What sampling outputs does to a model's gradient: measured on the user's own batch, without a trace.

At a step that looks, the forward pass leaves a hook on its outputs. When their gradients arrive, the exact graph and the candidates run once more on
the same inputs, random state and output gradients; the relative squared error of each candidate's gradient goes to the `OutputControl`. Parameters'
gradients, buffers, the random state and the user's own graph stay as they are. (The gradients of the outputs are those of the step's own forward
pass: what a loss outside the graph would have made of a candidate's outputs is not in the error.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from approx_compile import _torch
from approx_compile.config.schema import AdaptiveTable
from approx_compile.rows.controller import OutputControl, control_for
from approx_compile.rows.gather_rows import copied
from approx_compile.rows.row_backward import all_rows
from approx_compile.utils import warn_once


class Outputs:
    """The compiled rungs of one assignment of one graph as one function."""

    def __init__(self, settings: AdaptiveTable, rungs: Mapping[float, Callable[..., Any]], parameters: Sequence[int], key: str) -> None:
        self.settings = settings
        self.rungs = dict(rungs)
        self.parameters = tuple(parameters)
        self.key = f"{key}outputs"
        self._own = OutputControl(settings, self.key)

    def __call__(self, *args: Any) -> Any:
        owner = next((args[i] for i in self.parameters), None)
        control = control_for(owner, self.settings, self.key, OutputControl) if owner is not None else self._own
        if _torch.current_backward_id() >= 0:  # a checkpointed block runs once more, as it ran
            return self.rungs[control.ratio](*args)
        ratio = control.begin()
        candidates = control.candidates() if control.watches and torch.is_grad_enabled() else []
        if not candidates:
            return self.rungs[ratio](*args)
        probe = _Probe(args)
        out = self.rungs[ratio](*args)
        outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor) and o.requires_grad]

        def arrived(gradients: Sequence[Tensor | None]) -> None:
            if probe.gone:
                warn_once("approx: a model's parameters are gone when its backward pass begins (FSDP2): outputs whose ratio is to be found stay exact")
                return
            exact = probe.gradient(self.rungs[1.0], gradients)
            control.see(candidates, torch.stack([_error(probe.gradient(self.rungs[r], gradients), exact) for r in candidates]))

        if outs:
            torch.autograd.graph.register_multi_grad_hook(outs, arrived)
        return out


class _Probe:
    """The inputs of a call, and the random state before it."""

    def __init__(self, args: Sequence[Any]) -> None:
        # what is no parameter may be written to: buffers, by the graph itself; inputs, by the user before the backward pass
        self.args = [a if isinstance(a, nn.Parameter) or not isinstance(a, Tensor) else copied(a.detach()) for a in args]
        self.needs = [isinstance(a, Tensor) and a.requires_grad for a in args]
        self.random = _random_state(args)

    @property
    def gone(self) -> bool:
        """Whether a parameter's memory has been freed since."""
        return any(isinstance(a, nn.Parameter) and a.numel() and not a.untyped_storage().size() for a in self.args)

    def gradient(self, call: Callable[..., Any], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        with torch.enable_grad(), all_rows(), _random(self.random):
            leaves = [a.detach().requires_grad_(n) if isinstance(a, Tensor) else a for a, n in zip(self.args, self.needs, strict=True)]
            # the graph may write to what is no parameter, and into a leaf it could not
            out = call(*(v if isinstance(a, nn.Parameter) or not isinstance(v, Tensor) else copied(v) for a, v in zip(self.args, leaves, strict=True)))
            outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor) and o.requires_grad]
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=True) if g is not None]
            wanted = [v for v, n in zip(leaves, self.needs, strict=True) if n]
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        return [g for g in found if g is not None]


def _error(sampled: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """|g' - g|^2 / |g|^2 over all gradients; inf where it is no number."""
    off = sum((a - b).float().square().sum() for a, b in zip(sampled, exact, strict=True))
    whole = sum(b.float().square().sum() for b in exact)
    return torch.nan_to_num(torch.as_tensor(off / whole), nan=torch.inf)


def _random_state(args: Sequence[Any]) -> tuple[Tensor, dict[int, Tensor]]:
    devices = {a.device.index for a in args if isinstance(a, Tensor) and a.device.type == "cuda"}
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


@contextlib.contextmanager
def _random(state: tuple[Tensor, dict[int, Tensor]]) -> Iterator[None]:
    """Inside, random numbers start from a given state; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=list(state[1])):
        torch.set_rng_state(state[0])
        for device, own in state[1].items():
            torch.cuda.set_rng_state(own, device)
        yield
