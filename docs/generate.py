"""Write the parts of the documentation that are made from code and stored results: `python docs/generate.py` writes them, `--check` fails where one differs.

What makes them is in the package `generators` beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from generators import PICTURES, blocks

ROOT = Path(__file__).resolve().parents[1]
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


def main(check: Annotated[bool, typer.Option(help="Change nothing; fail where a page is not what would be written.")] = False) -> None:
    """Write the generated parts of README.md and docs/."""
    made, stale = blocks(), []
    for page in pages():
        before = page.read_text()
        after = filled(before, made, page)
        if after != before:
            stale.append(page)
            if not check:
                page.write_text(after)
    if not check:
        for name, draw in PICTURES.items():
            draw(ROOT / "docs" / "images" / name)
    for page in stale:
        print(f"{'differs' if check else 'written'}: {page.relative_to(ROOT)}")
    if check and stale:
        sys.exit("generated parts differ from what the code and the stored results give: run `python docs/generate.py`")


if __name__ == "__main__":
    typer.run(main)
