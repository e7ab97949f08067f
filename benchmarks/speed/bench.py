"""Speed against Inductor: `make bench`, or `python benchmarks/bench.py speed|rows|schedule|share|compile|deciding` with `--work`, `--ratio`, `--rounds`.

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

import csv
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from approx_compile._torch.known_faults import inductor
from approx_compile.backend.capture import graph_context
from approx_compile.machine import device_name
from approx_compile.tools.compare import race

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from models import build  # noqa: E402

from approx_compile import ApproxConfig, set_step  # noqa: E402
from approx_compile.backend.runtime.dispatch import Dispatch  # noqa: E402
from approx_compile.backend.runtime.schedule import Schedule  # noqa: E402
from approx_compile.backend.runtime.step_counter import after_step  # noqa: E402
from approx_compile.config import presets  # noqa: E402
from approx_compile.passes.joint_graph_pass import ApproxPass  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BARS = {("wrn", "0.5"): 1.85, ("wrn", "0.25"): 3.0, ("mlp", "0.5"): 1.65, ("mlp", "0.25"): 2.8, ("block", "0.5"): 1.55, ("block", "0.25"): 2.3}
BARS |= {("mlp", "0.5 by weight"): 2.8}
ALWAYS = {"policy": "always"}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution", "scaled_dot_product")
app = typer.Typer(help=__doc__, no_args_is_help=False)
console = Console()


class Block(nn.Module):
    """A transformer block: pre-norm, causal attention, GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


WORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
    "wrn": ("WRN-10-8, 64 x 3 x 32 x 32", lambda: build("wrn-10-8", (3, 32, 32), 10), lambda: torch.randn(64, 3, 32, 32), lambda: torch.randint(10, (64,))),
    "mlp": ("MLP 1024-4096-4096-10, batch 1024", lambda: mlp(1024, 4096, 4096, 10), lambda: torch.randn(1024, 1024), lambda: torch.randint(10, (1024,))),
    "block": ("transformer block, width 1024, 8 x 256 tokens", lambda: Block(1024), lambda: torch.randn(8, 256, 1024), None),
}

ROW_WORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
    "mlp1000": ("MLP 1024-4096-4096-10, batch 1000", lambda: mlp(1024, 4096, 4096, 10), lambda: torch.randn(1000, 1024), lambda: torch.randint(10, (1000,))),
    "mlp1024": ("MLP 1024-4096-4096-10, batch 1024", WORKS["mlp"][1], WORKS["mlp"][2], WORKS["mlp"][3]),
    "blocks": (
        "four transformer blocks, width 512, 16 x 128 tokens",
        lambda: nn.Sequential(*[Block(512) for _ in range(4)]),
        lambda: torch.randn(16, 128, 512),
        None,
    ),
    "cnn": (
        "CNN of Adelman et al., 128 x 28 x 28",
        lambda: build("cnn", (1, 28, 28), 10),
        lambda: torch.randn(128, 1, 28, 28),
        lambda: torch.randint(10, (128,)),
    ),
    "resnet": (
        "ResNet-20, 128 x 3 x 32 x 32",
        lambda: build("resnet-20", (3, 32, 32), 10),
        lambda: torch.randn(128, 3, 32, 32),
        lambda: torch.randint(10, (128,)),
    ),
    "wrn": ("WRN-10-2, 128 x 3 x 32 x 32", lambda: build("wrn-10-2", (3, 32, 32), 10), lambda: torch.randn(128, 3, 32, 32), lambda: torch.randint(10, (128,))),
}
ROW_BARS = {(w, r): bar for w in ("mlp1000", "mlp1024") for r, bar in ((0.5, 1.43), (0.25, 1.88), (0.1, 2.28))}
ROW_BARS |= {("blocks", 0.5): 1.46, ("blocks", 0.25): 1.94, ("blocks", 0.1): 2.5}


def stepper(work: str, options: dict[str, Any] | None) -> Callable[[], None]:
    """A training step without the optimizer, compiled by Inductor (options None) or approx; same weights and data for all."""
    _, make, data, target = (WORKS | ROW_WORKS)[work]
    torch.manual_seed(0)
    model = make()
    x, y = data(), target() if target is not None else None
    compiled = torch.compile(model, backend=inductor) if options is None else torch.compile(model, backend="approx", options=options)

    def step() -> None:
        for p in model.parameters():
            p.grad = None
        out = compiled(x)
        loss = F.cross_entropy(out, y) if y is not None else out.square().mean()
        loss.backward()

    step.model = model  # type: ignore[attr-defined]
    return step


def conditions() -> dict[str, Any]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "approx_compile"], capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit + ("+" if dirty else ""),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
    }


def store(name: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to results/<name>.csv (its header is the first row's keys)."""
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    console.print(f"{len(rows)} rows appended to {path.relative_to(ROOT)}")


def stored(name: str, where: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of results/<name>.csv that have these values."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [r for r in csv.DictReader(f) if all(r[k] == str(v) for k, v in where.items())]


def show(title: str, rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console.print(table)


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
    found = []
    for name in work or [w for w in ROW_WORKS if w != "resnet"]:
        shares = [] if name == "wrn" else [0.5, 0.25, 0.1]
        settings: dict[str, dict[str, Any]] = {f"{r:g}": {"grad": {"axis": "rows", "ratio": r}} for r in shares}
        settings["adaptive"] = {"policy": "adaptive", "adaptive": {"tau": 1e-9}}
        bars = {f"{r:g}": bar for (w, r), bar in ROW_BARS.items() if w == name} | {"adaptive": round(1 / 1.03, 3)}
        for setting, options in settings.items():
            torch._dynamo.reset()
            found += raced(ROW_WORKS[name][0], {"inductor": stepper(name, None), setting: stepper(name, options)}, rounds, bars)
    show("training step, backward on some rows, against Inductor", found, SPEED_COLUMNS)
    store("rows", found)


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
    found = raced(
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
    show("training step, mean over the schedule", found + switched, SPEED_COLUMNS)
    store("schedule", found + switched)


EXACT = {"policy": "always", "method": "exact"}


def _switch_us() -> dict[str, float]:
    """Microseconds of picking an assignment (figure 3's ten rules, 100 parameters) and of counting an optimizer step, medians of 2,000."""
    model = nn.ParameterList(torch.zeros(2) for _ in range(100))
    found = Schedule.of(ApproxConfig(**EXACT, rules=presets.figure_3()))
    pick = Dispatch(found, [lambda *args: None] * len(found.assignments), range(len(found.assignments)), range(100), "")
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


SPEED_COLUMNS = ("work", "setting", "median_ms", "p20_ms", "p80_ms", "speedup", "speedup_p20", "speedup_p80", "bar")


def raced(title: str, contest: dict[str, Callable[[], None]], rounds: int, bars: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every contestant; the one called inductor is what the others are compared with."""
    rows = []
    times = race(contest, rounds)
    base = statistics.median(times["inductor"])
    for setting, found in times.items():
        low, median, high = (round(statistics.quantiles(found, n=10)[i], 1) for i in (1, 4, 7))
        pairs = sorted(a / b for a, b in zip(times["inductor"], found, strict=True))
        rows.append(
            conditions()
            | {"work": title, "setting": setting, "rounds": rounds, "median_ms": median, "p20_ms": low, "p80_ms": high}
            | {"speedup": round(base / statistics.median(found), 3)}
            | {"speedup_p20": round(pairs[len(pairs) // 5], 3), "speedup_p80": round(pairs[-1 - len(pairs) // 5], 3), "bar": bars.get(setting, "")}
        )
    return rows


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    events = found.key_averages()
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
    found = []
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
            exact, own = medians["inductor", state], medians["approx", state]
            found.append(
                conditions()
                | {"work": (WORKS | ROW_WORKS)[name][0], "ratio": "adaptive" if rows else ratio, "cache": state, "repeats": repeats}
                | {"inductor_s": round(exact, 2), "approx_s": round(own, 2), "times": round(own / exact, 3), "bar": bar}
            )
    show("seconds to the first step", found, ("work", "ratio", "cache", "inductor_s", "approx_s", "times", "bar"))
    store("compile", found)


def _first_step(work: str, options: dict[str, Any] | None, folder: str) -> float:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench; bench.first_step({work!r}, {options!r})"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


@app.command()
def deciding(work: Annotated[list[str] | None, typer.Option(help="mlp, block, wrn, blocks; all by default")] = None) -> None:
    """Seconds in the pass itself (sites, costs, plan, rewriting, and reading the model for it) beside those of the whole first step, caches off."""
    found = []
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
        found.append(conditions() | row | {"bar": 0.05})
    show("deciding and rewriting", found, ("work", "deciding_s", "first_step_s", "share", "bar"))
    store("deciding", found)


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
