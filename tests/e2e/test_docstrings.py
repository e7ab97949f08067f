"""The docstring of every public name has an example, and the examples run."""

from __future__ import annotations

import doctest
import functools
import inspect
from pathlib import Path

import pytest
import torch

import approx_compile
from approx_compile import Backend
from approx_compile.backend import run_as_is

SLOW = {name: pytest.mark.slow for name in ("tune", "Report", "Backend", "Control", "decisions", "explain")}


class _Lenient(doctest.OutputChecker):
    """An example without a printed result shows only that it runs."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in approx_compile.__all__])
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder. Compiled graphs run op by op, which takes a fraction of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Backend, "__init__", functools.partialmethod(Backend.__init__, inner_compile=run_as_is))
    torch.manual_seed(0)
    text = inspect.getdoc(getattr(approx_compile, name)) or ""
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert examples.examples, f"{name}: no example"
    report: list[str] = []
    doctest.DocTestRunner(checker=_Lenient(), verbose=False).run(examples, out=report.append)
    assert not report, "".join(report)
