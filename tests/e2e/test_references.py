"""What documentation and docstrings refer to is there: commands with their options, and dotted names of the package."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from approx_compile.tools.cli import app

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "approx_compile"
ROOMS = sorted(path.stem for path in PACKAGE.iterdir() if (path.is_dir() or path.suffix == ".py") and not path.stem.startswith("__"))
DOTTED = re.compile(rf"`(?:approx_compile\.)?((?:{'|'.join(ROOMS)})(?:\.\w+)+)(?:\(\))?`")
COMMAND = re.compile(r"^\s*(approx-compile [a-z].*)$|`(approx-compile [a-z][^`]*)`", re.MULTILINE)
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts)]


def _commands() -> list[str]:
    return sorted({(line or inline).strip() for page in PAGES for line, inline in COMMAND.findall(page.read_text())})


@pytest.mark.parametrize("text", _commands())
def test_commands_in_the_documentation_parse(text: str) -> None:
    _, name, *arguments = shlex.split(text, comments=True)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    if len(arguments) > 0 and not arguments[0].startswith("-"):  # a whole command, and not only an option that is named in passing
        command.make_context(name, arguments)
    else:
        options = {option for parameter in command.params for option in parameter.opts}
        assert {a for a in arguments if a.startswith("--")} <= options


def _dotted_names() -> Iterator[tuple[str, str]]:
    """The file and the name of every reference in a docstring, of modules, classes, functions and what follows an assignment."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                for name in DOTTED.findall(node.value.value):
                    if not name.endswith(".NAME"):  # stands for any name
                        yield path.relative_to(PACKAGE).as_posix(), name


def _found(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if not (PACKAGE.joinpath(*parts[:length]).with_suffix(".py").exists() or PACKAGE.joinpath(*parts[:length]).is_dir()):
            continue
        value: Any = importlib.import_module(".".join(("approx_compile", *parts[:length])))
        for part in parts[length:]:
            if part in getattr(value, "__annotations__", {}):
                return True
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_dotted_names_in_docstrings_exist() -> None:
    names = list(_dotted_names())
    assert len(names) > 10  # the pattern finds them
    assert [(path, name) for path, name in names if not _found(name)] == []
