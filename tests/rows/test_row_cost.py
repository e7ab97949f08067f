"""Whether rows are worth their time is predicted from the machine's profile, or decided by a number of FLOPs where there is no profile."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from helpers.compile import Plans
from helpers.models import mlp
from helpers.oracles import grads
from torch import Tensor, nn

from approx_compile import Backend, machine
from approx_compile.backend import run_as_is
from approx_compile.config.resolve import RowSettings
from approx_compile.machine import Machine, calibration, store
from approx_compile.reasons.rows import GATHERING_COSTS
from approx_compile.rows import early_decline, row_cost
from approx_compile.rows.row_cost import Prediction, ProductWork, RowTraffic, RowWork, predict
from approx_compile.utils import MACHINE

HALF = [RowSettings("bernoulli", 0.5, 2, False)]
ADAPTIVE = [RowSettings("bernoulli", None, 2, False)]


def stored() -> Machine:
    """Return the profile of tests/helpers/machine.json."""
    return machine.current()


def products(batch: int, inner: int, columns: int) -> tuple[ProductWork, ProductWork]:
    """Return both gradients of a linear layer."""
    sizes, flops = (float(batch), float(inner), float(columns)), 2 * batch * inner * columns
    return tuple(ProductWork(1, flops, torch.float32, f"linear.{name}", sizes, (True, False, False)) for name in ("grad_input", "grad_weight"))  # type: ignore[return-value]


def layers(batch: int, width: int, count: int) -> RowWork:
    row = RowTraffic(1, batch * width * 4, width, torch.float32)
    return RowWork(batch, products(batch, width, width) * count, (row,), (row,) * (count + 1), ())


def seen(monkeypatch: pytest.MonkeyPatch, model: nn.Module, options: dict[str, Any], *inputs: Tensor, **kwargs: Any) -> list[RowWork]:
    """Return the work on rows as it is estimated from a model's joint graph, and from the partition of its backward graph."""
    monkeypatch.setattr(early_decline, "early_rejection", lambda *args: None)  # Dynamo's graph tells enough of a small model
    found: list[RowWork] = []
    monkeypatch.setattr(row_cost, "rejection_reason", lambda work, *rest: found.append(work))
    torch.compile(model, backend=Backend(options, inner_compile=run_as_is, **kwargs))(*inputs).sum().backward()
    return found


def test_a_tiny_model_does_not_pay_and_a_large_one_does() -> None:
    assert not predict(layers(32, 64, 3), HALF, stored()).pays(stored())
    assert predict(layers(256, 1024, 3), HALF, stored()).pays(stored())


def test_more_work_saves_more() -> None:
    def net(work: RowWork) -> float:
        found = predict(work, HALF, stored())
        return found.saved_us - found.cost_us

    for sizes in ([layers(256, 256, n) for n in range(1, 6)], [layers(b, 256, 3) for b in (64, 128, 256, 512, 1024)]):
        saved = [predict(work, HALF, stored()).saved_us for work in sizes]
        costs = [predict(work, HALF, stored()).cost_us for work in sizes]
        assert all(a < b for a, b in itertools.pairwise(saved)) and all(a < b for a, b in itertools.pairwise(costs))
        assert all(a < b for a, b in itertools.pairwise(map(net, sizes)))


def test_fewer_rows_save_more() -> None:
    quarter, half, most = (predict(layers(256, 512, 3), [RowSettings("bernoulli", r, 2, False)], stored()) for r in (0.25, 0.5, 0.9))
    assert quarter.saved_us > half.saved_us > most.saved_us
    assert quarter.cost_us < half.cost_us < most.cost_us
    assert predict(layers(256, 512, 3), ADAPTIVE, stored()) == half


def test_every_level_counts() -> None:
    one = layers(256, 512, 4)
    two = RowWork(256, tuple(p._replace(level=1 + i // 4) for i, p in enumerate(one.products)), one.entering, one.gathered, one.scattered)
    first, second = predict(one, HALF, stored()), predict(two, [*HALF, RowSettings("bernoulli", 0.25, 2, False)], stored())
    assert second.saved_us > first.saved_us and second.cost_us > first.cost_us


def test_what_is_put_back_costs() -> None:
    work = layers(256, 512, 3)
    back = RowWork(work.batch, work.products, work.entering, work.gathered, work.entering)
    assert predict(back, HALF, stored()).cost_us > predict(work, HALF, stored()).cost_us


def test_a_quick_measurement_is_trusted_less() -> None:
    close = Prediction(135.0, 100.0, 0.5)
    assert close.pays(stored()) and not close.pays(stored().model_copy(update={"quick": True}))


def test_without_a_profile_flops_decide() -> None:
    def reason(work: RowWork, device: str) -> str | None:
        return row_cost.rejection_reason(work, HALF, None, device)

    large, small = layers(256, 512, 3), layers(128, 64, 1)
    assert reason(large, "cpu") is None
    assert reason(small, "cpu") == "a backward pass of 2.1 MFLOP is over before its rows would be chosen"
    assert "is over before" in (reason(large, "cuda") or "") and "is over before" in (reason(large, "xpu") or "")


@pytest.mark.slow
def test_the_reason_has_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = machine.current()
    slow, fast = (Prediction(*times).describe(profile) for times in ((1120.3, 3104.4, 0.5), (0.26, 310.0, 0.25)))
    assert slow == "choosing and gathering rows would take about 3104 us, leaving out half of them saves 1120 us (must exceed 3725 us)"
    assert fast == "choosing and gathering rows would take about 310 us, leaving out 75% of them saves 0.3 us (must exceed 372 us)"
    plans = Plans()
    model, x = mlp(128, 128, 128, 128, 128), torch.randn(256, 128)
    torch.compile(model, backend=Backend({}, inner_compile=run_as_is, on_plan=plans))(x).sum().backward()
    found = re.search(r"would take about (\d+) us, leaving out half of them saves ([\d.]+) us", plans.sites[0].reason)
    assert found is not None and 100 < float(found[1]) < 2000 and 0 < float(found[2]) < 1000
    monkeypatch.setattr(machine, "stored", lambda device: None)
    torch._dynamo.reset()
    plans = Plans()
    torch.compile(model, backend=Backend({}, inner_compile=run_as_is, on_plan=plans))(x).sum().backward()
    assert "MFLOP is over before its rows would be chosen" in plans.sites[0].reason


@pytest.mark.slow
def test_a_large_model_runs_on_rows_with_inductor() -> None:
    plans, model, x = Plans(), mlp(1024, 1024, 1024, 16), torch.randn(256, 1024)
    torch.compile(model, backend=Backend({"grad": {"axis": "rows", "ratio": 0.5}, "policy": "cost"}, on_plan=plans))(x).square().sum().backward()
    assert [c.decision for c in plans[-1].cuts] == ["rows"]
    got = grads(model)
    model(x).square().sum().backward()
    assert all(0 < (a - b).norm() < b.norm() for a, b in zip(got, grads(model), strict=True) if b.dim() == 2)


def test_what_a_joint_graph_says_is_what_the_split_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = seen(monkeypatch, mlp(48, 64, 80, 16), {}, torch.randn(32, 48, requires_grad=True))
    assert before == after
    sizes = [(48, 64), (64, 80), (80, 16)]
    assert before.batch == 32 and sum(p.flops for p in before.products) == sum(4 * 32 * a * b for a, b in sizes)
    weight = [p for p in before.products if p.rate == "linear.grad_weight"]
    assert sorted(p.sizes for p in weight) == sorted((32.0, a, b) for a, b in sizes) and all(p.rows == (True, False, False) for p in before.products)
    assert {(p.sizes, p.rate) for p in before.products} == {((32.0, a, b), f"linear.grad_{n}") for a, b in sizes for n in ("weight", "input")}
    assert sorted(m.bytes for m in before.gathered) == [32 * 4 * n for n in (16, 48, 64, 80)]
    assert [m.bytes for m in before.entering] == [32 * 4 * 16] and [m.bytes for m in before.scattered] == [32 * 4 * 48]


def test_convolutions_and_attention_have_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 12, 3, padding=1, groups=2)
            self.linear = nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).flatten(2).transpose(1, 2)
            return self.linear(torch.bmm(torch.softmax(torch.bmm(h, h.transpose(1, 2)), -1), h))

    before, _ = seen(monkeypatch, Model(), {}, torch.randn(6, 8, 5, 5))
    found = {p.rate: p for p in before.products}
    assert found["conv.grad_weight"].sizes == (6 * 25, 4, 6, 9) and found["conv.grad_weight"].rows == (True, False, False, False)
    assert found["bmm"].rows == (False, False, False)
    assert found["linear.grad_weight"].sizes == (6 * 25, 12, 10)
    assert all(p.time_us(0.5, stored()) < p.time_us(1.0, stored()) for p in before.products)


def test_a_split_that_has_more_to_gather_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second estimate knows what the partitioner has really saved."""
    monkeypatch.setattr(early_decline, "early_rejection", lambda *args: None)
    too_much = GATHERING_COSTS(cost="20", left_out="half", saved="1", least="24")
    model, x, answers = mlp(20, 32, 4), torch.randn(24, 20), iter([None, too_much])
    monkeypatch.setattr(row_cost, "rejection_reason", lambda *args: next(answers))
    plans = Plans()
    f = torch.compile(model, backend=Backend({"grad": {"axis": "rows", "ratio": 0.5}, "policy": "cost"}, inner_compile=run_as_is, on_plan=plans))
    f(x).sum().backward()
    assert next(answers, "asked twice") == "asked twice"
    got = grads(model)
    model(x).sum().backward()
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(got, grads(model), strict=True))
    assert [(c.decision, c.reason) for c in plans[-1].cuts] == [("exact", too_much)]


def test_nothing_is_measured_for_this(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A stored profile is read. Where there is none, the first call does not wait for a measurement."""

    def measured(*args: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.delenv(MACHINE.name)
    monkeypatch.setattr(calibration, "_measure_profile", measured)
    monkeypatch.setattr(store, "loaded", {})
    monkeypatch.setattr(store.platformdirs, "user_cache_path", lambda name: tmp_path)
    assert machine.stored() is None and machine.stored("xpu") is None
    kept = machine.load(__file__.replace("rows/test_row_cost.py", "helpers/machine.json"))
    kept = kept.model_copy(update={"name": machine.device_name("cpu"), "threads": torch.get_num_threads(), "torch_version": torch.__version__})
    kept.save(machine.path_of())
    assert machine.stored() == kept == machine.stored()
    with machine.use(kept.model_copy(update={"quick": True})):
        assert machine.stored().quick  # type: ignore[union-attr]
