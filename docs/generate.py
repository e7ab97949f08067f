"""Write the parts of the documentation that are made from code and stored results: `python docs/generate.py` writes them, `--check` fails where one differs.

What makes them is in the package `generators` beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from generators import DRAWINGS, PICTURES, blocks

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- generated: {} -->", "<!-- end of generated part -->"


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def filled(text: str, made: Mapping[str, str], page: Path) -> str:
    """A page with its generated blocks made anew. Raises ValueError for a block of a name that nobody makes, or without an end."""
    out, rest = "", text
    start = BEGIN.split("{}")[0]
    while start in rest:
        before, rest = rest.split(start, 1)
        name, rest = rest.split(" -->", 1)
        if name not in made or END not in rest:
            raise ValueError(f"{page}: generated block {name!r}; there are {', '.join(made)}, each ends with {END}")
        _, rest = rest.split(END, 1)
        out += f"{before}{BEGIN.format(name)}\n{made[name]}\n{END}"
    return out + rest


def images(check: bool) -> list[Path]:
    """The files in docs/images that are not what the code and the stored results give; they are written unless `check` is set.

    Drawings are compared as text. A picture of stored results is compared by the digest of the rows that it shows.
    """
    stale = []
    for name, text in ((name, draw()) for name, draw in DRAWINGS.items()):
        path = IMAGES / name
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if not check:
                path.write_text(text)
    for name, picture in PICTURES.items():
        path = IMAGES / name
        if not picture.is_current(path):
            stale.append(path)
            if not check:
                picture.write(path)
    return stale


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; fail where a page or an image is not what would be written.")] = False,
    redraw: Annotated[bool, typer.Option(help="Draw all pictures anew, for example after a change of how they look.")] = False,
) -> None:
    """Write the generated parts of README.md and docs/."""
    made, stale = blocks(), images(check)
    for page in pages():
        before = page.read_text()
        after = filled(before, made, page)
        if after != before:
            stale.append(page)
            if not check:
                page.write_text(after)
    if redraw and not check:
        for name, picture in PICTURES.items():
            picture.write(IMAGES / name)
    for path in stale:
        print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}")
    if check and stale:
        sys.exit("generated parts differ from what the code and the stored results give: run `python docs/generate.py`")


if __name__ == "__main__":
    typer.run(main)
