"""The policy "adaptive" with tokens: regions begin with all tokens and follow their own norms; tau 0 leaves out only tokens without a gradient."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.compile import rows_of
from helpers.oracles import grads, relative
from helpers.tokens import Block, ChosenTokens
from torch import Tensor, nn

import approx_compile
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.rows import row_cost
from approx_compile.rows.controller import TokenControl
from approx_compile.rows.row_sampling import needed_share
from approx_compile.rows.tokens import token_cost

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")
ADAPTIVE: dict[str, Any] = {"grad": {"axis": "tokens"}}
PADDING = torch.arange(16) >= torch.tensor([4, 8, 6, 2]).view(-1, 1)
"""Of 64 tokens 20 are not padding."""


def padded(out: Tensor) -> Tensor:
    return (out.square() * ~PADDING.unsqueeze(-1)).sum()


def train(f: Any, model: nn.Module, steps: int, x: Tensor) -> list[Tensor]:
    """The gradients of the last of several steps."""
    found: list[Tensor] = []
    for _ in range(steps):
        padded(f(x)).backward()
        found = grads(model)
    return found


def test_shares_fall_where_few_tokens_matter() -> None:
    block, x = Block(8), torch.randn(4, 16, 8)
    f, plans = rows_of(block, ADAPTIVE)
    first = train(f, block, 1, x)
    exact = train(block, block, 1, x)
    assert relative(torch.cat([g.flatten() for g in first]), torch.cat([g.flatten() for g in exact])) < 1e-6  # all tokens are kept at first
    assert [(c.axis, c.ratio, c.level) for c in plans[0].cuts] == [("tokens", None, i) for i in (1, 2, 3)]
    train(f, block, 8, x)
    mlp, out, qkv = approx_compile.controls(block).values()
    assert mlp.changes[1][0] == 1  # the first observation counts from the second step on
    assert mlp.place == "tokens of narrow, wide" and out.place == "tokens of out" and qkv.place.startswith("tokens of qkv.")
    assert mlp.ratio <= 0.35 and out.ratio <= 0.35 < qkv.ratio  # keys and values get a gradient from all queries
    shown = str(approx_compile.decisions(block))
    assert "tokens of out" in shown and "tokens needed" in shown


def test_tau_0_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), torch.randn(4, 16, 8)
    f, _ = rows_of(model, ADAPTIVE | {"adaptive": {"tau": 0}})
    exact = train(model, model, 1, x)
    train(f, model, 100, x)
    (control,) = approx_compile.controls(model).values()
    assert control.ratio == 11 / 32 and 20 / 64 <= control.measured < 0.35
    chosen = ChosenTokens(monkeypatch)
    got = train(f, model, 1, x)
    assert [int(w.count_nonzero()) for w in chosen.weights] == [22]
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, exact, strict=True))


def test_tau_0_with_more_tokens_than_are_kept() -> None:
    """The step after is not exact, but weighted, and the one after that keeps more."""
    model, x = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), torch.randn(4, 16, 8)
    f, _ = rows_of(model, ADAPTIVE | {"adaptive": {"tau": 0}})
    train(f, model, 100, x)
    f(x).square().sum().backward()
    assert all(g.isfinite().all() for g in grads(model))
    train(f, model, 1, x)
    (control,) = approx_compile.controls(model).values()
    assert control.ratio == 1.0


def test_follows_upwards_at_once_and_downwards_slowly() -> None:
    control = TokenControl(AdaptiveTable(tau=0.0), "tokens:1")
    shares = []
    for count in (10, 10, 40, 10, 10):
        control.start_step()
        control.observe(torch.arange(64) < count)
        shares.append(control.measured)
    assert shares[:2] == [1.0, pytest.approx(1.1 * 10 / 64, rel=0.01)] and shares[3] == 40 / 64 and 0.9 * shares[3] < shares[4] < shares[3]


def test_regions_with_more_work_may_add_more_variance() -> None:
    weights = token_cost.variance_weights([8, 3, 1])
    assert sum(weights) == pytest.approx(3) and weights[0] / weights[2] == pytest.approx(8**0.5)
    assert token_cost.variance_weights([0, 0]) == [1.0, 1.0] and token_cost.variance_weights([]) == []
    c = torch.tensor([1.0, 1.0, 1.0])  # the variance of a region at a share of r is c / r

    def work(bounds: Any) -> float:
        return float((torch.tensor([8.0, 3.0, 1.0]) * c / torch.tensor(bounds)).sum())

    assert work(weights) < work([1.0, 1.0, 1.0])
    for factors in ([1.1, 0.8, 0.85], [0.95, 1.1, 1.08], [1.0, 1.0, 0.5]):
        moved = [w * f for w, f in zip(weights, factors, strict=True)]
        assert work(weights) < work([3 * w / sum(moved) for w in moved])
    controls = [TokenControl(AdaptiveTable(tau=0.1), "a"), TokenControl(AdaptiveTable(tau=0.1), "b")]
    controls[1].weight, controls[1].excess = 2.0, 4.0
    assert [c.bound for c in controls] == pytest.approx([0.1, 0.05])
    norms = torch.rand(64)
    for control in controls:
        control.start_step()
        control.observe(norms)
        control.start_step()
        assert control.measured == pytest.approx(float(needed_share(norms, control.bound)))
        assert control.wanted == math.ceil(control.measured * 32) / 32


def test_what_a_region_wants_holds_only_if_the_graph_keeps_it() -> None:
    control = TokenControl(AdaptiveTable(tau=0.3), "tokens:1")
    for keeps in (False, False, True, True, False):
        wanted = control.start_step()
        control.observe(torch.arange(64) ** 4)
        control.keep(wanted if keeps else 1.0)
    assert wanted < 1 and [r for _, r in control.changes] == [1.0, control.changes[1][1], 1.0]
    assert [s for s, _ in control.changes] == [0, 2, 4]  # the share of the third step and of the fourth
    again = TokenControl(control.settings, "tokens:1")
    again.load_state_dict(control.state_dict())
    assert again.wanted == control.wanted < 1 and again.ratio == 1
    former = control.state_dict()
    del former["wanted"]  # as in checkpoints of earlier versions
    again.load_state_dict(former)
    assert again.wanted == again.ratio == 1


def test_all_tokens_run_where_little_would_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), torch.randn(4, 16, 8)
    f, _ = rows_of(model, ADAPTIVE | {"adaptive": {"tau": 0, "ladder": [0.85, 0.5]}})
    half, most = torch.arange(16) < 7, torch.arange(16) < 13
    chosen = ChosenTokens(monkeypatch)
    f(x)[:, half].square().sum().backward()
    monkeypatch.setattr(row_cost, "ANY_SIZE", False)  # from here on as with large models
    grads(model)
    for kept, ran in ((half, 1), (most, 1), (most, 0), (most, 0)):
        del chosen.weights[:]
        f(x)[:, kept].square().sum().backward()
        got = grads(model)
        assert len(chosen.weights) == ran
        model(x)[:, kept].square().sum().backward()
        exact = grads(model)
        assert ran or all(relative(a, b) < 1e-5 for a, b in zip(got, exact, strict=True))
    (control,) = approx_compile.controls(model).values()
    assert isinstance(control, TokenControl) and control.wanted == 0.85 and control.ratio == 1
    assert [r for _, r in control.changes] == [1.0, 0.5, 1.0]


def test_tokens_are_watched_less_where_all_are_kept_for_long() -> None:
    control = TokenControl(AdaptiveTable(), "tokens:1")
    watched = []
    for n in range(1, 150):
        control.start_step()
        watched += [n] if control.should_observe else []
    assert watched[:3] == [1, 5, 9] and [n for n in watched if n > 100] == [113, 129, 145]


def test_a_resumed_run_repeats() -> None:
    x = torch.randn(4, 16, 8)
    block = Block(8)
    f, _ = rows_of(block, ADAPTIVE)
    torch.manual_seed(5)
    train(f, block, 60, x)
    weights, state = copy.deepcopy(block.state_dict()), approx_compile.state_dict(block)
    want = train(f, block, 3, x)
    again = Block(8)
    again.load_state_dict(weights)
    torch.manual_seed(5)
    approx_compile.load_state_dict(again, state)
    torch._dynamo.reset()
    g, _ = rows_of(again, ADAPTIVE)
    got = train(g, again, 3, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="rows in one place and tokens in another"):
        ApproxConfig(grad={"axis": "tokens"}, rules=[{"layers": "head", "grad": {"axis": "rows", "ratio": 0.5}}])
    with pytest.raises(ConfigError, match="can't choose tokens"):
        ApproxConfig(grad={"axis": "tokens", "method": "crs"})
    with pytest.raises(ConfigError, match="only with axis 'rows'"):
        ApproxConfig(grad={"axis": "tokens", "batch_norm": "approximate"})
    assert ApproxConfig(adaptive={"tau": 0}).adaptive.tau == 0
