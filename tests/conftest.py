"""Settings of the whole test run, and the fixtures that several files use."""

import gc
import os
import resource
from collections import Counter
from pathlib import Path

# Decisions must not depend on the machine that runs the tests, so all processes read a stored profile (one thread of an AMD EPYC).
os.environ["APPROX_COMPILE_MACHINE"] = str(Path(__file__).parent / "helpers" / "machine.json")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
# Inductor would otherwise compile a program for every vector instruction set, in every new process and cache, to see whether it runs here.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ["COLUMNS"] = "160"  # tables and sentences are as wide as the terminal, and tests must not depend on that

import pytest
import torch
import torch._dynamo.guards
from helpers.linking import link_without_torch
from helpers.sampling import mark_exhaustive
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from approx_compile.backend import diagnostics
from approx_compile.machine import float32_precision
from approx_compile.rows import row_cost

# After every compilation Dynamo flushes the processor's cache and times the guards, for its logs alone.
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0

link_without_torch()

# Two processes that compile the same kernel at once can read each other's half-written library. So every worker of pytest-xdist has an Inductor cache of its
# own, in the usual one, where the next run finds it.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()) / f"pytest-{worker}")


def pytest_ignore_collect(collection_path, config):
    """Leave out the files without a serial test where only those are asked for: most of that run's time would go into collecting the others."""
    if config.option.markexpr.startswith("serial") and collection_path.name.startswith("test_") and "mark.serial" not in collection_path.read_text():
        return True


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not select
def pytest_collection_modifyitems(items):
    mark_exhaustive(items)


def cpu_seconds():
    """Return the seconds of a core that this process and its ended children took."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


class Costs:
    """Which files' tests took the most seconds of a core. (A report is made in the worker that ran the test, and counted in the main process.)"""

    def __init__(self):
        self.until, self.of_files = 0.0, Counter()

    def pytest_collection_finish(self):
        gc.collect()
        gc.freeze()  # torch's modules hold so many objects that looking through them for garbage took a tenth of a compilation
        self.until = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        before, self.until = self.until, cpu_seconds()
        report.cpu_seconds = self.until - before
        return report

    def pytest_runtest_logreport(self, report):
        self.of_files[report.location[0]] += report.cpu_seconds

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section(f"seconds of a core, {self.of_files.total():.0f} in total")
        for file, seconds in self.of_files.most_common(10):
            terminalreporter.write_line(f"{seconds:6.1f} {file}")


def pytest_configure(config):
    config.pluginmanager.register(Costs())


@pytest.fixture(autouse=True)
def fresh():
    """Reset what torch.compile has compiled and which notices were given, and seed torch. Afterwards restore float32 precisions, which frameworks set."""
    torch._dynamo.reset()
    diagnostics.forget()
    torch.manual_seed(0)
    before = float32_precision.settings()
    yield
    if float32_precision.settings() != before:
        with getattr(torch.backends, "__allow_nonbracketed_mutation")():
            float32_precision.take_over(before)


@pytest.fixture
def small_work_counts(monkeypatch):
    """Sample rows also in models that are too small for it to pay."""
    monkeypatch.setattr(row_cost, "ANY_SIZE", True)


@pytest.fixture
def precisions():
    """Let a test change torch's float32 precision settings, and restore them. (torch's own test helpers, which other tests import, forbid to set some.)"""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        before = float32_precision.settings()
        yield
        float32_precision.take_over(before)


@pytest.fixture(scope="module")
def one_thread():
    """Run with one thread: on tiny tensors, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_rank(tmp_path):
    """Make a process group with this process as its only member."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
