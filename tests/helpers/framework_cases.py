"""Cases of training with frameworks on several ranks (`helpers.ranks`): a run that is resumed from the framework's checkpoint repeats the uninterrupted one.

The data of the ranks differ, so their shares of samples do, and every rank must get its own state back.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

import approx_compile
from approx_compile.backend import run_as_is
from approx_compile.rows import row_cost
from helpers import frameworks  # noqa: F401
from helpers.ddp import assert_equal_on_ranks
from helpers.models import mlp

STEPS, HALF = 24, 12


def _backend() -> approx_compile.Backend:
    return approx_compile.Backend({"adaptive": {"tau": 1.0}}, inner_compile=run_as_is)


def _announce(rank: int, world: int) -> Path:
    """Tell frameworks of the group that runs already, as torchrun would, and let small models run on rows. Returns an empty folder that all ranks have."""
    row_cost.ANY_SIZE = True  # not when the module is imported: the tests' process imports it, too
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # no connection is made: the group has its own store
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0)
    return Path(folder[0])


class Net(nn.Module):
    """A network that returns its loss, in which few samples matter on rank 0 and all do on others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(20, 64, 2)

    def forward(self, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x).square().sum(1) * weight).mean()}


def _data(rank: int, samples: int = STEPS * 16) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(rank)
    weights = (torch.arange(samples) % 8 == 0).float() if rank == 0 else torch.ones(samples)
    return [{"x": x, "weight": w} for x, w in zip(torch.randn(samples, 20, generator=g), weights, strict=True)]


def _same(whole: tuple[nn.Module, Any], resumed: tuple[nn.Module, Any], world: int) -> None:
    """Compare parameters and states of two runs, and see that the ranks' states differ."""
    assert all(torch.equal(p, q) for p, q in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))
    assert whole[1] == resumed[1]
    assert_equal_on_ranks(whole[0])
    (control,) = approx_compile.controls(resumed[0]).values()
    ratios: list[Any] = [None] * world
    dist.all_gather_object(ratios, control.ratio)
    assert control.step == STEPS and ratios[0] < ratios[1], (control.step, ratios)


def transformers_trainer(rank: int, world: int) -> None:
    from transformers import Trainer, TrainingArguments

    from approx_compile.integrations.transformers import ApproxCallback

    folder = _announce(rank, world)

    def run(resume: str | None = None) -> tuple[nn.Module, Any]:
        torch._dynamo.reset()
        model = Net()
        given: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo", "report_to": [], "disable_tqdm": True, "learning_rate": 1e-3, "seed": 3}
        arguments = TrainingArguments(str(folder), per_device_train_batch_size=16, max_steps=STEPS, save_steps=HALF, **given)
        Trainer(model, arguments, train_dataset=_data(rank, 2 * STEPS * 16), callbacks=[ApproxCallback(_backend())]).train(resume_from_checkpoint=resume)
        return model, approx_compile.state_dict(model)

    _same(run(), run(str(folder / f"checkpoint-{HALF}")), world)


def accelerator_and_fabric(rank: int, world: int) -> None:
    import lightning
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    from approx_compile.integrations.stateful import ApproxState

    folder = _announce(rank, world)
    loader = DataLoader(_data(rank), batch_size=16)  # type: ignore[arg-type]

    def run(prepare: Callable[[Any, Any], tuple[Any, ...]], resume: bool) -> tuple[nn.Module, Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        wrapped, optimizer, backward, save, load = prepare(torch.compile(model, backend=_backend()), optimizer)
        if resume:
            load()
        for i, batch in enumerate(itertools.islice(loader, HALF if resume else 0, STEPS), HALF if resume else 0):
            if i == HALF and not resume:
                save()
            optimizer.zero_grad()
            backward(wrapped(**batch)["loss"])
            optimizer.step()
        return model, approx_compile.state_dict(wrapped)

    def accelerator(model: Any, optimizer: Any) -> tuple[Any, ...]:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        made = Accelerator(cpu=True)
        model, optimizer = made.prepare(model, optimizer)
        made.register_for_checkpointing(ApproxState(model))
        return model, optimizer, made.backward, lambda: made.save_state(str(folder / "a")), lambda: made.load_state(str(folder / "a"))

    def fabric(model: Any, optimizer: Any) -> tuple[Any, ...]:
        made = lightning.Fabric(accelerator="cpu", devices=world, strategy="ddp")
        made.launch()
        model, optimizer = made.setup(model, optimizer)
        state = {"model": model, "optimizer": optimizer, "approx": ApproxState(model)}
        return model, optimizer, made.backward, lambda: made.save(folder / "f.ckpt", state), lambda: made.load(folder / "f.ckpt", state)

    for prepare in (accelerator, fabric):
        _same(run(prepare, False), run(prepare, True), world)


CASES = ("transformers_trainer", "accelerator_and_fabric")
