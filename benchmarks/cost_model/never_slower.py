"""Unmodified models against Inductor: `python -m benchmarks.cost_model.never_slower`, with `--policy`, `--threads`, `--limit`, `--fresh`.

Policies: "adaptive", what the one line without options means, at its worst: no row may be left out (tau 1e-9), so that whatever it costs is a loss; and
"cost" with its defaults. Each model of `zoo` takes training steps without the optimizer, Inductor's and ours in turn in one process; one row a model in
results/never_slower.csv, and models that have one for this policy, device, number of threads, torch and profile are not measured again. Bars: 0.97 for
every model, 1 for their geometric mean. One thread is timed by its CPU time, which other processes disturb less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor

from approx_compile import Backend, machine
from approx_compile._torch.known_faults import inductor
from approx_compile.machine.timer import BenchmarkTimer
from approx_compile.passes.planning.plan import Plan
from approx_compile.tools.compare import race
from benchmarks.common.rows import conditions, console, show, store, stored
from benchmarks.common.zoo import Work, works

KEY = ("device", "threads", "torch", "profile", "policy")
POLICIES: dict[str, dict[str, Any]] = {"cost": {"policy": "cost"}, "adaptive": {"policy": "adaptive", "adaptive": {"tau": 1e-9}}}
BAR = 0.97


def stepper(make: Callable[[], Work], backend: Any) -> Callable[[], None]:
    torch.manual_seed(0)
    model, given = make()
    compiled = torch.compile(model, backend=backend)

    def step() -> None:
        for p in model.parameters():
            p.grad = None
        out = compiled(**given) if isinstance(given, dict) else compiled(*given)
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        first.square().mean().backward()

    return step


def row(name: str, make: Callable[[], Work], policy: str, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    plans: list[Plan] = []
    ours = Backend(POLICIES[policy], on_plan=lambda plan, before, after: plans.append(plan))
    clock = BenchmarkTimer("cpu", 0.0)
    with torch._inductor.config.patch(force_disable_caches=True):  # of a cached graph nothing is planned
        times = race({"inductor": stepper(make, inductor), "ours": stepper(make, ours)}, rounds, now=clock.now)
    base, approx = (statistics.median(times[s]) for s in ("inductor", "ours"))
    sites = [s for plan in plans for s in plan.sites]
    return conditions() | {
        "profile": machine.current().digest[:12],
        "policy": policy,
        "work": name,
        "sites": len(sites),
        "sampled": sum(s.decision == "sampled" for s in sites),
        "inductor_ms": round(base, 3),
        "ours_ms": round(approx, 3),
        "rounds": rounds,
        "clock": clock.now.__name__,
        "speedup": round(base / approx, 3),
    }


def main(
    policy: Annotated[str, typer.Option(help="cost, adaptive")] = "cost",
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its own choice")] = 0,
    limit: Annotated[int, typer.Option(help="measure no more than so many models now; 0 means all")] = 0,
    rounds: Annotated[int, typer.Option(help="timed steps of each")] = 15,
    fresh: Annotated[bool, typer.Option(help="measure models again that have a row")] = False,
    work: Annotated[list[str] | None, typer.Option(help="only these models, measured again")] = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if policy not in POLICIES:
        raise typer.BadParameter(f"got {policy!r}; {', '.join(POLICIES)} are there", param_hint="--policy")
    here = conditions() | {"profile": machine.current().digest[:12], "policy": policy}
    rows = [] if fresh or work else stored("never_slower", {k: here[k] for k in KEY})
    done = {r["work"] for r in rows}
    todo = [(name, make) for name, make in works().items() if (name in work if work else name not in done)]
    for name, make in track(todo[: limit or None], "timing models", console=console):
        rows.append(row(name, make, policy, rounds))
        store("never_slower", rows[-1:])
    show(f"training step under policy {policy} against Inductor", rows, ("work", "sites", "sampled", "inductor_ms", "ours_ms", "speedup"))
    gains = [float(r["speedup"]) for r in rows]
    console.print(f"{len(rows)} models, geometric mean {statistics.geometric_mean(gains):.3f} (bar 1), lowest {min(gains):.3f} (bar {BAR})")
    for r in rows:
        if float(r["speedup"]) < BAR:
            console.print(f"below the bar: {r['work']}, {r['speedup']}")


if __name__ == "__main__":
    typer.run(main)
