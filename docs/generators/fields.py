"""Tables of fields: of data classes from the section "Attributes" of their docstrings, of pydantic models from the descriptions of their fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel


def attributes(cls: type) -> dict[str, str]:
    """The descriptions in the section "Attributes" of a class's Google docstring, by name."""
    _, _, rest = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    described: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if start := re.match(r"    (\w+): (.*)", line):
            name = start[1]
            described[name] = start[2]
        elif line.strip():
            described[name] += " " + line.strip()
    return described


def described_fields(cls: type[Any]) -> list[tuple[str, str]]:
    """The fields of a class with their descriptions. Raises ValueError for a field without one."""
    if issubclass(cls, BaseModel):
        found = {name: field.description or "" for name, field in cls.model_fields.items()}
    else:
        found = {f.name: attributes(cls).get(f.name, "") for f in dataclasses.fields(cls)}
    if missing := [name for name, text in found.items() if not text]:
        raise ValueError(f"{cls.__name__}: no description of {', '.join(missing)}")
    return list(found.items())


def table(cls: type[Any], more: Iterable[tuple[str, str]] = (), without: Iterable[str] = ()) -> str:
    """A table of the fields of a class.

    Args:
        cls: The data class or pydantic model.
        more: Names and descriptions of further rows.
        without: Names of fields that are left out.

    Returns:
        The table in Markdown.
    """
    rows = [(name, text) for name, text in described_fields(cls) if name not in without]
    lines = ["| field | content |", "|---|---|"]
    for name, text in [*rows, *more]:
        escaped = re.sub(r"(?<!\\)\|", r"\\|", text)
        lines.append(f"| `{name}` | {escaped} |")
    return "\n".join(lines)
