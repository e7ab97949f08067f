"""Messages that appear once in a process, and atomic writes of files."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

log = logging.getLogger("approx_compile")
emitted: set[str] = set()
"""The messages that this process has emitted."""


class ApproxWarning(UserWarning):
    """A warning of this package: nothing was approximated in a model, a pattern matches nothing, a lowering is not available, and the like."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees either its old or its new text, never a part; several processes may write at once.

    Args:
        path: The file; missing folders are made.
        text: Its new text.

    Raises:
        OSError: The file cannot be written. No temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(fd, "w") as f:
            f.write(text)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def log_once(text: str) -> None:
    """Log a message at the level of warnings, if this process has not emitted it yet.

    Args:
        text: The message.
    """
    if text not in emitted:
        emitted.add(text)
        log.warning(text)


def warn_once(text: str) -> None:
    """Give an `ApproxWarning` at the user's line of code, if this process has not emitted the message yet.

    Args:
        text: The message.
    """
    if text not in emitted:
        emitted.add(text)
        warnings.warn(text, ApproxWarning, stacklevel=_users_level())


_INNER = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__, functools.__file__)


def _users_level() -> int:
    """The `stacklevel`, seen from the caller, of the user's line: the first one outside of this package and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_INNER, "<")):
        frame, level = frame.f_back, level + 1
    return level
