"""`tune` on whole models: predicted speed-up against achieved. `python -m benchmarks.speed.tune --threads 1 --work blocks`; rows go to results/tune.csv.

Resumable: a work that has a row of this commit, device and number of threads is skipped unless `--again`. The plan's own figures are in the row (the time of
the plan, taken by `tune` in turn with the exact step once the plan is chosen), and the two of a race afterwards, model and loss compiled as a user would.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import approx_compile
from approx_compile._torch.known_faults import inductor
from approx_compile.tools.compare import race
from benchmarks.common.rows import RESULTS, conditions, console, show, store
from benchmarks.common.works import Block, mlp
from examples.models import build

BAR = 0.1
"""How far predicted and achieved speed-up may be apart, relatively."""

VOCABULARY = 256

Work = tuple[str, Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]
WORKS: dict[str, Work] = {
    "wrn": ("WRN-16-4, 64 x 3 x 32 x 32", lambda: build("wrn-16-4", (3, 32, 32), 10), lambda: torch.randn(64, 3, 32, 32), lambda: torch.randint(10, (64,))),
    "blocks": ("four transformer blocks, width 512, 8 x 128 tokens", lambda: _language(512), lambda: _tokens(), lambda: _tokens()),
    "mlp": (
        "MLP 512-1024-1024-1024-512-10, batch 256",
        lambda: mlp(512, *[1024] * 3, 512, 10),
        lambda: torch.randn(256, 512),
        lambda: torch.randint(10, (256,)),
    ),
    "blocks-256": ("four transformer blocks, width 256, 8 x 128 tokens", lambda: _language(256), lambda: _tokens(), lambda: _tokens()),
}
COLUMNS = ("work", "rows", "max_error", "error", "kept", "predicted", "achieved", "apart", "bar", "tune_s", "stopped")


def _language(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, width), *[Block(width) for _ in range(4)], nn.Linear(width, VOCABULARY))


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (8, 128))


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def main(
    work: Annotated[list[str] | None, typer.Option(help=", ".join(WORKS) + "; wrn and blocks by default")] = None,
    threads: Annotated[int, typer.Option(help="torch's threads")] = 1,
    max_error: Annotated[float, typer.Option(help="of the gradient")] = 0.5,
    ladder: Annotated[str, typer.Option(help="ratios")] = "0.7,0.5,0.35,0.25",
    rows: Annotated[bool, typer.Option(help="row sampling is tried, too")] = True,
    budget: Annotated[float, typer.Option(help="seconds for tune")] = 1800.0,
    rounds: Annotated[int, typer.Option(help="timed steps of each in the race")] = 9,
    again: Annotated[bool, typer.Option(help="also what has a row")] = False,
) -> None:
    """Tune, then race the plan against Inductor."""
    torch.set_num_threads(threads)
    results = []
    for name in work or ["wrn", "blocks"]:
        if not again and _has_row(WORKS[name][0], ladder, max_error, rows):
            console.print(f"{name}: has a row; --again measures it again")
            continue
        row = _measured(name, [float(r) for r in ladder.split(",")], max_error, rows, budget, rounds)
        store("tune", [row])
        results.append(row)
    if results:
        show("tune: predicted against achieved", results, COLUMNS)


def _measured(name: str, ladder: list[float], max_error: float, rows: bool, budget: float, rounds: int) -> dict[str, Any]:
    title, make, data, target = WORKS[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x, y = make(), data(), target()
    begin = time.perf_counter()
    plan = approx_compile.tune(model, x, target=y, loss=_cross_entropy, max_error=max_error, time_budget_s=budget, ladder=ladder, rows=rows)
    spent = time.perf_counter() - begin
    console.print(str(plan), highlight=False, markup=False)
    plan.save(RESULTS / f"tune-{name}{'' if rows else '-sites'}.toml")

    def stepper(options: dict[str, Any] | None) -> Callable[[], None]:
        run = torch.compile(model, backend=inductor) if options is None else torch.compile(model, backend="approx", options=options)

        def step() -> None:
            torch.autograd.grad(_cross_entropy(run(x), y), list(model.parameters()))

        return step

    times = race({"inductor": stepper(None), "plan": stepper({"plan": plan})}, rounds)
    pairs = sorted(a / b for a, b in zip(times["inductor"], times["plan"], strict=True))
    tuned = plan.tuned
    assert tuned is not None
    achieved = tuned.achieved_speedup
    apart = round(tuned.predicted_speedup / achieved - 1, 4) if achieved is not None else ""
    kept = " ".join(f"{s.name}:{s.ratio:g}" for s in tuned.sites if s.ratio < 1) or (f"rows:{tuned.rows:g}" if tuned.rows else "all")
    figures = {"error": tuned.error, "kept": kept, "predicted": tuned.predicted_speedup, "achieved": achieved or "", "apart": apart, "bar": BAR}
    race_found = {"race": round(pairs[len(pairs) // 2], 3), "race_p20": round(pairs[len(pairs) // 5], 3), "race_p80": round(pairs[-1 - len(pairs) // 5], 3)}
    head = conditions() | {"work": title, "ladder": " ".join(f"{r:g}" for r in ladder), "max_error": max_error, "rows": rows}
    return head | figures | race_found | {"rounds": rounds, "tune_s": round(spent), "stopped": tuned.stopped or ""}


def _has_row(title: str, ladder: str, max_error: float, rows: bool) -> bool:
    path = Path(RESULTS / "tune.csv")
    if not path.exists():
        return False
    now = conditions()
    same = {k: str(now[k]) for k in ("commit", "device", "threads")}
    same |= {"work": title, "ladder": ladder.replace(",", " "), "max_error": str(max_error), "rows": str(rows)}
    with path.open(newline="") as f:
        return any(all(row[k] == v for k, v in same.items()) for row in csv.DictReader(f))


if __name__ == "__main__":
    typer.run(main)
