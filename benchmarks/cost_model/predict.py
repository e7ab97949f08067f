"""Predicted against measured time of sites alone: `python -m benchmarks.cost_model.predict`, with `--threads`, `--limit`, `--fresh`, `--again COMMIT`.

Each of some 90 sites (linear, bmm, conv; fp32 and bf16) is a model of its own, whose forward and backward pass is timed as Inductor compiles it and
with every product sampled (top-k, forward), in turn. A step is predicted as its products' times (`approx_compile.passes.cost.estimates`) and the time of a step
on next to no data of the same dtype, measured here. One row a site in results/predict.csv; sites that have one for this device, number of threads,
torch and profile are not measured again. `--again COMMIT` measures none: times that were stored at that commit are predicted anew, by the present code and
profile (column `timed`: the commit whose times they are). Bars:
median error 15%, 90th percentile 40%; decisions within 3% of the better of exact and sampled on
average, and no site approximated that is slower by over 2%.
"""

from __future__ import annotations

import functools
import random
import statistics
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from approx_compile import Backend, machine
from approx_compile.backend import run_as_is
from approx_compile.backend.site_benchmark import SingleProduct, times_us
from approx_compile.machine.site_timings import OperandLayout, TimedProduct
from approx_compile.passes.cost import margins
from approx_compile.passes.planning.plan import Plan, SitePlan
from benchmarks.common.rows import conditions, console, show, store, stored

BATCHES = (1, 4, 16, 64, 256, 1024)
WIDTHS = (16, 64, 128, 256, 512, 1024, 2048, 4096)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)
LARGEST_FLOP = 1e10
KEY = ("profile", "kind", "dtype", "shape", "ratio")


def contiguous(*shape: int) -> OperandLayout:
    return shape, torch.empty(shape, device="meta").stride()


def channels_last(*shape: int) -> OperandLayout:
    return shape, torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()


def linear(pick: random.Random) -> tuple[float, Any]:
    m, k, n = pick.choice(BATCHES), pick.choice(WIDTHS), pick.choice(WIDTHS)
    return 2 * m * k * n, dict(op="mm", layouts=(contiguous(m, k), ((k, n), (1, k))))


def bmm(pick: random.Random) -> tuple[float, Any]:
    b, m, k, n = pick.choice(BATCHES[:4]), pick.choice(WIDTHS[:6]), pick.choice(WIDTHS[:6]), pick.choice(WIDTHS[:6])
    return 2 * b * m * k * n, dict(op="bmm", layouts=(contiguous(b, m, k), contiguous(b, k, n)), weight=None)


def conv(pick: random.Random) -> tuple[float, Any]:
    n, c, o, side, kernel = pick.choice(BATCHES), pick.choice(WIDTHS[:6]), pick.choice(WIDTHS[:6]), pick.choice((4, 8, 16, 32)), pick.choice((1, 3))
    rest = ((1, 1), (kernel // 2,) * 2, (1, 1), False, (0, 0), 1)
    return 2 * n * side**2 * c * o * kernel**2, dict(op="convolution", layouts=(channels_last(n, c, side, side), contiguous(o, c, kernel, kernel)), rest=rest)


def grid() -> list[tuple[str, TimedProduct, float]]:
    """Drawn once and for all: sizes that are too large to time many of are drawn again."""
    pick, sites = random.Random(0), []
    for kind, make, count in (("linear", linear, 44), ("bmm", bmm, 20), ("conv", conv, 26)):
        while sum(f[0] == kind for f in sites) < count:
            flops, given = make(pick)
            if 1e4 < flops < LARGEST_FLOP:
                sites.append((kind, TimedProduct(dtype=pick.choice(("float32", "bfloat16")), device="cpu", **given), pick.choice(RATIOS)))
    pick.shuffle(sites)  # so that a part of them is a fair sample
    return sites


def planned(product: TimedProduct, ratio: float, rounds: int) -> tuple[SitePlan, list[float]]:
    """The plan of the site with every product sampled, and the times of an exact and of a sampled step."""
    plans: list[Plan] = []
    options = {"policy": "always", "ratio": ratio, "min_k": 1}
    times = times_us(product, ["inductor", Backend(options, on_plan=lambda plan, before, after: plans.append(plan))], rounds)
    return plans[0].sites[0], times


@functools.cache
def overhead_us(dtype: str) -> float:
    """A step's time outside of its products, from a small site."""
    site, (exact, _) = planned(TimedProduct("mm", (contiguous(4, 128), ((128, 16), (1, 128))), dtype, "cpu"), 0.5, 15)
    assert site.time_exact_us is not None
    return max(0.0, exact - site.time_exact_us)


def row(kind: str, product: TimedProduct, ratio: float, rounds: int) -> dict[str, Any]:
    outside = overhead_us(product.dtype)
    site, (exact, sampled) = planned(product, ratio, rounds)
    return compared(site, identity(kind, product, ratio), exact, sampled, outside, conditions()["commit"])


def row_again(old: dict[str, Any], kind: str, product: TimedProduct, ratio: float) -> dict[str, Any]:
    """A stored row's times, predicted anew."""
    torch.compiler.reset()
    plans: list[Plan] = []
    backend = Backend({"policy": "always", "ratio": ratio, "min_k": 1}, inner_compile=run_as_is, on_plan=lambda plan, before, after: plans.append(plan))
    model = SingleProduct(product)
    torch.compile(model, backend=backend)(*model.given())
    exact, sampled, outside = (float(old[k]) for k in ("exact_us", "sampled_us", "overhead_us"))
    return compared(plans[0].sites[0], identity(kind, product, ratio), exact, sampled, outside, old.get("timed") or old["commit"])


def compared(site: SitePlan, what: dict[str, Any], exact: float, sampled: float, outside: float, timed: str) -> dict[str, Any]:
    assert site.time_exact_us is not None and site.time_sampled_us is not None
    chosen = site.decision == "sampled" and margins.threshold(site.kind, machine.current()).is_exceeded(site.time_exact_us, site.time_sampled_us)
    return (
        {k: v for k, v in conditions().items() if k != "dtype"}
        | what
        | {"timed": timed, "exact_us": round(exact, 1), "sampled_us": round(sampled, 1), "overhead_us": round(outside, 1)}
        | {"predicted_exact_us": round(site.time_exact_us + outside, 1), "predicted_sampled_us": round(site.time_sampled_us + outside, 1)}
        | {"decision": "sampled" if chosen else "exact", "regret": round((sampled if chosen else exact) / min(exact, sampled) - 1, 4)}
    )


def identity(kind: str, product: TimedProduct, ratio: float) -> dict[str, Any]:
    shape = " x ".join("x".join(map(str, shape)) for shape, _ in product.layouts)
    return {"profile": machine.current().digest[:12], "kind": kind, "dtype": product.dtype, "shape": shape, "ratio": ratio}


def summary(rows: list[dict[str, Any]]) -> None:
    errors = sorted(abs(float(r[f"predicted_{s}_us"]) / float(r[f"{s}_us"]) - 1) for r in rows for s in ("exact", "sampled"))
    sampled = [r for r in rows if r["decision"] == "sampled"]
    slower = [r for r in sampled if float(r["sampled_us"]) > 1.02 * float(r["exact_us"])]
    lines = {
        "median error (bar 0.15)": statistics.median(errors),
        "90th percentile (bar 0.4)": statistics.quantiles(errors, n=10)[-1],
        "mean regret (bar 0.03)": statistics.mean(float(r["regret"]) for r in rows),
        "sites": len(rows),
        "approximated": len(sampled),
        "of those slower by over 2% (bar 0)": len(slower),
    }
    show("predicted against measured", [{"what": k, "found": v} for k, v in lines.items()], ("what", "found"))
    for r in slower:
        console.print(f"slower: {r['kind']} {r['dtype']} {r['shape']} at {r['ratio']}: {r['exact_us']} -> {r['sampled_us']} us")


def main(
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its own choice")] = 0,
    limit: Annotated[int, typer.Option(help="measure no more than so many sites now; 0 means all")] = 0,
    rounds: Annotated[int, typer.Option(help="timed rounds of each")] = 7,
    fresh: Annotated[bool, typer.Option(help="measure sites again that have a row")] = False,
    again: Annotated[str, typer.Option(help="predict the times stored at this commit anew")] = "",
) -> None:
    if threads:
        torch.set_num_threads(threads)
    here = conditions() | {"profile": machine.current().digest[:12]}
    if again:
        old = {tuple(r[k] for k in KEY[1:]): r for r in stored("predict", {"timed": again})}
        known = [(old[tuple(str(identity(*g)[k]) for k in KEY[1:])], g) for g in grid()]
        rows = [row_again(r, *g) for r, g in track(known, "predicting", console=console)]
        store("predict", rows)
        return summary(rows)
    rows = [] if fresh else [r for r in stored("predict", {k: here[k] for k in ("device", "threads", "torch", "profile")}) if r["timed"] == r["commit"]]
    done = [{k: r[k] for k in KEY} for r in rows]
    todo = [g for g in grid() if {k: str(v) for k, v in identity(*g).items()} not in done]
    for site in track(todo[: limit or None], "timing sites", console=console):
        result = row(*site, rounds)
        store("predict", [result])
        rows.append(result)
    summary(rows)


if __name__ == "__main__":
    typer.run(main)
