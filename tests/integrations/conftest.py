"""Make the frameworks importable before a test file imports them, and start every test without what Accelerate remembers of the last one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from helpers import frameworks  # noqa: F401


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Reset Accelerate, which keeps the settings of the first Accelerator of a process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
