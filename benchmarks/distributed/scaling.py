"""Predict the step of a data-parallel training from the time of one worker, the bytes that are exchanged, and a link's latency and bandwidth.

```
python -m benchmarks.distributed.scaling predict --exact-ms 350 --sampled-ms 255 --whole-mb 241 --share 0.52 --model resnet-152
python -m benchmarks.distributed.scaling check    # against the stored rows of `exchange links`
```

The model is the alpha-beta model of a ring all-reduce (Thakur, Rabenseifner and Gropp, 2005), with DDP's overlap:

- a message of n bytes takes alpha + n / beta on a link; a ring of p workers makes 2 (p - 1) steps with n / p bytes each;
- the gradients leave in `buckets` messages of one size while the backward pass runs, each when its share of it is done; the last one leaves at its end;
- messages go one after the other, and the step ends with the last of them. The optimizer is left out.

Packing is part of the measured step. Rows go to results/scaling.csv; columns `exact_ms` and `sampled_ms` are steps, and `speedup` is their quotient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.common.rows import conditions, show, store, stored

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)
PAPER = {"ResNet-152, 40 %": (0.48, 1.16, 1.37), "ResNet-152, 12 %": (0.23, None, 1.13), "ResNet-152, 9 %": (0.13, 1.04, 1.09)}
"""Table 1 of Adelman et al. (2021), 8 nodes: communication saved, speed-up on one node where it is given, speed-up on eight."""


@dataclass(frozen=True)
class Link:
    """A worker's link: `alpha_us` a message's latency, `beta_gbit_s` its bandwidth."""

    alpha_us: float
    beta_gbit_s: float

    def ring_ms(self, mb: float, workers: int) -> float:
        """The time of a ring all-reduce of `mb` MB."""
        messages = 2 * (workers - 1)
        return messages * (self.alpha_us / 1e3 + 8 * mb / workers / self.beta_gbit_s) if workers > 1 else 0.0


def step_ms(compute_ms: float, backward: float, mb: float, workers: int, link: Link, buckets: int) -> float:
    """A step: `compute_ms` of one worker, of which the share `backward` is its backward pass, with `mb` MB of gradients in `buckets` messages."""
    start, message = compute_ms * (1 - backward), link.ring_ms(mb / buckets, workers)
    end = 0.0
    for i in range(1, buckets + 1):
        ready = start + compute_ms * backward * i / buckets
        end = max(end, ready) + message
    return end


@app.command()
def predict(
    exact_ms: Annotated[float, typer.Option(help="Measured step of one worker, exact.")],
    sampled_ms: Annotated[float, typer.Option(help="The same, sampled, packing included.")],
    whole_mb: Annotated[float, typer.Option(help="All gradients in MB.")],
    share: Annotated[float, typer.Option(help="What is sent of them, as counted by the hook.")],
    model: Annotated[str, typer.Option(help="A name for the rows.")] = "resnet-152",
    backward: Annotated[float, typer.Option(help="The share of the step that is the backward pass.")] = 0.66,
    alpha_us: float = 30.0,
    beta_gbit_s: Annotated[list[float] | None, typer.Option(help="Bandwidths of a link.")] = None,
    buckets: int = 10,
) -> None:
    """Print and store the speed-up of a sampled step for 8 to 1,024 workers."""
    rows = []
    for beta in beta_gbit_s or (10.0, 25.0, 100.0):
        link = Link(alpha_us, beta)
        for workers in WORKERS:
            exact = step_ms(exact_ms, backward, whole_mb, workers, link, buckets)
            sampled = step_ms(sampled_ms, backward, whole_mb * share, workers, link, buckets)
            settings = {"model": model, "workers": workers, "alpha_us": alpha_us, "gbit_s": beta, "buckets": buckets, "share": share}
            rows.append(conditions() | settings | {"exact_ms": exact, "sampled_ms": sampled, "speedup": exact / sampled})
    show(f"{model}: predicted", rows, ("gbit_s", "workers", "exact_ms", "sampled_ms", "speedup"))
    for name, (saved, one, eight) in PAPER.items():
        print(f"Adelman et al., table 1, {name}: {saved:.0%} of the communication saved, {f'{one} on one node, ' if one else ''}{eight} on eight")
    store("scaling", rows)


@app.command()
def check(
    alpha_us: Annotated[float, typer.Option(help="Latency of a message through two virtual interfaces, and the collective's own.")] = 200.0,
    buckets: int = 1,
) -> None:
    """Hold the model against the stored steps over limited links: compute is what the fastest link leaves, and all else is predicted."""
    found = stored("exchange_links", {})
    if not found:
        raise typer.BadParameter("there are no rows in results/exchange_links.csv; run `python -m benchmarks.distributed.exchange links` first")
    rows = []
    for r in found:
        if r["way"] not in ("full", "kept", "fp16", "kept + fp16"):
            continue
        same = [o for o in found if all(o[k] == r[k] for k in ("model", "ranks", "rows", "way", "commit"))]
        fastest = max(same, key=lambda o: float(o["mbit_s"]))
        if fastest is r:
            continue
        compute = float(fastest["step_ms"]) - Link(alpha_us, float(fastest["mbit_s"]) / 1e3).ring_ms(float(fastest["mb"]), int(fastest["ranks"]))
        predicted = step_ms(max(0.0, compute), 0.66, float(r["mb"]), int(r["ranks"]), Link(alpha_us, float(r["mbit_s"]) / 1e3), buckets)
        measured = float(r["step_ms"])
        kept = {k: r[k] for k in ("model", "ranks", "mbit_s", "way")}
        rows.append(kept | {"measured_ms": measured, "predicted_ms": predicted, "off": f"{predicted / measured - 1:+.0%}"})
    show("Predicted against measured", rows, ("model", "ranks", "mbit_s", "way", "measured_ms", "predicted_ms", "off"))


if __name__ == "__main__":
    app()
