"""What is said once in a process."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from pathlib import Path

import torch

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
        warnings.warn(text, ApproxWarning, stacklevel=_users_level())


_INNER = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__, functools.__file__)


def _users_level() -> int:
    """The `stacklevel`, for who calls this, of the user's own line: the first one outside of this package and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_INNER, "<")):
        frame, level = frame.f_back, level + 1
    return level
