"""The documentation holds: its Python blocks run, its generated parts are what the stored results give, links inside the repository lead somewhere."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from approx_compile import Backend
from approx_compile.backend import run_as_is

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMPILED = {ROOT / "README.md"}
"""The page whose models Inductor compiles; the compiled graphs of the others run op by op, which takes a fraction of the time."""
SLOW = COMPILED | set((ROOT / "docs" / "tutorials").glob("*.md"))
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT))
NOT_PROSE = re.compile(
    r"<!-- generated: .*?<!-- end of generated part -->|```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)\s]*\)|^---\n.*?\n---$", re.DOTALL | re.MULTILINE
)
FIGURE = re.compile(r"\d\s?%|±\s?\d|\d\.\d+x\b|\b\d+x\b|\d\s(?:[kMGT]?FLOPs?|[kMG]i?B|[mµun]?s|seconds|minutes|points|times (?:as|faster|slower|Inductor))\b")
NOT_MEASURED = re.compile(r"<!-- not measured: \S.*?-->")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


def _with_python(page: Path) -> bool:
    return "```python" in page.read_text()


RUN = [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW), id=str(p.relative_to(ROOT))) for p in PAGES if _with_python(p)]


@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    if page not in COMPILED:
        monkeypatch.setattr(Backend, "__init__", functools.partialmethod(Backend.__init__, inner_compile=run_as_is))
    examples = list(SYBIL.parse(page).examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.slow
def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python docs/generate.py --check` checks, in this process: another one would take seconds to import torch."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    importlib.import_module("generate").main(check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not dead


def _typed_figures(text: str) -> list[str]:
    """Lines with a number that looks measured (a share, a spread, a speed-up, a time, a size), outside of generated parts, code and formulas.

    A number that is no measurement, such as a default, is allowed by `<!-- not measured: reason -->` on its line.
    """
    prose = NOT_PROSE.sub(lambda m: "\n" * m[0].count("\n"), text)
    return [line for line in prose.splitlines() if FIGURE.search(line) and not NOT_MEASURED.search(line)]


@pytest.mark.parametrize("page", [p for p in PAGES if "docs" in p.parts or p.name == "README.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_measured_figure_is_typed(page: Path) -> None:
    assert not _typed_figures(page.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "it is 1.5x as fast",
        "takes 3 s longer",
        "about 20% of the step",
        "98.5 ± 0.1",
        "saves 30 MB",
        "is 2.5 times as fast",
        "loses 4 points",
        "1.2 GFLOP of work",
    ],
)
def test_a_typed_figure_is_found(line: str) -> None:
    assert _typed_figures(f"# Title\n\nText before.\n{line}\n") == [line]
    assert not _typed_figures(f"{line} <!-- not measured: a default -->")
    assert not _typed_figures(f"<!-- generated: accuracy -->\n{line}\n<!-- end of generated part -->\n```\n{line}\n```\n`{line}`\n")


def test_numbers_that_are_no_figures_are_left_alone() -> None:
    assert not _typed_figures("A 3 x 3 convolution at batch 128, every 4 steps, `ratio` 0.25, torch 2.13 and Python 3.11.\n")


def test_method_cards_have_one_form() -> None:
    """Every method's page has the same parts in the same order."""
    parts = ["When, and when not", "Settings", "Measured effect", "Cost", "Paper", "API"]
    for page in sorted(set((ROOT / "docs" / "methods").glob("*.md")) - {ROOT / "docs" / "methods" / "index.md"}):
        text = page.read_text()
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == parts, page.name
        opening = text.split("## ")[0]
        assert "**In short.**" in opening and "](../images/" in opening and "```python" in text, page.name


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 10_000
