"""Find during a run how many rows each step needs (the policy "adaptive"), and keep the state of a run that a model's checkpoint must hold.

For rows, the norms g of the gradients that reach a cut are known in any case. `row_sampling.needed_share` computes the share of the rows that keeps the added
variance below tau times the gradient's own. The running mean of this share, rounded up to a rung of the ladder, is the share kept from the next step on.
(The ratio of sampled outputs has a control in `backend.runtime.output_probe`.)

A measured number is read one step after it was computed, so the host never waits for the device. The state is small and must be part of a checkpoint, because
a resumed run would otherwise start with all rows again. So must the number of random draws made, whatever the policy.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.config.words import LADDER
from approx_compile.rows.agreement import VariancePool
from approx_compile.rows.row_sampling import added_variance, needed_share, share_from_variance

log = logging.getLogger("approx_compile")

MOMENTUM = 0.9
"""The momentum of the running mean. It is high because a single batch says little about the next ten."""

DECAY = 0.05
"""With tau 0, by how much of the difference the share of tokens with a gradient is followed downwards in each step."""

FIRST_MARGIN = 1.1
"""With tau 0, the factor on the share of tokens with a gradient in the first step, because other batches may have more."""

OVERHEAD = 0.03
"""The time that choosing and gathering rows is taken to cost under tau "auto", as a share of the exact step's."""

TOKEN_RUNGS = 32
"""With the default ladder, the number of shares of the tokens to choose from. Any number of tokens runs in the same code."""

OBSERVE_EVERY = 4
"""Backward passes from one observation of the norms to the next."""

OBSERVE_EVERY_SETTLED = 16
"""The same for tokens in a graph that still keeps all of them after `SETTLED` passes: a pass that observes runs the slower code for some of the tokens."""

SETTLED = 100

HISTORY = 100_000
"""The most changes of the ratio that are kept."""


class StepFlops(NamedTuple):
    """The FLOPs of a graph in one training step, forward and backward, on all rows.

    Attributes:
        on_rows: Those that run on the rows of a cut.
        step: All of them; with several cuts each has an equal part.
    """

    on_rows: float = 0.0
    step: float = 0.0


class DeferredScalar:
    """A number on the device that is read one step after it was made, so that the host does not wait for it."""

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, Any] | None = None

    def put(self, value: Tensor) -> None:
        """Start to copy a number to the host."""
        if value.device.type == "cuda":
            host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting = (host, event)
        else:
            self._waiting = (value, None)

    def take(self) -> Tensor | None:
        """Return the number that was put last, once; None if there is none."""
        if self._waiting is None:
            return None
        (value, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()  # it belongs to the previous step, so this hardly waits, and the device still has the next forward pass to run
        return value


class Checkpointed:
    """State of a run, attached to a model, that its checkpoint must contain.

    Attributes:
        name: The key in checkpoints.
        former_name: The key in checkpoints of earlier versions.
    """

    name: str
    former_name: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        raise NotImplementedError


class Draws(Checkpointed):
    """The random numbers that select the rows of one graph. They are a separate stream, so that the user's random numbers stay as in an exact run.

    Every draw seeds a generator with torch's seed, the graph's name and the number of draws made, so that a checkpoint needs only this number.
    `torch.manual_seed` resets the count, even with the same seed; restoring a state of torch's stream (`fork_rng`) does not. Ranks with the same seed draw the
    same numbers, which they use for different data.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._random = torch.Generator("cpu")
        self._seeding = _torch.seeding_marker()

    def random(self, device: torch.device) -> torch.Generator | None:
        """Return the generator for the next draw.

        Args:
            device: The device of the generator.

        Returns:
            The seeded generator; None while a CUDA graph is recorded, where torch's own stream must be used.
        """
        if _torch.is_capturing_cuda_graph(device):
            return None
        if self._random.device != device:
            self._random = torch.Generator(device)
        self._restart_if_reseeded()
        self.count += 1
        drawn = hashlib.blake2b(f"{_torch.initial_seed(device)} {self.name} {self.count}".encode(), digest_size=8)
        return self._random.manual_seed(int.from_bytes(drawn.digest(), "little"))

    def _restart_if_reseeded(self) -> None:
        """Reset the count if the user has seeded torch since the last draw."""
        seeding = _torch.seeding_marker()
        if seeding != self._seeding:
            self._seeding = seeding
            if _torch.initial_seed(self._random.device) in _torch.seeds_of_marker(seeding):
                self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        self._restart_if_reseeded()
        return {"draws": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        self.count = int(state["draws"])
        self._seeding = _torch.seeding_marker()


class Observing(Checkpointed):
    """State that follows numbers which are measured on the device and read one pass later.

    Attributes:
        settings: The settings of the policy.
        name: The name in logs and checkpoints.
        passes: The passes started.
        pool: What pools numbers with other ranks, if anything does.
    """

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        self.settings = settings
        self.name = name
        self.passes = 0
        self.pool: VariancePool | None = None
        self._late = DeferredScalar()


class Control(Observing):
    """A share that is found during a run, among the rungs of a ladder.

    Attributes:
        settings: The settings of the policy.
        name: The name in logs and checkpoints.
        place: What it decides about, in words for the user.
        work: The FLOPs that it decides about; none for outputs.
        step: The optimizer steps started; backward passes where no `torch.optim` optimizer steps the parameters and none are counted by `set_step`.
        passes: The backward passes started (for outputs: forward passes). With gradient accumulation there are several in a step.
        completed: The completed optimizer steps when the present pass began; None where they are not known.
        measured: The number that the ratio is decided by.
        changes: (step, ratio) of every change of the ratio, starting with (0, 1).

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
        >>> torch.compile(model, backend="approx")(torch.randn(512, 1024)).square().mean().backward()
        >>> [(control.step, control.ratio) for control in approx_compile.controls(model).values()]
        [(1, 1.0)]
    """

    def __init__(self, settings: AdaptiveTable, name: str, measured: float) -> None:
        super().__init__(settings, name)
        self.place = "backward pass"
        self.work = StepFlops()
        self.step = 0
        self.completed: int | None = None
        self.measured = measured
        self.changes: deque[tuple[int, float]] = deque([(0, 1.0)], maxlen=HISTORY)

    @property
    def ratio(self) -> float:
        """The ratio that holds now."""
        return self.changes[-1][1]

    @property
    def kept(self) -> float:
        """The mean share over all steps so far."""
        ends = [*[s for s, _ in self.changes][1:], self.step + 1]
        steps = [max(0, end - max(1, begin)) for (begin, _), end in zip(self.changes, ends, strict=True)]
        return sum(n * r for n, (_, r) in zip(steps, self.changes, strict=True)) / sum(steps) if any(steps) else 1.0

    def start_step(self) -> float:
        """Start a pass and return the share of rows that holds in it."""
        self._apply_pending()
        self.passes += 1
        step = self.passes if self.completed is None else self.completed + 1
        if step < self.step:  # passes stood for steps until an optimizer was seen, or the user has set an earlier step
            self.changes = deque(((min(s, step), r) for s, r in self.changes), maxlen=HISTORY)
        self.step = step
        return self.ratio

    def _apply_pending(self) -> None:
        """Decide on the ratio by the number that the last observation gave, if there is one."""
        if self.pool is not None:
            self.pool.collect()
        value = self._late.take()
        if value is None:
            return
        self._change_to(self._decide(value), self.step)

    def _change_to(self, ratio: float, step: int) -> None:
        """Let a ratio hold in the steps after `step`."""
        if ratio != self.ratio:
            log.debug("%s: %g from step %d on (%.3g measured)", self.name, ratio, step + 1, self.measured)
            self.changes.append((step, ratio))

    def _decide(self, value: Tensor) -> float:
        """Choose the ratio by a number that an observation gave."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        self._apply_pending()
        return {"step": self.step, "passes": self.passes, "measured": self.measured, "changes": [list(c) for c in self.changes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        self.step, self.measured = int(state["step"]), float(state["measured"])
        self.passes = int(state.get("passes", self.step))  # earlier versions saved passes as steps
        self.changes = deque([(int(s), float(r)) for s, r in state["changes"]], maxlen=HISTORY)
        self._late = DeferredScalar()


class RowControl(Control):
    """The control of the share of the rows that one cut of a graph keeps. `measured` is the running mean of the share needed, 1 at first.

    `excess` is how many times as much variance the whole gradient gets as the norms at the cut say (`VarianceBudget`): they may add tau / excess.
    """

    unit = "rows"
    """What it keeps a share of."""

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        super().__init__(settings, name, 1.0)
        self.excess = 1.0
        self.level = 1
        """The number of the cut, or of the region of tokens, in its graph."""
        self.curve = [(1 - r) / r for r in settings.ladder]
        """Under tau "auto": the running mean of the variance added at every share of the ladder, by the norms; at first that of equal norms."""

    @property
    def bound(self) -> float:
        """The variance that the norms at the cut may add, as a share of the sum of squares."""
        assert self.settings.tau != "auto"
        return self.settings.tau / self.excess

    @property
    def should_observe(self) -> bool:
        """Whether this pass observes the norms."""
        return self.passes % OBSERVE_EVERY == 1

    def observe(self, norms_sq: Tensor, floor: float = 0.0) -> None:
        """Observe the squared gradient norms (B,) of a pass, with the floor that `choose_rows` gets. They affect the ratio from the next pass on."""
        shares, pool = self.settings.ladder[:-1], self.pool if self.settings.agree else None
        if self.settings.tau != "auto" and (pool is None or not shares):
            self._late.put(needed_share(norms_sq, self.bound, floor))
            return
        numbers = added_variance(norms_sq, shares, floor)
        if pool is None or not pool.put(self, numbers):
            self.take_pooled(numbers)

    def take_pooled(self, sums: Tensor) -> None:
        """Take up the variances and sums of squares of all ranks together."""
        shares = self.settings.ladder[:-1]
        if self.settings.tau == "auto":
            self._late.put(sums[: len(shares) + 1])
        else:
            self._late.put(share_from_variance(sums, shares, self.bound))

    def _decide(self, value: Tensor) -> float:
        if self.settings.tau == "auto":
            return self._cheapest(*value.tolist())
        if bool(value.isnan()):  # no rank has observed anything
            return self.ratio
        self.measured = self._momentum * self.measured + (1 - self._momentum) * float(value)
        return self._rung(self.measured)

    @property
    def _momentum(self) -> float:
        """The weight of what was measured before in the running mean."""
        return MOMENTUM

    def _rung(self, share: float) -> float:
        """The rung of the ladder that a share is rounded up to."""
        return next(r for r in self.settings.ladder if r >= min(1.0, share * (1 - 1e-9)))

    def _cheapest(self, *sums: float) -> float:
        """Take up the variance added at every share and the sum of squares, and return the share r with the least time(r) (1 + v(r)).

        By its FLOPs a step takes time(r) = 1 - f (1 - r), and `OVERHEAD` more for r < 1, where f is the part of them that runs on rows.
        """
        if 0 < sums[-1] < math.inf:
            added = [v / sums[-1] for v in sums[:-1]] + [0.0]
            self.curve = [MOMENTUM * v + (1 - MOMENTUM) * new for v, new in zip(self.curve, added, strict=True)]
        on_rows = self.work.on_rows / self.work.step if self.work.step else 0.0
        costs = {r: (1 - on_rows * (1 - r) + OVERHEAD * (r < 1)) * (1 + self.excess * v) for r, v in zip(self.settings.ladder, self.curve, strict=True)}
        self.measured = min(costs, key=costs.__getitem__)
        return self.measured

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        return super().state_dict() | ({"curve": list(self.curve)} if self.settings.tau == "auto" else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        super().load_state_dict(state)
        curve = [float(v) for v in state.get("curve", ())]
        if len(curve) == len(self.curve):  # else it is from a run with another ladder, or with a number for tau
            self.curve = curve


class TokenControl(RowControl):
    """The control of the share of the tokens that one region keeps.

    With tau 0, no token with a gradient may be left out. The share of these tokens is observed in every step. After the first, `measured` follows it upwards
    at once and downwards slowly, because the number of tokens is decided before a step's gradients are known. In a step with more of them than are kept,
    tokens are sampled without bias.

    Whether the whole graph runs on tokens is decided for all of its regions together (`keep`): all tokens run where too little would be saved.

    Attributes:
        wanted: The share that the region by itself would keep.
        weight: The factor of the variance that it may add, for the least FLOPs in all regions together at the same variance (`token_cost.variance_weights`).
    """

    unit = "tokens"

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        super().__init__(settings, name)
        self.wanted = 1.0
        self.weight = 1.0
        self._step_before = 0

    @property
    def bound(self) -> float:
        """The variance that the norms of the region may add, as a share of the sum of squares."""
        return self.weight * super().bound

    def _rung(self, share: float) -> float:
        if self.settings.ladder == LADDER:
            return min(1.0, math.ceil(share * TOKEN_RUNGS * (1 - 1e-9)) / TOKEN_RUNGS)
        return super()._rung(share)

    def start_step(self) -> float:
        """Start a pass and return the share of the tokens that the region wants to keep in it."""
        self._step_before = self.step
        super().start_step()
        return self.wanted

    def keep(self, ratio: float) -> None:
        """Keep a share of the tokens from this pass on: the share wanted, or all."""
        super()._change_to(ratio, min(self._step_before, self.step))

    def _change_to(self, ratio: float, step: int) -> None:
        self.wanted = ratio

    @property
    def _momentum(self) -> float:
        """That of a mean over all observations at first: there are many tokens in a batch, and padding is worth leaving out from the first steps on."""
        seen = self.passes // OBSERVE_EVERY
        return min(MOMENTUM, seen / (seen + 1))

    @property
    def should_observe(self) -> bool:
        """Whether this step observes the norms."""
        settled = self.passes > SETTLED and self.ratio == 1
        return self.passes % (OBSERVE_EVERY_SETTLED if settled else OBSERVE_EVERY) == 1 or (self.settings.tau == 0 and not settled)

    def observe(self, norms_sq: Tensor, floor: float = 0.0) -> None:
        """Observe the squared gradient norms (N,) of a pass. With tau 0 ranks do not pool them."""
        if self.settings.tau:
            super().observe(norms_sq, floor)
        else:
            self._late.put(needed_share(norms_sq, 0.0))

    def _decide(self, value: Tensor) -> float:
        if self.settings.tau:
            return super()._decide(value)
        share = float(value)
        if self.passes <= 1:
            self.measured = min(1.0, FIRST_MARGIN * share)
        self.measured = max(share, self.measured + DECAY * (share - self.measured))
        return self._rung(self.measured)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists."""
        return super().state_dict() | {"wanted": self.wanted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""
        super().load_state_dict(state)
        self.wanted = float(state.get("wanted", self.ratio))
