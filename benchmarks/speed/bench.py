"""Speed against Inductor: `make bench`, or `python -m benchmarks.speed.bench speed|rows|schedule|share|compile|deciding` with `--work`, `--ratio`, `--rounds`.

- `speed`: a training step without the optimizer (fp32, policy always, sampling forward, top-k), Inductor and approx in turn in one process; of the MLP also
  with choices by the weight alone (`topk_weights`), which the layers before know.
- `rows`: the same step with its backward pass on some rows of the batch, and under the policy "adaptive" where nothing may be left out.
- `schedule`: weight gradients by a schedule over steps, and what switching costs.
- `share`: how much of a sampled step is the sampling itself: the time outside products, less that of the exact step, from the profiler.
- `compile`: seconds of the first step in a fresh process, with an empty cache folder and with a filled one.
- `deciding`: the share of a cold first step under policy "cost" that goes into deciding and rewriting; every step after runs what was compiled.

Every result is a row in benchmarks/results/*.csv with device, threads, versions and commit. Nothing here is a test: times decide nothing in CI.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import nn

from approx_compile import ApproxConfig, set_step
from approx_compile.backend.capture import graph_context
from approx_compile.backend.runtime.dispatch import Dispatch
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.config import presets
from approx_compile.passes.joint_graph_pass import ApproxPass
from approx_compile.rows.step_counter import after_step
from approx_compile.tools.compare import race
from benchmarks.common.races import SPEED_COLUMNS, raced
from benchmarks.common.rows import ROOT, conditions, show, store
from benchmarks.common.works import ROW_WORKS, WORKS, stepper

BARS = {("wrn", "0.5"): 1.85, ("wrn", "0.25"): 3.0, ("mlp", "0.5"): 1.65, ("mlp", "0.25"): 2.8, ("block", "0.5"): 1.55, ("block", "0.25"): 2.3}
BARS |= {("mlp", "0.5 by weight"): 2.8}
ALWAYS = {"policy": "always"}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution", "scaled_dot_product")
app = typer.Typer(help=__doc__, no_args_is_help=False)


ROW_BARS = {(w, r): bar for w in ("mlp1000", "mlp1024") for r, bar in ((0.5, 1.43), (0.25, 1.88), (0.1, 2.28))}
ROW_BARS |= {("blocks", 0.5): 1.46, ("blocks", 0.25): 1.94, ("blocks", 0.1): 2.5}


@app.command()
def speed(
    work: Annotated[list[str] | None, typer.Option(help="wrn, mlp, block; all by default")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="kept shares; 0.5 and 0.25 by default")] = None,
    rounds: Annotated[int, typer.Option(help="timed steps of each")] = 15,
) -> None:
    """Training step against Inductor, in turn in one process: medians, 20th and 80th percentile."""
    rows = []
    for name in work or list(WORKS):
        torch._dynamo.reset()
        contest = {"inductor": stepper(name, None)} | {f"{r:g}": stepper(name, ALWAYS | {"ratio": r}) for r in ratio or [0.5, 0.25]}
        if name == "mlp":
            by_weight = ALWAYS | {"method": "topk_weights"}
            contest |= {f"{r:g} by weight": stepper(name, by_weight | {"ratio": r}) for r in ratio or [0.5, 0.25]}
        rows += raced(WORKS[name][0], contest, rounds, {setting: bar for (w, setting), bar in BARS.items() if w == name})
    show("training step against Inductor", rows, SPEED_COLUMNS)
    store("speed", rows)


@app.command("rows")
def rows_speed(
    work: Annotated[list[str] | None, typer.Option(help="mlp1000, mlp1024, blocks, cnn, wrn; all by default")] = None,
    rounds: Annotated[int, typer.Option(help="timed steps of each")] = 15,
) -> None:
    """Training step with the backward pass on 0.5, 0.25 and 0.1 of the rows; "adaptive" here keeps all, for the data is noise. Each setting in turn with
    Inductor alone: five models in a process take each other's caches, which cost the blocks 2% at 0.25."""
    rows = []
    for name in work or [w for w in ROW_WORKS if w != "resnet"]:
        shares = [] if name == "wrn" else [0.5, 0.25, 0.1]
        settings: dict[str, dict[str, Any]] = {f"{r:g}": {"grad": {"axis": "rows", "ratio": r}} for r in shares}
        settings["adaptive"] = {"policy": "adaptive", "adaptive": {"tau": 1e-9}}
        bars = {f"{r:g}": bar for (w, r), bar in ROW_BARS.items() if w == name} | {"adaptive": round(1 / 1.03, 3)}
        for setting, options in settings.items():
            torch._dynamo.reset()
            rows += raced(ROW_WORKS[name][0], {"inductor": stepper(name, None), setting: stepper(name, options)}, rounds, bars)
    show("training step, backward on some rows, against Inductor", rows, SPEED_COLUMNS)
    store("rows", rows)


@app.command()
def schedule(rounds: Annotated[int, typer.Option(help="timed periods of each, four steps long")] = 15) -> None:
    """ResNet-20 under Wang and Nelaturu's schedule 3 (all weight gradients of convolutions at every fourth step), mean of a period of four steps; and what
    switching costs: two assignments in turn against four steps of each."""
    cycles: dict[str, Callable[[], None]] = {"inductor": cycle("resnet", None, range(4))}
    for name, method in {
        "zero": "zero",
        "max": "max",
        "max, tile .5": {"method": "max", "tile": 0.5, "scale": 0.5},
        "max, tile 8": {"method": "max", "tile": 8, "scale": 0.5},
        "max, tile auto": {"method": "max", "tile": "auto"},
    }.items():
        cycles[f"schedule 3, {name}"] = cycle("resnet", {**EXACT, "rules": presets.schedule_3(method)}, range(4))
    torch._dynamo.reset()
    raced_rows = raced(
        ROW_WORKS["resnet"][0],
        cycles,
        rounds,
        {"schedule 3, zero": 1.05} | {name: 1.035 for name in cycles if "max" in name},
    )
    torch._dynamo.reset()
    turns = {**EXACT, "rules": [{"layers": "conv", "steps": "1::2", "grad_weight": "zero"}]}
    contest = {"inductor": cycle("resnet", None, range(4)), "in turn": cycle("resnet", turns, range(4))}
    contest |= {"first only": cycle("resnet", turns, [0] * 4), "second only": cycle("resnet", turns, [1] * 4)}
    switched = raced(ROW_WORKS["resnet"][0], contest, rounds, {})
    by_name = {r["setting"]: r["median_ms"] for r in switched}
    mean = (by_name["first only"] + by_name["second only"]) / 2
    costs = conditions() | {"work": ROW_WORKS["resnet"][0], "in_turn_over_mean": round(by_name["in turn"] / mean, 4), "bar": 1.03} | _switch_us()
    show("switching", [costs], ("in_turn_over_mean", "bar", "dispatch_us", "count_us"))
    store("switch", [costs])
    show("training step, mean over the schedule", raced_rows + switched, SPEED_COLUMNS)
    store("schedule", raced_rows + switched)


EXACT = {"policy": "always", "method": "exact"}


def _switch_us() -> dict[str, float]:
    """Microseconds of picking an assignment (figure 3's ten rules, 100 parameters) and of counting an optimizer step, medians of 2,000."""
    model = nn.ParameterList(torch.zeros(2) for _ in range(100))
    timetable = Schedule.of(ApproxConfig(**EXACT, rules=presets.figure_3()))
    pick = Dispatch(timetable, [lambda *args: None] * len(timetable.assignments), range(len(timetable.assignments)), range(100), "")
    set_step(model, 1)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters)
    counted = {"dispatch_us": lambda: pick(*parameters), "count_us": lambda: after_step(optimizer, (), {})}
    return {name: round(statistics.median(times) * 1e3, 2) for name, times in race(counted, 2000).items()}


def cycle(work: str, options: dict[str, Any] | None, steps: Sequence[int]) -> Callable[[], None]:
    """Training steps at these places of a schedule, as one."""
    step = stepper(work, options)

    def run() -> None:
        for i in steps:
            set_step(step.model, i)  # type: ignore[attr-defined]
            step()

    return run


@app.command()
def share(ratio: Annotated[float, typer.Option(help="kept share")] = 0.5, steps: Annotated[int, typer.Option(help="profiled steps")] = 8) -> None:
    """The sampling's own share of a step: what runs outside the products, less what runs there in the exact step."""
    rows = []
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        for name in WORKS:
            torch._dynamo.reset()
            exact_rest, exact_products = _profile(stepper(name, None), steps)
            rest, products = _profile(stepper(name, ALWAYS | {"ratio": ratio}), steps)
            rows.append(
                conditions()
                | {"work": WORKS[name][0], "ratio": ratio, "exact_products_ms": exact_products, "exact_rest_ms": exact_rest}
                | {"products_ms": products, "rest_ms": rest, "sampling_share": round(max(0.0, rest - exact_rest) / (rest + products), 4), "bar": 0.12}
            )
    show("the sampling's share of a step", rows, ("work", "exact_products_ms", "exact_rest_ms", "products_ms", "rest_ms", "sampling_share", "bar"))
    store("share", rows)


def _profile(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Milliseconds per step outside and inside matrix products and convolutions (time of the calling thread)."""
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    events = profile.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    products = sum(e.self_cpu_time_total for e in events if any(p in e.key for p in PRODUCTS) and "cpp_fused" not in e.key)
    return round((total - products) / steps / 1e3, 2), round(products / steps / 1e3, 2)


@app.command("compile")
def compile_times(
    ratio: Annotated[float, typer.Option(help="kept share")] = 0.5,
    repeats: Annotated[int, typer.Option(help="fresh folders tried")] = 3,
    rows: Annotated[bool, typer.Option(help="instead: policy adaptive, with every rung of its ladder")] = False,
) -> None:
    """Seconds of the first step in a fresh process: cold (empty cache folder) and warm (second process on it), approx beside Inductor."""
    results = []
    works = [w for w in ROW_WORKS if w not in ("mlp1000", "resnet")] if rows else list(WORKS)
    ours: dict[str, Any] = {"policy": "adaptive"} if rows else ALWAYS | {"ratio": ratio}
    for name in works:
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(repeats):
            for compiler, options in (("inductor", None), ("approx", ours)):
                with tempfile.TemporaryDirectory() as folder:
                    for state in ("cold", "warm"):
                        seconds.setdefault((compiler, state), []).append(_first_step(name, options, folder))
        medians = {key: statistics.median(v) for key, v in seconds.items()}
        for state, bar in (("cold", 2.0), ("warm", "")) if rows else (("cold", 1.5), ("warm", 1.2)):
            exact, approx = medians["inductor", state], medians["approx", state]
            results.append(
                conditions()
                | {"work": (WORKS | ROW_WORKS)[name][0], "ratio": "adaptive" if rows else ratio, "cache": state, "repeats": repeats}
                | {"inductor_s": round(exact, 2), "approx_s": round(approx, 2), "times": round(approx / exact, 3), "bar": bar}
            )
    show("seconds to the first step", results, ("work", "ratio", "cache", "inductor_s", "approx_s", "times", "bar"))
    store("compile", results)


def _first_step(work: str, options: dict[str, Any] | None, folder: str) -> float:
    code = f"from benchmarks.speed import bench; bench.first_step({work!r}, {options!r})"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


@app.command()
def deciding(work: Annotated[list[str] | None, typer.Option(help="mlp, block, wrn, blocks; all by default")] = None) -> None:
    """Seconds in the pass itself (sites, costs, plan, rewriting, and reading the model for it) beside those of the whole first step, caches off."""
    rows = []
    for name in work or ["mlp", "block", "wrn", "blocks"]:
        torch._dynamo.reset()
        spent = [0.0]

        def timed(run: Callable[..., Any], spent: list[float] = spent) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return run(*args, **kwargs)
                finally:
                    spent[0] += time.perf_counter() - begin

            return call

        with (
            mock.patch.object(ApproxPass, "__call__", timed(ApproxPass.__call__)),
            mock.patch.object(graph_context, "read_graph", timed(graph_context.read_graph)),
            torch._inductor.config.patch(force_disable_caches=True),
        ):
            step = stepper(name, {"policy": "cost"})
            begin = time.perf_counter()
            step()
            total = time.perf_counter() - begin
        row = {"work": (WORKS | ROW_WORKS)[name][0], "deciding_s": round(spent[0], 3), "first_step_s": round(total, 2), "share": round(spent[0] / total, 4)}
        rows.append(conditions() | row | {"bar": 0.05})
    show("deciding and rewriting", rows, ("work", "deciding_s", "first_step_s", "share", "bar"))
    store("deciding", rows)


def first_step(work: str, options: dict[str, Any] | None) -> None:
    """Print the seconds from making the model to the end of its first step, the compilers' imports included, less a second step (run in a child)."""
    marks = [time.perf_counter()]
    step = stepper(work, options)
    for _ in range(2):
        step()
        marks.append(time.perf_counter())
    print(json.dumps(marks[1] - marks[0] - (marks[2] - marks[1])))


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """All of them, in turn."""
    if context.invoked_subcommand is None:
        speed(None, None, 15)
        rows_speed(None, 15)
        schedule(15)
        share(0.5, 8)
        compile_times(0.5, 3, False)
        compile_times(0.5, 3, True)
        deciding(None)


if __name__ == "__main__":
    app()
