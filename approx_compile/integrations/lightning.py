"""Lightning: `ApproxCallback` for the Trainer, `ApproxState` for Fabric.

Example:
    from approx_compile.integrations.lightning import ApproxCallback

    lightning.Trainer(max_epochs=3, callbacks=[ApproxCallback()]).fit(module, data)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from approx_compile.backend import Backend
from approx_compile.backend.runtime.metrics import metrics
from approx_compile.config import ApproxConfig
from approx_compile.integrations.in_place import compile_in_place
from approx_compile.integrations.stateful import ApproxState, load_state_of_ranks, state_of_ranks

try:
    from lightning.pytorch import Callback
except ImportError as e:
    raise ImportError(f"approx_compile.integrations.lightning needs lightning ({e}): pip install 'approx-compile[lightning]'") from None

__all__ = ["ApproxCallback", "ApproxState"]

LOGGED = ("approx/kept", "approx/flops_saved")
"""The keys of `approx_compile.metrics` that are logged."""


class ApproxCallback(Callback):
    """A callback of Lightning's `Trainer` that trains with this backend.

    Before training it compiles a part of the LightningModule in place, unless something of it is compiled with this backend already. Lightning's checkpoints
    then hold the state that `approx_compile.state_dict` returns, and `fit(ckpt_path=...)` takes it up. `self.log` gets `approx/kept` and
    `approx/flops_saved` after every batch; the Trainer's `log_every_n_steps` says how often loggers write them.

    Args:
        options: The settings: the keys of `ApproxConfig`, an `ApproxConfig`, or a `Backend`. None for the defaults.
        submodule: The name of the submodule to compile, such as "encoder". None: the only child with parameters, if there is one, so that it does not matter
            whether `training_step` calls `self(x)` or `self.net(x)`; else the LightningModule, whose `training_step` must then call `self(...)`.
        log: Whether to log.

    Raises:
        ConfigError: If the settings are not valid.

    Example:
        >>> from approx_compile.integrations.lightning import ApproxCallback
        >>> callback = ApproxCallback({"adaptive": {"tau": 0.05}})  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, options: ApproxConfig | Backend | Mapping[str, Any] | None = None, submodule: str | None = None, log: bool = True) -> None:
        self.backend = options if isinstance(options, Backend) else Backend(options)
        self.submodule = submodule
        self.log = log
        self._model: nn.Module | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Compile the part of the module."""
        if stage != "fit":
            return
        self._model = pl_module
        compile_in_place(pl_module, self._part(pl_module), self.backend)

    def _part(self, module: nn.Module) -> nn.Module:
        if self.submodule is not None:
            names = [n for n, _ in module.named_modules() if n]
            if self.submodule not in names:
                raise ValueError(f"ApproxCallback: submodule: got {self.submodule!r}; {type(module).__name__} has {', '.join(names[:8])}")
            return module.get_submodule(self.submodule)
        children = [child for child in module.children() if next(child.parameters(), None) is not None]
        return children[0] if len(children) == 1 and not module._parameters else module

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's checkpoint holds of this callback. In a process group all ranks must call this, as they must call `save_checkpoint`."""
        return state_of_ranks(self._model) if self._model is not None else self._loaded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._loaded = state

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take up the state of the checkpoint that training is resumed from."""
        if self._loaded:
            load_state_of_ranks(pl_module, self._loaded)
            self._loaded = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was saved."""
        if self.log:
            values = metrics(pl_module)
            pl_module.log_dict({name: values[name] for name in LOGGED})
