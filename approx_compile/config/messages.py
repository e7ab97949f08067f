"""Say in this package's words what is wrong with settings: where, what came, what is valid, and where a key of another table belongs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import pydantic
from pydantic import BaseModel

from approx_compile import _torch
from approx_compile.config.schema import Table

Place = Sequence[str | int]

_BESIDE: Mapping[str, Mapping[str, Any]] = {
    **{key: {"method": "max"} for key in ("j", "tile", "scale")},
    "std": {"method": "random"},
    "batch_norm": {"axis": "rows"},
}
"""Keys that have an effect only beside others, with these others."""


def message(error: pydantic.ValidationError, root: type[Table]) -> str:
    """Return the problems that pydantic found in settings, joined into one line: `rules[1].ratio: got 3; ...`.

    Args:
        error: What pydantic raised.
        root: The model that was built.

    Returns:
        The text.
    """
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        place: Place = item["loc"]
        if item["type"] == "extra_forbidden":
            place, text = place[:-1], unknown_key(str(place[-1]), item["input"], place[:-1], root)
        else:
            text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "invalid_key":
            place, text = place[:-1], f"got the key {place[-1]!r}; a string is expected"
        key = re.match(r"([a-z_]+): ", text)
        if key is not None and place and place[-1] == key[1]:  # patterns and slices name their key themselves
            text = text.removeprefix(key[0])
        where = _path(place)
        names_own_key = key is not None and key[1] in (*getattr(_model_at(root, place), "model_fields", ()), "mode") and place and place[-1] != key[1]
        lines.append(f"{where}.{text}" if names_own_key else f"{where}: {text}" if where else text)
    return "; ".join(dict.fromkeys(lines))


def unknown_key(key: str, value: Any, place: Place, root: type[Table]) -> str:
    """Return what to say about a key that the table at a place does not have.

    Args:
        key: The key.
        value: Its value, which the example in the message has.
        place: The keys and indices that lead to the table; empty for the top.
        root: The model of the whole settings.

    Returns:
        Where the key belongs, or else the valid key that is most similar, or else all that are valid.
    """
    belongs = _belongs(key, value, place, root)
    if belongs is not None:
        return belongs
    model = _model_at(root, place)
    here = list(model.model_fields) if model is not None else []
    if match := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        return f"unknown key {key!r}; did you mean {match[0]!r}?"
    elsewhere = sorted({k for table in [root, *tables(root).values()] for k in table.model_fields} - set(here))
    for near in difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.6):
        return f"unknown key {key!r}; did you mean {near!r}? {_belongs(near, value, place, root)}"
    return f"unknown key {key!r}; valid keys here are {', '.join(here)}"


def _belongs(key: str, value: Any, place: Place, root: type[Table]) -> str | None:
    """Where a key of another table belongs, with an example; None if no table has it."""
    if key == "max_error":
        return "max_error is an argument of approx_compile.tune, and bounds the relative error e; adaptive.error bounds e^2"
    if key == "mode":
        return f"mode is an option of Inductor: {{'inductor': {{'mode': {value!r}}}}}, or torch.compile(mode={value!r})"
    for outer in [tuple(place[:n]) for n in range(len(place), -1, -1)]:
        model = _model_at(root, outer)
        if model is None:
            continue
        if key in model.model_fields and outer != tuple(place):
            return f"{key} belongs {'in the rule' if outer else 'at the top of the options'}: {{{key!r}: {value!r}}}"
        owners = [name for name, table in tables(model).items() if key in table.model_fields]
        if owners and key not in model.model_fields:
            table = dict(_BESIDE.get(key, {})) | {key: value}
            if owners == ["rules"]:
                return f"{key} belongs in a rule: {{'rules': [{table}]}}"
            at_the_top = ", at the top of the options" if place and not outer else ""
            return f"{key} belongs in {' or '.join(owners)}{at_the_top}: {{{owners[-1]!r}: {table}}}"
    if key.replace("-", "_") in _torch.inductor_options():
        return f"{key} is an option of Inductor: {{'inductor': {{{key!r}: {value!r}}}}}"
    return None


def tables(model: type[BaseModel]) -> dict[str, type[Table]]:
    """Return the models of the tables that a model's keys hold, by key: a table, or a list of tables."""
    return {name: table for name, field in model.model_fields.items() if (table := next(_tables_in(field.annotation), None)) is not None}


def _tables_in(annotation: Any) -> Iterator[type[Table]]:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        yield annotation
    for part in get_args(annotation):
        yield from _tables_in(part)


def _model_at(root: type[Table], place: Place) -> type[Table] | None:
    """The model of the table at a place; None if no table is there."""
    model: type[Table] | None = root
    for part in place:
        if isinstance(part, str):
            model = tables(model).get(part) if model is not None else None
    return model


def _path(place: Place) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
