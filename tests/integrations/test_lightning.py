"""Lightning's Trainer with `ApproxCallback`, and Fabric with `ApproxState`: the recipes of the documentation against the real library."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import approx_compile
from approx_compile import Backend, controls
from approx_compile.backend import run_as_is

lightning = pytest.importorskip("lightning")

from approx_compile.integrations.lightning import ApproxCallback, ApproxState  # noqa: E402

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("one_thread", "small_work_counts")]


def backend() -> Backend:
    return Backend({"adaptive": {"tau": 10.0}}, inner_compile=run_as_is)


def data() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(192, 20, generator=g), torch.randint(0, 2, (192,), generator=g)), batch_size=16)


class Classifier(lightning.LightningModule):
    def __init__(self, calls_itself: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(20, 64, 2)
        self.calls_itself = calls_itself

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, i: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x) if self.calls_itself else self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fitted(folder: Path, module: Classifier, callback: Any, epochs: int, resume: str | None = None) -> Any:
    torch._dynamo.reset()
    lightning.seed_everything(3)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=[callback], **quiet)
    trainer.fit(module, data(), ckpt_path=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("calls_itself", [True, False])
def test_a_resumed_run_repeats_the_uninterrupted_one(calls_itself: bool, tmp_path: Path) -> None:
    first, whole, resumed = (Classifier(calls_itself) for _ in range(3))
    fitted(tmp_path, first, ApproxCallback(backend()), 1).save_checkpoint(tmp_path / "half.ckpt")
    fitted(tmp_path, whole, ApproxCallback(backend()), 2)
    after = approx_compile.state_dict(whole)  # a later seed restarts the draws
    trainer = fitted(tmp_path, resumed, ApproxCallback(backend()), 2, str(tmp_path / "half.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert after == approx_compile.state_dict(resumed)
    ((name, control),) = controls(resumed).items()
    assert name.startswith("0.weight") and control.step == 24 and control.ratio < 1
    assert trainer.logged_metrics["approx/kept"] == pytest.approx(control.ratio) and trainer.logged_metrics["approx/flops_saved"] > 0


def test_submodules_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"submodule: got 'nte'; Classifier has net, net\.0"):
        fitted(tmp_path, Classifier(), ApproxCallback(backend(), submodule="nte"), 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fabric(tmp_path: Path) -> None:
    """Compiled before or after `setup`, the state is the bare model's, and a resumed run repeats the uninterrupted one."""

    def run(steps: int, save: int | None = None, load: bool = False) -> tuple[nn.Module, dict[str, Any]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = mlp(20, 64, 2)
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        wrapped, optimizer = fabric.setup(torch.compile(model, backend=backend()), torch.optim.SGD(model.parameters(), lr=0.05))
        state = {"model": wrapped, "optimizer": optimizer, "approx": ApproxState(wrapped)}
        if load:
            fabric.load(tmp_path / "half.ckpt", state)
        batches = itertools.islice(itertools.cycle(data()), 12 if load else 0, steps)
        for i, (x, y) in enumerate(batches, 1):
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(wrapped(x), y))
            optimizer.step()
            if i == save:
                fabric.save(tmp_path / "half.ckpt", state)
        return model, approx_compile.state_dict(wrapped)

    (whole, after), (resumed, again) = run(24, save=12), run(24, load=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert after == again
    assert [c.step for c in controls(resumed).values()] == [24]


def test_explain_sees_the_precision_of_fabric() -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    for compiled in (False, True):
        model = mlp(20, 64, 2)
        wrapped = fabric.setup(torch.compile(model, backend=backend()) if compiled else model)
        report = approx_compile.explain(wrapped, torch.randn(32, 20))
        assert {s.dtype for s in report.sites} == {"bfloat16"}
