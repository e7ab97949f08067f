"""What sharing indices loses and saves: `python -m benchmarks.accuracy.share_study`.

A language model of three blocks of width 128 (causal attention, gated MLP) is trained on characters of the standard library's sources. At some steps, on the
same batches, the gradient's relative error is measured with query, key and value (or gate and up) of all blocks sampled at entries of their own, and at
shared ones (`share`), top-k. Then the time of a step of such layers alone, both ways, beside Inductor. Rows go to results/share_study.csv.
"""

from __future__ import annotations

import itertools
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from approx_compile import Backend
from approx_compile.machine.timer import BenchmarkTimer
from approx_compile.tools.tuning.trial import Trials
from benchmarks.common.rows import conditions, show, store

WIDTH, LENGTH, BATCH = 128, 64, 32
STEPS = (0, 50, 150, 300)
READERS = {"query, key, value": ["blocks.*.q", "blocks.*.k", "blocks.*.v"], "gate, up": ["blocks.*.gate", "blocks.*.up"]}
EXACT = {"policy": "always", "method": "exact"}
COLUMNS = ("what", "step", "ratio", "exact", "own", "shared", "shared_by_own", "unit")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(128, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks, self.norm, self.head = nn.ModuleList(Block() for _ in range(3)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Readers(nn.Module):
    """Three layers that read one activation, behind a normalisation."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(width), nn.ModuleList(nn.Linear(width, out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.layers[0](h) * self.layers[1](h) + self.layers[2](h)


def loss(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), target.flatten())


def errors() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    text = torch.tensor(list(b"".join(p.read_bytes() for p in sorted(Path(os.__file__).parent.glob("*.py"))[:60]))).clamp_max(127)
    model, rows = Language(), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def batch() -> tuple[Tensor, Tensor]:
        parts = torch.stack([text[i : i + LENGTH + 1] for i in torch.randint(len(text) - LENGTH - 1, (BATCH,))])
        return parts[:, :-1], parts[:, 1:]

    for step in range(max(STEPS) + 1):
        tokens, target = batch()
        if step in STEPS:
            trials = Trials(model, (tokens,), target, loss, EXACT)
            exact = trials.gradients(EXACT)
            for what, layers in READERS.items():
                for ratio in (0.5, 0.25):
                    rule = {"layers": layers, "method": "topk", "ratio": ratio, "group": 1}
                    separate, shared = (trials.gradients(EXACT | {"rules": [rule | {"share": share}]}).error(exact) for share in (False, True))
                    rows.append({"what": what, "step": step, "ratio": ratio, "own": separate, "shared": shared, "unit": "error"})
        value = loss(model(tokens), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return rows


def times(width: int, out: int, tokens: int, ratio: float, rounds: int = 9) -> dict[str, Any]:
    """Milliseconds of a step of three layers, in turn: medians."""
    torch.manual_seed(0)
    model, x, steps = Readers(width, out), torch.randn(tokens, width, requires_grad=True), []
    for options in (EXACT, *({"policy": "always", "ratio": ratio, "share": share} for share in (False, True))):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=Backend(options, on_plan=lambda plan, before, after: None))
        grad = torch.ones_like(compiled(x))

        def step(compiled: Any = compiled, grad: Tensor = grad) -> None:
            model.zero_grad()
            x.grad = None
            compiled(x).backward(grad)

        step()
        steps.append(step)
    clock = BenchmarkTimer("cpu", 0.05)
    calls = [clock.calls(s) for s in steps]
    seconds = itertools.islice(clock.in_turn(steps, calls), rounds)
    exact, separate, shared = (statistics.median(column) * 1e3 for column in zip(*seconds, strict=True))
    return {"what": f"{tokens} x {width} to 3 x {out}", "ratio": ratio, "exact": exact, "own": separate, "shared": shared, "unit": "ms"}


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    rows = errors() + [times(*size, 0.5) for size in ((512, 512, 1024), (512, 64, 1024), (1024, 1024, 2048), (2048, 128, 1024))]
    for r in rows:
        r |= {k: float(f"{r[k]:.4g}") for k in ("exact", "own", "shared") if k in r} | {"shared_by_own": round(r["shared"] / r["own"], 3)}
    keys = dict.fromkeys(k for r in (conditions(), *rows[:1], *rows[-1:]) for k in r)
    store("share_study", [{k: (conditions() | r).get(k, "") for k in keys} for r in rows])
    show("error of the gradient, ms of a step", [{c: r.get(c, "") for c in COLUMNS} for r in rows], COLUMNS)


if __name__ == "__main__":
    typer.run(main)
