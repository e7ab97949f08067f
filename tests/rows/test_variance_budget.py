"""The variance that leaving out rows adds to the whole gradient is measured, and corrects what the norms at a cut say; a step that measures is exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.models import Buckets, mlp
from helpers.oracles import grads, relative
from torch import Tensor, fx, nn

import approx_compile
from approx_compile import Backend
from approx_compile.backend import run_as_is
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.reasons.rows import UNMEASURED_COLLECTIVE, UNMEASURED_MEMORY, UNMEASURED_WRITES
from approx_compile.rows import controller, variance_budget
from approx_compile.rows.agreement import VariancePool
from approx_compile.rows.ownership import budgets, controls
from approx_compile.rows.row_sampling import added_variance, inclusion_probabilities
from approx_compile.rows.variance_budget import MOMENTUM, VarianceBudget, measure, some_entries, squared_distance, unmeasured_reason

pytestmark = pytest.mark.usefixtures("one_thread", "small_work_counts")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the share follow the last observation alone, so that rows are left out from the second step on."""
    monkeypatch.setattr(controller, "MOMENTUM", 0.0)


def options(tau: float, probe: int, **grad: Any) -> dict[str, Any]:
    return {"policy": "adaptive", "adaptive": {"tau": tau, "probe": probe}} | ({"grad": {"axis": "rows", **grad}} if grad else {})


def compiled(model: nn.Module, asked: dict[str, Any], inner: Any = run_as_is) -> Any:
    return torch.compile(model, backend=Backend(asked, inner_compile=inner))


def uneven(size: int) -> Tensor:
    """Weights of samples of which a few are large."""
    return torch.rand(size, 1, generator=torch.Generator().manual_seed(5)) ** 6


def observed(budget: VarianceBudget, *pairs: tuple[float, float]) -> VarianceBudget:
    for added, predicted in pairs:
        budget.observe(torch.tensor(3 * added), torch.tensor(3.0), torch.tensor(predicted))
        budget.start_pass()
    return budget


def test_a_budget_follows_what_is_measured() -> None:
    budget = VarianceBudget(AdaptiveTable(tau=0.1, probe=100), "graph")
    assert [step for step in range(1, 301) if budget.start_pass()] == [25, 125, 225]
    assert (budget.excess, budget.tau) == (1, 0.1)
    observed(budget, *[(0.6, 0.2)] * 30)
    assert budget.excess == pytest.approx(3, rel=1e-3) and budget.tau == pytest.approx(0.1 / 3, rel=1e-3)
    before = budget.excess
    observed(budget, (float("nan"), 0.1), (float("inf"), 0.1), (0.1, float("nan")))
    assert budget.excess == before and len(budget.measurements) == 30
    observed(budget, (100.0, 0.2))  # one explosion counts at once
    assert budget.excess > 100
    observed(budget, *[(0.0, 0.2)] * 60)
    assert budget.tau == pytest.approx(0.4)  # at most four times what is asked
    again = VarianceBudget(budget.settings, "graph")
    again.load_state_dict(budget.state_dict())
    assert again.state_dict() == budget.state_dict() and again.excess == budget.excess
    assert not any(VarianceBudget(AdaptiveTable(probe=0), "graph").start_pass() for _ in range(3))


def test_ranks_pool_what_they_measure() -> None:
    pools = [VariancePool(), VariancePool()]
    ranks = [VarianceBudget(AdaptiveTable(tau=0.1, agree=True), "graph") for _ in pools]
    for rank, pool, (added, own, predicted) in zip(ranks, pools, [(1.0, 2.0, 0.1), (5.0, 4.0, 0.4)], strict=True):
        rank.pool = pool
        rank.observe(*map(torch.tensor, (added, own, predicted)))
        assert rank.state_dict()["measurements"] == []  # nothing counts before the ranks have exchanged it
    sums = sum(pool.local(torch.device("cpu")) for pool in pools)
    for pool in pools:
        pool.deliver(lambda: sums)
        pool.collect()
    states = [rank.state_dict() for rank in ranks]
    assert states[0] == states[1]
    assert states[0]["measurements"][0][1] == 1.0 and ranks[0].predicted == pytest.approx(MOMENTUM * 0.1 + (1 - MOMENTUM) * (0.2 + 1.6) / 6)
    for pool in pools:
        pool.deliver(lambda: torch.zeros_like(sums))
        pool.collect()
    assert [rank.state_dict() for rank in ranks] == states


def test_the_first_measurement_is_weighed_against_what_the_norms_say() -> None:
    budget = observed(VarianceBudget(AdaptiveTable(tau=0.1), "graph"), (0.3, 0.1))
    assert budget.excess == pytest.approx((MOMENTUM * 0.1 + (1 - MOMENTUM) * 0.3) / 0.1)


def test_tau_auto_bounds_nothing_and_is_said_so() -> None:
    budget = observed(VarianceBudget(AdaptiveTable(tau="auto"), "graph"), *[(0.4, 0.2)] * 30)
    assert budget.tau is None and budget.excess == pytest.approx(2, rel=1e-3)
    text = " ".join(str(approx_compile.Decisions(CONTROL, (), {"graph": budget})).split())
    assert "asked: what is cheapest (tau auto)" in text and "2 times what the norms say." in text


class WithDropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 5))


class WithNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5))


@pytest.mark.parametrize(
    ("make", "inner"),
    [(WithDropout, run_as_is), (WithNorm, run_as_is), pytest.param(WithDropout, None, marks=pytest.mark.slow)],
    ids=["dropout", "batch norm", "dropout, inductor"],
)
def test_a_step_that_measures_is_exact_and_changes_nothing_else(make: type[nn.Module], inner: Any) -> None:
    model = make()
    twin = copy.deepcopy(model)
    asked = options(3.0, 4, batch_norm="approximate") if make is WithNorm else options(3.0, 4)
    f = compiled(model, asked, inner)
    plain = compiled(twin, {"method": "exact"}, inner)
    x, tangent = torch.randn(64, 20), torch.randn(64, 5) * uneven(64)
    for step in range(1, 7):
        states = []
        for call in (f, plain):
            torch.manual_seed(step)
            call(x).backward(tangent)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        found = [relative(a, b) for a, b in zip(grads(model), grads(twin), strict=True) if b.norm() > 1e-4]
        assert max(found) < 1e-5 if step in (1, 5) else max(found) > 0.02, step
    (budget,) = budgets(f).values()
    assert [s for s, _ in budget.measurements] == [5] and budget.measurements[0][1] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert "of the gradient's own in pass 5" in str(approx_compile.decisions(f))


def test_accumulated_and_repeated_passes_are_exact_where_each_measures() -> None:
    model = mlp(20, 64, 5)
    twin = copy.deepcopy(model)
    f = compiled(model, options(3.0, 1))
    x, tangent = torch.randn(64, 20), torch.randn(64, 5) * uneven(64)
    for _ in range(3):  # from the second pass on rows would be left out
        f(x).backward(tangent)
        twin(x).backward(tangent)
    out = f(x)
    out.backward(tangent, retain_graph=True)
    out.backward(tangent)
    for _ in range(2):
        twin(x).backward(tangent)
    assert max(relative(a, b) for a, b in zip(grads(model), grads(twin), strict=True)) < 1e-5
    f(x)
    (budget,) = budgets(f).values()
    assert len(budget.measurements) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("misleading", [False, True])
def test_what_is_measured_is_the_variance_over_the_gradients_own(misleading: bool) -> None:
    """For one linear layer the gradient of every sample is known. Inputs of different length make the norms at the output mislead."""
    torch.manual_seed(0)
    size = 96
    model = nn.Linear(30, 8, bias=False)
    weights = uneven(size)
    x, tangent = torch.randn(size, 30), torch.randn(size, 8) * weights
    if misleading:
        x *= 1 / (weights + 0.05)
    each = torch.einsum("bo,bi->boi", tangent, x).flatten(1).double()
    own = each.var(0).sum() * size
    f = compiled(model, options(0.3, 1))
    for _ in range(160):
        f(x).backward(tangent)
    (budget,) = budgets(f).values()
    (control,) = controls(f).values()
    budget.state_dict()  # the last measurement is taken up
    found = torch.tensor([a for _, a in budget.measurements][-100:])
    k = round(control.ratio * size)
    p = inclusion_probabilities(tangent.square().sum(1), k)
    want = ((1 - p) / p * each.square().sum(1)).sum() / own
    assert found.mean().item() == pytest.approx(want.item(), rel=0.15)
    variance, square = added_variance(tangent.square().sum(1), [k / size]).tolist()
    assert budget.excess == pytest.approx(want.item() / (variance / square), rel=0.3)
    assert (budget.excess > 2) == misleading
    # the share that holds keeps what is measured about the budget; without measurements it would be that of the norms
    g = compiled(copy.deepcopy(model), options(0.3, 0))
    for _ in range(8):
        g(x).backward(tangent)
    (unguided,) = controls(g).values()
    assert control.ratio > unguided.ratio if misleading else control.ratio <= unguided.ratio * 1.5
    assert want < 0.3 * 1.2


def test_too_many_rows_left_out_once_does_not_keep_all_rows_forever() -> None:
    f = compiled(mlp(20, 64, 5), options(1.0, 1))
    x, tangent = torch.randn(64, 20), torch.randn(64, 5)
    for _ in range(3):
        f(x).backward(tangent)
    (budget,) = budgets(f).values()
    (control,) = controls(f).values()
    assert control.ratio < 1
    budget.added = 1e6 * budget.predicted
    for _ in range(controller.OBSERVE_EVERY + 1):
        f(x).backward(tangent)
    assert control.ratio == 1 and budget.excess > 1000
    for _ in range(45):  # each measures at the largest share below 1
        f(x).backward(tangent)
    assert control.ratio < 1 and budget.excess < 10


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one() -> None:
    def train(f: Any, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
        losses = []
        for i in range(first, first + count):
            g = torch.Generator().manual_seed(i)
            y = torch.randint(0, 2, (128,), generator=g)
            x = torch.randn(128, 20, generator=g) + 1.5 * (2 * y[:, None] - 1)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(f(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def made() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = mlp(20, 64, 2)
        return model, compiled(model, options(0.1, 7)), torch.optim.Adam(model.parameters(), 0.01)

    model, f, optimizer = made()
    train(f, optimizer, 0, 29)  # the last step measures
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "approx": approx_compile.state_dict(f)})
    rng = torch.get_rng_state()
    want = train(f, optimizer, 29, 40)
    torch._dynamo.reset()
    twin, g, again = made()
    twin.load_state_dict(saved["model"])
    again.load_state_dict(copy.deepcopy(saved["optimizer"]))
    approx_compile.load_state_dict(g, saved["approx"])
    assert approx_compile.state_dict(g) == saved["approx"]
    torch.set_rng_state(rng)
    assert train(g, again, 29, 40) == want
    assert len(next(iter(budgets(g).values())).measurements) > 5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("one_rank")
def test_a_measuring_step_of_ddp_is_exact() -> None:
    model = Buckets()
    twin = copy.deepcopy(model)
    f = compiled(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1), options(3.0, 1))
    x, tangent = torch.randn(32, 512), torch.randn(32, 512) * uneven(32)
    for _ in range(3):
        f(x).backward(tangent)
        twin(x).backward(tangent)
    assert max(relative(a, b) for a, b in zip(grads(model), grads(twin), strict=True)) < 1e-5
    assert len(budgets(f)) == 4 and all(len(b.measurements) for b in budgets(f).values())


def graph_of(op: Any, *more: Any) -> fx.Graph:
    graph = fx.Graph()
    a = graph.placeholder("a")
    graph.output((graph.call_function(op, (a, *more)),))
    return graph


def test_a_graph_that_must_run_once_is_not_measured() -> None:
    import torch.distributed._functional_collectives  # registers the ops

    assert unmeasured_reason(graph_of(torch.ops.aten.relu.default)) is None
    written = unmeasured_reason(graph_of(torch.ops.aten.relu_.default))
    assert UNMEASURED_WRITES.explains(written) and "relu_" in str(written)
    assert UNMEASURED_COLLECTIVE.explains(unmeasured_reason(graph_of(torch.ops._c10d_functional.all_reduce.default, "sum", "0")))
    budget = VarianceBudget(AdaptiveTable(probe=1), "graph")
    budget.declined = written
    assert not budget.start_pass()
    assert "is not measured: aten.relu_.default has effects" in " ".join(str(approx_compile.Decisions(CONTROL, (), {"graph": budget})).split())


CONTROL: dict[str, controller.Control] = {"cut": controller.RowControl(AdaptiveTable(), "cut")}


def test_distances_of_half_precision_do_not_overflow() -> None:
    a = [torch.full((4,), 300.0, dtype=torch.float16), torch.ones(2)]
    b = [torch.zeros(4, dtype=torch.float16), torch.zeros(2)]
    assert squared_distance([some_entries(t) for t in a], b).item() == pytest.approx(4 * 300.0**2 + 2)


def test_large_gradients_are_compared_by_some_of_their_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variance_budget, "MOST_ENTRIES", 100)
    a, b = torch.randn(400, 10), torch.randn(400, 10)
    part = some_entries(a)
    assert part.shape == (10, 10) and torch.equal(part, a[::40])
    assert squared_distance([part], [b]).item() == pytest.approx(40 * (a[::40] - b[::40]).square().sum().item(), rel=1e-5)
    assert squared_distance([some_entries(a)], [b]).item() == pytest.approx((a - b).square().sum().item(), rel=0.4)


def test_without_memory_for_a_measurement_the_pass_is_exact_and_the_last_try() -> None:
    budget = VarianceBudget(AdaptiveTable(probe=1), "graph")

    def evaluate(probe: variance_budget.Probe) -> list[Any]:
        if probe.rows is variance_budget.Rows.UNIFORM:
            raise torch.OutOfMemoryError
        return [torch.full((3,), 7.0 if probe.rows is variance_budget.Rows.ALL else 1.0)]

    (found,) = measure(evaluate, budget, [0], 1.0, [])
    assert found.tolist() == [7.0] * 3 and UNMEASURED_MEMORY.explains(budget.declined) and not budget.start_pass()
