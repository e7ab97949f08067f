"""What is said once in a process."""

from __future__ import annotations

import logging
import warnings

log = logging.getLogger("approx_compile")
said: set[str] = set()


class ApproxWarning(UserWarning):
    """A model in which nothing was approximated; a pattern that matches nothing; slices over several graphs; a lowering that is not to be had."""


def say_once(text: str) -> None:
    if text not in said:
        said.add(text)
        log.warning(text)


def warn_once(text: str) -> None:
    if text not in said:
        said.add(text)
        warnings.warn(text, ApproxWarning, stacklevel=2)
