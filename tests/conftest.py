import os
from pathlib import Path

# decisions must not depend on the machine that tests: a stored calibration (one thread of an AMD EPYC), for child processes as well
os.environ["APPROX_COMPILE_MACHINE"] = str(Path(__file__).parent / "helpers" / "machine.json")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")

import pytest
import torch

from approx_compile.backend import diagnostics
from approx_compile.machine import float32_precision
from approx_compile.rows import row_cost


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts with no compiled code, no notice given, and the same seed."""
    torch._dynamo.reset()
    diagnostics.forget()
    torch.manual_seed(0)
    yield


@pytest.fixture
def small_work_counts(monkeypatch):
    """Rows are sampled in models that are too small for it to pay."""
    monkeypatch.setattr(row_cost, "ANY_SIZE", True)


@pytest.fixture
def precisions():
    """torch's settings of float32 may be changed, and are put back. (torch's own test helpers, which other tests import, forbid to set some.)"""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        before = float32_precision.settings()
        yield
        float32_precision.take_over(before)


@pytest.fixture(scope="module")
def one_thread():
    """Tensors are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
