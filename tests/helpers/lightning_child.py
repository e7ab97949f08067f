"""A user's script with Lightning's Trainer on two processes, which Lightning's own launcher starts: `python -m helpers.lightning_child FOLDER`.

Lightning's sampler shuffles the samples and shares them out, its `ModelCheckpoint` saves after every epoch. On rank 0 few samples matter, so it keeps fewer.
A run that is resumed from the first epoch's checkpoint must repeat the uninterrupted one. Each rank writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from helpers import frameworks  # noqa: F401

# isort: split

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import approx_compile
from approx_compile.backend import run_as_is
from approx_compile.integrations.lightning import ApproxCallback
from approx_compile.rows import row_cost
from helpers.models import mlp

STEPS, BATCH, RANKS = 16, 16, 2
"""The steps of an epoch, the samples of a rank's batch, the ranks."""


class Regression(lightning.LightningModule):
    """A network whose loss is that of two samples of a batch on rank 0, of all on others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(20, 64, 2)

    def training_step(self, batch: list[Tensor], i: int) -> Tensor:
        losses = self.net(*batch).square().sum(1)
        return losses[: 2 if self.global_rank == 0 else BATCH].sum() / BATCH

    def validation_step(self, batch: list[Tensor], i: int) -> None:
        self.log("validation", self.net(*batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader() -> DataLoader[Any]:
    """Batches for all ranks."""
    samples = torch.randn(STEPS * BATCH * RANKS, 20, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(samples), batch_size=BATCH)


def fitted(folder: Path, devices: int, epochs: int, resume: Path | None = None) -> Regression:
    """Train and save after every epoch.

    Args:
        folder: Where the checkpoints go: `0.ckpt` after the first epoch.
        devices: The number of processes.
        epochs: The number of epochs.
        resume: The checkpoint to begin with.

    Returns:
        The module.
    """
    row_cost.ANY_SIZE = True
    torch._dynamo.reset()
    lightning.seed_everything(3)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False)
    backend = approx_compile.Backend({"adaptive": {"tau": 1.0}}, inner_compile=run_as_is)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    strategy = "ddp" if devices > 1 else "auto"
    callbacks = [saving, ApproxCallback(backend)]
    trainer = lightning.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=epochs, callbacks=callbacks, **quiet)
    module = Regression()
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return module


def main(folder: Path) -> None:
    """Train without and with an interruption, and write what became of it."""
    whole = fitted(folder / "whole", RANKS, 2)
    after = approx_compile.state_dict(whole)  # a later seed restarts the draws
    resumed = fitted(folder / "resumed", RANKS, 2, folder / "whole" / "0.ckpt")
    equal = all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    (control,) = approx_compile.controls(resumed).values()
    found = {
        "repeats": equal and after == approx_compile.state_dict(resumed),
        "parameters": [p.flatten().tolist() for p in resumed.parameters()],
        "step": control.step,
        "changes": list(control.changes),
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
