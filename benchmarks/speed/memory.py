"""The most memory that a training step holds, each in a process of its own: `python -m benchmarks.speed.memory rows|zero`, both by default.

- `rows`: the backward pass on some rows of the batch, and on all of them under the policy "adaptive" (row_memory.csv).
- `zero`: with `zero` in every other or in every convolution (gradient_memory.csv).

Memory is what the process holds at its peak over what it holds between steps, gradients of the last step included: the next one frees them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import nn

from approx_compile._torch.known_faults import inductor
from benchmarks.common.rows import ROOT, conditions, show, store
from benchmarks.common.works import ROW_WORKS
from examples.models import build
from examples.peak_memory import peak_bytes, reset_peak

BATCH, IMAGE = 128, (3, 32, 32)
ZERO_WORKS = ("resnet-20", "vgg-11", "vgg-11 with GELU")
Threads = Annotated[int | None, typer.Option(help="threads of torch; its own choice by default")]
app = typer.Typer(help=__doc__, no_args_is_help=False)


@app.command()
def rows(
    work: Annotated[list[str] | None, typer.Option(help="mlp1000, mlp1024, blocks, cnn; the last three by default")] = None, threads: Threads = None
) -> None:
    """Backward passes on rows against Inductor."""
    settings: dict[str, Any] = {"inductor": None, "adaptive, all rows": {"policy": "adaptive", "adaptive": {"tau": 1e-9}}}
    settings |= {f"{r:g}": {"grad": {"axis": "rows", "ratio": r}} for r in (0.5, 0.25, 0.1)}
    results = []
    for name in work or ("mlp1024", "blocks", "cnn"):
        results += _compared(ROW_WORKS[name][0], {s: f"works.stepper({name!r}, {o!r})" for s, o in settings.items()}, threads)
    show("memory of a training step", results, ("work", "setting", "peak_mb", "share"))
    store("row_memory", results)


@app.command()
def zero(
    work: Annotated[list[str] | None, typer.Option(help="models of examples/models.py; resnet-20, vgg-11 and that with GELU by default")] = None,
    threads: Threads = None,
) -> None:
    """Weight gradients that are zero against Inductor."""
    settings = {"inductor": None} | {f"zero {layers}": replacing(layers, "zero") for layers in ("conv[1::2]", "conv")}
    results = []
    for name in work or ZERO_WORKS:
        results += _compared(f"{name}, batch {BATCH}", {s: f"memory.training({name!r}, {o!r})" for s, o in settings.items()}, threads)
    show("memory of a training step", results, ("work", "setting", "peak_mb", "share"))
    store("gradient_memory", results)


def replacing(layers: str, method: str) -> dict[str, Any]:
    """Options that leave everything exact but these weight gradients."""
    return {"policy": "cost", "rules": [{"layers": "site", "output": "exact"}, {"layers": layers, "output": "exact", "grad_weight": method}]}


def training(work: str, options: dict[str, Any] | None) -> Callable[[], None]:
    """A training step without the optimizer, by Inductor (options None) or approx."""
    torch.manual_seed(0)
    model, x, y = network(work), torch.randn(BATCH, *IMAGE), torch.randint(10, (BATCH,))
    f = torch.compile(model, backend=inductor) if options is None else torch.compile(model, backend="approx", options=options)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(f(x), y).backward()

    return step


def network(work: str) -> nn.Module:
    """A model of examples/models.py, with GELU for every ReLU if its name says so: the backward pass of a ReLU reads its output, so that is kept anyway."""
    name, _, gelu = work.partition(" with ")
    model = build(name, IMAGE, 10)
    for child, module in list(model.named_children()):
        if gelu and isinstance(module, nn.ReLU):
            setattr(model, child, nn.GELU())
    return model


def _compared(work: str, steps: Mapping[str, str], threads: int | None) -> list[dict[str, Any]]:
    """A row for every setting; the first is what the others are compared with."""
    peaks = {setting: _in_child(step, threads) for setting, step in steps.items()}
    base = next(iter(peaks.values()))
    here = conditions() | {"threads": threads or torch.get_num_threads()}
    return [here | {"work": work, "setting": s, "peak_mb": round(peak / 1e6, 1), "share": round(peak / base, 3)} for s, peak in peaks.items()]


def _in_child(step: str, threads: int | None) -> int:
    """Bytes of a step, which an expression makes. Large tensors are mapped one by one there, so that what is freed is gone."""
    code = f"from benchmarks.common import works; from benchmarks.speed import memory; memory.report(lambda: {step}, {threads!r})"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def report(make: Callable[[], Callable[[], None]], threads: int | None) -> None:
    """Print the bytes (run in a child)."""
    torch.set_num_threads(threads or torch.get_num_threads())
    step, device, peaks = make(), torch.device("cpu"), []
    for _ in range(5):
        reset_peak(device)
        before = peak_bytes(device)
        step()
        peaks.append(peak_bytes(device) - before)
    print(json.dumps(min(peaks[1:])))  # the first step compiles


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Both, in turn."""
    if context.invoked_subcommand is None:
        rows(None, None)
        zero(None, None)


if __name__ == "__main__":
    app()
