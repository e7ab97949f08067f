"""The page on configuration, from the JSON schema of `ApproxConfig`: type, default, valid values, description and an example of every key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from approx_compile import ApproxConfig
from approx_compile.config.messages import tables
from approx_compile.config.schema import Table

TITLES = {
    "": "Keys at the top",
    "rules": "A rule",
    "output": "The table `output`",
    "grad": "The table `grad`",
    "grad_input": "The table `grad_input`",
    "grad_weight": "The table `grad_weight`",
    "units": "The table `units`",
    "adaptive": "The table `adaptive`",
}
TYPES = {"integer": "an integer", "number": "a number", "boolean": "`true` or `false`", "string": "text", "object": "a table"}
LONGEST = 320
"""The most characters of a paragraph that has more than one sentence."""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def words(schema: Mapping[str, Any]) -> str:
    """The type and the valid values of a property, in words."""
    alternatives = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    bounds = {key: value for part in (schema, *alternatives) for key, value in part.items() if key in BOUNDS}
    texts = []
    for part in alternatives:
        if "enum" in part or "const" in part:
            texts.append(", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")])))
        elif "$ref" in part:
            name = part["$ref"].rpartition("/")[2]
            texts.append("the record of a plan" if name == "Tuned" else "a table")
        elif part["type"] == "array":
            items = part["items"]
            texts.append("a list of tables" if "$ref" in items else f"a list of {'numbers' if items['type'] == 'number' else 'texts'}")
        else:
            texts.append(TYPES[part["type"]])
    return " or ".join(texts) + "".join(f", {word} {bounds[key]:g}" for key, word in BOUNDS.items() if key in bounds)


def default(schema: Mapping[str, Any], name: str) -> str:
    """The default of a property, in words."""
    value = schema.get("default")
    if value is None:
        return "not set" if not name or name in ("adaptive", "units") else "not set; the key at the top or in the rule holds"
    if isinstance(value, dict):
        return "the defaults of its keys"
    return f"`{json.dumps(value)}`"


def paragraphs(text: str) -> str:
    """A description as paragraphs: its first sentence, which says what the key is, and the others, a few together."""
    first, *others = re.split(r"(?<=\.) (?=[A-Z`])", text)
    parts = [first]
    for sentence in others:
        if len(parts) > 1 and len(parts[-1]) + len(sentence) < LONGEST:
            parts[-1] += f" {sentence}"
        else:
            parts.append(sentence)
    return text if len(text) <= LONGEST else "\n\n".join(parts)


def section(name: str, key: str, model: type[Table], schema: Mapping[str, Any]) -> Iterator[str]:
    """The section of a key."""
    path = {"": key, "rules": f"rules[].{key}"}.get(name, f"{name}.{key}")
    yield f"### `{path}`\n"
    yield f"{paragraphs(schema['description'])}\n"
    yield f"- Valid: {words(schema)}"
    yield f"- Default: {'as above' if (name, key) == ('', 'policy') else default(schema, name)}\n"
    yield "```python"
    for options in model.model_fields[key].examples or ():
        yield f"ApproxConfig.of({json_as_python(options)})"
    yield "```\n"


def json_as_python(options: Mapping[str, Any]) -> str:
    """Options as a Python expression with double quotes, as in the rest of the documentation."""
    text = json.dumps(options)
    for word, name in (("true", "True"), ("false", "False"), ("null", "None")):
        text = text.replace(f": {word}", f": {name}")
    return text


def table(name: str, model: type[Table], schema: Mapping[str, Any]) -> Iterator[str]:
    """The sections of a table: of the keys that have the same description at the top only the names are listed."""
    top = ApproxConfig.model_fields
    own = [k for k, field in model.model_fields.items() if not name or k not in top or top[k].description != field.description]
    same = [k for k in model.model_fields if k not in own]
    yield f"## {TITLES[name]}\n"
    if same:
        yield f"As at the top: {', '.join(f'[`{k}`](#{k})' for k in same)}.\n"
    for key in own:
        yield from section(name, key, model, schema["properties"][key])


def page() -> str:
    """All keys, those at the top first."""
    schema = ApproxConfig.model_json_schema()
    lines: list[str] = []
    nested = tables(ApproxConfig)
    for name in TITLES:
        model = nested[name] if name else ApproxConfig
        lines += table(name, model, schema if not name else schema["$defs"][model.__name__])
    if missing := set(nested) - set(TITLES):
        raise ValueError(f"configuration page: no title for the tables {sorted(missing)}")
    return "\n".join(lines).rstrip()


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"configuration": page()}
