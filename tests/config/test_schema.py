"""Every key is described, with examples that run; what is said of a wrong value or a misplaced key is said in this package's words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compile import plans_of
from torch import nn

from approx_compile import ApproxConfig, ConfigError
from approx_compile.config.messages import tables
from approx_compile.config.schema import Table

TABLES: dict[str, type[Table]] = {"": ApproxConfig, **tables(ApproxConfig)}
KEYS = [(name, key) for name, table in TABLES.items() for key in table.model_fields]

DIGESTS: dict[str, dict[str, Any]] = {
    "e04ebcd6d862273206840ef10f9c2621370dfd2d17191cb6ee09d314fb043828": {},
    "e53587fe2355f40742602b4f7883c0804db9a29d1a8667bae1397d3fb55cc9af": {
        "ratio": 0.25,
        "method": "crs",
        "min_k": 8,
        "group": 4,
        "sampling": "backward",
        "share": True,
    },
    "ef0d460f63ab71fcba2c014f0e90a653aca228a73d721ae5af0c271d39e1d098": {
        "policy": "always",
        "output": "topk",
        "grad_input": {"method": "max", "j": 2, "scale": 0.5},
        "grad_weight": {"method": "random", "std": 0.1},
    },
    "f8d737bda2e3510eae2065b7380ce688348773a264ff63c90e09f108e541da23": {
        "grad": {"axis": "rows", "ratio": 0.25, "method": "wta", "batch_norm": "approximate"},
        "adaptive": {"tau": 0.1, "ladder": [0.5], "error": 0.1, "outputs": [0.25], "every": 50},
    },
    "0b24b239d174c89898b954c2b820dab4079e70562363ab8d3e94d99b4effddb6": {
        "total_steps": 1000,
        "final_exact": 0.1,
        "lowering": "triton",
        "huge_pages": False,
        "inductor": {"mode": "max-autotune"},
        "rules": [
            {"layers": ["stem.*", "re:head"], "method": "exact"},
            {"layers": "conv[1::4]", "steps": "80%:", "phase": "late", "grad_weight": {"method": "max", "tile": "auto"}},
        ],
    },
    "5e6b709209dffc4d5d1f00b5b2c1c1ab1ac0ca13c6a8941fa1ad909b9efec847": {
        "plan": {
            "policy": "always",
            "method": "exact",
            "tuned": {
                "model": "Net",
                "torch": "2.13.0",
                "device": "cpu",
                "threads": 1,
                "max_error": 0.5,
                "sites": [{"name": "0", "op": "mm", "shape": "8x8x8", "dtype": "float32"}],
            },
        }
    },
}
"""The part of the cache keys that settings make, with the table `units` among the keys."""


def _values(options: Any, key: str) -> Iterator[Any]:
    """Every value that options, or tables in them, have for a key."""
    for k, v in options.items() if isinstance(options, dict) else ():
        if k == key:
            yield v
        yield from _values(v, key)
    for item in options if isinstance(options, list) else ():
        yield from _values(item, key)


@pytest.mark.parametrize("digest", DIGESTS)
def test_descriptions_are_in_no_cache_key(digest: str) -> None:
    assert ApproxConfig(**DIGESTS[digest]).digest() == digest


@pytest.mark.parametrize(("name", "key"), KEYS, ids=[f"{n}.{k}".lstrip(".") for n, k in KEYS])
def test_every_key_has_a_description_and_examples_that_are_settings(name: str, key: str) -> None:
    field = TABLES[name].model_fields[key]
    assert field.description and field.description.endswith(".")
    assert field.examples
    for options in field.examples:
        ApproxConfig(**options)
        assert list(_values(options, key)), options


def test_the_json_schema_describes_every_property_and_lists_the_words() -> None:
    schema = ApproxConfig.model_json_schema()
    for name, table in {"ApproxConfig": schema, **schema["$defs"]}.items():
        if name not in ("Tuned", "TunedSite"):  # the record of a plan is no setting
            assert all("description" in prop for prop in table["properties"].values()), name
    words = {key: schema["properties"][key]["enum"] for key in ("method", "sampling", "policy", "lowering")}
    for key, valid in words.items():
        for word in valid:
            ApproxConfig(**{key: word})
        with pytest.raises(ConfigError, match=rf"{key}: got 'nonsense'; valid are {', '.join(valid)}"):
            ApproxConfig(**{key: "nonsense"})
    assert (schema["properties"]["ratio"]["exclusiveMinimum"], schema["properties"]["ratio"]["maximum"]) == (0, 1)
    weight = next(o["enum"] for o in schema["$defs"]["WeightTable"]["properties"]["method"]["anyOf"] if "enum" in o)
    assert {"zero", "random", "max", "topk"} <= set(weight)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["grad", "grad_weight", "plan"])
def test_examples_compile(key: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    for options in ApproxConfig.model_fields[key].examples or ():
        assert [s.name for s in plans_of(model, options, torch.randn(32, 64))] == ["0", "2"]


BAD: tuple[Any, ...] = ("nonsense", -1, 1.5, True, [], [1], {}, {"nonsense": 1}, object(), b"x")


@pytest.mark.parametrize(("name", "key"), KEYS, ids=[f"{n}.{k}".lstrip(".") for n, k in KEYS])
def test_what_is_said_of_a_wrong_value(name: str, key: str) -> None:
    refused = 0
    for value in BAD:
        table: dict[str, Any] = {key: value}
        if name == "rules":
            table = {"layers": "a"} | table
        options = {name: [table] if name == "rules" else table} if name else table
        try:
            ApproxConfig(**options)
        except ConfigError as error:
            refused += 1
            for theirs in ("Input should be", "valid string", "valid dictionary", "type=", "pydantic"):
                assert theirs not in str(error), (value, str(error))
            assert key in str(error)
    assert refused >= 4


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in KEYS if n and k not in ApproxConfig.model_fields])
def test_a_key_of_a_table_at_the_top(name: str, key: str) -> None:
    """And in a rule, where the table may stand at the top only."""
    value = next(v for options in TABLES[name].model_fields[key].examples or () for v in _values(options, key))
    with pytest.raises(ConfigError) as error:
        ApproxConfig(**{key: value})
    text = str(error.value)
    assert text.startswith(f"{key} belongs in ") and ("a rule" if name == "rules" else name) in text
    example = eval(text.partition(": ")[2])  # the options that the message shows are options
    assert list(_values(example, key)) == [value]
    if name != "rules":
        ApproxConfig(**example)
        with pytest.raises(ConfigError, match=rf"rules\[0\]: {key} belongs in "):
            ApproxConfig(rules=[{"layers": "a", key: value}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "max-autotune"}, "mode is an option of Inductor: {'inductor': {'mode': 'max-autotune'}}, or torch.compile(mode='max-autotune')"),
        ({"max_autotune": True}, "max_autotune is an option of Inductor: {'inductor': {'max_autotune': True}}"),
        ({"grad": "rows"}, "grad.method: got 'rows', which is a value of axis: {'grad': {'axis': 'rows', 'ratio': 0.25}}"),
        ({"policy": "topk"}, "policy: got 'topk', which is a value of method: {'method': 'topk'}"),
        ({"rules": [{"layer": "stem", "method": "exact"}]}, "rules[0]: unknown key 'layer'; did you mean 'layers'?"),
        ({"rules": [{"layers": "a", "tau": 0.1}]}, "rules[0]: tau belongs in adaptive, at the top of the options: {'adaptive': {'tau': 0.1}}"),
        ({"rules": [{"layers": "a", "output": {"share": True}}]}, "rules[0].output: share belongs in the rule: {'share': True}"),
        ({"rules": [{"layers": "a", "total_steps": 9}]}, "rules[0]: total_steps belongs at the top of the options: {'total_steps': 9}"),
        ({"tua": 0.1}, "unknown key 'tua'; did you mean 'tau'? tau belongs in adaptive: {'adaptive': {'tau': 0.1}}"),
        ({"max_error": 0.5}, "max_error is an argument of approx_compile.tune, and bounds the relative error e; adaptive.error bounds e^2"),
        ({"total_steps": "10k"}, "total_steps: got '10k'; an integer of at least 1 is expected, the optimizer steps of the whole run, such as 10000"),
        ({"huge_pages": "no"}, "huge_pages: got 'no'; true or false is expected"),
        ({"output": {3: 4}}, "output: got the key 3; a string is expected"),
        ({"rules": [{"ratio": 0.5}]}, "rules[0].layers: this key is required in a rule without steps or phase"),
        ({"rules": [{"layers": "a", "grad": {"axis": "rows", "method": "crs"}}]}, "rules[0].grad.method: got 'crs', which can't choose rows"),
        ({"ratio": 25}, "ratio: got 25; a number in (0, 1] is expected, the share of the axis that is kept, such as 0.25"),
        ({"ratio": 2, "tau": 3}, "ratio: got 2; a number in (0, 1] is expected, the share of the axis that is kept, such as 0.5; tau belongs in adaptive"),
    ],
)
def test_near_misses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ApproxConfig(**options)
    assert str(error.value).startswith(message)
