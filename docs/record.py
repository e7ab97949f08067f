"""Record the real runs whose output pages show: `python docs/record.py training tokens picture doctor compare` writes docs/recorded/
and docs/images/report.png.

`python docs/generate.py` makes the blocks of the pages from these files, with the words of the present code. Record on a machine that does nothing else.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from generators.recorded import RECORDED, PixelTransformer, digits_model, trained_report
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import approx_compile
from approx_compile.machine import current, device_name

DOCS = Path(__file__).resolve().parent
COMMAND = (sys.executable, "-c", "from approx_compile.tools.cli import app; app()")
STEPS = 400
PICTURE = (1280, 1070)
"""The part of the page that the picture shows, in pixels."""


def conditions() -> dict[str, Any]:
    device, threads = device_name("cpu"), torch.get_num_threads()
    return {"device": device, "threads": threads, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def write(name: str, content: dict[str, Any]) -> None:
    (RECORDED / f"{name}.json").write_text(json.dumps(conditions() | content, indent=1) + "\n")
    print(f"written: docs/recorded/{name}.json")


def train(model: nn.Module, steps: int, batch: int) -> dict[str, Any]:
    """Train a model on scikit-learn's digits; return what the backend decided."""
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    images = images.float() / 16
    compiled = torch.compile(model, backend="approx")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        drawn = torch.randperm(len(images))[:batch]
        optimizer.zero_grad()
        F.cross_entropy(compiled(images[drawn]), labels[drawn]).backward()
        optimizer.step()
    report, found = approx_compile.explain(compiled, images[:batch]), approx_compile.decisions(compiled)
    assert report.adaptive is not None
    controls = {name: {"place": c.place} | c.state_dict() for name, c in found.cuts.items()}
    return {"steps": steps, "adaptive": asdict(report.adaptive), "controls": controls, "budgets": {n: b.state_dict() for n, b in found.budgets.items()}}


def training() -> None:
    """Train the perceptron of the tutorial, and store what the backend decided."""
    torch.manual_seed(0)
    run = train(digits_model(), STEPS, 256)
    del run["budgets"]  # the page does not show what was measured of the whole gradient
    write("training", run)


def tokens() -> None:
    """Train a small transformer, for which the default chooses tokens."""
    torch.manual_seed(0)
    write("tokens", {"batch": 64} | train(PixelTransformer(), STEPS, 64))


def picture() -> None:
    """Photograph the upper part of the page about the recorded training. It needs playwright and Chromium."""
    from playwright.sync_api import sync_playwright

    report, path = trained_report(), DOCS / "images" / "report.png"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        page_file = Path(folder) / "report.html"
        report.to_html(page_file, current())
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": PICTURE[0], "height": PICTURE[1]}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]")
        taken = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    taken.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)
    print(f"written: {path.relative_to(DOCS.parent)}, {path.stat().st_size // 1000} kB")


def doctor() -> None:
    """Store what `approx-compile doctor` finds here."""
    done = subprocess.run([*COMMAND, "doctor", "--json"], capture_output=True, text=True)
    write("doctor", json.loads(done.stdout))


def compare() -> None:
    """Run the training of the page on accuracy with three seeds."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "check-accuracy.md").read_text(), re.DOTALL)[:1]
    with tempfile.TemporaryDirectory() as folder:
        script, result = Path(folder) / "train.py", Path(folder) / "runs.json"
        script.write_text(code)
        command = [*COMMAND, "compare", f"{script}:run", "--seeds", "3", "--margin", "1", "--json", str(result)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(DOCS.parent)})
        write("compare", json.loads(result.read_text()))


RUNS: dict[str, Callable[[], None]] = {"training": training, "tokens": tokens, "picture": picture, "doctor": doctor, "compare": compare}


def main(names: Annotated[list[str], typer.Argument(help=f"Which to record: {', '.join(RUNS)}.")]) -> None:
    """Record real runs for the pages."""
    unknown = [n for n in names if n not in RUNS]
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}; there are {', '.join(RUNS)}")
    for name in names:
        RUNS[name]()


if __name__ == "__main__":
    typer.run(main)
