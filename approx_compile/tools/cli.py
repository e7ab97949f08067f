"""The command line `approx-compile`: explain, time and tune a model, compare accuracies, examine the installation, and measure the machine.

A new command is a function with `@app.command()` whose body is inside `with failures(debug):`. The exit code is 0 after success, 2 after wrong usage (options,
config, factory), and 1 after any other failure. The reason for a failure is one line on stderr.
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from approx_compile import machine as machines
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.tools import compare as timing
from approx_compile.tools.accuracy import RunFailed, compare_accuracy
from approx_compile.tools.doctor import examine
from approx_compile.tools.model_loader import Example, FactoryError, load
from approx_compile.tools.recommend import recommend as recommended
from approx_compile.tools.report.explain import Report
from approx_compile.tools.report.explain import explain as explained
from approx_compile.tools.report.words import si
from approx_compile.tools.tuning.tune import tune as tuned
from approx_compile.utils import DISABLE

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train PyTorch models with approximate matrix products and convolutions: look at a model, time it, tune it, check its accuracy; "
    "examine and measure this machine.",
)

_EXAMPLES = "\n\n".join(
    (
        "**The model**: `package.module:factory` or `path/to/file.py:factory`; the factory takes no arguments and returns `(model, example_inputs)`, "
        "the inputs being a tensor, a tuple of arguments or a dict of keyword arguments.",
        "**Examples**",
        "`approx-compile {command} my_package.models:small`",
        "`approx-compile {command} train.py:example --config approx.toml --set ratio=0.25`",
        "`approx-compile {command} train.py:example {more}`",
    )
)

_NO_PRODUCTS = (
    "torch.compile shows the backend none of the model's products ({flops}FLOP forward; {graphs} graphs seen, none with a product): "
    "each is behind a graph break, or compiling is off there; TORCH_LOGS=graph_breaks says where"
)

Model = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="What makes the model and its example inputs.", show_default=False)]
Config = Annotated[Path | None, typer.Option("--config", help="A TOML file with the keys of the backend's `options`.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One key of the options, over the file's: `ratio=0.25`.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="torch's threads; its own choice by default.", show_default=False)]
Float32 = StrEnum("Float32", ["highest", "high", "medium"])
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


class Failure(Exception):
    """A command cannot be carried out; the message is one line."""


class WrongUsage(Failure):
    """An argument of the command line is not valid."""


@contextlib.contextmanager
def failures(debug: bool) -> Iterator[None]:
    """Turn exceptions inside the block into one line on stderr and an exit code.

    Args:
        debug: Whether to let exceptions pass, so that the traceback is shown.

    Yields:
        Nothing.

    Raises:
        typer.Exit: With code 2 after wrong usage, and 1 after any other exception.
    """
    try:
        yield
    except Exception as e:
        if debug or isinstance(e, typer.Exit):
            raise
        usage = isinstance(e, (ConfigError, FactoryError, WrongUsage))
        expected = usage or isinstance(e, (Failure, RunFailed, ImportError, OSError))
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [""]
        text = " ".join(lines) if expected else lines[0] + ("" if len(lines) == 1 else " (--debug shows all of it)")
        typer.echo(f"approx-compile: {text if expected else f'{type(e).__name__}: {text}'}", err=True)
        raise typer.Exit(2 if usage else 1) from e


@app.callback(invoke_without_command=True)
def main(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:  # noqa: D103
    if show_version:
        typer.echo(version("approx-compile"))
        raise typer.Exit


@app.command(epilog=_EXAMPLES.format(command="explain", more="--html report.html"))
def explain(
    model: Model,
    config: Config = None,
    settings: Set = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as a page.", show_default=False)] = None,
    as_json: Json = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Print the graphs before and after, too.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every layer, with op, shape, dtype and kept entries.")] = False,
    costs: Annotated[bool, typer.Option("--costs", help="Print what the predicted times are made of, term by term.")] = False,
    step: Annotated[int, typer.Option(min=0, help="Of settings that change over a run, those after this many optimizer steps.")] = 0,
    phase: Annotated[str | None, typer.Option(help="And in this phase.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """What would be rewritten in a training step, why, and what it saves; nothing is compiled to machine code."""
    with failures(debug):
        options = read_options(config, settings or [])
        if step or phase:
            options = ApproxConfig.of(options).at(step, phase)
        _check_folder("--html", html)
        example = example_of(model)
        report = _report(example, options)
        report.verbose = verbose
        if html is not None:
            report.to_html(html, machines.current(report.device))
        if as_json:
            typer.echo(json.dumps(report.to_dict() | ({"before": report.before, "after": report.after} if graphs else {})))
            return
        typer.echo(str(report))
        if costs:
            typer.echo(report.costs())
        for i, (before, after) in enumerate(zip(report.before, report.after, strict=True) if graphs else (), 1):
            typer.echo(f"\n# --- graph {i}, before ---\n{before}\n# --- graph {i}, after ---\n{after}")
        if html is not None:
            typer.echo(f"written: {html}")


@app.command(epilog=_EXAMPLES.format(command="bench", more="--threads 2 --repeats 30 --json"))
def bench(
    model: Model,
    config: Config = None,
    settings: Set = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each backend.")] = 15,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a training step (forward and backward) under Inductor and under approx, in turn in one process."""
    with failures(debug):
        options, example = _prepared(model, config, settings, threads)
        report = _report(example, options)
        comparison = timing.compare(example.model, *example.args, config=options, repeats=repeats, **example.kwargs)
        sampled = sum(s.decision == "sampled" for s in report.sites)
        counts = {"sites": len(report.sites), "sampled": sampled, "flops_exact": report.flops_exact, "flops_sampled": report.flops_sampled}
        typer.echo(json.dumps(comparison.to_dict() | counts) if as_json else f"{comparison}; {sampled} of {len(report.sites)} layers approximated")


@app.command(epilog=_EXAMPLES.format(command="recommend", more="--batch 20 --fine-tuning --epochs 3"))
def recommend(
    model: Model,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples of a batch, if the example inputs have fewer.", show_default=False)] = None,
    fine_tuning: Annotated[bool, typer.Option("--fine-tuning", help="A trained model is trained on.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the run.", show_default=False)] = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Which setting to train the model with, what to expect, on what evidence, and what to check."""
    with failures(debug):
        _set_threads(threads)
        example = example_of(model)
        found = recommended(example.model, *example.args, batch=batch, fine_tuning=fine_tuning, epochs=epochs, **example.kwargs)
        typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


@app.command(epilog=_EXAMPLES.format(command="tune", more="--out plan.toml --max-error 0.3 --budget 300"))
def tune(
    model: Model,
    config: Config = None,
    settings: Set = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the plan as TOML, for `options={'plan': ...}`.", show_default=False)] = None,
    max_error: Annotated[float, typer.Option(help="Relative error |g' - g| / |g| that the gradient g may have (not squared).")] = 0.5,
    budget: Annotated[float, typer.Option(help="Seconds it may take.")] = 600.0,
    rows: Annotated[bool, typer.Option(help="Try the backward pass on some of the rows, too.")] = True,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure every site of the model on its example inputs and choose the plan that saves most time; Ctrl-C takes the best so far."""
    with failures(debug):
        _check_folder("--out", out)
        options, example = _prepared(model, config, settings, threads, policy="cost")
        if not isinstance(example.model, torch.nn.Module):
            raise WrongUsage(f"{model} makes a {type(example.model).__name__}; tune needs a torch.nn.Module")
        if example.kwargs:
            raise WrongUsage(f"{model} gives its inputs by keyword; tune needs positional ones")
        plan = tuned(example.model, *example.args, loss=timing.loss_of, config=options, max_error=max_error, time_budget_s=budget, rows=rows)
        if out is not None:
            plan.save(out)
        typer.echo(json.dumps(plan.to_dict()) if as_json else str(plan))
        if out is not None and not as_json:
            typer.echo(f"written: {out}")


_COMPARE_HELP = "\n\n".join(
    (
        '**The function**: `path/to/file.py:run` or `package.module:run`; `run(seed)` trains with `backend="approx"` and returns the accuracy, or a dict with '
        "`accuracy` and perhaps `seconds`. It is called in fresh processes, in turn exact (with `APPROX_COMPILE_DISABLE=1`) and approximate.",
        "**Example**: `approx-compile compare train.py:run --seeds 5 --margin 0.002 --json compared.json`",
    )
)


@app.command(epilog=_COMPARE_HELP)
def compare(
    function: Annotated[str, typer.Argument(metavar="FILE:FUNCTION", help="What trains once with a given seed.", show_default=False)],
    seeds: Annotated[int, typer.Option(min=2, help="Pairs of runs, with seeds 0, 1, 2 and so on.")] = 3,
    margin: Annotated[float | None, typer.Option(help="Loss of accuracy that would not matter; 0.5 % of exact's.", show_default=False)] = None,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="The function returns a loss or an error.")] = False,
    threads: Threads = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all runs and the verdict as JSON.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Train exactly and approximately with several seeds, and say whether the accuracy is the same and how much time is saved."""
    with failures(debug):
        _check_folder("--json", json_file)
        if margin is not None and not margin > 0:
            raise WrongUsage(f"--margin: got {margin:g}; a number above 0 is expected")
        if DISABLE.value() == "1":
            raise Failure(f"{DISABLE.name}=1 is set, with which both runs would be exact; unset it")
        comparison = compare_accuracy(function, seeds, margin, lower_is_better, threads, lambda text: typer.echo(text, err=True))
        if json_file is not None:
            json_file.write_text(json.dumps(comparison.to_dict(), indent=1))
        typer.echo(str(comparison))
        if json_file is not None:
            typer.echo(f"written: {json_file}")


@app.command()
def doctor(
    as_json: Json = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Examine this installation: versions, C++ compiler, devices, machine profile, caches, torch's known faults, and whether a small model compiles."""
    with failures(debug):
        _set_threads(threads)
        examination = examine()
        typer.echo(json.dumps(examination.to_dict()) if as_json else str(examination))
        if examination.problems:
            raise typer.Exit(1)


@app.command()
def calibrate(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The short measurement that first use makes.")] = False,
    threads: Threads = None,
    float32: Annotated[Float32 | None, typer.Option(help="What training gives `torch.set_float32_matmul_precision`.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure this machine (product rates, bandwidths, selection, launches) for the cost model, and store it."""
    with failures(debug):
        _set_threads(threads)
        if float32 is not None:
            torch.set_float32_matmul_precision(float32)
        profile = machines.calibrate(device, quick=quick, progress=not as_json)
        if as_json:
            typer.echo(profile.model_dump_json())
            return
        Console().print(profile)
        typer.echo(f"stored: {machines.path_of(profile.device)}")


def _prepared(model: str, config: Path | None, settings: list[str] | None, threads: int | None, **defaults: Any) -> tuple[ApproxConfig | None, Example]:
    """Check the options, which override `defaults` if any options are given; then set the number of threads, and load the model."""
    options = read_options(config, settings or [], **defaults)
    _set_threads(threads)
    return options, example_of(model)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _check_folder(option: str, path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise WrongUsage(f"{option}: there is no folder {path.parent}; make it, or name a file elsewhere")
    if path is not None and path.is_dir():
        raise WrongUsage(f"{option}: {path} is a folder; the name of a file is expected, such as {path / option.strip('-')}")


def example_of(spec: str) -> Example:
    """Load the model that a specification names, with the same weights and data at every call.

    Args:
        spec: `package.module:factory` or `path/to/file.py:factory`.

    Returns:
        The model and its arguments.

    Raises:
        FactoryError: If there is no such model.
    """
    torch.manual_seed(0)
    return load(spec)


def _report(example: Example, options: ApproxConfig | None) -> Report:
    """Make the report of `explain`. A model whose products torch.compile does not show to the backend is a failure; a model without products is not."""
    if DISABLE.value() == "1":
        raise Failure(f"{DISABLE.name}=1 is set, with which nothing is rewritten; unset it")
    flops = example.forward_flops()
    report = explained(example.model, *example.args, config=options, **example.kwargs)
    if flops and not report.sites:
        raise Failure(_NO_PRODUCTS.format(flops=si(flops), graphs=len(report.before)))
    return report


def read_options(path: Path | None, settings: list[str], **defaults: Any) -> ApproxConfig | None:
    """Read the options of the backend from a file and from the command line.

    Args:
        path: A TOML file with the keys of the options, or None.
        settings: Texts "key=value", which override the file. The value is written as in TOML, or is a bare word. The key has dots for tables.
        **defaults: Options that hold unless the file or `settings` override them.

    Returns:
        The checked options; None if neither a file nor settings are given.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is not valid.
    """
    if path is None and not settings:
        return None
    options: dict[str, Any] = {}
    if path is not None:
        try:
            options = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"--config: {path} can't be read: {e}") from e
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"--config: {path} is no TOML: {e}") from e
    for text in settings:
        options = _merged(options, _setting(text))
    return ApproxConfig.of(defaults | options)


def _setting(text: str) -> dict[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    for written in (value, json.dumps(value)) if equals and value else ():
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(f"{key} = {written}")
    raise ConfigError(f"--set: got {text!r}; KEY=VALUE is expected, such as ratio=0.25, method=topk, grad.axis=rows")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | both
