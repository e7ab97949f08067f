"""Fixtures for the tests of passes."""

from __future__ import annotations

import pytest

from approx_compile.kernels import availability


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of our kernels are offered on this device as well."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
