"""What the package runs with, from pyproject.toml and constraints.txt, and the private names of torch that it needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from approx_compile._torch.canary import NAMES

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict[str, object]:
    """The table `project` of pyproject.toml."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def pinned(name: str) -> str:
    """The version of a package that `make test` installs."""
    found = re.search(rf"(?m)^{re.escape(name)}==(\S+)$", (ROOT / "constraints.txt").read_text())
    if found is None:
        raise ValueError(f"constraints.txt does not pin {name}")
    return found[1].partition("+")[0]


def requirements() -> str:
    """Python, systems, and each required package with its range and the version that is tested."""
    settings = project()
    classifiers = [str(c) for c in settings["classifiers"]]
    systems = ", ".join(c.rpartition(" :: ")[2] for c in classifiers if c.startswith("Operating System ::"))
    pythons = ", ".join(c.rpartition(" :: ")[2] for c in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c))
    lines = [
        "| | required | tested |",
        "|---|---|---|",
        f"| Python | {settings['requires-python']} | {pythons} |",
        f"| operating system | {systems} | {systems} |",
    ]
    for requirement in settings["dependencies"]:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", str(requirement)).groups()
        lines.append(f"| {name} | {bounds or 'any'} | {pinned(name)} |")
    return "\n".join(lines)


def extras() -> str:
    """The optional packages by extra; those for work on the package itself are left out."""
    lines = ["| extra | packages |", "|---|---|"]
    for name, packages in project()["optional-dependencies"].items():
        if name not in ("dev", "docs", "conformance"):
            lines.append(f"| `{name}` | {', '.join(packages)} |")
    return "\n".join(lines)


def private_names() -> str:
    """The private names of torch that may be missing, with what holds then."""
    lines = ["| private name of torch | without it |", "|---|---|"]
    lines += [f"| `{n.name}` | {n.fallback} |" for n in NAMES if n.fallback is not None]
    needed = sum(n.fallback is None for n in NAMES)
    return "\n".join([*lines, "", f"Without one of {needed} further names the package cannot be imported, and says which one is missing."])


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"requirements": requirements(), "extras": extras(), "private names of torch": private_names()}
