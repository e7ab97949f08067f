"""The conformance suite: `make conformance`, or `python tests/conformance/run.py --only NAME --decide` for a model's decision alone.

Every model runs in processes of its own with a time limit; what was found is kept under `out/conformance` and reused while the package's code is the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT))  # this checkout's package, whatever is installed
import approx_compile  # noqa: E402, F401

sys.path.remove(str(ROOT))  # its links `kernels` and `passes` must not be taken for libraries
os.environ.setdefault("APPROX_COMPILE_MACHINE", str(HERE.parent / "helpers" / "machine.json"))  # decisions must not depend on the machine that tests
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import models  # noqa: E402
import typer  # noqa: E402

models.offline()
import checks  # noqa: E402
import decide  # noqa: E402
import table  # noqa: E402

from approx_compile.machine import device_name  # noqa: E402
from approx_compile.passes.joint_graph_pass import code_version  # noqa: E402

KEPT = ROOT / "out" / "conformance"


def main(
    only: Annotated[list[str] | None, typer.Option(help="A model's name, or a part of one; may be given several times.")] = None,
    decide_only: Annotated[bool, typer.Option("--decide", help="Print decisions and the ops that stop rows, and write nothing.")] = False,
    part: Annotated[list[str] | None, typer.Option(help=f"What to run: {', '.join(checks.PARTS)}; all by default.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that a part of a model may take.")] = 900,
    again: Annotated[bool, typer.Option(help="Run what has a result already.")] = False,
    tables: Annotated[bool, typer.Option(help="Write benchmarks/results/conformance.csv, which docs/generate.py reads.")] = True,
    list_models: Annotated[bool, typer.Option("--list", help="Print the models' names.")] = False,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Try library models under the one line and check their gradients."""
    patterns = only or []
    found = list(models.named(patterns))
    if not found:
        raise typer.BadParameter(f"--only: no model's name contains {', '.join(patterns)}; --list shows them")
    if unknown := set(part or ()) - set(checks.PARTS):
        raise typer.BadParameter(f"--part: got {', '.join(sorted(unknown))}; valid are {', '.join(checks.PARTS)}")
    if list_models:
        print("\n".join(m.name for m in found))
    elif decide_only:
        decide.main(found)
    elif child is not None:
        result = checks.run_part(found[0], (part or [""])[0])
        Path(child).write_text(json.dumps(result))
    else:
        for i, model in enumerate(found):
            for p in part or checks.PARTS:
                line = _run(model, p, limit, again)
                print(f"{i + 1}/{len(found)} {model.name}, {p}: {line}", flush=True)
        if tables:
            table.write(ROOT, KEPT)


def _run(model: models.Model, part: str, limit: float, again: bool) -> str:
    """One part of one model in a child, unless its result is there; a line on it."""
    path = KEPT / table.slug(model.name) / f"{part}.json"
    if not again and path.exists() and json.loads(path.read_text())["code"] == code_version():
        return "kept"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    start = time.perf_counter()
    with path.with_suffix(".log").open("w") as log:
        command = [sys.executable, str(Path(__file__).resolve()), "--only", model.name, "--part", part, "--child", str(fresh)]
        try:
            code: Any = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, cwd=ROOT).returncode
        except subprocess.TimeoutExpired:
            code = f"not done after {limit:g} s"
    result = json.loads(fresh.read_text()) if fresh.exists() else {"died": code if isinstance(code, str) else f"exit status {code}"}
    fresh.unlink(missing_ok=True)
    path.write_text(json.dumps({"code": code_version(), "conditions": _conditions(), "result": result}, indent=1))
    return f"{table.line(result)} ({time.perf_counter() - start:.0f} s)"


def _conditions() -> dict[str, str]:
    """When, with which commit and on what device a result was found."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"date": date.today().isoformat(), "commit": commit, "device": device_name("cpu")}


if __name__ == "__main__":
    typer.run(main)
