"""Every wrong key, value, pattern and combination is a ConfigError that says what came, what is valid and what is near."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from common import mlp, plans_of
from torch import nn

from approx_compile import ApproxConfig, Backend, ConfigError
from approx_compile.patterns import Pattern

WRONG = {
    "key": ({"ration": 0.5}, "unknown key 'ration'", "'ratio'"),
    "method": ({"method": "topkk"}, "topkk", "'topk'"),
    "method_type": ({"method": 3}, "3", "bernoulli"),
    "method_none": ({"method": None}, "method", "leave the key out"),
    "ratio_zero": ({"ratio": 0}, "ratio", "(0, 1]"),
    "ratio_above": ({"ratio": 1.5}, "1.5", "(0, 1]"),
    "ratio_text": ({"ratio": "half"}, "half", "(0, 1]"),
    "ratio_bool": ({"ratio": True}, "True", "(0, 1]"),
    "min_k": ({"min_k": 0}, "min_k", "at least 1"),
    "group": ({"group": -4}, "-4", "'auto'"),
    "sampling": ({"sampling": "forwards"}, "forwards", "'forward'"),
    "policy": ({"policy": "costs"}, "costs", "'cost'"),
    "steps_outside": ({"steps": "::2"}, "steps", "belongs in a rule"),
    "method_later": ({"grad_weight": "dropout"}, "grad_weight.method", "not built yet"),
    "replace_all": ({"method": "zero"}, "'zero' replaces a gradient", "grad_weight only"),
    "replace_output": ({"output": "max"}, "output.method", "grad_input and grad_weight only"),
    "replace_input": ({"rules": [{"layers": "conv", "grad": "random"}]}, "rules[0].grad.method", "valid here are topk"),
    "replace_rows": ({"grad": {"axis": "rows", "method": "max"}}, "grad", "can't choose rows"),
    "replace_keys": ({"grad_weight": {"method": "zero", "j": 3}}, "grad_weight", "j belongs to method 'max'"),
    "replace_keys_alone": ({"grad_weight": {"std": 0.1}}, "std belongs to method 'random'", "method: None"),
    "replace_share": ({"grad_weight": {"method": "max", "ratio": 0.5}}, "ratio has no effect with method 'max'", "drop it"),
    "replace_tile": ({"grad_weight": {"method": "max", "tile": "small"}}, "grad_weight.tile", "'auto', an integer"),
    "replace_tile_of_all": ({"grad_weight": {"method": "max", "tile": 1.5}}, "grad_weight.tile", "share in (0, 1)"),
    "replace_tile_and_j": ({"grad_weight": {"method": "max", "tile": 4, "j": 2}}, "grad_weight: tile and j", "drop one"),
    "replace_tile_of_input": ({"grad_input": {"method": "max", "tile": 4}}, "grad_input", "tile"),
    "replace_j": ({"grad_weight": {"method": "max", "j": 0}}, "grad_weight.j", "at least 1"),
    "replace_scale": ({"grad_input": {"method": "max", "scale": -1}}, "grad_input.scale", "above 0"),
    "replace_std": ({"grad_weight": {"method": "random", "std": True}}, "grad_weight.std", "above 0"),
    "replace_top": ({"j": 3}, "key 'j' belongs in the table of a gradient", "'max'"),
    "rows_axis": ({"grad": {"axis": "row"}}, "grad.axis", "Did you mean 'rows'"),
    "rows_elsewhere": ({"output": {"axis": "rows"}}, "axis", "belongs under grad"),
    "rows_method": ({"grad": {"axis": "rows", "method": "crs"}}, "crs", "can't choose rows"),
    "rows_group": ({"grad": {"axis": "rows", "group": 4}}, "group", "one by one"),
    "batch_norm_alone": ({"grad": {"batch_norm": "approximate"}}, "batch_norm", "only with axis 'rows'"),
    "adaptive_ratio": ({"policy": "adaptive", "ratio": 0.5}, "ratio", "no effect under policy 'adaptive'"),
    "adaptive_rule": ({"policy": "adaptive", "rules": [{"layers": "conv", "sampling": "forward"}]}, "rules[0]", "set policy 'cost'"),
    "adaptive_key": ({"policy": "adaptive", "adaptive": {"tua": 0.1}}, "tua", "Did you mean 'tau'"),
    "adaptive_tau": ({"policy": "adaptive", "adaptive": {"tau": 0}}, "adaptive.tau", "above 0"),
    "adaptive_ladder": ({"policy": "adaptive", "adaptive": {"ladder": [0.5, 2]}}, "adaptive.ladder", "shares in"),
    "plan": ({"plan": "nowhere.toml"}, "nowhere.toml", "No such file"),
    "lowering": ({"lowering": "tritn"}, "tritn", "Did you mean 'triton'?"),
    "lowering of a rule": ({"rules": [{"layers": "conv", "lowering": 3}]}, "rules[0].lowering", "valid are auto, inductor, triton, cuda"),
    "rules_dict": ({"rules": {"layers": "conv"}}, "rules", "list of rules"),
    "rule_no_layers": ({"rules": [{"ratio": 0.5}]}, "rules[0]: layers", "required"),
    "rule_key": ({"rules": [{"layers": "x"}, {"layers": "y", "methods": "topk"}]}, "rules[1]", "'method'"),
    "rule_type": ({"rules": ["conv"]}, "rules[0]", "table"),
    "layers_empty": ({"rules": [{"layers": []}]}, "layers", "list of patterns"),
    "layers_blank": ({"rules": [{"layers": " "}]}, "empty pattern", "'site'"),
    "layers_type": ({"rules": [{"layers": 3}]}, "3", "pattern"),
    "regex": ({"rules": [{"layers": "re:(", "ratio": 0.5}]}, "re:(", "regular expression"),
    "slice": ({"rules": [{"layers": "conv[a:b]"}]}, "conv[a:b]", "conv[1::4]"),
    "slice_step": ({"rules": [{"layers": "conv[::0]"}]}, "conv[::0]", "step other than 0"),
    "slice_open": ({"rules": [{"layers": "linear[1:"}]}, "linear[1:", "slice"),
    "glob_open": ({"rules": [{"layers": "block[0"}]}, "block[0", "unbalanced"),
    "table_key": ({"output": {"sampling": "forward"}}, "output", "method, ratio, min_k, group"),
    "table_type": ({"grad": 0.5}, "grad", "table"),
    "no_weight": ({"grad_weight": "topk_weights"}, "grad_weight", "topk, crs"),
    "exact_beside": ({"method": "exact", "grad_weight": "topk"}, "grad_weight", "output='exact'"),
    "inductor_key": ({"inductor": {"max_autotun": True}}, "max_autotun", "max_autotune"),
    "inductor_mode": ({"inductor": {"mode": "fast"}}, "fast", "max-autotune"),
    "inductor_pass": ({"inductor": {"joint_custom_pre_pass": None}}, "joint_custom_pre_pass", "torch._inductor.config"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_say_why(name: str) -> None:
    options, *fragments = WRONG[name]
    with pytest.raises(ConfigError) as error:
        Backend(options)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert isinstance(error.value, ValueError)
    assert "pydantic" not in str(error.value)


def test_wrong_options_of_the_string_form_reach_the_user_unwrapped() -> None:
    model = torch.compile(nn.Linear(4, 4), backend="approx", options={"ratio": 7})
    with pytest.raises(ConfigError, match=r"ratio: got 7"):
        model(torch.randn(2, 4))


def test_contradictory_modes() -> None:
    model = torch.compile(nn.Linear(4, 4), backend=Backend({"inductor": {"mode": "max-autotune"}}), mode="reduce-overhead")
    with pytest.raises(ConfigError, match="give one"):
        model(torch.randn(2, 4))


def test_options_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match="a dict or an ApproxConfig"):
        Backend(0.5)  # type: ignore[arg-type]


def test_config_is_a_value() -> None:
    options = {"ratio": 0.3, "rules": [{"layers": ["stem.*", "head"], "method": "exact"}, {"layers": "conv[1::2]", "grad": {"method": "crs"}}]}
    a, b = ApproxConfig(**options), ApproxConfig(**options)
    assert a == b and hash(a) == hash(b) and a.digest() == b.digest()
    assert copy.deepcopy(a) == a and pickle.loads(pickle.dumps(a)) == a
    assert ApproxConfig(ratio=0.3).digest() != ApproxConfig(ratio=0.31).digest()
    with pytest.raises(ValueError, match="frozen"):
        a.ratio = 0.5  # type: ignore[misc]
    copied = copy.deepcopy(Backend(a))
    assert copied == Backend(b) and hash(copied) == hash(Backend(b))
    assert pickle.loads(pickle.dumps(Backend(a))) == Backend(a)


def test_error_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("ratio: got 7")))
    assert isinstance(error, ConfigError) and str(error) == "ratio: got 7"


def test_merging_and_precedence() -> None:
    config = ApproxConfig(
        ratio=0.5,
        rules=[
            {"layers": "a", "ratio": 0.25, "sampling": "backward"},
            {"layers": "a", "method": "crs"},
            {"layers": "b", "method": "exact"},
            {"layers": "b", "grad_weight": {"method": "topk", "ratio": 0.1}},
            {"layers": "c", "grad_weight": "topk"},
            {"layers": "c", "method": "exact"},
            {"layers": "d", "output": "exact"},
            {"layers": "e", "grad": {"method": "bernoulli", "ratio": 0.4}, "grad_weight": {"ratio": 0.2}},
        ],
    )
    hits = lambda *which: [i in which for i in range(8)]  # noqa: E731
    a = config.settings(hits(0, 1))
    assert (a.output.method, a.grad_input.method, a.grad_input.ratio) == ("exact", "crs", 0.25)
    b = config.settings(hits(2, 3))
    assert (b.output.method, b.grad_input.method, b.grad_weight.method, b.grad_weight.ratio) == ("exact", "exact", "topk", 0.1)
    c = config.settings(hits(4, 5))
    assert {c.output.method, c.grad_input.method, c.grad_weight.method} == {"exact"}
    d = config.settings(hits(6))  # an exact output leaves nothing to couple to
    assert {d.output.method, d.grad_input.method, d.grad_weight.method} == {"exact"}
    e = config.settings(hits(7))
    assert (e.output.method, e.grad_input.method, e.grad_input.ratio) == ("topk", "bernoulli", 0.4)
    assert (e.grad_weight.method, e.grad_weight.ratio) == ("bernoulli", 0.2)
    plain = config.settings(hits())
    assert (plain.output.method, plain.grad_input.method, plain.grad_weight.method) == ("topk", "coupled", "coupled")
    assert not plain.named and e.named


def test_patterns() -> None:
    assert Pattern.parse("layers.*.fc").matches_name("layers.0.sub.fc")
    assert not Pattern.parse("layers.?").matches_name("layers.10")
    assert Pattern.parse(r"re:layers\.\d+").matches_name("layers.10") and not Pattern.parse(r"re:layers\.\d").matches_name("layers.10")
    assert Pattern.parse("linear").kind == "linear" and Pattern.parse("linears").kind is None
    assert [i for i in range(8) if Pattern.parse("conv[1::4]").matches_position(i, 8)] == [1, 5]
    assert [i for i in range(4) if Pattern.parse("linear[:-1]").matches_position(i, 4)] == [0, 1, 2]
    assert [i for i in range(4) if Pattern.parse("site[-1]").matches_position(i, 4)] == [3]


def test_rules_by_layer_reach_the_sites() -> None:
    model = mlp(64, 64, 64, 64, 64)
    options = {
        "policy": "always",
        "rules": [
            {"layers": "linear[1::2]", "ratio": 0.25, "group": 1},
            {"layers": ["0"], "method": "exact"},
            {"layers": r"re:6", "sampling": "backward"},
        ],
    }
    sites = plans_of(model, options, torch.randn(32, 64))
    assert [s.name for s in sites] == ["0", "2", "4", "6"]
    assert [s.decision for s in sites] == ["exact", "sampled", "sampled", "sampled"]
    assert [s.products[0].k for s in sites] == [64, 16, 32, 64]
    assert [p.decision for p in sites[3].products] == ["exact", "sampled", "sampled"]
    assert sites[3].products[1].k == 16


def test_the_default_policy_depends_on_what_is_said() -> None:
    assert ApproxConfig().policy == ApproxConfig(adaptive={"tau": 0.1}).policy == ApproxConfig(inductor={"max_autotune": True}).policy == "adaptive"
    for options in ({"ratio": 0.5}, {"method": "exact"}, {"rules": [{"layers": "conv", "ratio": 0.25}]}, {"grad": {"axis": "rows", "ratio": 0.5}}):
        assert ApproxConfig(**options).policy == "cost"
    assert ApproxConfig().settings([]).rows is not None and ApproxConfig(ratio=0.5).settings([]).rows is None


def test_which_settings_weigh_time() -> None:
    rows, replaced = {"policy": "adaptive"}, {"policy": "always", "method": "exact", "rules": [{"layers": "conv", "grad_weight": "max"}]}
    for options in (rows, replaced, {"method": "exact"}, {"rules": [{"layers": "conv", "method": "exact"}], "policy": "adaptive"}):
        assert not ApproxConfig(**options).asks_for_products(), options
    for options in (
        {"policy": "cost"},
        {"policy": "adaptive", "rules": [{"layers": "conv", "output": "topk"}]},
        {"method": "exact", "rules": [{"layers": "conv", "method": "crs"}]},
        {"policy": "adaptive", "rules": [{"layers": "conv", "policy": "cost"}]},
        {"policy": "always", "method": "exact", "rules": [{"layers": "conv", "grad_input": {"method": "topk"}}]},
    ):
        assert ApproxConfig(**options).asks_for_products(), options
