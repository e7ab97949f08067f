"""Run one training step under trial settings, to measure its gradients, its plan, and its time beside the exact step's. The model is left as it was."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from approx_compile import _torch
from approx_compile.backend import Backend
from approx_compile.config import ApproxConfig
from approx_compile.machine.timer import BenchmarkTimer
from approx_compile.passes.planning.plan import Plan, SitePlan
from approx_compile.tools.model_state import model_state_preserved

WARM_UP = 2
"""Pairs of steps that are run before any is timed."""

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 41, 2.0
"""A comparison times pairs of steps for about `SECONDS`, but at least `LEAST_ROUNDS` and at most `MOST_ROUNDS` pairs."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step (None for a parameter that takes no part in it), and the sites as planned."""

    values: tuple[Tensor | None, ...]
    sites: tuple[SitePlan, ...]

    def error(self, exact: Gradients) -> float:
        """Compute the relative error ``|g - g_exact| / |g_exact|``, taken over the gradients of all parameters together.

        Args:
            exact: The gradients of the exact step.

        Returns:
            The error; 0 if the exact gradient is zero.
        """
        pairs = [(a, b) for a, b in zip(self.values, exact.values, strict=True) if a is not None and b is not None]
        difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
        size = sum(float(b.double().square().sum()) for _, b in pairs)
        return (difference / size) ** 0.5 if size > 0 else 0.0


class StepTimes(NamedTuple):
    """Medians over pairs of steps: seconds of the exact step, seconds of the trial step, and the trial step's share of the exact step's time."""

    exact_s: float
    step_s: float
    share: float


Step = Callable[[], None]
Settings = ApproxConfig | Mapping[str, Any]


class Trials:
    """Runs the step `loss(model(*inputs), target).backward()`, without the optimizer and without touching `.grad`, under one setting after the other.

    Args:
        model: The model.
        inputs: Its positional arguments.
        target: What the loss compares the output with, if anything.
        loss: A function of the output (and of the target); None for the default losses of `tune`.
        exact: The options under which everything is exact.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], target: Any, loss: Callable[..., Any] | None, exact: Settings) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.target = target
        self.loss = loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._exact_options = exact
        self._exact: Step | None = None

    def gradients(self, options: Settings, draw: int = 0) -> Gradients:
        """Compute the gradients of one step, run op by op.

        Args:
            options: The settings of the step.
            draw: The seed; equal seeds give equal random numbers.

        Returns:
            The gradients, and the sites as planned.

        Raises:
            ValueError: If the loss is not one number with a gradient.
        """
        planned: list[SitePlan] = []
        with model_state_preserved(self.model):
            torch.manual_seed(draw)
            run = self._compiled(options, planned, inner_compile=_torch.run_as_is)
            values = self._backward(run)
        return Gradients(values, tuple(planned))

    def planned(self, options: Settings) -> tuple[SitePlan, ...]:
        """Plan a step without running its backward pass. A graph that Inductor brings from its cache is not planned again.

        Args:
            options: The settings of the step.

        Returns:
            The sites as planned, in execution order.
        """
        planned: list[SitePlan] = []
        with model_state_preserved(self.model), torch.enable_grad(), _torch.preserve_shape_history():
            self._compiled(options, planned, inner_compile=_torch.run_as_is)(*self.inputs)
        return tuple(planned)

    def compiled(self, options: Settings) -> Step:
        """Compile the step with Inductor, and run it once.

        Args:
            options: The settings of the step.

        Returns:
            The compiled step.
        """
        run = self._compiled(options, [])

        def step() -> None:
            self._backward(run)

        with model_state_preserved(self.model):
            step()
        return step

    def times(self, step: Step, late: Callable[[], bool]) -> StepTimes:
        """Time the exact step and a trial step in turn.

        With one CPU thread, the CPU time of this process is measured, because other processes have no effect on it.

        Args:
            step: The compiled trial step.
            late: Tells whether no time is left; the comparison then ends as soon as it has the least number of pairs.

        Returns:
            The medians.
        """
        exact = self.exact
        timer = BenchmarkTimer("cuda" if any(p.device.type == "cuda" for p in self.parameters) else "cpu", SECONDS)
        with model_state_preserved(self.model):
            for _ in range(WARM_UP):
                exact()
                step_s = timer.sample(step, 1)
            rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(SECONDS / max(step_s, 1e-6))))
            pairs: list[tuple[float, ...]] = []
            for pair in itertools.islice(timer.in_turn((exact, step)), rounds):
                pairs.append(pair)
                if len(pairs) >= LEAST_ROUNDS and late():
                    break
        return StepTimes(statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), statistics.median(b / a for a, b in pairs))

    @property
    def exact_is_compiled(self) -> bool:
        """Whether the exact step has been compiled."""
        return self._exact is not None

    @property
    def exact(self) -> Step:
        """The exact step, compiled at first use."""
        if self._exact is None:
            self._exact = self.compiled(self._exact_options)
        return self._exact

    def _compiled(self, options: Settings, planned: list[SitePlan], **kwargs: Any) -> Callable[..., Any]:
        def listen(plan: Plan, before: fx.Graph | None, after: fx.Graph | None) -> None:
            planned.extend(plan.sites)

        run: Callable[..., Any] = _torch.compile_isolated(self.model, Backend(ApproxConfig.of(options), on_plan=listen, **kwargs))
        return run

    def _backward(self, run: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), _torch.preserve_shape_history():
            loss = self._loss(run(*self.inputs))
            return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _loss(self, output: Any) -> Tensor:
        if self.loss is not None:
            value = self.loss(output) if self.target is None else self.loss(output, self.target)
        elif self.target is not None and isinstance(output, Tensor) and isinstance(self.target, Tensor):
            value = F.mse_loss(output, self.target) if self.target.is_floating_point() else F.cross_entropy(output, self.target)
        else:
            value = getattr(output, "loss", output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"tune: the loss is {_described(value)}; one number with a gradient is expected. Give target=..., loss=a function of the "
                "output (and of the target), or a model that returns its loss"
            )
        return value


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " that needs no gradient")
    return type(value).__name__
