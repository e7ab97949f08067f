"""The reference of reasons: a section for every entry of the registry, with its text and its advice."""

from __future__ import annotations

import string
from types import ModuleType

from approx_compile.reasons import MODULES, Template, templates


def blocks() -> dict[str, str]:
    """A block for every module of the registry, named "reasons: MODULE"."""
    return {f"reasons: {module.__name__.rpartition('.')[2]}": _sections(module) for module in MODULES}


def _sections(module: ModuleType) -> str:
    return "\n".join(f"### {t.id}\n\n`{_shown(t)}`\n" + (f"\n{t.advice}\n" if t.advice else "") for t in templates(module).values()).rstrip()


def _shown(template: Template) -> str:
    """The text with the names of its fields in braces, without their formats."""
    return "".join(text + (f"{{{name}}}" if name else "") for text, name, _, _ in string.Formatter().parse(template.text))
