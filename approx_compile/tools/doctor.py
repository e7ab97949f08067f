"""Examine this installation: versions, the C++ compiler, devices, stored profiles, caches, torch's known faults, and whether Inductor compiles."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from approx_compile import _torch, machine
from approx_compile._torch import canary, known_faults
from approx_compile.config import ConfigError
from approx_compile.passes.planning.selection import PREDICTION_ERROR
from approx_compile.tools.report.explain import explain
from approx_compile.tools.report.report_text import headline
from approx_compile.utils import DISABLE, MACHINE, counted, printed

EXTRAS = {"report": ("itables", "jinja2", "matplotlib", "pygments"), "examples": ("sklearn", "matplotlib"), "triton": ("triton",), "cuda": ("cuda.core",)}
"""The optional dependencies of this package, by the name of the extra."""

TESTED_TORCH = (2, 13)
"""The newest version of torch that the tests run with."""

DAY_S = 86_400

COMPILER_HELP = "install one: apt install build-essential (Debian), dnf install gcc-c++ (Fedora), or set CXX to its path"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: "ok"; "note" for what works but is worth knowing; or "problem" for what stops training with this backend.
        found: What was found.
        advice: What to do about it; empty if nothing.
    """

    name: str
    state: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """The results of all checks. `str()` is a table."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> list[Check]:
        """The checks that found a problem."""
        return [c for c in self.checks if c.state == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain values, for JSON."""
        return {"checks": [asdict(c) for c in self.checks], "problems": len(self.problems)}

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("check", "state", "found"):
            table.add_column(title, overflow="fold")
        for c in self.checks:
            table.add_row(c.name, c.state, c.found + (f"\n-> {c.advice}" if c.advice else ""))
        count = len(self.problems)
        verdict = "All is well." if not count else f"{counted(count, 'problem')}: {', '.join(c.name for c in self.problems)}."
        return printed(table, verdict)


def examine(compile_model: bool = True) -> Examination:
    """Run all checks.

    Args:
        compile_model: Whether to also compile a small model with Inductor, which takes some seconds.

    Returns:
        The results.
    """
    checks = [*_versions(), _extras(), _compiler(), *_devices(), *_profiles(), *_caches(), *_faults(), _switch()]
    if compile_model:
        checks += [_attempt("Inductor", _inductor), _attempt("small model", _small_model)]
    return Examination(tuple(checks))


def _versions() -> Iterator[Check]:
    found = f"approx_compile {importlib.metadata.version('approx-compile')}, torch {torch.__version__}, Python {platform.python_version()}"
    newer = tuple(map(int, torch.__version__.split(".")[:2])) > TESTED_TORCH
    tested = f"tested with torch {'.'.join(map(str, TESTED_TORCH))}; if something fails, try it with that version"
    yield Check("versions", "note" if newer else "ok", found, tested if newer else "")
    gone = canary.missing()
    if gone:
        yield Check("torch's private names", "note", "; ".join(f"{n.name}: {n.fallback}" for n in gone), "results stay correct; torch 2.13 has them all")


def _extras() -> Check:
    missing = {extra: [m for m in modules if not _is_installed(m)] for extra, modules in EXTRAS.items()}
    words = [f"{extra}: {'installed' if not lacks else 'without ' + ', '.join(lacks)}" for extra, lacks in missing.items()]
    absent = [extra for extra, lacks in missing.items() if lacks]
    return Check("extras", "ok", "; ".join(words), f"optional: pip install 'approx-compile[{','.join(absent)}]'" if absent else "")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def _compiler() -> Check:
    path = _torch.cpp_compiler()
    if path is None:
        return Check("C++ compiler", "problem", "none found; Inductor needs one on CPUs", COMPILER_HELP)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        return Check("C++ compiler", "problem", f"{path} does not run: {e}", COMPILER_HELP)
    return Check("C++ compiler", "ok", f"{path}: {next(iter(done.stdout.splitlines()), 'no version')}")


def _devices() -> Iterator[Check]:
    threads = torch.get_num_threads()
    yield Check("CPU", "ok", f"{machine.device_name('cpu')}, {counted(threads, 'thread')}")
    for i in range(torch.cuda.device_count()):
        yield Check("GPU", "ok", f"cuda:{i}: {torch.cuda.get_device_name(i)}")


def _profiles() -> Iterator[Check]:
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        name = f"machine profile ({device})"
        named = MACHINE.value()
        path = Path(named) if named else machine.path_of(device)
        try:
            profile = machine.stored(device)
        except ConfigError as e:
            yield Check(name, "problem", str(e), f"unset {MACHINE.name}, or name a file that approx-compile calibrate has stored")
            continue
        if profile is None or not path.exists():
            again = "policies that need one measure it at first use, a few seconds; approx-compile calibrate does it more precisely"
            yield Check(name, "note", "none stored for this device, number of threads and torch", again)
            continue
        days = (time.time() - path.stat().st_mtime) / DAY_S
        yield Check(name, "ok", f"{days:.0f} days old, {_short(path)}")


def _caches() -> Iterator[Check]:
    for name, folder in (("Inductor's cache", _torch.cache_folder()), ("profiles and site times", machine.path_of("cpu").parent.parent)):
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        if os.access(nearest, os.W_OK):
            yield Check(name, "ok", _short(folder))
        else:
            variable = "TORCHINDUCTOR_CACHE_DIR" if name.startswith("Inductor") else "XDG_CACHE_HOME"
            yield Check(name, "problem", f"{_short(folder)} cannot be written", f"set {variable} to a folder that can be written")


def _short(path: Path) -> str:
    """Write a path with `~` for the user's folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _faults() -> Iterator[Check]:
    for fault in known_faults.FAULTS:
        if fault.in_version(torch.__version__):
            first = ".".join(map(str, fault.until))
            text = f"{fault.name} ({fault.device}): this package avoids it; backend='inductor' may give wrong results"
            yield Check("known fault of torch", "note", text, f"fixed in torch {first}; compare with APPROX_COMPILE_DISABLE=1, not with backend='inductor'")


def _switch() -> Check:
    if DISABLE.value() == "1":
        return Check(DISABLE.name, "note", "set to 1: the backend is plain Inductor", "unset it to approximate")
    return Check(DISABLE.name, "ok", "not set: the backend approximates")


def _attempt(name: str, check: Callable[[], Check]) -> Check:
    """Run a check that compiles; whatever it raises is a problem."""
    try:
        return check()
    except Exception as e:
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
        return Check(name, "problem", f"{type(e).__name__}: {first}", "TORCH_LOGS=inductor approx-compile doctor shows more; mend the other problems first")


def _inductor() -> Check:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    x = torch.randn(16, 24)
    with torch.random.fork_rng(devices=[]):
        _torch.compile_isolated(model, known_faults.inductor)(x).square().mean().backward()
    exact = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    same = all(a is not None and b.grad is not None and torch.allclose(a, b.grad, atol=1e-5) for a, b in zip(exact, model.parameters(), strict=True))
    if not same:
        return Check(
            "Inductor", "problem", "the gradients of a small compiled model differ from eager's", "report it to PyTorch, or use another version of torch"
        )
    return Check("Inductor", "ok", "compiles a small model, with eager's gradients")


def _small_model() -> Check:
    """Say what would be sampled in a small MLP on a batch of 256."""
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    x = torch.randn(256, 784)
    report = explain(model, x, config={})
    gain = report.flops_exact / max(1, report.flops_possible)
    name = "small model"
    if report.flops_possible == report.flops_exact:
        return Check(name, "note", f"nothing would be sampled in an MLP 784-1024-1024-10: {_reasons(c.reason for c in report.cuts)}")
    times = _predicted_times(model, x) if machine.stored("cpu") is not None else ""
    return Check(name, "ok", f"MLP 784-1024-1024-10: {headline(report)} At a quarter of the rows a step has {gain:.2f} times fewer FLOPs{times}.")


def _predicted_times(model: nn.Module, x: torch.Tensor) -> str:
    """Say how long the products of a step take at a quarter of the rows, as a share of the exact ones' time, by the stored profile of the machine."""
    exact_us = math.fsum(s.time_exact_us or 0.0 for s in explain(model, x, config={"policy": "cost", "ratio": 0.5}).sites)
    (cut,) = explain(model, x, config={"grad": {"axis": "rows", "ratio": 0.25}}).cuts
    if not exact_us or cut.saved_us is None or cut.cost_us is None:
        return ""
    off = PREDICTION_ERROR
    best, expected, worst = (1 - (cut.saved_us * k - cut.cost_us / k) / exact_us for k in (off, 1.0, 1 / off))
    return f"; its products are predicted to take {expected:.2f} of the time ({best:.2f} to {worst:.2f} if predictions are off by a factor of {off:g})"


def _reasons(reasons: Iterable[object]) -> str:
    return "; ".join(dict.fromkeys(map(str, reasons)))
