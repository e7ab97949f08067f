"""What makes the generated parts of the documentation: a module for each source, whose functions return text for the blocks of pages.

A page marks a block with `<!-- generated: NAME -->` and `<!-- end of generated part -->`; `blocks` has the text for every NAME. Pictures of stored results and
drawings are files in docs/images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, PngImagePlugin

from generators import (
    accuracy,
    api,
    compatibility,
    configuration,
    conformance,
    cost_model,
    cpu_study,
    distributed,
    environment,
    formats,
    frameworks,
    gradients,
    outputs,
    papers,
    reasons,
    recorded,
    speed,
    studies,
)
from generators.drawings import DRAWINGS
from generators.stored import Row

__all__ = ["DRAWINGS", "PICTURES", "Picture", "blocks"]

SOURCES: tuple[Callable[[], dict[str, str]], ...] = (
    accuracy.blocks,
    speed.blocks,
    cost_model.blocks,
    studies.blocks,
    gradients.blocks,
    papers.blocks,
    frameworks.blocks,
    cpu_study.blocks,
    distributed.blocks,
    outputs.blocks,
    recorded.blocks,
    reasons.blocks,
    configuration.blocks,
    api.blocks,
    environment.blocks,
    formats.blocks,
    compatibility.blocks,
    conformance.blocks,
)
"""Functions that return blocks by name. No two of them may make a block of the same name."""


@dataclass(frozen=True)
class Picture:
    """A picture of stored results.

    Attributes:
        draw: Draws it to a path.
        rows: Returns the stored rows that it shows. Their digest is kept in the file, so that a picture of other rows can be told without drawing it anew.
    """

    draw: Callable[[Path], None]
    rows: Callable[[], Sequence[Row]]

    def digest(self) -> str:
        """A digest of the rows."""
        return hashlib.sha256(json.dumps(self.rows(), sort_keys=True).encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Draw the picture, with the digest of its rows in the file."""
        self.draw(path)
        info = PngImagePlugin.PngInfo()
        info.add_text("rows", self.digest())
        with Image.open(path) as image:
            image.load()
        image.save(path, pnginfo=info, optimize=True)

    def is_current(self, path: Path) -> bool:
        """Whether the file shows the rows that are stored now."""
        if not path.exists():
            return False
        with Image.open(path) as image:
            return bool(image.info.get("rows") == self.digest())


PICTURES: dict[str, Picture] = {
    **{
        f"accuracy{'' if work == 'mnist-mlp' else '-' + work}.png": Picture(partial(accuracy.accuracy_picture, work), partial(accuracy.picture_rows, work))
        for work in accuracy.PICTURED
    },
    "predictions.png": Picture(cost_model.predictions_picture, cost_model.predictions),
    "shift.png": Picture(studies.shift_picture, studies.picture_rows),
}
"""By the name of a file in docs/images, the picture of stored results in it."""


def blocks() -> dict[str, str]:
    """Every generated block by name. Raises ValueError if two sources make a block of one name."""
    made: dict[str, str] = {}
    for source in SOURCES:
        more = source()
        if twice := made.keys() & more.keys():
            raise ValueError(f"generated block {', '.join(sorted(twice))}: made by two sources")
        made |= more
    return made
