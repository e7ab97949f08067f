"""Interrupt what runs when the time budget is over, as Ctrl-C would: a compilation can take minutes on a busy machine and looks at no clock."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from time import monotonic
from types import FrameType

AGAIN_S = 5.0
"""Seconds after which it rings again inside the block: Python drops an exception that is raised in a finalizer or in the callback of a weak reference."""


class DeadlineReached(BaseException):
    """The time is over. It is no `Exception`, so that code which handles errors lets it pass, as it does a `KeyboardInterrupt`."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `DeadlineReached` inside the block after some seconds.

    Nothing is raised outside of the main thread, where Python handles no signals, on systems without interval timers, and where another timer of the process
    rings earlier.

    Args:
        seconds: The seconds from now on.

    Yields:
        Nothing.

    Raises:
        DeadlineReached: When the seconds are over.
    """
    others = signal.getitimer(signal.ITIMER_REAL)[0] if hasattr(signal, "setitimer") else 0.0
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread() or 0 < others <= seconds:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise DeadlineReached

    began = monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if rest:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, rest - (monotonic() - began)), interval)
