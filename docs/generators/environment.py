"""The table of environment variables, from the registry that the package reads them through."""

from __future__ import annotations

from approx_compile.utils import ENVIRONMENT, EnvironmentVariable


def table(variables: tuple[EnvironmentVariable, ...]) -> str:
    """A line for each variable."""
    lines = ["| variable | effect |", "|---|---|"]
    lines += [f"| `{v.name}={v.example}` | {v.effect} |" for v in variables]
    return "\n".join(lines)


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"environment": table(ENVIRONMENT)}
