"""What the reduced all-reduce sends, what packing costs, and how long steps take over links of limited bandwidth.

```
python -m benchmarks.distributed.exchange bytes                       # counted in the hook; minutes
python -m benchmarks.distributed.exchange pack                        # seconds
python -m benchmarks.distributed.exchange links --mbit 100 --ranks 2  # as root; minutes a bandwidth
```
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook, fp16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP

from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.backend.runtime.choice_recorder import KeptAxis
from approx_compile.distributed import packing, register
from approx_compile.distributed.gradient_slices import KeptSlices
from benchmarks.common.rows import conditions, show, store
from benchmarks.distributed import network

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

HALF: dict[str, Any] = {"policy": "always", "method": "topk_weights", "ratio": 0.5}


def wide_only(channels: int) -> dict[str, Any]:
    """Half the channels of layers that have at least so many.

    With 256, 512 and 1024 channels, half of these layers' weights are 48, 23 and 13 % of ResNet-152's, and half of their products 41, 14 and 9 %. These are the
    three settings of Adelman et al., table 1: 48, 23 and 13 % of the communication saved, and 40, 12 and 9 % of the products.
    """
    return {"policy": "always", "method": "exact", "rules": [{"layers": "*", "method": "topk_weights", "ratio": 0.5, "min_k": channels // 2}]}


class Block(nn.Module):
    """Attention and a GELU MLP, each behind a LayerNorm, with residual connections."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.n1, self.n2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.a, self.na = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c, self.nc = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 or inputs != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.nb(self.b(torch.relu(self.na(self.a(x))))))
        return torch.relu(self.nc(self.c(y)) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """ResNet of bottleneck blocks (He et al. 2015); (3, 8, 36, 3) blocks are ResNet-152."""

    def __init__(self, blocks: tuple[int, int, int, int] = (3, 8, 36, 3), classes: int = 1000) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], 64
        for stage, count in enumerate(blocks):
            for i in range(count):
                stages.append(Bottleneck(inputs, 64 << stage, 2 if i == 0 and stage else 1))
                inputs = 4 * (64 << stage)
        self.body, self.head = nn.Sequential(*stages), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.pool(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, Any]]] = {
    "mlp": (lambda: mlp(1024, 2048, 2048, 10), lambda rows: torch.randn(rows, 1024), HALF),
    "blocks": (lambda: nn.Sequential(*(Block(256) for _ in range(4))), lambda rows: torch.randn(rows, 64, 256), HALF),
    **{f"resnet-152, {c} channels": (ResNet, lambda rows: torch.randn(rows, 3, 64, 64), wide_only(c)) for c in (256, 512, 1024)},
}


@app.command(name="bytes")
def count_bytes(model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; all by default.")] = None, rows: int = 4) -> None:
    """Count what one rank passes to the all-reduce in a step, beside a full all-reduce, with the model as one graph and cut at DDP's buckets."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = []
    for name, one_graph in itertools.product(model or MODELS, (True, False)):
        make, data, options = MODELS[name]
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=not one_graph):
            ddp = DDP(torch.compile(make(), backend=Backend(options, inner_compile=run_as_is)))
            exchange = register(ddp)
            ddp(data(rows)).square().mean().backward()
        sent, whole = exchange.bytes_sent / 1e6, exchange.bytes_whole / 1e6
        graphs = "one" if one_graph else "buckets"
        found.append(conditions() | {"model": name, "graphs": graphs, "sent_mb": round(sent, 3), "whole_mb": round(whole, 3), "share": round(sent / whole, 4)})
        store("exchange_bytes", found[-1:])
    show("Bytes of a step", found, ("model", "graphs", "sent_mb", "whole_mb", "share"))


@app.command()
def pack(size: int = 2048, repeats: int = 50) -> None:
    """Time packing and unpacking half of the rows and columns of a weight's gradient, beside a copy of the whole.

    Times are those of a core, which other processes disturb less than the clock.
    """
    gradient, found = torch.randn(size, size), []
    for unit in (1, 16):
        axes = tuple(_half(dim, size, unit) for dim in (0, 1))
        segments = packing.lay_out([gradient], [KeptSlices(axes, 0)])
        flat = packing.pack([gradient], segments, None)
        whole = torch.empty_like(gradient)
        actions: dict[str, Callable[[], Any]] = {
            "copy": lambda whole=whole: whole.copy_(gradient),
            "lay_out": lambda axes=axes: packing.lay_out([gradient], [KeptSlices(axes, 0)]),
            "pack": lambda segments=segments: packing.pack([gradient], segments, None),
            "unpack": lambda flat=flat, segments=segments: packing.unpack(flat, [gradient], segments),
            "checksum": lambda axes=axes: packing.checksums_of([KeptSlices(axes, 0)], torch.float32),
        }
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(repeats):
            for name, act in actions.items():
                start = time.process_time()
                act()
                times[name].append(1e6 * (time.process_time() - start))
        medians = {f"{name}_us": round(statistics.median(t), 1) for name, t in times.items()}
        ratio = (sum(medians.values()) - medians["copy_us"]) / medians["copy_us"]
        found.append(conditions() | {"size": size, "unit": unit} | medians | {"of_copy": round(ratio, 3)})
    show("Packing", found, ("size", "unit", "copy_us", "lay_out_us", "pack_us", "unpack_us", "checksum_us", "of_copy"))
    store("exchange_pack", found)


def _half(dim: int, size: int, unit: int) -> KeptAxis:
    idx = torch.randperm(size // unit)[: size // unit // 2].sort().values
    return KeptAxis(dim, unit, size, size // 2, idx, "layer")


VARIANTS = ("full", "kept", "fp16", "kept + fp16", "PowerSGD")


@app.command()
def links(
    mbit: Annotated[list[float] | None, typer.Option(help="Bandwidths of a link in Mbit/s.")] = None,
    ranks: int = 2,
    model: str = "mlp",
    rows: Annotated[int, typer.Option(help="Samples of a rank in a step.")] = 64,
    rounds: int = 5,
    steps: Annotated[int, typer.Option(help="Steps of each way in a round.")] = 3,
) -> None:
    """Time training steps of several ranks over limited links, the ways of exchange in turn."""
    if (lack := network.missing()) is not None:
        raise typer.BadParameter(f"this machine lacks {lack}")
    found = []
    for limit in mbit or (100.0, 1000.0):
        with network.namespaces(ranks, limit) as prefixes:
            arguments = [sys.executable, "-m", "benchmarks.distributed.exchange", "worker", model, str(rows), str(rounds), str(steps)]
            output = network.run_ranks([[*p, *arguments] for p in prefixes], [network.environment(r, ranks) for r in range(ranks)], limit_s=3600)
        times: dict[str, dict[str, float]] = json.loads(output.splitlines()[-1])
        for way, result in times.items():
            relative = result["step_ms"] / times["full"]["step_ms"]
            found.append(conditions() | {"model": model, "ranks": ranks, "rows": rows, "mbit_s": limit, "way": way} | result | {"of_full": round(relative, 3)})
    show("Steps over limited links", found, ("model", "ranks", "mbit_s", "way", "step_ms", "mb", "of_full"))
    store("exchange_links", found)


@app.command(hidden=True)
def worker(model: str, rows: int, rounds: int, steps: int) -> None:
    """One rank of `links`."""
    dist.init_process_group("gloo")
    make, data, options = MODELS[model]
    torch.manual_seed(0)
    net, x = make(), data(rows)
    ways = {name: _way(name, copy.deepcopy(net), options) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):  # the first compiles
        for name, (ddp, _) in ways.items():
            for _ in range(steps if round_number else 2):
                dist.barrier()
                start = time.perf_counter()
                ddp(x).square().mean().backward()
                if round_number:
                    times[name].append(time.perf_counter() - start)
                ddp.zero_grad()
    if dist.get_rank() == 0:
        result = {n: {"step_ms": round(1e3 * statistics.median(t), 2), "mb": round(ways[n][1](), 3)} for n, t in times.items()}
        print(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _way(name: str, net: nn.Module, options: dict[str, Any]) -> tuple[DDP, Callable[[], float]]:
    """A model that exchanges its gradients in one way, and a function that says how many MB of a step it passes to collectives (NaN: not counted)."""
    # PowerSGD chains collectives: with several buckets on gloo the ranks issue them in different orders, and it aborts
    ddp = DDP(torch.compile(net, backend="approx", options=options), bucket_cap_mb=10_000 if name == "PowerSGD" else None)
    whole = 4e-6 * sum(p.numel() for p in net.parameters())
    if name.startswith("kept"):
        exchange = register(ddp, wrapper=fp16_compress_wrapper if "fp16" in name else None)
        return ddp, lambda: exchange.bytes_sent / exchange.exchanges / 1e6
    if name == "fp16":
        ddp.register_comm_hook(None, fp16_compress_hook)
        return ddp, lambda: whole / 2
    if name == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return ddp, lambda: float("nan")
    return ddp, lambda: whole


if __name__ == "__main__":
    app()
