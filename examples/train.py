"""Train one model twice, with torch.compile's Inductor and with approx_compile, and show both: `python examples/train.py --help`.

`trainer.py` has the training loop, `plots.py` what is shown of the runs; here is the command line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import data
import models
import torch
import typer
from plots import conclusions, plot, step_flops, summarise, table, write_rows
from rich.console import Console
from trainer import BACKENDS, Settings, load, train_all

from approx_compile import ApproxConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


_APPROX = "The approx backend"


@app.command(help="Train the same model with torch.compile's Inductor and with approx_compile; compare accuracy, time, FLOPs and memory.")
def main(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.NAMES)}.")] = "digits",
    directory: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Where the data set's files are (not for digits).")] = None,
    model: Annotated[str, typer.Option(help=f"One of {models.VALID}.")] = "mlp",
    width: Annotated[int | None, typer.Option(min=1, help="Hidden units of mlp, channels of the first stage of the others.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training samples; each ends with an evaluation.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="A last, smaller batch of an epoch is left out: one shape is compiled.")] = 256,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train on the first N samples.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per backend, each with other weights and batches.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")] = "auto",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the plot goes.")] = Path("out"),
    rows: Annotated[bool, typer.Option("--json", help="Also write one JSON line per run.")] = False,
    ratio: Annotated[float | None, typer.Option(help="Kept share of a sampled axis.", rich_help_panel=_APPROX)] = None,
    method: Annotated[str | None, typer.Option(help="Which indices are kept: topk, crs, ...", rich_help_panel=_APPROX)] = None,
    sampling: Annotated[str | None, typer.Option(help="forward, backward or blackbox.", rich_help_panel=_APPROX)] = None,
    group: Annotated[str | None, typer.Option(help="Contiguous indices kept together, or auto.", rich_help_panel=_APPROX)] = None,
    policy: Annotated[str | None, typer.Option(help="adaptive: rows of the batch; cost; or always: every legal site.", rich_help_panel=_APPROX)] = None,
) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # in a file no line need be broken
    given = {"ratio": ratio, "method": method, "sampling": sampling, "group": int(group) if group and group.isdecimal() else group, "policy": policy}
    options = {k: v for k, v in given.items() if v is not None}
    try:  # DataError and ConfigError are ValueErrors
        ApproxConfig.of(options)
        settings = Settings(dataset, directory, model, width, epochs, batch_size, lr, limit, _device(device), options)
        loaded = load(settings)
        models.build(model, loaded.shape, loaded.classes, width)
        samples = len(loaded.train_x)
        steps = epochs * (samples // batch_size)
        if steps < 2:
            raise ValueError(f"--epochs {epochs}, --batch-size {batch_size} and {samples} training samples make {steps} steps; at least 2 are needed")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    title = f"{model}{f' (width {width})' if width else ''} on {dataset}, {samples} training images, batches of {batch_size}"
    decisions = ", ".join(f"{k} {v}" for k, v in options.items()) or "the backend's own decisions"
    console.print(f"{title}; {epochs} epochs, {steps} steps per run, {settings.device}; approx: {decisions}", highlight=False, soft_wrap=True)
    flops = step_flops(settings, loaded)
    del loaded
    try:
        runs = train_all(settings, seeds, steps, console)
    except RuntimeError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(1) from None
    exact, approx = (summarise(name, runs, flops) for name in BACKENDS)
    console.print(table((exact, approx)))
    left_out = samples % batch_size
    dropped = [f"The last {left_out} of an epoch's {samples} samples, a smaller batch, are left out: one shape is compiled."] if left_out else []
    plot(runs, title, out / "train.png")
    written = [out / "train.png"]
    if rows:
        write_rows(runs, settings, flops, out / "train.jsonl")
        written.append(out / "train.jsonl")
    for line in (*conclusions(exact, approx, seeds), *dropped, f"Written: {', '.join(map(str, written))}"):
        console.print(line, highlight=False, soft_wrap=True)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"--device: got {name!r}; auto, cpu, cuda or cuda:N is expected")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {name!r}, and torch sees no CUDA device here; cpu works")
    return name


if __name__ == "__main__":
    app()
