"""The model of data-parallel steps in `benchmarks/distributed/scaling.py`: limits that can be computed by hand."""

from __future__ import annotations

import pytest

from benchmarks.distributed.scaling import Link, step_ms

LINK = Link(alpha_us=0, beta_gbit_s=8)  # 1 MB in 1 ms


def test_a_ring_sends_twice_all_but_one_part() -> None:
    assert LINK.ring_ms(100, 1) == 0
    assert LINK.ring_ms(100, 2) == pytest.approx(100)
    assert LINK.ring_ms(100, 4) == pytest.approx(150)
    assert Link(1000, 1e9).ring_ms(100, 4) == pytest.approx(6, rel=1e-3)


def test_one_message_leaves_after_the_backward_pass() -> None:
    assert step_ms(100, 0.6, 50, 2, LINK, 1) == pytest.approx(150)


def test_messages_overlap_with_the_backward_pass() -> None:
    assert step_ms(100, 0.6, 50, 2, LINK, 10) == pytest.approx(105)  # the link keeps up: only the last message is left
    assert step_ms(100, 0.6, 200, 2, LINK, 10) == pytest.approx(46 + 200)  # the link is the limit: it starts with the first bucket and never waits
