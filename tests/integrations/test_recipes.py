"""The recipes of the pages, run as they are written, against the real frameworks: blocks marked `py`. Graphs run op by op, without Inductor."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
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

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("one_thread", "small_work_counts")]
PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"
SECTION = re.compile(r"^#+ (.*?)\n(.*?)(?=^#+ |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"```py\n(.*?)```", re.DOTALL)
SAMPLES = 48
Names = dict[str, Any]
Recipe = tuple[Names, Callable[[Names], None]]
"""The names that the blocks of a section read, and what is tried with those that they leave."""


def backend() -> Backend:
    return Backend({"adaptive": {"tau": 10.0}}, inner_compile=run_as_is)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 20, generator=torch.Generator().manual_seed(0)), torch.arange(SAMPLES) % 2


class WithLoss(nn.Module):
    """A classifier as the Trainer takes one: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(20, 64, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def trained_in_three_steps(model: Any) -> None:
    assert {(c.step, c.passes) for c in controls(model).values()} == {(3, 3)}


def trainer_names(folder: Path) -> Names:
    transformers = pytest.importorskip("transformers")
    given = {"use_cpu": True, "per_device_train_batch_size": 16, "num_train_epochs": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = functools.partial(transformers.TrainingArguments, **given)
    data = [{"x": a, "labels": b} for a, b in zip(*inputs(), strict=True)]
    return {"Trainer": transformers.Trainer, "TrainingArguments": arguments, "model": WithLoss(), "args": arguments(str(folder)), "data": data}


def trainer_with_callback(folder: Path) -> Recipe:
    def check(after: Names) -> None:
        trained_in_three_steps(after["model"])
        assert after["callback"].log_every == 100
        arguments = after["TrainingArguments"](str(folder), torch_compile=True)
        with pytest.raises(ValueError, match=r"torch_compile=True, which compiles the model with 'inductor'; leave it out"):
            after["Trainer"](WithLoss(), arguments, train_dataset=after["data"], callbacks=[after["ApproxCallback"]()]).train()

    return trainer_names(folder), check


def trainer_with_name(folder: Path) -> Recipe:
    def check(after: Names) -> None:
        from approx_compile.integrations.transformers import ApproxCallback

        after["Trainer"](after["model"], after["args"], train_dataset=after["data"], callbacks=[ApproxCallback()]).train()
        trained_in_three_steps(after["model"])

    return trainer_names(folder), check


def lightning_trainer(folder: Path) -> Recipe:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss()

        def training_step(self, batch: Any, i: int) -> Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    library = type("Library", (), {"Trainer": functools.partial(lightning.Trainer, default_root_dir=folder, **quiet)})
    names = {"lightning": library, "module": Module(), "data": DataLoader(TensorDataset(*inputs()), batch_size=16)}
    return names, lambda after: trained_in_three_steps(after["module"])


def fabric(folder: Path) -> Recipe:
    lightning = pytest.importorskip("lightning")
    model = mlp(20, 64, 2)
    names = {
        "torch": torch,
        "fabric": lightning.Fabric(accelerator="cpu", devices=1),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }

    def check(after: Names) -> None:
        assert (folder / "checkpoint.ckpt").exists()
        assert after["model"](inputs()[0]).shape == (SAMPLES, 2) and after["state"]["approx"].state_dict() == approx_compile.state_dict(model)

    return names, check


def accelerator(folder: Path) -> Recipe:
    accelerate = pytest.importorskip("accelerate")

    def check(after: Names) -> None:
        after["accelerator"].save_state(str(folder))
        after["accelerator"].load_state(str(folder))
        assert (folder / "custom_checkpoint_0.pkl").exists()

    return {"torch": torch, "accelerator": accelerate.Accelerator(cpu=True), "model": mlp(20, 64, 2)}, check


def skorch(folder: Path) -> Recipe:
    library = pytest.importorskip("skorch")
    net = functools.partial(library.NeuralNetClassifier, criterion=nn.CrossEntropyLoss, max_epochs=1, batch_size=16, train_split=None, verbose=0)
    x, y = (t.numpy() for t in inputs())

    def check(after: Names) -> None:
        after["net"].fit(x, y)
        trained_in_three_steps(after["net"].module_)
        assert after["net"].predict(x).shape == (SAMPLES,)

    return {"NeuralNetClassifier": net, "module": mlp(20, 64, 2)}, check


def ignite(folder: Path) -> Recipe:
    engine = pytest.importorskip("ignite.engine")
    model = mlp(20, 64, 2)

    def check(after: Names) -> None:
        x, y = inputs()
        after["trainer"].run([(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)], max_epochs=1)
        trained_in_three_steps(model)
        assert after["trainer"].state.metrics["approx/step"] == 3

    names = {n: getattr(engine, n) for n in ("create_supervised_trainer", "Events")} | {"torch": torch, "approx_compile": approx_compile, "model": model}
    return names | {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loss": nn.CrossEntropyLoss()}, check


def keras(folder: Path) -> Recipe:
    library = pytest.importorskip("keras")
    model = library.Sequential([library.layers.Input((20,)), library.layers.Dense(64, "relu"), library.layers.Dense(2)])
    x, y = (t[:32] for t in inputs())  # one batch of Keras's default size: every size is traced anew, which takes seconds

    def check(after: Names) -> None:
        (control,) = controls(model).values()
        assert control.step == 1

    return {"torch": torch, "model": model, "x": x.numpy(), "y": nn.functional.one_hot(y).float().numpy()}, check


RECIPES: dict[tuple[str, str], Callable[[Path], Recipe]] = {
    ("transformers", "The Transformers Trainer"): trainer_with_callback,
    ("transformers", "Without the callback"): trainer_with_name,
    ("lightning", "Trainer"): lightning_trainer,
    ("lightning", "Fabric"): fabric,
    ("accelerate", "Accelerate"): accelerator,
    ("other-frameworks", "skorch"): skorch,
    ("other-frameworks", "ignite"): ignite,
    ("other-frameworks", "Keras 3"): keras,
}


def blocks_of_pages() -> dict[tuple[str, str], list[str]]:
    """The `py` blocks of all pages, by page and heading."""
    sections = {(page.stem, heading): BLOCK.findall(text) for page in sorted(PAGES.glob("*.md")) for heading, text in SECTION.findall(page.read_text())}
    return {key: found for key, found in sections.items() if found}


def test_every_recipe_is_run_and_short() -> None:
    """An import, an empty line, and at most four lines of which two are plain use."""
    found = blocks_of_pages()
    assert found.keys() == RECIPES.keys()
    assert all(len(block.strip().splitlines()) <= 6 for blocks in found.values() for block in blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "heading"), RECIPES)
def test_recipe(page: str, heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a section in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Backend, "__init__", functools.partialmethod(Backend.__init__, inner_compile=run_as_is))
    for variable in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # TrainingArguments sets them
        monkeypatch.setenv(variable, "no")
        monkeypatch.delenv(variable)
    torch._dynamo.reset()
    names, check = RECIPES[page, heading](tmp_path)
    for block in blocks_of_pages()[page, heading]:
        exec(compile(block, f"{page}.md", "exec"), names)
    check(names)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_explain_of_a_model_of_keras(tmp_path: Path) -> None:
    model = keras(tmp_path)[0]["model"]
    model.call = torch.compile(model.call, backend=backend())
    assert [cut.decision for cut in approx_compile.explain(model.call, inputs()[0]).cuts] == ["rows"]


@pytest.mark.slow
def test_task_of_timms_scripts() -> None:
    """`train.py --torchcompile NAME` calls `task.compile(backend=NAME)`."""
    timm, task, optim = (pytest.importorskip(name) for name in ("timm", "timm.task", "timm.optim"))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    training = task.ClassificationTask(model, device=torch.device("cpu"), verbose=False)
    training.compile(backend=backend(), mode=None)
    optimizer = optim.create_optimizer_v2(model, opt="sgd", lr=0.01)
    for _ in range(3):
        training(torch.randn(16, 3, 16, 16), torch.arange(16) % 3)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    trained_in_three_steps(training)
    assert approx_compile.metrics(training)["approx/step"] == 3
    assert approx_compile.state_dict(training.trainable_module) == approx_compile.state_dict(model)


def blocks() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    return nn.ModuleDict({str(i): Block() for i in range(2)})


@pytest.mark.slow
@pytest.mark.parametrize("registered", [True, False])
def test_blocks_compiled_as_torchtitan_does(registered: bool) -> None:
    """Each block with the backend and `fullgraph=True`: as a new child, or in place. The state names the blocks as the bare model does."""
    layers: Any = blocks()
    for name, block in layers.named_children():
        if registered:
            layers.register_module(name, torch.compile(block, backend=backend(), fullgraph=True))
        else:
            block.compile(backend=backend(), fullgraph=True)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
    for _ in range(3):
        h = torch.randn(32, 16)
        for layer in layers.values():
            h = layer(h)
        h.square().mean().backward()
        optimizer.step()
    saved = approx_compile.state_dict(layers)
    assert saved["clocks"][0]["step"] == 3 and all(n.startswith(("0.up", "1.up")) for n in saved["controls"])
    approx_compile.load_state_dict(blocks(), saved)
