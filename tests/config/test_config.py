"""Every wrong key, value, pattern and combination is a ConfigError that says what came, what is valid and what is near."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.compile import plans_of
from helpers.models import mlp
from helpers.sampling import all_but
from torch import nn

from approx_compile import ApproxConfig, Backend, ConfigError, explain
from approx_compile.config.selectors import LayerPattern

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
    "method_later": ({"grad_weight": "dropout"}, "grad_weight.method", "chooses the units of a whole layer"),
    "units_group": ({"method": "dropout", "group": 4}, "group", "one by one"),
    "units_sampling": ({"method": "dropout", "sampling": "backward"}, "sampling", "no effect beside method 'dropout'"),
    "units_table": ({"rules": [{"layers": "a", "method": "dropout", "grad": "topk"}]}, "rules[0]", "no effect beside method 'dropout'"),
    "units_key": ({"method": "dropout", "units": {"alpha": 2.0}}, "alpha belongs to method 'adaptive_dropout'", "drop alpha"),
    "units_alpha": ({"method": "adaptive_dropout", "units": {"alpha": "big"}}, "units.alpha", "a finite number"),
    "units_adaptive": ({"method": "dropout", "policy": "adaptive"}, "method", "no effect under policy 'adaptive'"),
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
    "replace_top": ({"j": 3}, "j belongs in grad or grad_input or grad_weight: {'grad_weight': {'method': 'max', 'j': 3}}"),
    "rows_axis": ({"grad": {"axis": "row"}}, "grad.axis", "Did you mean 'rows'"),
    "rows_elsewhere": ({"output": {"axis": "rows"}}, "output: axis belongs in grad, at the top of the options: {'grad': {'axis': 'rows'}}"),
    "rows_method": ({"grad": {"axis": "rows", "method": "crs"}}, "crs", "can't choose rows"),
    "rows_group": ({"grad": {"axis": "rows", "group": 4}}, "group", "one by one"),
    "batch_norm_alone": ({"grad": {"batch_norm": "approximate"}}, "batch_norm", "only with axis 'rows'"),
    "adaptive_ratio": ({"policy": "adaptive", "ratio": 0.5}, "ratio", "no effect under policy 'adaptive'"),
    "adaptive_rule": ({"policy": "adaptive", "rules": [{"layers": "conv", "sampling": "forward"}]}, "rules[0]", "set policy 'cost'"),
    "adaptive_key": ({"policy": "adaptive", "adaptive": {"tua": 0.1}}, "adaptive: unknown key 'tua'", "did you mean 'tau'?"),
    "adaptive_tau": ({"policy": "adaptive", "adaptive": {"tau": -1}}, "adaptive.tau", "above 0"),
    "adaptive_ladder": ({"policy": "adaptive", "adaptive": {"ladder": [0.5, 2]}}, "adaptive.ladder", "shares in"),
    "plan": ({"plan": "nowhere.toml"}, "nowhere.toml", "No such file"),
    "lowering": ({"lowering": "tritn"}, "tritn", "Did you mean 'triton'?"),
    "lowering of a rule": ({"rules": [{"layers": "conv", "lowering": 3}]}, "rules[0].lowering", "valid are auto, inductor, triton, cuda"),
    "rules_dict": ({"rules": {"layers": "conv"}}, "rules", "list of rules"),
    "rule_no_layers": ({"rules": [{"ratio": 0.5}]}, "rules[0].layers: this key is required"),
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
    "table_key": ({"output": {"samplin": "forward"}}, "output: unknown key 'samplin'", "sampling belongs at the top"),
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


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "adaptive", "ratio": 0.25, "rules": [{"steps": "::2", "output": "topk"}]},
        {"policy": "adaptive", "rules": [{"layers": "conv", "ratio": 0.25, "steps": "::2"}, {"layers": "conv", "output": "topk", "steps": "1::2"}]},
    ],
)
def test_settings_of_a_step_survive_pickle_where_a_key_has_no_effect_then(options: dict[str, Any]) -> None:
    for step in (0, 1):
        config = ApproxConfig(**options).at(step)
        assert pickle.loads(pickle.dumps(config)) == config


def test_tau_is_a_number_or_auto() -> None:
    assert ApproxConfig(adaptive={"tau": "auto"}).adaptive.tau == "auto"
    with pytest.raises(ConfigError, match=r"adaptive\.tau: got 'automatic'.*or 'auto'"):
        ApproxConfig(adaptive={"tau": "automatic"})
    with pytest.raises(ConfigError, match="with axis 'tokens' give a number"):
        ApproxConfig(adaptive={"tau": "auto"}, policy="adaptive", grad={"axis": "tokens"})


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
    assert LayerPattern.parse("layers.*.fc").matches_name("layers.0.sub.fc")
    assert not LayerPattern.parse("layers.?").matches_name("layers.10")
    assert LayerPattern.parse(r"re:layers\.\d+").matches_name("layers.10") and not LayerPattern.parse(r"re:layers\.\d").matches_name("layers.10")
    assert LayerPattern.parse("linear").kind == "linear" and LayerPattern.parse("linears").kind is None
    assert [i for i in range(8) if LayerPattern.parse("conv[1::4]").matches_position(i, 8)] == [1, 5]
    assert [i for i in range(4) if LayerPattern.parse("linear[:-1]").matches_position(i, 4)] == [0, 1, 2]
    assert [i for i in range(4) if LayerPattern.parse("site[-1]").matches_position(i, 4)] == [3]


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


# --- the policy that holds where none is given ---

PRODUCTS_ASKED: tuple[dict[str, Any], ...] = (
    {"ratio": 0.5},
    {"ratio": 1.0},  # at the top: every product, all of it
    {"method": "crs"},
    {"sampling": "backward"},
    {"output": "topk"},
    {"output": {"ratio": 0.5}},
    {"grad": "crs"},
    {"grad_weight": {"method": "crs"}},
    {"rules": [{"layers": "conv", "ratio": 0.25}]},
    {"rules": [{"layers": "conv", "method": "exact"}, {"layers": "conv[1]", "grad_input": {"ratio": 0.25}}]},
    {"plan": {"method": "exact"}},
)

NO_PRODUCTS_ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"adaptive": {"tau": 0.1}},
    {"inductor": {"max_autotune": True}},
    {"lowering": "inductor"},
    {"method": "exact"},
    {"output": "exact"},
    {"grad": "exact"},
    {"grad": {"axis": "rows"}},
    {"grad": {"axis": "rows", "ratio": 0.5}},
    {"grad": {"axis": "contraction"}},
    {"grad_weight": "max"},
    {"rules": [{"layers": "6", "method": "exact"}]},
    {"rules": [{"layers": "conv", "grad_weight": "zero"}]},
    {"rules": [{"layers": "blocks.0", "grad": {"axis": "rows", "ratio": 0.25}}]},
    {"rules": [{"layers": "6", "policy": "cost"}]},
    {"rules": [{"layers": "6", "lowering": "inductor"}]},
)


def test_the_policy_without_one_is_for_products_where_these_are_asked_for() -> None:
    for options in PRODUCTS_ASKED:
        assert ApproxConfig(**options).policy == "cost", options
    for options in NO_PRODUCTS_ASKED:
        config = ApproxConfig(**options)
        assert config.policy == "adaptive", options
        assert config.settings([False] * len(config.rules)).output.method == "exact"
    assert ApproxConfig().settings([]).rows is not None and ApproxConfig(ratio=0.5).settings([]).rows is None
    rows = ApproxConfig(grad={"axis": "rows"}).settings([]).rows, ApproxConfig(grad={"axis": "rows", "ratio": 0.5}).settings([]).rows
    assert [r is not None and r.ratio for r in rows] == [None, 0.5]  # as many as needed; so many


@pytest.mark.slow
def test_rows_and_replaced_gradients_by_rule_leave_the_forward_pass_exact() -> None:
    model, x = mlp(64, 64, 64, 64), torch.randn(32, 64)
    for rule in ({"layers": "0", "grad_weight": "max"}, {"layers": "0", "grad": {"axis": "rows", "ratio": 0.25}}, {"layers": "4", "method": "exact"}):
        assert [s.products[0].decision for s in plans_of(model, {"rules": [rule]}, x)] == ["exact"] * 3
    sites = plans_of(model, {"rules": [{"layers": "0", "grad_weight": "max"}]}, x)
    assert [p.method for p in sites[0].products if p.decision == "replaced"] == ["max"]


def test_a_replaced_gradient_names_no_site() -> None:
    """A rule that only replaces a gradient leaves the site's other products as they are: the exclusions of policy "cost" still hold."""
    config = ApproxConfig(ratio=0.5, rules=[{"layers": "conv", "grad_weight": "max"}, {"layers": "conv", "min_k": 8}])
    assert not config.settings([True, False]).named and config.settings([False, True]).named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_k": 8}, "min_k has no effect under policy 'adaptive'.*set policy 'cost'"),
        ({"share": False}, "share has no effect"),
        ({"group": 16}, "group has no effect"),
        ({"rules": [{"layers": "6", "group": 16}]}, r"rules\[0\]\.group has no effect"),
        ({"rules": [{"layers": "6", "ratio": 1.0}]}, r"rules\[0\]\.ratio has no effect.*for exact products method='exact'"),
        ({"output": {"min_k": 8}}, "output: min_k has no effect.*a method into output"),
        ({"rules": [{"layers": "6", "grad_weight": {"group": 4}}]}, r"rules\[0\]\.grad_weight: group has no effect"),
        ({"policy": "adaptive", "ratio": 0.5, "grad": {"axis": "rows"}}, "ratio has no effect"),
        ({"min_k": 8, "rules": [{"layers": "6", "method": "exact"}]}, "min_k has no effect"),
        ({"policy": "adaptive", "rules": [{"layers": "a", "output": "topk"}, {"layers": "b", "min_k": 8}]}, r"rules\[1\]\.min_k"),
    ],
)
def test_a_key_without_effect_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ApproxConfig(**options)


def test_a_key_with_an_effect_somewhere_is_none() -> None:
    for options in (
        {"min_k": 8, "rules": [{"layers": "6", "policy": "cost"}]},
        {"policy": "adaptive", "min_k": 8, "rules": [{"layers": "6", "output": "topk"}]},
        {"policy": "adaptive", "rules": [{"layers": "6", "output": "topk"}, {"layers": "6", "min_k": 8}]},
        {"policy": "adaptive", "output": "topk", "rules": [{"layers": "6", "share": False}]},
        {"policy": "cost", "min_k": 8, "output": {"group": 4}},
        {"grad": {"axis": "rows", "min_k": 8}},
    ):
        ApproxConfig(**options)


EXACTNESS: tuple[dict[str, Any], ...] = (
    *({key: "exact"} for key in ("method", "output", "grad", "grad_input", "grad_weight")),
    {"grad": {"axis": "rows", "method": "exact"}},
    {"grad": {"axis": "rows", "ratio": 1.0}},
    {"output": {"method": "topk", "ratio": 1.0}},
    {"policy": "adaptive"},
)


def _drawn(draw: random.Random, choices: Sequence[dict[str, Any]], at_most: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for one in draw.sample(list(choices), draw.randint(0, at_most)):
        keys |= one
    if keys.get("method") == "exact":
        keys = {k: v for k, v in keys.items() if k in ("method", "policy", "ratio", "min_k", "sampling")}
    return keys


def _output_is_exact(config: ApproxConfig, matches: Sequence[bool]) -> bool:
    output = config.settings(matches).output
    return output.method == "exact" or output.ratio == 1


def test_keys_that_only_make_something_exact_sample_no_output() -> None:
    draw = random.Random(0)
    for _ in range(500):
        rules = [{"layers": draw.choice(["site", "a", "b"])} | _drawn(draw, EXACTNESS, 3) for _ in range(draw.randint(0, 4))]
        config = ApproxConfig(**_drawn(draw, EXACTNESS, 3), rules=rules)
        assert config.policy == "adaptive"
        assert all(_output_is_exact(config, matches) for matches in itertools.product([False, True], repeat=len(rules))), config


ANYTHING: tuple[dict[str, Any], ...] = (
    *EXACTNESS,
    *({"ratio": r} for r in (0.25, 1.0)),
    *({"method": m} for m in ("topk", "crs")),
    *({"sampling": s} for s in ("forward", "backward", "blackbox")),
    *({"policy": p} for p in ("cost", "always", "measure")),
    *({k: {"method": "crs", "ratio": r}} for k in ("output", "grad", "grad_input", "grad_weight") for r in (0.5, 1.0)),
    {"output": {"min_k": 32}},
    {"output": {"ratio": 0.5}},
    {"grad_weight": "max"},
    {"grad": {"axis": "rows", "ratio": 0.25}},
    {"grad": {"axis": "rows"}},
    {"min_k": 4},
)


@pytest.mark.slow
@pytest.mark.parametrize("count", all_but([400], [400, 1500]))
def test_more_exact_rules_never_sample_an_output_that_was_exact(count: int) -> None:
    """A rule that makes something exact samples no output, wherever it stands among other rules, for every site, and at every step of a run."""
    draw, seen = random.Random(0), 0
    while seen < count:
        rules = [{"layers": draw.choice(["a", "b"])} | _drawn(draw, ANYTHING, 3) for _ in range(draw.randint(0, 4))]
        own = _drawn(draw, ANYTHING, 3)
        more = list(rules)
        at = sorted(draw.randint(0, len(rules)) for _ in range(draw.randint(1, 2)))
        for i, place in enumerate(at):
            more.insert(place + i, {"layers": draw.choice(["site", "a"]), "method": "exact"})
        try:
            config = ApproxConfig(**own, rules=rules)
        except ConfigError:
            continue  # a key without effect
        exacter = ApproxConfig(**own, rules=more)
        assert exacter.policy == config.policy
        for layer in ("a", "b"):
            hits = lambda c, layer=layer: [r.layers in ((layer,), ("site",)) for r in c.rules]  # noqa: E731
            if _output_is_exact(config, hits(config)):
                assert _output_is_exact(exacter, hits(exacter)), (own, rules, more)
                assert _output_is_exact(exacter.at(0), hits(exacter.at(0))), (own, rules, more)
        seen += 1


@pytest.mark.slow
def test_more_exact_rules_in_a_model() -> None:
    model, x, draw = mlp(64, 64, 64, 64), torch.randn(32, 64), random.Random(1)

    def outputs(options: dict[str, Any]) -> list[str]:
        return [s.products["output"].decision for s in explain(model, x, config=options).sites]

    for own in ({"policy": "always"}, {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5}}, {"policy": "always", "sampling": "backward"}, {}):
        before = outputs(own)
        for rule in draw.sample([{"method": "exact"}, {"grad": "exact"}, {"grad_weight": "exact"}, {"output": "exact"}], 1):
            after = outputs(own | {"rules": [{"layers": draw.choice(["0", "2", "site"])} | rule, {"layers": "4", "method": "exact"}]})
            assert all(new == "exact" for old, new in zip(before, after, strict=True) if old == "exact") and after[2] == "exact"


@pytest.mark.parametrize("exact", [{"axis": "rows", "ratio": 1.0}, {"axis": "rows", "method": "exact"}])
def test_all_rows_are_an_exact_step(exact: dict[str, Any]) -> None:
    """Where a rule keeps all rows, the step is exact, and no outputs are sampled in place of rows."""
    for policy in ("always", "cost", "adaptive"):
        settings = ApproxConfig(policy=policy, grad=exact).settings([])
        assert settings.rows is None and {settings.output.method, settings.grad_input.method, settings.grad_weight.method} == {"exact"}
    settings = ApproxConfig(policy="always", grad={"axis": "rows", "ratio": 0.5}, rules=[{"layers": "a", "grad": "exact"}]).settings([True])
    assert settings.rows is None and settings.output.method == "exact"


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
