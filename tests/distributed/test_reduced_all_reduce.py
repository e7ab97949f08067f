"""The reduced all-reduce against DDP's full one, with real ranks. What each case does stands in `helpers/reduced_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import reduced_cases
from helpers.ranks import run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.exhaustive
def test_other_uses_with_two_ranks(tmp_path: Path) -> None:
    failed = run_on_ranks(tmp_path, "helpers.reduced_cases", reduced_cases.OTHERS)
    assert not failed, failed


@pytest.mark.exhaustive
def test_four_ranks(tmp_path: Path) -> None:
    failed = run_on_ranks(tmp_path, "helpers.reduced_cases", reduced_cases.FOUR_RANKS, 4)
    assert not failed, failed


@pytest.mark.exhaustive
def test_four_ranks_with_random_delays(tmp_path: Path) -> None:
    failed = run_on_ranks(tmp_path, "helpers.reduced_cases", ["random_delays"], 4)
    assert not failed, failed
