"""Fixtures for the tests of passes."""

from __future__ import annotations

import pytest

from approx_compile.kernels import availability


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer the ops of this project's kernels on this device as well."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
