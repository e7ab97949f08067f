"""The type of reasons and of their templates."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

NOTHING_TO_DO = "Nothing to do: "
"""How an advice begins that only says why all is well."""


@dataclass(frozen=True)
class Template:
    """An entry of the registry: a reason whose fields are not filled in yet. A call fills them in.

    Attributes:
        id: Its stable name in JSON, and its anchor in docs/reference/reasons.md.
        text: What is the case, with the fields in braces.
        advice: What the user can do about it, or `NOTHING_TO_DO` and why that is fine. Empty for what describes something that is done.

    Example:
        >>> from approx_compile.reasons.reason import Template
        >>> template = Template("short-axis", "axis of {size}", "Set a smaller min_k.")
        >>> template(size=8)
        'axis of 8'
        >>> template(size=8).ids
        ('short-axis',)
    """

    id: str
    text: str
    advice: str = ""

    def __call__(self, **fields: object) -> Reason:
        """Return the reason with its fields filled in. The causes of a field that is a reason become causes of this one, too."""
        inside = (c for v in fields.values() if isinstance(v, Reason) for c in v.causes)
        return Reason(self.text.format(**fields), (self, *inside))

    def explains(self, text: str | None) -> bool:
        """Return whether a reason was made from this template, alone or among others."""
        return isinstance(text, Reason) and self in text.causes

    @property
    def actionable(self) -> bool:
        """Whether the advice is something that the user can do."""
        return bool(self.advice) and not self.advice.startswith(NOTHING_TO_DO)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.text) if name)


class Reason(str):
    """A text that says why something stays exact, or what is done in its place. It is compared, stored and shown as its text.

    Only templates make reasons, so that each has an entry in the registry.

    Attributes:
        causes: The templates that it was made from, without repetitions.
    """

    causes: tuple[Template, ...]

    def __new__(cls, text: str, causes: Iterable[Template] = ()) -> Reason:
        """Make a reason of a text and the templates that it comes from."""
        made = super().__new__(cls, text)
        made.causes = tuple(dict.fromkeys(causes))
        return made

    def __getnewargs__(self) -> tuple[str, tuple[Template, ...]]:  # type: ignore[override]
        """Return what copies and pickles are made from."""
        return str(self), self.causes

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of its causes, the most general first."""
        return tuple(c.id for c in self.causes)

    @property
    def advice(self) -> tuple[str, ...]:
        """What the user can do, without repetitions; empty where there is nothing to do."""
        return tuple(dict.fromkeys(c.advice for c in self.causes if c.actionable))

    def at(self, place: str) -> Reason:
        """Return the reason with the place in the user's model where it holds; unchanged for an empty place."""
        return Reason(f"{self} (at {place})", self.causes) if place else self


def join(reasons: Iterable[Reason], between: str = "; ") -> Reason:
    """Return several reasons as one.

    Args:
        reasons: The reasons.
        between: The text between them.
    """
    listed = list(reasons)
    return Reason(between.join(listed), (c for r in listed for c in r.causes))
