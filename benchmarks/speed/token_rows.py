"""A training step of four transformer blocks whose regions run on a share of the tokens, against Inductor.

The blocks have width 512 and batches of 16 x 128 tokens, half of which are padding that attention and the mean over tokens leave out. Inductor and each of
the settings take steps without the optimizer in turn, in one process; one row for each setting in results/token_rows.csv. Bars: 1.40, 1.75 and 2.0 with
shares .5, .25 and .1, and 1.35 with `tau: 0`, which leaves out only tokens without a gradient.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from approx_compile import Backend, decisions
from approx_compile._torch import known_faults
from approx_compile.rows.controller import OBSERVE_EVERY
from approx_compile.tools.compare import race
from benchmarks.common.rows import conditions, console, show, store

BARS = {"share 0.5": 1.40, "share 0.25": 1.75, "share 0.1": 2.0, "zeros only": 1.35}
WARM_UP = 12 * OBSERVE_EVERY
"""Steps until the adaptive share has settled."""


class Block(nn.Module):
    """A transformer block with the norm inside the residual branches."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Blocks whose attention leaves padding out."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """The mean over the tokens that are `real` (B, T)."""
        for block in self.blocks:
            x = block(x, real[:, None, None])
        weight = real.unsqueeze(-1).to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


def settings(work: str) -> dict[str, Any]:
    """The options of one of the works."""
    if work == "zeros only":
        return {"policy": "adaptive", "grad": {"axis": "tokens"}, "adaptive": {"tau": 0}}
    return {"policy": "adaptive", "grad": {"axis": "tokens", "ratio": float(work.removeprefix("share "))}}


def row(work: str, rounds: int, width: int, blocks: int, batch: int, length: int, padding: float) -> dict[str, Any]:
    """Measure one of the works."""
    plans: list[Any] = []
    ours = Backend(settings(work), on_plan=lambda plan, before, after: plans.append(plan))
    steps, first, models = {}, {}, {}
    x = torch.randn(batch, length, width)
    lengths = ((1 - padding) * length * torch.linspace(0.5, 1.5, batch).view(-1, 1)).clamp(1, length)
    real = torch.arange(length) < lengths
    for who, backend in (("inductor", known_faults.inductor), ("tokens", ours)):
        torch.manual_seed(0)
        models[who] = Blocks(width, blocks).train()
        compiled = torch.compile(models[who], backend=backend)

        def step(compiled: Any = compiled, model: nn.Module = models[who]) -> None:
            model.zero_grad()
            compiled(x, real).square().mean().backward()

        begin = time.perf_counter()
        step()
        first[who], steps[who] = time.perf_counter() - begin, step
    for _ in range(WARM_UP if work == "zeros only" else 1):
        steps["tokens"]()
    times = race(steps, rounds)
    base, on_tokens = (statistics.median(times[s]) for s in ("inductor", "tokens"))
    ratios = [a / b for a, b in zip(times["inductor"], times["tokens"], strict=True)]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    kept = [c.ratio for c in decisions(models["tokens"]).cuts.values()]
    cuts = [c for plan in plans for c in plan.cuts]
    return conditions() | {
        "work": work,
        "width": width,
        "blocks": blocks,
        "tokens": f"{batch} x {length}",
        "real": round(real.float().mean().item(), 3),
        "kept": round(statistics.mean(kept), 3) if kept else settings(work)["grad"]["ratio"],
        "regions": sum(c.decision == "rows" for c in cuts),
        "share_on_tokens": round(sum(c.flops_on_rows for c in cuts) / max(1, cuts[0].flops_all), 3),
        "inductor_ms": round(base, 2),
        "tokens_ms": round(on_tokens, 2),
        "rounds": rounds,
        "speedup": round(statistics.median(ratios), 3),
        "p20": round(fifths[0], 3),
        "p80": round(fifths[-1], 3),
        "first_inductor_s": round(first["inductor"], 1),
        "first_tokens_s": round(first["tokens"], 1),
    }


def main(
    work: Annotated[list[str] | None, typer.Option(help="only these settings; all by default")] = None,
    rounds: Annotated[int, typer.Option(help="timed steps of each")] = 12,
    width: Annotated[int, typer.Option(help="of the blocks")] = 512,
    blocks: Annotated[int, typer.Option(help="how many")] = 4,
    batch: Annotated[int, typer.Option(help="sequences")] = 16,
    length: Annotated[int, typer.Option(help="of a sequence")] = 128,
    padding: Annotated[float, typer.Option(help="share of the tokens that are padding, on average")] = 0.5,
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its own choice")] = 0,
    keep: Annotated[bool, typer.Option(help="store the rows")] = True,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if unknown := set(work or ()) - set(BARS):
        raise typer.BadParameter(f"--work: got {', '.join(sorted(unknown))}; valid are {', '.join(BARS)}")
    for name in work or BARS:
        torch._dynamo.reset()
        result = row(name, rounds, width, blocks, batch, length, padding)
        if keep:
            store("token_rows", [result])
        show("training step on tokens against Inductor", [result], ("work", "real", "kept", "regions", "inductor_ms", "tokens_ms", "speedup", "p20", "p80"))
        console.print(f"bar {BARS[name]}: {'met' if result['speedup'] >= BARS[name] else 'missed'}")


if __name__ == "__main__":
    typer.run(main)
