"""Why something stays exact, or what is done in its place: the registry of all reasons.

A reason is a text made from a `Template` of one of this package's modules, which also has a stable id and what the user can do. Plans, reports and notices
carry reasons; docs/reference/reasons.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from approx_compile.reasons import decisions, kernels, products, rows, tuning
from approx_compile.reasons.reason import Reason, Template, join

MODULES: tuple[ModuleType, ...] = (products, rows, kernels, tuning, decisions)
"""The modules with templates, in the order in which the reference shows them."""


def templates(module: ModuleType) -> Mapping[str, Template]:
    """Return the templates of a module by the names of its constants."""
    return {name: t for name, t in vars(module).items() if isinstance(t, Template)}


REGISTRY: Mapping[str, Template] = {t.id: t for module in MODULES for t in templates(module).values()}
"""All templates by id."""

__all__ = ["MODULES", "REGISTRY", "Reason", "Template", "join", "templates"]
