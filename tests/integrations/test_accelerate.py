"""Other libraries accept the backend. The tests use the real libraries where they are installed."""

from __future__ import annotations

import enum
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import mlp
from torch import nn

from approx_compile import Backend, controls, explain, state_dict
from approx_compile.backend import run_as_is
from approx_compile.integrations.accelerate import ApproxState, register

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DynamoBackend, TorchDynamoPlugin  # noqa: E402

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("one_thread")]
OPTIONS: dict[str, Any] = {"policy": "always", "ratio": 0.25, "group": 1}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_nothing_of_accelerate_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, approx_compile, approx_compile.integrations.accelerate; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_is_one_of_accelerates() -> None:
    for _ in range(2):
        register()
    assert DynamoBackend("APPROX") is DynamoBackend["APPROX"] is DynamoBackend.APPROX
    assert [b.value for b in DynamoBackend].count("APPROX") == 1 and "APPROX" in DynamoBackend and str(DynamoBackend.APPROX) == "APPROX"
    assert pickle.loads(pickle.dumps(DynamoBackend.APPROX)) is DynamoBackend.APPROX and DynamoBackend("INDUCTOR") is DynamoBackend.INDUCTOR
    count = len(DynamoBackend)
    register("inductor")  # is there already
    assert len(DynamoBackend) == count


@pytest.mark.slow
def test_a_step_with_an_accelerator() -> None:
    """The gradients are those of the model compiled by hand, and exact at ratio 1; options reach the backend."""
    register()
    x = torch.randn(32, 64)
    by_name = accelerate.Accelerator(cpu=True, dynamo_backend="approx")
    model = by_name.prepare(mlp(64, 64, 64))
    by_name.backward(model(x).square().mean())
    plain = mlp(64, 64, 64)
    plain.load_state_dict(model._orig_mod.state_dict())
    plain(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    AcceleratorState._reset_state(reset_partial_state=True)
    with_options = accelerate.Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="approx", options=OPTIONS))
    assert [s.k for s in explain(with_options.prepare(mlp(64, 64, 64)), x).sites] == [16, 16]


@pytest.mark.parametrize("name", ["aproxx", "APPROX", 3])
def test_names_that_torch_does_not_know(name: Any) -> None:
    before = DynamoBackend.list()
    with pytest.raises(ValueError, match=r"a backend that torch.compile knows is expected: .*approx"):
        register(name)
    assert DynamoBackend.list() == before


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"approx-compile\[integrations\].*prepare\(torch.compile"):
        register()


@pytest.mark.parametrize("changed", [frozenset({"INDUCTOR"}), enum.Enum("DynamoBackend", ["INDUCTOR"])])
def test_an_accelerate_that_has_changed(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.utils, "DynamoBackend", changed)
    before = list(changed)
    with pytest.raises(RuntimeError, match="has changed its list of backends"):
        register()
    assert list(changed) == before


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_repeats_the_uninterrupted_one(before: bool, tmp_path: Path, small_work_counts: None) -> None:
    """Compiled before `prepare` or after it; the state is in `save_state` and `load_state`."""
    backend = Backend({"adaptive": {"tau": 10.0}}, inner_compile=run_as_is)
    batches = torch.randn(24, 32, 20, generator=torch.Generator().manual_seed(0))

    def run(first: int, last: int, save: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
        torch._dynamo.reset()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        accelerator, model = accelerate.Accelerator(cpu=True), mlp(20, 64, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        prepared, optimizer = accelerator.prepare(torch.compile(model, backend=backend) if before else model, optimizer)
        prepared = prepared if before else torch.compile(prepared, backend=backend)
        accelerator.register_for_checkpointing(ApproxState(prepared))
        if first:
            accelerator.load_state(str(tmp_path))
        for i in range(first, last):
            optimizer.zero_grad()
            accelerator.backward(prepared(batches[i]).square().mean())
            optimizer.step()
            if i + 1 == save:
                accelerator.save_state(str(tmp_path))
        return model, state_dict(prepared)  # a later seed restarts the draws

    (whole, after), (resumed, again) = run(0, 24, save=12), run(12, 24)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert after == again
    assert [(c.step, c.ratio < 1) for c in controls(resumed).values()] == [(24, True)]
