"""`max` for `grad_weight` against the exact product: `python -m benchmarks.kernels.gradients`; rows in benchmarks/results/gradients.csv.

The eight convolutions of Table 1 of Wang and Nelaturu (3 x 3, padding 1, batch 128), NCHW and channels-last, each compiled by Inductor, in turn in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from approx_compile.kernels.gradient_replacements import ConvGeometry, Replacement, max_conv_weight
from approx_compile.passes.planning.gradient_replacement import smallest_useful_tile
from benchmarks.common.races import raced
from benchmarks.common.rows import show, store

SHAPES = ((256, 256, 8), (128, 128, 16), (512, 512, 4), (512, 512, 2), (64, 64, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8))
"""Input channels, output channels, height and width, in the order of Table 1."""
BATCH = 128
CONV = ConvGeometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
app = typer.Typer(help=__doc__, no_args_is_help=False)


def exact(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    args = (None, CONV.stride, CONV.padding, CONV.dilation, False, (0, 0), 1, (False, True, False))
    grad: Tensor = torch.ops.aten.convolution_backward(dy, x, w, *args)[1]
    return grad


def largest(x: Tensor, dy: Tensor, w: Tensor, tile: int | None = None) -> Tensor:
    grad = max_conv_weight(x, dy, Replacement("max", tile=tile), CONV)
    return grad.contiguous(memory_format=torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format)


@app.command()
def speed(
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 15,
    threads: Annotated[int | None, typer.Option(help="threads of torch; its own choice by default")] = None,
) -> None:
    """`max` against the exact product: not slower anywhere, at least twice as fast on four shapes of eight; and with an entry for every small tile."""
    torch.set_num_threads(threads or torch.get_num_threads())
    rows = []
    for layout, form in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        for inputs, outputs, size in SHAPES:
            torch._dynamo.reset()
            torch.manual_seed(0)
            shapes = (BATCH, inputs, size, size), (BATCH, outputs, size, size), (outputs, inputs, 3, 3)
            tensors = [torch.randn(s).contiguous(memory_format=form) for s in shapes]
            products: dict[str, Callable[..., Tensor]] = {"inductor": exact, "max": largest}
            tile = smallest_useful_tile((size, size))
            if tile < size:
                products[f"max, tile {tile}"] = functools.partial(largest, tile=tile)
            contest = {name: functools.partial(torch.compile(f, backend="inductor", dynamic=False), *tensors) for name, f in products.items()}
            rows += raced(f"{inputs} -> {outputs}, {size} x {size}, batch {BATCH}, {layout}", contest, rounds, {"max": 1.0})
    show(
        "weight gradient, max against the exact product",
        [r for r in rows if r["setting"] != "inductor"],
        ("work", "setting", "median_ms", "speedup", "speedup_p20", "speedup_p80"),
    )
    store("gradients", rows)


if __name__ == "__main__":
    app()
