"""The variance that leaving out tokens adds to the whole gradient is measured over two passes, both of them exact, and corrects what the norms say."""

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
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.rows import controller
from approx_compile.rows.ownership import budgets, controls
from approx_compile.rows.row_sampling import added_variance
from approx_compile.rows.tokens.token_variance import FIRST_EXCESS, MOST_CHANGE, SKETCH, TokenBudget, predicted_variance, sketch_of
from approx_compile.rows.variance_budget import MOMENTUM, some_entries, squared_distance

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the shares follow the last observation alone, so that tokens are left out from the second pass on."""
    monkeypatch.setattr(controller.TokenControl, "_momentum", 0.0)


def options(tau: float, probe: int) -> dict[str, Any]:
    return {"grad": {"axis": "tokens"}, "adaptive": {"tau": tau, "probe": probe}}


def step(f: Any, model: nn.Module, seed: int) -> list[Tensor]:
    """The gradients of a batch, whose tokens matter to different degrees."""
    random = torch.Generator().manual_seed(seed)
    x, wanted = torch.randn(4, 16, 8, generator=random), torch.randn(4, 16, 8, generator=random)
    (f(x) * wanted * torch.rand(4, 16, 1, generator=random) ** 4).sum().backward()
    return grads(model)


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def test_when_it_is_measured() -> None:
    def passes(**settings: Any) -> list[int]:
        budget = TokenBudget(AdaptiveTable(**settings), "graph")
        return [n for n in range(1, 601) if budget.start_pass()]

    assert passes(tau=0.1, probe=400) == [12, 25, 50, 100, 200, 300, 500]
    assert passes(tau=0.1, probe=0) == [] == passes(tau=0, probe=400)


def test_means_are_geometric_and_begin_with_what_several_regions_add() -> None:
    def budget(regions: int, probe: int = 400) -> TokenBudget:
        made = TokenBudget(AdaptiveTable(tau=0.1, probe=probe), "graph")
        made.begin_with_excess(regions)
        return made

    assert budget(1).excess == budget(9, probe=0).excess == 1
    b = budget(9)
    assert (b.excess, b.tau) == pytest.approx((FIRST_EXCESS, 0.1 / FIRST_EXCESS))
    want = [math.log(FIRST_EXCESS)]
    for seen, (added, predicted) in enumerate([(0.4, 0.1), (0.1, 0.05), (0.3, 0.3), (0.2, 0.1)], 1):
        b.observe(torch.tensor(2 * added), torch.tensor(2.0), torch.tensor(predicted))
        b.start_pass()
        b.begin_with_excess(9)  # has no effect any more
        momentum = min(MOMENTUM, seen / (seen + 1))
        want.append(momentum * want[-1] + (1 - momentum) * math.log(added / predicted))
        assert math.log(b.excess) == pytest.approx(want[-1])
    added = b.added
    for value, factor in ((0.0, 1 / MOST_CHANGE), (1e9, MOST_CHANGE)):
        b.added = added
        b.observe(torch.tensor(value), torch.tensor(1.0), torch.tensor(0.1))
        b.start_pass()
        assert b.added == pytest.approx(added * factor ** (1 - MOMENTUM))


def test_both_passes_are_exact_and_the_ratio_is_that_of_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(8)
    f, _ = rows_of(block, options(tau=1.0, probe=16))
    for seed in range(1, 20):
        step(f, block, seed)
    (budget,) = budgets(block).values()
    known = len(budget.measurements)  # the next one begins in pass 20
    chosen = ChosenTokens(monkeypatch)
    exact = [step(block, block, seed) for seed in (20, 21)]
    got = [step(f, block, 20)]
    assert budget.is_half_done and len(chosen.weights) == 3
    chosen.apply([block])
    approximate = step(block, block, 20)
    block.weights = {}
    got.append(step(f, block, 21))
    assert len(chosen.weights) == 3 and not budget.is_half_done
    assert all(relative(flat(g), flat(e)) < 1e-5 for g, e in zip(got, exact, strict=True))
    step(f, block, 22)
    assert len(chosen.weights) == 6 and len(budget.measurements) == known + 1
    first, second, other = map(flat, (*exact, approximate))
    added, own = (other - first).square().sum().item(), (second - first).square().sum().item() / 2
    at, ratio = budget.measurements[-1]
    assert at == 21 and ratio == pytest.approx(added / own, rel=0.3)  # a sketch of 512 numbers knows `own` to 6%


class Layer(nn.Module):
    """A linear layer and a sum of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_of_one_region_with_independent_tokens_the_norms_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[tuple[float, ...]] = []
    monkeypatch.setattr(TokenBudget, "observe", lambda self, *numbers: observed.append(tuple(map(float, numbers))))
    model = Layer()
    f, _ = rows_of(model, options(tau=0.3, probe=4))
    for seed in range(800):
        step(f, model, seed)
    added, own, predicted = torch.tensor(observed).mean(0).tolist()
    assert len(observed) > 190
    assert added / own == pytest.approx(predicted, rel=0.15)
    assert 0.1 < predicted < 0.3  # less than tau, because shares are rounded up


def test_many_regions_add_up_and_keep_more_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8) for _ in range(3)))
    shares = []
    for probe in (0, 8):
        torch._dynamo.reset()
        again = copy.deepcopy(model)
        f, _ = rows_of(again, options(tau=0.1, probe=probe))
        for seed in range(64):
            step(f, again, seed)
        shares.append(sum(c.measured for c in controls(again).values()) / len(controls(again)))
    (budget,) = budgets(again).values()
    assert budget.excess > 1.2 and shares[1] > shares[0]
    added = [a for _, a in list(budget.measurements)[4:]]
    assert 0.02 < sum(added) / len(added) < 0.15
    text = " ".join(str(approx_compile.decisions(again)).split())
    assert "Variance added to the whole gradient" in text and "asked: at most 10" in text


def test_a_run_resumed_between_the_two_passes_repeats() -> None:
    block = Block(8)
    f, _ = rows_of(block, options(tau=0.3, probe=16))
    torch.manual_seed(5)
    for seed in range(1, 21):
        step(f, block, seed)
    (budget,) = budgets(block).values()
    assert budget.is_half_done
    weights, state = copy.deepcopy(block.state_dict()), copy.deepcopy(approx_compile.state_dict(block))
    want = [step(f, block, seed) for seed in range(21, 25)]
    again = Block(8)
    again.load_state_dict(weights)
    torch.manual_seed(5)
    approx_compile.load_state_dict(again, state)
    torch._dynamo.reset()
    g, _ = rows_of(again, options(tau=0.3, probe=16))
    got = [step(g, again, seed) for seed in range(21, 25)]
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert [b.state_dict() for b in budgets(again).values()] == [budget.state_dict()]


def test_one_batch_twice_measures_nothing() -> None:
    block = Block(8)
    f, _ = rows_of(block, options(tau=0.3, probe=4))
    for _ in range(30):
        step(f, block, 1)
    (budget,) = budgets(block).values()
    assert not budget.measurements and budget.excess == pytest.approx(FIRST_EXCESS)


def test_a_measurement_whose_parameters_change_is_dropped() -> None:
    budget = TokenBudget(AdaptiveTable(tau=0.1), "graph")
    small, large = [torch.randn(4, 5)], [torch.randn(4, 5), torch.randn(3)]
    for after, count in ((large, 0), (small, 1)):
        budget.begin([torch.randn(4, 5)], small, torch.tensor(0.1))
        assert budget.is_half_done
        budget.complete([torch.randn_like(g) for g in after])
        budget.start_pass()
        assert not budget.is_half_done and len(budget.measurements) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sketches_keep_distances(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    shapes = [(70, 90), (5,), (), (3, 0), (2, 3, 4)]
    a, b = ([torch.randn(s, generator=random).to(dtype) for s in shapes] for _ in range(2))
    want = sum((x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True))
    first, second = sketch_of(a), sketch_of(b)
    assert first.shape == (SKETCH,) and first.dtype == torch.float64
    assert (first - second).square().sum().item() == pytest.approx(float(want), rel=0.25)
    assert torch.equal(first, sketch_of(a))


def test_predicted_variance() -> None:
    norms = [torch.rand(40), torch.rand(30), torch.zeros(20)]
    variance, square = added_variance(norms[0], [0.25])
    assert float(predicted_variance(norms, [10, 30, 5])) == pytest.approx(float(variance / square / 3))


@pytest.mark.parametrize("axis", ["tokens", "rows"])
def test_asking_for_the_state_changes_nothing(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pass it is done in, and whether a measurement has just been made."""
    monkeypatch.setattr(controller, "MOMENTUM", 0.0)

    def run(asks: bool) -> list[Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        block = Block(8)
        f, _ = rows_of(block, {"grad": {"axis": axis}, "adaptive": {"tau": 0.5, "probe": 7}})
        torch.manual_seed(5)
        found = []
        for seed in range(1, 60):
            found.append(flat(step(f, block, seed)))
            if asks:
                approx_compile.state_dict(block)
        return [*found, [c.measured for c in controls(block).values()]]

    plain, asked = run(False), run(True)
    assert plain[-1] == asked[-1] and all(torch.equal(a, b) for a, b in zip(plain[:-1], asked[:-1], strict=True))


def test_two_calls_of_one_backward_pass_are_not_compared() -> None:
    """As of a discriminator, whose gradients on real and on fake data are not two samples of one."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    f, _ = rows_of(model, options(tau=0.5, probe=6))
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        a, b = torch.randn(4, 16, 8, generator=random) + 1, torch.randn(4, 16, 8, generator=random) - 1
        (f(a).sum() - f(b).sum()).backward()
        (budget,) = budgets(model).values()
        if budget.waits:
            assert not budget.measurements or budget.measurements[-1][0] < budget.passes
    assert budget.measurements
    (known,) = {b.passes for b in budgets(model).values()}
    assert known == 120 and budget.excess > 0.2


def test_complex_parameters(recwarn: pytest.WarningsRecorder) -> None:
    a, b = ([torch.randn(30, 40, dtype=torch.cfloat)] for _ in range(2))
    distance = (a[0] - b[0]).abs().square().sum().item()
    assert (sketch_of(a) - sketch_of(b)).square().sum().item() == pytest.approx(distance, rel=0.25)
    assert squared_distance([some_entries(g) for g in a], b).item() == pytest.approx(distance, rel=1e-5)
    assert not recwarn.list


@pytest.mark.parametrize("alternating", [False, True])
def test_losses_that_alternate_measure_nothing(alternating: bool) -> None:
    """Half of the squared distance of two gradients of opposite losses is not their variance."""
    block = Block(8)
    f, _ = rows_of(block, options(tau=0.5, probe=16))
    random = torch.Generator().manual_seed(0)
    for i in range(60):
        x = torch.randn(4, 16, 8, generator=random)
        goal = 3.0 if i % 2 or not alternating else -3.0
        (f(x) - goal).square().mean().backward()
        block.zero_grad()
    (budget,) = budgets(block).values()
    budget.state_dict()  # the last measurement is taken up
    assert (len(budget.measurements) == 0) == alternating
    assert budget.excess == pytest.approx(FIRST_EXCESS) or not alternating
