"""Forward sampling trains one network and evaluates another: which remedy helps? `python -m benchmarks.accuracy.shift run --data DIR`, then `table`.

Hand-written sampling in eager torch (the product on the kept channels of both operands, gradients through the same channels), so that
choices that the product does not have can be tried: indices renewed only now and then, noisy ones, a scale that keeps the norm. Scores of the
exact network, of the exact network with BatchNorm's statistics collected anew, and of the sampled network. Resumable: rows in results/shift.jsonl.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.accuracy.accuracy import WORKS
from benchmarks.accuracy.study import RESULTS, Work, load, loss, score
from benchmarks.common.rows import conditions

ROWS = RESULTS / "shift.jsonl"
app = typer.Typer(help=__doc__)
console = Console()


@dataclass(frozen=True)
class Scheme:
    """A way to sample. `final`: share of the steps at the end that are exact; `ends`: first and last layer exact; `renew`: steps between choices."""

    ratio: float
    final: float = 0.0
    ends: bool = True
    keep_norm: bool = False
    renew: int = 1
    noise: float = 0.0
    unbiased: bool = False


def schemes(ratio: float) -> dict[str, Scheme | None]:
    plain = Scheme(ratio)
    return {
        "exact": None,
        "topk": plain,
        "topk, last 20% exact": replace(plain, final=0.2),
        "topk, last 10% exact": replace(plain, final=0.1),
        "topk, all layers": replace(plain, ends=False),
        "topk, norm kept": replace(plain, keep_norm=True),
        "topk, renewed every 50 steps": replace(plain, renew=50),
        "topk of noisy scores": replace(plain, noise=0.5),
        "bernoulli": replace(plain, unbiased=True),
        "bernoulli, last 20% exact": replace(plain, unbiased=True, final=0.2),
    }


@dataclass
class Clock:
    """What the layers of one model read: the step, and whether they sample at all."""

    step: int = 0
    on: bool = True


class Sampled(nn.Module):
    """A linear layer or convolution that samples its contraction channels while it trains."""

    def __init__(self, layer: nn.Module, scheme: Scheme, clock: Clock) -> None:
        super().__init__()
        self.layer, self.scheme, self.clock = layer, scheme, clock
        self.idx: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.layer.weight  # type: ignore[assignment]
        channels = w.shape[1]
        k = max(16, round(self.scheme.ratio * channels))
        if not self.clock.on or k >= channels:
            return self._product(x, w)
        with torch.no_grad():
            dim = 1 if x.dim() == 4 else x.dim() - 1
            a = x.square().sum([d for d in range(x.dim()) if d != dim]).sqrt()
            s = a * w.square().sum([d for d in range(w.dim()) if d != 1]).sqrt()
            if self.idx is None or self.clock.step % self.scheme.renew == 0:
                self.idx = self._choose(s, k)
            idx = self.idx
            scale = self._scale(s, idx, k)
        w = w.index_select(1, idx)
        return self._product(x.index_select(dim, idx), w if scale is None else w * scale.view(1, -1, *[1] * (w.dim() - 2)))

    def _choose(self, s: Tensor, k: int) -> Tensor:
        if self.scheme.unbiased:
            p = self._inclusion(s, k)
            order = torch.randperm(len(s))
            ends = p[order].cumsum(0)
            cuts = torch.rand(()) + torch.arange(k)
            return order[torch.searchsorted(ends, cuts, right=True).clamp_(max=len(s) - 1)].sort().values
        if self.scheme.noise:
            s = s * torch.exp(self.scheme.noise * torch.randn_like(s))
        return s.topk(k).indices.sort().values

    def _scale(self, s: Tensor, idx: Tensor, k: int) -> Tensor | None:
        if self.scheme.unbiased:
            return 1 / self._inclusion(s, k)[idx].clamp_min(1e-6)
        if self.scheme.keep_norm:
            return (s.square().sum() / s[idx].square().sum().clamp_min(1e-30)).sqrt().expand(k)
        return None

    @staticmethod
    def _inclusion(s: Tensor, k: int) -> Tensor:
        """min(1, c s) with sum k, by bisection on c."""
        low, high = torch.zeros(()), k / s[s > 0].min() if bool((s > 0).any()) else torch.ones(())
        for _ in range(60):
            c = (low + high) / 2
            low, high = (low, c) if (c * s).clamp(max=1).sum() > k else (c, high)
        return (high * s).clamp(max=1)

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, w, layer.bias)
        return F.conv2d(x, w, layer.bias, layer.stride, layer.padding, layer.dilation)


def sampled(model: nn.Module, scheme: Scheme, clock: Clock) -> None:
    """Put `Sampled` around the layers."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name, layer in layers[1:-1] if scheme.ends else layers:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Sampled(layer, scheme, clock))


def train(work: Work, scheme: Scheme | None, seed: int, epochs: int, parts: tuple[Tensor, ...]) -> dict[str, Any]:
    x, y, test_x, test_y = parts
    torch.manual_seed(seed)
    model, clock = work.make(1.0), Clock(on=scheme is not None)
    if scheme is not None:
        sampled(model, scheme, clock)
    if work.momentum is None:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=work.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=work.momentum, weight_decay=5e-4, fused=True)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * (len(x) // work.batch)
    model.train()
    while clock.step < steps:
        for batch in torch.randperm(len(x), generator=order).split(work.batch)[: min(len(x) // work.batch, steps - clock.step)]:
            for group in optimizer.param_groups:
                group["lr"] = work.lr * 0.5 * (1 + math.cos(math.pi * clock.step / steps))
            clock.on = scheme is not None and clock.step < round((1 - scheme.final) * steps)
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
            clock.step += 1
    clock.on = scheme is not None
    with_sampling = score(model, work, test_x, test_y)
    clock.on = False
    exact = score(model, work, test_x, test_y)
    torch.optim.swa_utils.update_bn([x[i : i + work.batch] for i in range(0, min(len(x), 6400), work.batch)], model)
    return {"final": exact, "recalibrated": score(model, work, test_x, test_y), "sampled": with_sampling}


def done() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


PLAN: Mapping[str, tuple[float, int]] = {"fashion-mlp": (0.25, 4), "cifar-wrn": (0.5, 5)}
"""Work -> ratio, epochs."""


@app.command()
def run(
    directory: Annotated[Path, typer.Option("--data", help="where the data sets lie")],
    work: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PLAN)}; all by default")] = None,
    seeds: Annotated[int, typer.Option()] = 2,
    threads: Annotated[int | None, typer.Option(help="torch's threads")] = None,
) -> None:
    """Train what is not in the results yet."""
    if threads is not None:
        torch.set_num_threads(threads)
    for seed in range(seeds):
        for name in work or list(PLAN):
            ratio, epochs = PLAN[name]
            parts = load(WORKS[name], directory)
            for setting, scheme in schemes(ratio).items():
                if (name, setting, seed) in {(r["work"], r["setting"], r["seed"]) for r in done()}:
                    continue
                result = train(WORKS[name], scheme, seed, epochs, parts)
                row = (
                    conditions()
                    | {"work": name, "setting": setting, "seed": seed, "ratio": ratio, "epochs": epochs}
                    | {k: round(v, 3) for k, v in result.items()}
                )
                with ROWS.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                console.print(f"{name} seed {seed} {setting}: {result}", highlight=False)


@app.command()
def table() -> None:
    """Means over seeds."""
    for name in PLAN:
        t = Table("setting", "seeds", "exact evaluation", "BatchNorm recalibrated", "sampled evaluation", title=name)
        by_setting = defaultdict(list)
        for r in done():
            if r["work"] == name:
                by_setting[r["setting"]].append(r)
        for setting, rows in by_setting.items():
            t.add_row(setting, str(len(rows)), *(f"{statistics.mean(r[k] for r in rows):.2f}" for k in ("final", "recalibrated", "sampled")))
        console.print(t)


if __name__ == "__main__":
    app()
