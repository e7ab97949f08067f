"""Training through frameworks: the examples for Transformers' Trainer, PEFT and Lightning, exactly and with the callbacks of `approx_compile.integrations`.

`python -m benchmarks.accuracy.frameworks run [--work NAME ..] [--seeds N] [--data FILE]` adds a row for every run to frameworks.jsonl. FILE is the source
package of vaderSentiment, which the work `text` needs (see examples/finetune_text.py). A row has `cpu_share`, the CPU seconds of the example's process over
its seconds: clearly below the number of threads, other programs had the machine, and the row's seconds mean little.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common.rows import RESULTS, ROOT, conditions, console

WORKS = {
    "text": ["finetune_text.py", "--epochs", "3"],
    "lora": ["finetune_lora.py", "--epochs", "12"],
    "images": ["lightning_images.py", "--epochs", "20"],
}
"""The example and its arguments by the name of the work."""

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.callback()
def _commands() -> None:
    pass


@app.command()
def run(
    work: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(WORKS)}; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="The sentences of the work `text`.")] = None,
) -> None:
    """Run the examples one after the other, and store their rows."""
    asked = work or list(WORKS)
    if unknown := [w for w in asked if w not in WORKS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: one of {', '.join(WORKS)} is expected")
    if "text" in asked and data is None:
        raise typer.BadParameter("--data: the work `text` needs the source package of vaderSentiment, or a file of labelled sentences")
    for name in asked:
        console.print(f"{len(store(name, example(name, seeds, data)))} rows of {name} added to frameworks.jsonl")


def example(work: str, seeds: int, data: Path | None) -> list[dict[str, object]]:
    """Run an example; return the rows that it writes, with the share of a CPU that it had."""
    script, *arguments = WORKS[work]
    arguments += ["--seeds", str(seeds), *(["--data", str(data)] if work == "text" else [])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        began, cpu = time.perf_counter(), _children_cpu_s()
        subprocess.run([sys.executable, str(ROOT / "examples" / script), *arguments, "--out", str(out)], check=True)
        share = (_children_cpu_s() - cpu) / (time.perf_counter() - began)
        return [{**json.loads(line), "cpu_share": round(share, 2)} for line in out.read_text().splitlines()]


def store(work: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Append rows to the file, with the conditions that they were measured in."""
    kept = ("what", "backend", "seed", "accuracy", "seconds", "seconds_compiled", "kept", "flops_saved", "cpu_share")
    made = [conditions() | {"work": work} | {key: row[key] for key in kept} for row in rows]
    with (RESULTS / "frameworks.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in made)
    return made


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    app()
