"""What is said where ranks have decided differently."""

from __future__ import annotations

from approx_compile.backend.runtime.compiled_graphs import GraphDecisions
from approx_compile.distributed.plan_agreement import disagreement

LAYERS = {"a": "output sampled (topk_weights 0.5)", "b": "output exact"}
DECISIONS = GraphDecisions({"ratio": 0.5}, "profile", LAYERS)


def test_equal_decisions_and_graphs_that_one_rank_lacks_agree() -> None:
    assert disagreement([{"g": DECISIONS}, {"g": DECISIONS}, {}]) is None
    assert disagreement([{"g": DECISIONS}, {"other": DECISIONS}]) is None


def test_settings_are_named() -> None:
    text = disagreement([{"g": DECISIONS}, {"g": GraphDecisions({"ratio": 0.25}, "profile", LAYERS)}])
    assert text == "the ranks were given different settings: rank 0 {'ratio': 0.5}, rank 1 {'ratio': 0.25}"


def test_layers_that_differ_are_named_with_the_cause() -> None:
    other = GraphDecisions({"ratio": 0.5}, "another profile", LAYERS | {"b": "output sampled (topk_weights 0.5)"})
    text = disagreement([{"g": DECISIONS}, {"g": DECISIONS}, {"g": other}])
    assert text is not None
    assert "by different machine profiles: b: rank 0 output exact, rank 2 output sampled (topk_weights 0.5). Name one profile" in text


def test_a_plan_from_a_cache_is_not_compared() -> None:
    assert disagreement([{"g": DECISIONS}, {"g": GraphDecisions({"ratio": 0.5}, "profile", None)}]) is None


def test_of_many_layers_some_are_named() -> None:
    first, second = ({f"layer{i}": text for i in range(8)} for text in ("output exact", "output sampled (topk 0.5)"))
    text = disagreement([{"g": GraphDecisions({}, None, first)}, {"g": GraphDecisions({}, None, second)}])
    assert text is not None and "layer4" in text and "layer5" not in text and "3 more layers" in text
