"""Which share of their rows ranks keep where the labels of the last one are noisy, with and without agreement.

```
python -m benchmarks.distributed.shares run --data DIR             # 2 ranks, a tenth of the last one's labels random; minutes
python -m benchmarks.distributed.shares run --data DIR --noise 0   # shards alike
```

Ranks train an MLP in DDP for some epochs. The shares are those of real ranks; they do not depend on how busy the machine is. The time of a step, as a share of
the exact step's, is read off the stored steps of an MLP by share (`speed.bench rows`): `mean_step` is the mean over the ranks, `slowest_step` that of the
slowest rank, for which the others wait. Rows go to results/distributed_shares.csv.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch.nn.parallel import DistributedDataParallel as DDP

import approx_compile
from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.distributed import register
from approx_compile.rows import row_cost
from benchmarks.common.rows import conditions, show, store, stored
from benchmarks.distributed.exchange import mlp
from examples import data

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TIMED = "MLP 1024-4096-4096-10, batch 1000"


def step_by_share() -> list[tuple[float, float]]:
    """Pairs of a share of the rows and a step's time as a share of the exact step's, as they are stored; the newest of each share."""
    found = {float(r["setting"]): 1 / float(r["speedup"]) for r in stored("rows", {"work": TIMED}) if r["setting"][0].isdigit()}
    return sorted((found | {1.0: 1.0}).items())


def step_at(share: float, known: list[tuple[float, float]]) -> float:
    """The time of a step at a share, between the two next to it that are known; below the least that of the least."""
    for (low, fast), (high, slow) in pairwise(known):
        if low <= share <= high:
            return fast + (slow - fast) * (share - low) / (high - low)
    return known[0][1]


@app.command()
def run(
    directory: Annotated[Path, typer.Option("--data", help="Where the data set is.")],
    dataset: str = "mnist",
    ranks: int = 2,
    noise: Annotated[float, typer.Option(help="The share of random labels of the last rank.")] = 0.1,
    samples: Annotated[int, typer.Option(help="Samples of a rank.")] = 2048,
    epochs: int = 20,
) -> None:
    """Train with and without agreement; print and store the shares."""
    found, known = [], step_by_share()
    for agree in (False, True):
        arguments = [str(directory), dataset, str(noise), str(samples), str(epochs), str(int(agree))]
        shares = _shares(ranks, arguments)
        steps = [[step_at(share, known) for share in of_rank] for of_rank in shares]
        row = {"dataset": dataset, "ranks": ranks, "noise": noise, "samples": samples, "epochs": epochs, "agree": agree}
        row |= {"shares": " ".join(f"{statistics.mean(s):.3f}" for s in shares)}
        row |= {"mean_step": round(statistics.mean(map(statistics.mean, steps)), 4)}
        found.append(conditions() | row | {"slowest_step": round(statistics.mean(map(max, zip(*steps, strict=True))), 4)})
    show("Shares", found, ("noise", "ranks", "agree", "shares", "mean_step", "slowest_step"))
    store("distributed_shares", found)


def _shares(ranks: int, arguments: list[str]) -> list[list[float]]:
    """The share that each rank kept in each step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.distributed.shares", "worker", folder, *arguments]
        children = [subprocess.Popen(command, env=os.environ | {"RANK": str(r), "WORLD_SIZE": str(ranks)}, stdout=subprocess.PIPE) for r in range(ranks)]
        outputs = [child.communicate()[0] for child in children]
        if any(child.returncode for child in children):
            raise RuntimeError("a rank has failed; its error is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@app.command(hidden=True)
def worker(folder: str, directory: Path, dataset: str, noise: float, samples: int, epochs: int, agree: int) -> None:
    """One rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    row_cost.ANY_SIZE = True  # shares are looked at here, not whether they pay in a model of this size
    torch._dynamo.config.optimize_ddp = False  # one graph, so one share
    full = data.load(dataset, directory)
    x, y = (t[rank * samples : (rank + 1) * samples] for t in (full.train_x.flatten(1), full.train_y))
    random = torch.Generator().manual_seed(rank)
    if rank == world - 1:
        wrong = torch.rand(samples, generator=random) < noise
        y = torch.where(wrong, torch.randint(full.classes, y.shape, generator=random), y)
    torch.manual_seed(0)
    net = mlp(x.shape[1], 512, 512, full.classes)
    options: dict[str, Any] = {"policy": "adaptive", "adaptive": {"agree": bool(agree)}}
    ddp = DDP(torch.compile(net, backend=Backend(options, inner_compile=run_as_is)))
    register(ddp)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    shares: list[float] = []
    for _ in range(epochs):
        for batch in torch.randperm(samples, generator=random).split(128):
            F.cross_entropy(ddp(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            (control,) = approx_compile.controls(net).values()
            shares.append(control.ratio)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(shares))


if __name__ == "__main__":
    app()
