"""Replaced weight gradients: `python benchmarks/gradient_bench.py speed|memory`, all by default; rows in benchmarks/results/gradients.csv and
gradient_memory.csv.

- `speed`: `max` for `grad_weight` against the exact product, each compiled by Inductor, in turn in one process: the eight convolutions of Table 1 of
  Wang and Nelaturu (3 x 3, padding 1, batch 128), NCHW and channels-last.
- `memory`: the most memory that a training step holds, exact and with `zero` in every other or in every convolution, each in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from bench import conditions, raced, show, store
from torch import Tensor, nn

from approx_compile.kernels.replacements import Geometry, Replacement, max_conv_weight

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from models import build
from train import peak_bytes, reset_peak

SHAPES = ((256, 256, 8), (128, 128, 16), (512, 512, 4), (512, 512, 2), (64, 64, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8))
"""Input channels, output channels, height and width, in the order of Table 1."""
BATCH, IMAGE = 128, (3, 32, 32)
CONV = Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
app = typer.Typer(help=__doc__, no_args_is_help=False)


def exact(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    args = (None, CONV.stride, CONV.padding, CONV.dilation, False, (0, 0), 1, (False, True, False))
    grad: Tensor = torch.ops.aten.convolution_backward(dy, x, w, *args)[1]
    return grad


def largest(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    grad = max_conv_weight(x, dy, Replacement("max"), CONV)
    return grad.contiguous(memory_format=torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format)


@app.command()
def speed(
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 15,
    threads: Annotated[int | None, typer.Option(help="threads of torch; its own choice by default")] = None,
) -> None:
    """`max` against the exact product: not slower anywhere, at least twice as fast on four shapes of eight."""
    torch.set_num_threads(threads or torch.get_num_threads())
    rows = []
    for layout, form in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        for inputs, outputs, size in SHAPES:
            torch._dynamo.reset()
            torch.manual_seed(0)
            shapes = (BATCH, inputs, size, size), (BATCH, outputs, size, size), (outputs, inputs, 3, 3)
            tensors = [torch.randn(s).contiguous(memory_format=form) for s in shapes]
            products = {"inductor": exact, "max": largest}
            contest = {name: functools.partial(torch.compile(f, backend="inductor", dynamic=False), *tensors) for name, f in products.items()}
            rows += raced(f"{inputs} -> {outputs}, {size} x {size}, batch {BATCH}, {layout}", contest, rounds, {"max": 1.0})
    show(
        "weight gradient, max against the exact product",
        [r for r in rows if r["setting"] == "max"],
        ("work", "median_ms", "speedup", "speedup_p20", "speedup_p80"),
    )
    store("gradients", rows)


def replacing(layers: str, method: str) -> dict[str, Any]:
    """Options that leave everything exact but these weight gradients."""
    return {"rules": [{"layers": "site", "output": "exact"}, {"layers": layers, "output": "exact", "grad_weight": method}]}


def training(work: str, options: dict[str, Any] | None) -> Callable[[], None]:
    """A training step without the optimizer, by Inductor (options None) or approx."""
    torch.manual_seed(0)
    model, x, y = network(work), torch.randn(BATCH, *IMAGE), torch.randint(10, (BATCH,))
    f = torch.compile(model, backend="inductor") if options is None else torch.compile(model, backend="approx", options=options)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(f(x), y).backward()

    return step


MEMORY_WORKS = ("resnet-20", "vgg-11", "vgg-11 with GELU")


def network(work: str) -> nn.Module:
    """A model of examples/models.py, with GELU for every ReLU if its name says so: the backward pass of a ReLU reads its output, so that is kept anyway."""
    name, _, gelu = work.partition(" with ")
    model = build(name, IMAGE, 10)
    for child, module in list(model.named_children()):
        if gelu and isinstance(module, nn.ReLU):
            setattr(model, child, nn.GELU())
    return model


@app.command()
def memory(
    work: Annotated[list[str] | None, typer.Option(help="models of examples/models.py; resnet-20, vgg-11 and that with GELU by default")] = None,
    threads: Annotated[int | None, typer.Option(help="threads of torch; its own choice by default")] = None,
) -> None:
    """The memory that a step holds at its peak over what the process holds between steps."""
    rows = []
    for name in work or MEMORY_WORKS:
        base = 0
        for setting, layers in (("inductor", None), ("zero conv[1::2]", "conv[1::2]"), ("zero conv", "conv")):
            peak = _in_child(name, layers, threads)
            base = base or peak
            rows.append(conditions() | {"work": f"{name}, batch {BATCH}", "setting": setting, "peak_mb": round(peak / 1e6, 1), "share": round(peak / base, 3)})
    show("memory of a training step", rows, ("work", "setting", "peak_mb", "share"))
    store("gradient_memory", rows)


def _in_child(work: str, layers: str | None, threads: int | None) -> int:
    """Large tensors are mapped one by one there, so that what is freed is gone."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gradient_bench; gradient_bench.peak({work!r}, {layers!r}, {threads!r})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def peak(work: str, layers: str | None, threads: int | None) -> None:
    """Print the bytes (run in a child)."""
    torch.set_num_threads(threads or torch.get_num_threads())
    step, device, found = training(work, replacing(layers, "zero") if layers else None), torch.device("cpu"), []
    for _ in range(4):
        reset_peak(device)
        before = peak_bytes(device)
        step()
        found.append(peak_bytes(device) - before)
    print(json.dumps(min(found[1:])))  # the first step compiles


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """All, in turn."""
    if context.invoked_subcommand is None:
        speed(15, None)
        memory(None, None)


if __name__ == "__main__":
    app()
