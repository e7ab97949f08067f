"""What `make test` runs of data-parallel training with two real ranks, by one start of the ranks. What each case does stands in `helpers/*_cases.py`."""

from __future__ import annotations

import pytest
from helpers import ddp_cases, reduced_cases
from helpers.ranks import run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CASES = [f"{module.__name__}.{case}" for module in (ddp_cases, reduced_cases) for case in module.IN_MAKE_TEST]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), "", CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.removeprefix("helpers."))
def test_two_ranks(case: str, failed: dict[str, str]) -> None:
    assert case not in failed, failed[case]
