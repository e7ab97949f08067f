"""Every environment variable that the package reads is in the registry, of which the documentation's page is made, and is read through it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from approx_compile.utils import DISABLE, ENVIRONMENT

PACKAGE = Path(__file__).resolve().parents[2] / "approx_compile"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
COPIES = {
    "machine/store.py": "the settings of memory are part of a machine's name",
    "machine/site_timings.py": "the environment of a child process",
    "tools/accuracy.py": "the environment of child processes",
}
"""Files that read the environment as a whole, and why."""


def _reads_the_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and isinstance(node.value, ast.Name) and node.value.id == "os"


def test_variables_of_the_package_are_registered() -> None:
    named = {name for text in SOURCES.values() for name in re.findall(r"APPROX_COMPILE_[A-Z_]+", text)}
    assert named == {v.name for v in ENVIRONMENT if v.name.startswith("APPROX_COMPILE_")}


def test_variables_are_read_through_the_registry() -> None:
    reading = {path for path, text in SOURCES.items() if any(_reads_the_environment(node) for node in ast.walk(ast.parse(text)))}
    assert reading == {"utils.py", *COPIES}


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE.name, "")
    assert DISABLE.value() is None
    monkeypatch.setenv(DISABLE.name, "1")
    assert DISABLE.value() == "1"
