"""How many rows a step needs: the policy "adaptive".

Of the gradients that reach a cut the norms g are known anyway. `needed` says what share of the rows keeps the added variance under tau of the
gradient's own; its running mean, rounded up on the ladder, is the share kept from the next step on. A number is read one step after it was made,
so the device never waits for it. The state is small and part of a checkpoint (`state.py`), or a resumed run would start exact again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile.config import AdaptiveTable
from approx_compile.kernels.rows import needed

log = logging.getLogger("approx_compile")

MOMENTUM = 0.9
"""Of the running mean: a batch says little about the next ten."""

WATCH = 4
"""Steps from one look at the norms to the next."""

HISTORY = 100_000
"""Changes of the ratio that are remembered."""


class Control:
    """Of one cut of one graph. `share`: the running mean of what was needed, 1 at first; `ratio`: what is kept, a rung of the ladder."""

    def __init__(self, settings: AdaptiveTable, name: str) -> None:
        self.settings = settings
        self.name = name
        self.step = 0
        self.share = 1.0
        self.changes: deque[tuple[int, float]] = deque([(0, 1.0)], maxlen=HISTORY)
        self._waiting: tuple[Tensor, Any] | None = None

    @property
    def ratio(self) -> float:
        return self.changes[-1][1]

    def begin(self) -> float:
        """Start a step: the share of rows to keep in it."""
        self._settle()
        self.step += 1
        return self.ratio

    @property
    def kept(self) -> float:
        """The mean share of the rows over all steps so far."""
        ends = [*[s for s, _ in self.changes][1:], self.step + 1]
        steps = [max(0, end - max(1, begin)) for (begin, _), end in zip(self.changes, ends, strict=True)]
        return sum(n * r for n, (_, r) in zip(steps, self.changes, strict=True)) / sum(steps) if any(steps) else 1.0

    @property
    def watches(self) -> bool:
        """Whether this step looks at the norms."""
        return self.step % WATCH == 1

    def see(self, norms_sq: Tensor) -> None:
        share = needed(norms_sq, self.settings.tau)
        if share.device.type == "cuda":
            host = torch.empty((), dtype=share.dtype, pin_memory=True).copy_(share, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting = (host, event)
        else:
            self._waiting = (share, None)

    def _settle(self) -> None:
        """Take in the number that the last look gave, if there is one."""
        if self._waiting is None:
            return
        (value, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()  # of the step before: the device has the next forward pass to do meanwhile
        self.share = MOMENTUM * self.share + (1 - MOMENTUM) * float(value)
        ratio = next(r for r in self.settings.ladder if r >= min(1.0, self.share * (1 - 1e-9)))
        if ratio != self.ratio:
            log.info("rows at cut %s: %g of them from step %d on (%.3f needed)", self.name, ratio, self.step + 1, self.share)
            self.changes.append((self.step, ratio))

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"step": self.step, "share": self.share, "changes": [list(c) for c in self.changes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.share = int(state["step"]), float(state["share"])
        self.changes = deque([(int(s), float(r)) for s, r in state["changes"]], maxlen=HISTORY)
        self._waiting = None


# Models of one class share compiled code, so a control belongs to a parameter that its backward pass reads: the first one saved for it. Where none
# is saved (a single layer) it belongs to the module that was compiled.
Owner = nn.Parameter | nn.Module
_controls = WeakIdKeyDictionary()
_pending = WeakIdKeyDictionary()
"""Loaded state of cuts that are not compiled yet."""


def control_for(owner: Owner, settings: AdaptiveTable, key: str) -> Control:
    """The control of a cut: that of an earlier compilation of the same graph if there is one, or a new one, with loaded state if some waits."""
    own: dict[str, Control] = _controls.setdefault(owner, {})
    if key not in own or own[key].settings != settings:
        own[key] = Control(settings, key)
        state = _pending.get(owner, {}).pop(key, None)
        if state is not None:
            own[key].load_state_dict(state)
    return own[key]


def _owners(model: nn.Module) -> dict[str, Owner]:
    return {**dict(model.named_modules()), **dict(model.named_parameters())}


def controls_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{parameter or module: {cut: state}}."""
    found: dict[str, dict[str, Any]] = {}
    for name, owner in _owners(model).items():
        states = {key: dict(state) for key, state in _pending.get(owner, {}).items()}
        states |= {key: control.state_dict() for key, control in _controls.get(owner, {}).items()}
        if states:
            found[name] = states
    return found


def load_controls(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """At once where a cut is compiled, else when it is."""
    owners = _owners(model)
    for name, states in state.items():
        for key, own in states.items():
            control = _controls.get(owners[name], {}).get(key)
            if control is not None:
                control.load_state_dict(own)
            else:
                _pending.setdefault(owners[name], {})[key] = own


def controls(model: nn.Module) -> dict[str, Control]:
    """The controls of a model, compiled or not, by name: parameter or module, and cut."""
    return {".".join(p for p in (name, key) if p): c for name, owner in _owners(plain(model)).items() for key, c in _controls.get(owner, {}).items()}


def plain(model: nn.Module) -> nn.Module:
    """The module below torch.compile."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
