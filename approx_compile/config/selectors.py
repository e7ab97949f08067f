"""Parse and match the selectors that say where and when a rule holds: patterns over layers, slices over optimizer steps, and names of phases."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

KINDS = ("conv", "linear", "matmul", "site")


@dataclass(frozen=True)
class LayerPattern:
    """One parsed entry of `layers`.

    Attributes:
        text: The entry as written.
        kind: The kind of sites that it matches, one of `KINDS`; None if it matches names.
        index: Which sites of the kind match, in execution order; None for all.
        regex: The expression that a name must match; None for a kind or a glob.
    """

    text: str
    kind: str | None = None
    index: slice | int | None = None
    regex: re.Pattern[str] | None = None

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> LayerPattern:
        """Parse an entry of `layers`. Results are cached.

        Args:
            text: The entry.

        Returns:
            The pattern.

        Raises:
            ValueError: The entry is empty, or is no valid regular expression, slice or glob.
        """
        if not text.strip():
            raise ValueError("layers: an empty pattern; write 'site' for every site")
        if text.startswith("re:"):
            try:
                return LayerPattern(text, regex=re.compile(text[3:]))
            except re.error as e:
                raise ValueError(f"layers: {text!r} is not a regular expression: {e}") from None
        kind = re.fullmatch(rf"({'|'.join(KINDS)})(\[.*)?", text)
        if kind is None:
            if text.count("[") != text.count("]"):
                raise ValueError(f"layers: {text!r} has an unbalanced bracket; '[abc]' in a glob is a set of characters")
            return LayerPattern(text)
        if kind[2] is None:
            return LayerPattern(text, kind=kind[1])
        return LayerPattern(text, kind=kind[1], index=_parse_slice(text, kind[2]))

    @property
    def is_name(self) -> bool:
        """Whether the pattern is matched against names of modules and not against kinds."""
        return self.kind is None

    def matches_name(self, *names: str) -> bool:
        """Whether the expression or glob matches one of the names."""
        if self.regex is not None:
            return any(self.regex.fullmatch(n) for n in names)
        return any(fnmatchcase(n, self.text) for n in names)

    def matches_position(self, position: int, count: int) -> bool:
        """Whether `index` selects the site at `position` among `count` sites of its kind."""
        if self.index is None:
            return True
        if isinstance(self.index, int):
            return position == (self.index if self.index >= 0 else self.index + count)
        return position in range(count)[self.index]


def _parse_slice(text: str, brackets: str) -> slice | int:
    """Parse the index or slice in brackets of the pattern `text`."""
    inside = re.fullmatch(r"\[\s*(-?\d*)\s*(?::\s*(-?\d*)\s*(?::\s*(-?\d*)\s*)?)?\]", brackets)
    try:
        if inside is None:
            raise ValueError
        parts = [p for p in inside.groups() if p is not None]
        if len(parts) == 1:
            return int(parts[0])
        numbers = [int(p) if p else None for p in parts]
        if len(numbers) == 3 and numbers[2] == 0:
            raise ValueError
        return slice(*numbers)
    except ValueError:
        raise ValueError(
            f"layers: {text!r} is no valid slice; write conv[3], conv[1::4], linear[:-1] (a kind, then a Python index or slice with a step other than 0)"
        ) from None


@dataclass(frozen=True)
class StepSlice:
    """A slice over completed optimizer steps, from 0. Ends may be shares of `total_steps`: "80%:" is the last fifth of a run.

    Attributes:
        text: The slice as written.
        start: The first step.
        stop: The step after the last; None if the slice has no end.
        stride: Steps from one selected step to the next.
    """

    text: str
    start: int = 0
    stop: int | None = None
    stride: int = 1

    @staticmethod
    def parse(text: str, total: int | None = None) -> StepSlice:
        """Parse a slice over steps.

        Args:
            text: The slice, such as "::2", ":8000" or "80%:".
            total: The optimizer steps of the whole run, which shares refer to (see `needs_total`).

        Returns:
            The slice.

        Raises:
            ValueError: The text is no slice, selects no step, or has shares while `total` is None.
        """
        match = _STEPS.fullmatch(text.replace(" ", ""))
        if match is None or not text.strip():
            raise ValueError(f"steps: got {text!r}; a slice over optimizer steps is expected: '::2', '3::4', ':8000', or shares of total_steps: '80%:'")
        start, stop = (_place(text, part, total) for part in match.group(1, 2))
        stride = int(match[3]) if match[3] else 1
        if stride == 0:
            raise ValueError(f"steps: {text!r} has a stride of 0")
        if stop is not None and stop <= (start or 0):
            raise ValueError(f"steps: {text!r} holds no step")
        return StepSlice(text, start or 0, stop, stride)

    def hold(self, step: int) -> bool:
        """Whether the slice selects a step."""
        return step >= self.start and (self.stop is None or step < self.stop) and (step - self.start) % self.stride == 0


@dataclass(frozen=True)
class ActivePeriod:
    """The steps and the phases at which a rule holds; None means all."""

    steps: StepSlice | None
    phases: tuple[str, ...] | None

    def holds(self, step: int, phase: str | None) -> bool:
        """Whether the rule holds after `step` completed optimizer steps in a phase."""
        return (self.steps is None or self.steps.hold(step)) and (self.phases is None or phase in self.phases)


_STEPS = re.compile(r"(\d+(?:\.\d+)?%|\d+)?:(\d+(?:\.\d+)?%|\d+)?(?::(\d+)?)?")


def needs_total(text: str) -> bool:
    """Whether a slice over steps has ends that are shares of the whole run."""
    return "%" in text


def _place(text: str, part: str | None, total: int | None) -> int | None:
    """The step at one end of the slice `text`; None if that end is left out."""
    if not part:
        return None
    if not part.endswith("%"):
        return int(part)
    share = float(part[:-1]) / 100
    if share > 1:
        raise ValueError(f"steps: {text!r} goes beyond 100%")
    if total is None:
        raise ValueError(f"steps: {text!r} is a share of the run; set total_steps, the number of optimizer steps it will have")
    return round(share * total)
