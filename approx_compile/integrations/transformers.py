"""Transformers' Trainer: `ApproxCallback` compiles the model, keeps its state in the Trainer's checkpoints and logs what was saved.

Example:
    from approx_compile.integrations.transformers import ApproxCallback

    Trainer(model=model, args=TrainingArguments("out"), train_dataset=data, callbacks=[ApproxCallback()]).train()
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from approx_compile.backend import Backend
from approx_compile.backend.runtime.metrics import metrics
from approx_compile.backend.runtime.state import state_dict
from approx_compile.config import ApproxConfig
from approx_compile.integrations.accelerate import register
from approx_compile.integrations.in_place import compile_in_place
from approx_compile.integrations.stateful import load_state_of_ranks, state_of_ranks

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
except ImportError as e:
    raise ImportError(f"approx_compile.integrations.transformers needs transformers ({e}): pip install 'approx-compile[transformers]'") from None

__all__ = ["ApproxCallback", "register"]

LOGGED = ("approx/kept", "approx/flops_saved")
"""The keys of `approx_compile.metrics` that are logged, beside `approx/seconds`."""


class ApproxCallback(TrainerCallback, ExportableState):
    """A callback of Transformers' `Trainer` and `Seq2SeqTrainer` that trains with this backend.

    Before the first step it compiles the model in place (`model.compile`), unless it is compiled with this backend already. The Trainer's own compilation
    (`torch_compile`) must be off, or have this backend, which then runs with the default settings. The Trainer's checkpoints hold the state that
    `approx_compile.state_dict` returns, in `trainer_state.json`, and `resume_from_checkpoint` takes it up, each process its own, so a resumed run repeats the
    uninterrupted one. Logs have, before other callbacks such as TensorBoard's write them, `approx/kept` (the share of samples or tokens that backward passes
    keep), `approx/flops_saved` (the share of the FLOPs of training steps that was left out so far) and `approx/seconds` (since training began in this process).

    Args:
        options: The settings: the keys of `ApproxConfig`, an `ApproxConfig`, or a `Backend`. None for the defaults.
        log_every: Log at every so many optimizer steps, also where the Trainer would not. None: whenever the Trainer logs its loss.

    Raises:
        ConfigError: If the settings are not valid.
        ValueError: If `log_every` is neither None nor a number of steps; when training begins, if the Trainer compiles the model with another backend.

    Example:
        >>> from approx_compile.integrations.transformers import ApproxCallback
        >>> callback = ApproxCallback({"adaptive": {"tau": 0.05}})  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, options: ApproxConfig | Backend | Mapping[str, Any] | None = None, log_every: int | None = None) -> None:
        if log_every is not None and (isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1):
            raise ValueError(f"ApproxCallback: log_every: got {log_every!r}; a number of optimizer steps, 1 or more, or None is expected")
        self.backend = options if isinstance(options, Backend) else Backend(options)
        self.log_every = log_every
        self.saved: dict[str, Any] = {}
        self._model: nn.Module | None = None
        self._of_ranks: dict[str, Any] | None = None
        self._began = 0.0

    def state(self) -> dict[str, Any]:
        """Return what the Trainer's checkpoint holds of this callback."""
        saved = self._of_ranks or (state_dict(self._model) if self._model is not None else self.saved)
        return {"args": {"options": self.backend.config.options(), "log_every": self.log_every}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Compile the model, and take up the state of the checkpoint that training is resumed from."""
        assert model is not None
        self._model, self._began = model, time.perf_counter()
        _put_before_writers(self)
        if not args.torch_compile:
            compile_in_place(model, model, self.backend)
        elif str(args.torch_compile_backend).lower() != "approx":
            raise ValueError(
                f"ApproxCallback: the TrainingArguments have torch_compile=True, which compiles the model with {args.torch_compile_backend!r}; "
                "leave it out: the callback compiles the model"
            )
        resumed = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        saved = resumed[-1] if isinstance(resumed, list) else resumed
        if state.global_step and saved["attributes"]["saved"]:
            load_state_of_ranks(model, saved["attributes"]["saved"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what was collected for the last checkpoint."""
        self._of_ranks = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer to log where `log_every` says so."""
        if self.log_every is not None and state.global_step % self.log_every == 0:
            control.should_log = True
        self._collect(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare for a checkpoint at the end of the epoch."""
        self._collect(control)

    def _collect(self, control: Any) -> None:
        """Collect the states of all ranks before a checkpoint, because the Trainer calls `state` on one rank only. An evaluation may ask for a checkpoint."""
        if self._model is not None and (control.should_save or control.should_evaluate):
            self._of_ranks = state_of_ranks(self._model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add to the Trainer's logs what was saved."""
        if self._model is None or logs is None or not logs.keys() & {"loss", "train_runtime"}:
            return
        if self.log_every is not None and state.global_step % self.log_every and "loss" in logs:
            return
        values = metrics(self._model)
        new = {name: values[name] for name in LOGGED} | {"approx/seconds": time.perf_counter() - self._began}
        logs.update(new)
        if state.log_history:
            state.log_history[-1].update(new)


def _put_before_writers(callback: TrainerCallback) -> None:
    """Move a callback before all others of its Trainer but the one that decides when to save: what it adds to the logs is there when others write them.

    The Trainer passes its list to no callback, so it is taken from the call that is running. Without it, what is added reaches later callbacks only.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None:
        handler = frame.f_locals["self"]
        others = [c for c in handler.callbacks if c is not callback]
        place = max((i + 1 for i, c in enumerate(others) if isinstance(c, DefaultFlowCallback)), default=0)
        handler.callbacks = [*others[:place], callback, *others[place:]]
