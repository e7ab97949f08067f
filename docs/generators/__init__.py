"""What makes the generated parts of the documentation: a module for each source, whose functions return text for the blocks of pages.

A page marks a block with `<!-- generated: NAME -->` and `<!-- end of generated part -->`; `blocks` has the text for every NAME.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from generators import accuracy

SOURCES: tuple[Callable[[], dict[str, str]], ...] = (accuracy.blocks,)
"""Functions that return blocks by name. No two of them may make a block of the same name."""

PICTURES: dict[str, Callable[[Path], None]] = {"accuracy.png": lambda path: accuracy.accuracy_picture("mnist-mlp", path)}
"""By the name of a file in docs/images, the function that draws it to a path."""


def blocks() -> dict[str, str]:
    """Every generated block by name. Raises ValueError if two sources make a block of one name."""
    made: dict[str, str] = {}
    for source in SOURCES:
        own = source()
        if twice := made.keys() & own.keys():
            raise ValueError(f"generated block {', '.join(sorted(twice))}: made by two sources")
        made |= own
    return made
