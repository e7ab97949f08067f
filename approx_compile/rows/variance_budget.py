"""Measure how much variance leaving out rows really adds to the gradient of a backward graph, and correct what the norms at its cuts say.

The norms g at a cut say how much variance a choice of rows adds there, if the gradient of every parameter has per-sample norms in proportion to g. What lies
below the cut may make that wrong: a layer may shrink the gradients of some samples, samples may be coupled, several cuts add up. So in some passes the same
backward graph is evaluated three times on the same saved tensors, and the gradients of its parameters are compared:

| evaluation | gradient | used for |
|---|---|---|
| all rows | g | the result of the pass, which is exact |
| rows as in any other pass | g' | A = |g' - g|^2, the variance added |
| k of B rows, drawn uniformly, with weight B / k | g'' | V = |g'' - g|^2 k / (B - k), the gradient's own variance |

For k rows drawn without replacement E |g'' - g|^2 = (B / k) (1 - k / B) B S^2, where S^2 is the variance of a sample's gradient and B S^2 that of the batch's.

The norms at the cuts predict P for A / V. `excess` is the running mean of A / V over that of P, and the norms may add tau / excess from then on.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.reasons import Reason
from approx_compile.reasons.rows import UNMEASURED_COLLECTIVE, UNMEASURED_CUDA_GRAPHS, UNMEASURED_MEMORY, UNMEASURED_WRITES
from approx_compile.rows.controller import HISTORY, Observing

log = logging.getLogger("approx_compile")

MOMENTUM = 0.7
"""The momentum of the running means of what was measured and of what was predicted. A single draw may be off by a half."""

MOST_ENTRIES = 2**20
"""The most entries of one parameter's gradient that are compared, so that a measurement needs little memory. Where there are more, every n-th slice is."""

FIRST_VARIANCE = 0.025
"""With tau 0 or "auto": the variance that the running means begin with, measured and predicted."""

LEAST_EXCESS = 0.25
"""The least excess that counts: the norms may add at most four times tau."""


class Rows(enum.Enum):
    """Which rows an evaluation of a backward graph runs on."""

    ALL = "all rows"
    CHOSEN = "rows chosen by their norms"
    UNIFORM = "rows drawn uniformly"


@dataclass
class Probe:
    """An evaluation of a backward graph for a measurement. `predicted` collects, at every cut, the variance that the norms say is added, over sum g^2."""

    rows: Rows
    predicted: list[Tensor] = field(default_factory=list)


class VarianceBudget(Observing):
    """How much variance the choices of one backward graph add to the gradient of its parameters, and what the norms at its cuts may add so that it is tau.

    Attributes:
        added: The running mean of the variance added, over the gradient's own.
        predicted: The running mean of what the norms at the cuts said.
        measurements: (pass, variance added) of every measurement.
        declined: Why nothing is measured, if so.
    """

    left_out = "rows left out"
    """What adds the variance, in words."""

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        super().__init__(settings, name)
        self.added = self.predicted = settings.tau if settings.tau and settings.tau != "auto" else FIRST_VARIANCE
        self.measurements: deque[tuple[int, float]] = deque(maxlen=HISTORY)
        self.declined: Reason | None = None
        self._measured_at = 0

    @property
    def excess(self) -> float:
        """How many times as much variance is added as the norms at the cuts say."""
        return max(LEAST_EXCESS, self.added / self.predicted)

    @property
    def tau(self) -> float | None:
        """The variance that the norms at the cuts may add; None for tau "auto", which bounds none."""
        return self.settings.tau / self.excess if self.settings.tau != "auto" else None

    def start_pass(self) -> bool:
        """Start a pass; return whether it measures."""
        self.apply_pending()
        self.passes += 1
        return self.is_due()

    def is_due(self) -> bool:
        """Whether this pass measures."""
        every = self.settings.probe
        return every > 0 and self.declined is None and self.passes % every == every // 4

    def observe(self, added: Tensor, own: Tensor, predicted: Tensor) -> None:
        """Observe the squares |g' - g|^2 and V of one measurement, and the sum P of what the norms said. They count from the next pass on.

        Where ranks agree on their shares, A, V and P V are summed over the ranks.
        """
        self._measured_at = self.passes
        numbers = torch.stack([added.double(), own.double(), predicted.double() * own.double()])
        if not (self.settings.agree and self.pool is not None and self.pool.put(self, numbers)):
            self.take_pooled(numbers)

    def take_pooled(self, sums: Tensor) -> None:
        """Take up A, V and P V of all ranks together; zeros where none has measured."""
        self._late.put(torch.stack([sums[0] / sums[1], sums[2] / sums[1]]))

    def apply_pending(self) -> None:
        """Take up the last measurement, if there is one."""
        value = self._late.take()
        if value is None:
            return
        added, predicted = value.tolist()
        if not (0 <= added < float("inf") and 0 < predicted < float("inf")):  # gradients of inf, NaN or 0
            return
        self.added, self.predicted = self._mean(self.added, added), self._mean(self.predicted, predicted)
        self.measurements.append((self._measured_at, added))
        said = "%s: %s add %.3g of the gradient's own variance in pass %d, the norms say %.3g; asked: %s; on average %.3g times what the norms say"
        log.debug(said, self.name, self.left_out, added, self._measured_at, predicted, self.settings.tau, self.excess)

    def _mean(self, before: float, new: float) -> float:
        """The running mean after one more number."""
        return MOMENTUM * before + (1 - MOMENTUM) * new

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        self.apply_pending()
        return {"passes": self.passes, "added": self.added, "predicted": self.predicted, "measurements": [list(m) for m in self.measurements]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        self.passes, self.added, self.predicted = int(state["passes"]), float(state["added"]), float(state["predicted"])
        self.measurements = deque([(int(s), float(a)) for s, a in state["measurements"]], maxlen=HISTORY)
        self._late = type(self._late)()


def unmeasured_reason(graph: fx.Graph) -> Reason | None:
    """Return why a backward graph can't be evaluated several times in one step, or None if it can."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    for n in calls:
        if "c10d" in str(n.target):
            return UNMEASURED_COLLECTIVE(op=n.target)
        if _torch.writes_to_arguments(n):
            return UNMEASURED_WRITES(op=n.target)
    on_cuda = any(isinstance(v := n.meta.get("val"), Tensor) and v.device.type == "cuda" for n in calls)
    return UNMEASURED_CUDA_GRAPHS() if on_cuda and _torch.uses_cuda_graphs() else None


def measure(
    evaluate: Callable[[Probe], list[Any]], budget: VarianceBudget, parameters: Sequence[int], odds: float, devices: Iterable[torch.device]
) -> list[Any]:
    """Evaluate a backward graph on all rows, on chosen ones and on uniformly drawn ones, and let the budget observe the variances.

    Torch's random state afterwards is that after one evaluation.

    Args:
        evaluate: Evaluates the graph and returns its outputs. The last evaluation is the one on all rows, after which the saved tensors may be freed.
        budget: The budget that observes.
        parameters: The places of the gradients of parameters among the outputs.
        odds: k / (B - k) of the k of B rows that are drawn uniformly.
        devices: The devices whose random state is kept.

    Returns:
        The outputs on all rows.
    """
    probes = [Probe(Rows.CHOSEN), Probe(Rows.UNIFORM)]
    approximate = []
    try:
        for probe in probes:
            with _torch.random_state_kept(devices):
                outputs = evaluate(probe)
            approximate.append([some_entries(outputs[i]).clone() for i in parameters])
            del outputs
    except torch.OutOfMemoryError:
        budget.declined = UNMEASURED_MEMORY()
        approximate.clear()
        return evaluate(Probe(Rows.ALL))
    outputs = evaluate(Probe(Rows.ALL))
    exact = [outputs[i] for i in parameters]
    added, own = (squared_distance(values, exact) for values in approximate)
    budget.observe(added, own * odds, torch.stack([p.double() for p in probes[0].predicted]).sum())
    return outputs


def some_entries(gradient: Tensor) -> Tensor:
    """Return every n-th slice of a gradient's first dim, with the least n that leaves at most about `MOST_ENTRIES` entries."""
    return gradient[:: -(-gradient.numel() // MOST_ENTRIES)] if gradient.numel() > MOST_ENTRIES and gradient.dim() else gradient


def squared_distance(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return an estimate of the squared distance of two lists of gradients, exact where none has more than `MOST_ENTRIES` entries.

    Args:
        values: Some entries of the one (`some_entries`).
        gradients: The other.

    Returns:
        A scalar in fp64. Differences are squared in fp32 or wider.
    """
    parts = []
    for value, gradient in zip(values, gradients, strict=True):
        dtype = value.dtype if value.dtype == torch.float64 or value.is_complex() else torch.float32
        distance = torch.linalg.vector_norm(value.to(dtype) - some_entries(gradient).to(dtype)).double()
        parts.append(distance.square() * (gradient.numel() / max(1, value.numel())))
    return torch.stack(parts).sum()
