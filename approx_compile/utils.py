"""Messages that appear once for each model, text as wide as the terminal, atomic writes of files, and the registry of environment variables."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger("approx_compile")

WIDTH = 120
"""The columns of text where there is no terminal."""

_emitted: set[str] = set()
"""The messages without a model that this process has emitted."""
_emitted_for = WeakIdKeyDictionary()
"""The set of the messages that were emitted about each model."""


class ApproxWarning(UserWarning):
    """A warning of this package: nothing was approximated in a model, a pattern matches nothing, a lowering is not available, and the like.

    Example:
        >>> import warnings
        >>> import approx_compile
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", approx_compile.ApproxWarning)  # stop at a warning of this package
    """


@dataclass(frozen=True)
class EnvironmentVariable:
    """An environment variable that this package reads, or that changes what it does.

    Attributes:
        name: The name.
        example: A value that has an effect.
        effect: What the value does.
    """

    name: str
    example: str
    effect: str

    def value(self) -> str | None:
        """Return the value; None if the variable is not set, or is empty."""
        return os.environ.get(self.name) or None


DISABLE = EnvironmentVariable(
    "APPROX_COMPILE_DISABLE",
    "1",
    "The backend is plain Inductor, except that known faults of torch are avoided as in approximate runs. Compare the accuracy of both. "
    "It is read when a model is compiled.",
)
MACHINE = EnvironmentVariable(
    "APPROX_COMPILE_MACHINE",
    "file.json",
    "The profile in this file is used in place of the measured one: for decisions that must agree on several nodes, or be the same in tests.",
)
ENVIRONMENT = (
    DISABLE,
    MACHINE,
    EnvironmentVariable(
        "TORCH_LOGS",
        "+approx_compile",
        "Every decision is in the log: that about every layer, and every change of a share during training. Without the plus it has one line for each graph.",
    ),
    EnvironmentVariable("TORCH_TRACE", "folder", "The plan of every graph is an artifact in torch's structured trace."),
    EnvironmentVariable(
        "THP_MEM_ALLOC_ENABLE",
        "1",
        "torch's own switch for huge pages in all memory of a process. It must be set before the process starts. Machines with it have a profile of their own.",
    ),
    EnvironmentVariable(
        "LD_PRELOAD",
        "libtcmalloc.so",
        "Another malloc changes the cost of new memory, as `GLIBC_TUNABLES`, `MALLOC_*` and `TCMALLOC_*` do. Machines with it have a profile of their own.",
    ),
    EnvironmentVariable(
        "XDG_CACHE_HOME", "folder", "Profiles of machines, times of sites and compiled CUDA kernels are stored in `approx_compile` in this folder."
    ),
)
"""Every environment variable that this package reads itself (`APPROX_COMPILE_...`), and those of others that change what it does."""


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


def percent(share: float) -> str:
    """Write a share in percent with three significant digits.

    Args:
        share: The share, 1 for all.

    Returns:
        Text such as "12.5 %".
    """
    return f"{100 * share:.3g} %"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s for more than one, as "2 threads".

    Args:
        number: The number.
        noun: The noun in the singular.
    """
    return f"{number} {noun}{'s' if number > 1 else ''}"


def terminal_width() -> int:
    """Return the columns of the terminal; `WIDTH` where there is none and the environment variable `COLUMNS` is not set."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def printed(*items: object) -> str:
    """Print tables and lines as wide as the terminal.

    Args:
        *items: What to print. Brackets in it are no markup.

    Returns:
        The text.
    """
    out = io.StringIO()
    console = Console(file=out, width=terminal_width(), markup=False, highlight=False)
    for item in items:
        console.print(item)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def log_once(text: str, model: nn.Module | None = None) -> None:
    """Log a message at the level of warnings, if it has not been emitted yet.

    Args:
        text: The message.
        model: The model that it is about; the same words about another model are another message.
    """
    if _is_new(text, model):
        log.warning(text)


def warn_once(text: str, model: nn.Module | None = None) -> None:
    """Give an `ApproxWarning` at the user's line of code, if the message has not been emitted yet.

    Args:
        text: The message.
        model: The model that it is about; the same words about another model are another message.
    """
    if _is_new(text, model):
        warnings.warn(text, ApproxWarning, stacklevel=_users_level())


def _is_new(text: str, model: nn.Module | None) -> bool:
    messages: set[str] = _emitted if model is None else _emitted_for.setdefault(model, set())
    if text in messages:
        return False
    messages.add(text)
    return True


def forget_messages() -> None:
    """Forget which messages were emitted, so that each is emitted again."""
    _emitted.clear()
    _emitted_for.clear()


_INNER = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__, functools.__file__)


def _users_level() -> int:
    """The `stacklevel`, seen from the caller, of the user's line: the first one outside of this package and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_INNER, "<")):
        frame, level = frame.f_back, level + 1
    return level
