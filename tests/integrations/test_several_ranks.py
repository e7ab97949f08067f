"""Frameworks on two ranks. What each case does stands in `helpers/framework_cases.py`. Lightning's Trainer: `test_lightning_ranks.py`."""

from __future__ import annotations

import pytest
from helpers import framework_cases
from helpers.ranks import run_on_ranks

pytestmark = [pytest.mark.integrations, pytest.mark.distributed, pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    for library in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(library)
    return run_on_ranks(tmp_path_factory.mktemp("frameworks"), "helpers.framework_cases", framework_cases.CASES)


@pytest.mark.parametrize("case", framework_cases.CASES)
def test_a_resumed_run_of_two_ranks_repeats_the_uninterrupted_one(case: str, failed: dict[str, str]) -> None:
    assert case not in failed, failed[case]
