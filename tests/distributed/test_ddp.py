"""Data-parallel training with real ranks. What each case does stands in `helpers/ddp_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ddp_cases
from helpers.ranks import run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
exhaustive = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def failed_of_others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(tmp_path_factory.mktemp("others"), "helpers.ddp_cases", ddp_cases.OTHERS)


@exhaustive
@pytest.mark.parametrize("case", ddp_cases.OTHERS)
def test_other_uses_with_two_ranks(case: str, failed_of_others: dict[str, str]) -> None:
    assert case not in failed_of_others, failed_of_others[case]


@exhaustive
@pytest.mark.parametrize("case", ["killed_rank", "killed_rank_of_the_reduced_all_reduce"])
def test_a_killed_rank_ends_the_others_with_an_error(case: str, tmp_path: Path) -> None:
    failed = run_on_ranks(tmp_path, "helpers.ddp_cases", [case], limit_s=200)
    assert "rank 0" not in failed[case] and "rank 1: did not run" in failed[case]
