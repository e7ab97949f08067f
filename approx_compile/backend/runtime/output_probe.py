"""Find during a run which ratio sampled outputs need, by measuring on the user's own batch how much error they cause in the model's gradient.

At a step that measures, the forward pass leaves a hook on its outputs. When their gradients arrive, the exact graph and the candidate graphs run once more on
the same inputs, random state and output gradients. The relative squared error of each candidate's gradient goes to the `OutputControl`, which chooses the
ratio. Parameters' gradients, buffers, the random state and the user's own graph stay as they are.

The gradients of the outputs are those of the step's own forward pass. If the loss is outside the graph, the error therefore leaves out how the gradient of the
loss would have changed with a candidate's outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from approx_compile import _torch
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.rows.controller import Control
from approx_compile.rows.gather_rows import copy_keeping_strides
from approx_compile.rows.ownership import GraphName, control_for
from approx_compile.rows.row_backward import all_rows
from approx_compile.utils import warn_once


class OutputControl(Control):
    """The control of the ratio of one graph's sampled outputs. `measured` is the last relative squared error |g' - g|^2 / |g|^2 of the gradient.

    The ratio goes down one rung if the error at that rung is small enough, and up one rung if the error at the present one is not.
    """

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        super().__init__(settings, name, 0.0)
        self.place = "outputs of the forward pass"
        self._candidates: list[float] = []

    @property
    def should_observe(self) -> bool:
        """Whether this pass measures errors."""
        return self.passes % self.settings.every == 1 % self.settings.every

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        super().load_state_dict(state)
        if self.ratio not in self.settings.outputs:  # the ladder has changed since: take the next rung up
            self.changes.append((self.step, next((r for r in self.settings.outputs if r > self.ratio), 1.0)))

    def candidates(self) -> list[float]:
        """Return the ratios whose errors this step is to measure: the next rung down, and the present one unless it is 1, which has no error."""
        down = [r for r in self.settings.outputs if r < self.ratio][-1:]
        return [*down, *([self.ratio] if self.ratio < 1 else [])]

    def observe(self, candidates: Sequence[float], squares: Tensor) -> None:
        """Observe the errors of the gradient. They affect the ratio from the next step on.

        Args:
            candidates: The ratios.
            squares: |g' - g|^2 for each of them, then |g|^2. Ranks that exchange gradients decide by the sums over all of them.
        """
        self._candidates = list(candidates)
        if self.pool is None or not self.pool.put(self, squares):
            self._late.put(_relative(squares))

    def take_pooled(self, sums: Tensor) -> None:
        """Take up the squares of all ranks together; the decision ignores them if no rank has measured anything."""
        squares = sums[: len(self._candidates) + 1]
        self._late.put(torch.where(squares[-1] == 0, torch.nan, _relative(squares)))

    def _decide(self, value: Tensor) -> float:
        if bool(value.isnan().all()):
            return self.ratio
        errors = dict(zip(self._candidates, value.tolist(), strict=True))
        good = [r for r, e in errors.items() if e <= self.settings.error]
        up = next((r for r in self.settings.outputs if r > self.ratio), 1.0)
        ratio = min(good) if good else up
        self.measured = errors.get(ratio, 0.0)
        return ratio


class AdaptiveOutputs:
    """The graphs of one assignment, compiled with different ratios of outputs, as one function.

    Args:
        settings: The value of the key `adaptive` of the settings.
        graphs: The compiled graph for each ratio; ratio 1 is exact.
        parameters: The places of the graph's parameters among its arguments.
        name: The graph's name, the same in every process.
    """

    def __init__(self, settings: AdaptiveTable, graphs: Mapping[float, Callable[..., Any]], parameters: Sequence[int], name: GraphName) -> None:
        self.settings = settings
        self.graphs = dict(graphs)
        self.parameters = tuple(parameters)
        self.name = name + "outputs"
        self._unowned_control = OutputControl(settings, self.name.key)

    def __call__(self, *args: Any) -> Any:
        """Run the graph at the ratio that holds; at a step that measures, leave a hook on its outputs."""
        parameters = [args[i] for i in self.parameters]
        owner = next((p for p in parameters if p.requires_grad), next(iter(parameters), None))
        control = control_for(owner, self.settings, self.name, OutputControl) if owner is not None else self._unowned_control
        if _torch.current_backward_id() >= 0:  # a checkpointed block is recomputed at the ratio that it was run with
            return self.graphs[control.ratio](*args)
        ratio = control.start_step()
        candidates = control.candidates() if control.should_observe and torch.is_grad_enabled() else []
        if not candidates:
            return self.graphs[ratio](*args)
        snapshot = _CallSnapshot(args)
        out = self.graphs[ratio](*args)
        outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor) and o.requires_grad]

        def measure(gradients: Sequence[Tensor | None]) -> None:
            if snapshot.parameters_freed:
                warn_once("approx: a model's parameters are gone when its backward pass begins (FSDP2): outputs whose ratio is to be found stay exact")
                return
            exact = snapshot.gradient(self.graphs[1.0], gradients)
            errors = [_squared_difference(snapshot.gradient(self.graphs[r], gradients), exact) for r in candidates]
            control.observe(candidates, torch.stack([*errors, _squared_difference(exact)]))

        if outs:
            torch.autograd.graph.register_multi_grad_hook(outs, measure)
        return out


class _CallSnapshot:
    """The inputs of a call and the random state before it, from which the call can be repeated."""

    def __init__(self, args: Sequence[Any]) -> None:
        # everything but parameters is copied: the graph itself may write to buffers, and the user to inputs before the backward pass
        self.args = [a if isinstance(a, nn.Parameter) or not isinstance(a, Tensor) else copy_keeping_strides(a.detach()) for a in args]
        self.needs = [isinstance(a, Tensor) and a.requires_grad for a in args]
        self.random = _random_state(args)

    @property
    def parameters_freed(self) -> bool:
        """Whether a parameter's memory has been freed since the call."""
        return any(isinstance(a, nn.Parameter) and a.numel() and not a.untyped_storage().size() for a in self.args)

    def gradient(self, call: Callable[..., Any], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Repeat the call with a compiled graph.

        Args:
            call: The compiled graph.
            gradients: The gradient of each differentiable output; None for one that gets none.

        Returns:
            The gradients of the inputs that need one and take part in the computation.
        """
        with torch.enable_grad(), all_rows(), _random_state_set(self.random):
            leaves = [a.detach().requires_grad_(n) if isinstance(a, Tensor) else a for a, n in zip(self.args, self.needs, strict=True)]
            # the graph may write to tensors that are not parameters, which autograd does not allow for a leaf that needs a gradient
            out = call(
                *(v if isinstance(a, nn.Parameter) or not isinstance(v, Tensor) else copy_keeping_strides(v) for a, v in zip(self.args, leaves, strict=True))
            )
            outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor) and o.requires_grad]
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=True) if g is not None]
            wanted = [v for v, n in zip(leaves, self.needs, strict=True) if n]
            values = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        return [g for g in values if g is not None]


def _relative(squares: Tensor) -> Tensor:
    """Return ``|g' - g|^2 / |g|^2`` for each candidate; infinite if a quotient is not a number."""
    return torch.nan_to_num(squares[:-1] / squares[-1], nan=torch.inf)


def _squared_difference(a: Sequence[Tensor], b: Sequence[Tensor] | None = None) -> Tensor:
    """Return ``|a - b|^2``, or ``|a|^2`` without `b`, taken over all gradients together."""
    differences = a if b is None else [x - y for x, y in zip(a, b, strict=True)]
    return torch.as_tensor(sum(d.float().square().sum() for d in differences))


def _random_state(args: Sequence[Any]) -> tuple[Tensor, dict[int, Tensor]]:
    devices = {a.device.index for a in args if isinstance(a, Tensor) and a.device.type == "cuda"}
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


@contextlib.contextmanager
def _random_state_set(state: tuple[Tensor, dict[int, Tensor]]) -> Iterator[None]:
    """Draw random numbers from a given state inside the block; afterwards the previous sequence continues as if none had been drawn."""
    with torch.random.fork_rng(devices=list(state[1])):
        torch.set_rng_state(state[0])
        for device, device_state in state[1].items():
            torch.cuda.set_rng_state(device_state, device)
        yield
