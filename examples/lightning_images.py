"""Train an image classifier with Lightning's Trainer, exactly and with `ApproxCallback`: `python examples/lightning_images.py --help`."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import data
import models
import torch
import typer
from framework_runs import BACKENDS, Run, show
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import approx_compile
from approx_compile.integrations.lightning import ApproxCallback


class Classifier(LightningModule):
    """A network with cross entropy and Adam. It notes the time of every training step."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.seconds: list[float] = []
        self.right: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, i: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, i: int) -> None:
        x, y = batch
        self.right.append((self(x).argmax(1) == y).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)

    def on_train_batch_start(self, batch: Any, i: int) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, i: int) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def train(backend: str, seed: int, loaded: data.Dataset, model: str, width: int | None, epochs: int, batch_size: int, lr: float) -> Run:
    torch._dynamo.reset()
    seed_everything(seed)
    module = Classifier(models.build(model, loaded.shape, loaded.classes, width), lr)
    if backend == "exact":
        module.net = torch.compile(module.net)
    loader = DataLoader(TensorDataset(loaded.train_x, loaded.train_y), batch_size, shuffle=True, drop_last=True)
    callbacks = [ApproxCallback(log=False)] if backend == "approx" else []  # the line that differs from exact training
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, loader)
    trainer.validate(module, DataLoader(TensorDataset(loaded.test_x, loaded.test_y), 500), verbose=False)
    values = approx_compile.metrics(module)
    return Run(backend, seed, torch.cat(module.right).mean().item(), module.seconds, values["approx/kept_mean"], values["approx/flops_saved"])


def main(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.NAMES)}.")] = "digits",
    directory: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Where the data set's files are (not for digits).")] = None,
    model: Annotated[str, typer.Option(help=f"One of {models.VALID}.")] = "mlp",
    width: Annotated[int | None, typer.Option(min=1)] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    lr: Annotated[float, typer.Option()] = 1e-3,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Add a JSON line for each run.")] = None,
) -> None:
    """Train exactly and approximately, with several seeds, and compare."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loaded = data.load(dataset, directory)
    runs = [train(backend, seed, loaded, model, width, epochs, batch_size, lr) for seed in range(seeds) for backend in BACKENDS]
    show(f"{model} on {dataset}, {epochs} epochs", runs, out)


if __name__ == "__main__":
    typer.run(main)
