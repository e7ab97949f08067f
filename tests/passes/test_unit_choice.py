"""Hidden layers that compute some of their units: values and gradients are those of the dense model with a mask on its units, in training only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Choices, compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from torch import Tensor, nn

import approx_compile
from approx_compile import ConfigError, explain
from approx_compile.kernels.estimators import Estimator, water_fill
from approx_compile.kernels.unit_selection import UnitChoice, choose_units, mean_pre_activation

METHODS = ("dropout", "adaptive_dropout", "alsh")
ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "min_k": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


class Hidden(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(16, 24), nn.Linear(24, 8), between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


def masked(model: nn.Sequential, x: Tensor, choices: Choices) -> Tensor:
    """The dense model with the chosen units of every hidden layer multiplied by their scale, and the others by 0."""
    for name, layer in model.named_children():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            reader = f"{int(name) + 1}.output"
            x = x * torch.zeros(x.shape[-1]).index_copy_(0, choices[f"{reader}.idx"], choices[f"{reader}.scale"])
    return x


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_is_the_masked_dense_model(method: str) -> None:
    """Values and all gradients of a chain of three hidden layers; weights of units left out get no gradient."""
    model, x = mlp(20, 64, 48, 40, 10), torch.randn(4, 8, 20, requires_grad=True)
    f, choices, plans = compiled(model, ALWAYS | {"method": method})
    y = f(x)
    y.square().sum().backward()
    found = grads(model, x)
    expected = masked(model, x, choices)
    expected.square().sum().backward()
    wanted = grads(model, x)
    assert relative(y, expected) < 1e-6
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-6
    if method == "alsh":
        assert {s.item() for s in choices["2.output.scale"]} <= {0.0, 1.0}
    left_out = torch.ones(64, dtype=torch.bool).index_fill_(0, choices["2.output.idx"], False)
    assert left_out.sum() == 64 - len(choices["2.output.idx"]) > 0 and not found[0][left_out].any() and not found[1][left_out].any()
    assert [plan.chains() for plan in plans] == [[("0", "2", "4", "6")]]


def test_a_chain_multiplies_the_kept_units_only() -> None:
    """A layer in the middle of a chain costs a quarter at half the units, in all three products."""
    sites = plans_of(mlp(64, 128, 128, 8), ALWAYS | {"method": "dropout", "min_k": 1}, torch.randn(32, 64))
    products = sites[1].products
    assert [p.k for p in products] == [64] * 3 and sites[1].units.estimator.k == 64
    assert all(p.flops_exact / 4 <= p.flops_sampled < 0.3 * p.flops_exact for p in products)


@pytest.mark.slow
def test_inductor_draws_anew_every_step_and_evaluates_exactly() -> None:
    model, x = mlp(16, 64, 32, 8), torch.randn(24, 16)
    f = torch.compile(model, backend="approx", options=ALWAYS | {"method": "dropout"})
    torch.manual_seed(0)
    zeros = []
    for _ in range(4):
        f(x).sum().backward()
        zeros.append(grads(model)[0].eq(0).all(1))
    assert all(int(z.sum()) >= 32 for z in zeros) and len({tuple(z.tolist()) for z in zeros}) == 4
    torch.manual_seed(0)
    f(x).sum().backward()
    assert torch.equal(grads(model)[0].eq(0).all(1), zeros[0])  # a restored random state repeats the run
    exact = torch.compile(model, backend="inductor")
    with torch.no_grad():
        assert torch.equal(f(x), exact(x))
    model.eval()
    assert torch.equal(f(x), exact(x))


@pytest.mark.parametrize("method", METHODS)
def test_all_units_are_the_exact_layer(method: str) -> None:
    sites = plans_of(mlp(16, 64, 8), ALWAYS | {"method": method, "ratio": 1.0}, torch.randn(24, 16))
    assert all(s.decision == "exact" for s in sites) and "keeps all 64" in sites[0].reason


@pytest.mark.parametrize("method", METHODS[:2])
def test_the_expectation_is_the_exact_layer(method: str) -> None:
    """The mean mask is 1 for every unit, within 5 standard errors; the scale of dropout is 1 / ratio."""
    torch.manual_seed(0)
    draws, size, k = 1000, 32, 8
    x, weight, bias = torch.randn(16, 12), torch.randn(12, size), torch.randn(size)
    choice = UnitChoice(Estimator(method, size, k, 1, 1), 0.7, -0.2)
    random = torch.Generator().manual_seed(1)
    total = torch.zeros(size, dtype=torch.float64)
    for _ in range(draws):
        idx, scale = choose_units(choice, x, weight, bias, None, None, random)
        total.index_add_(0, idx, scale.double())
        assert method != "dropout" or (len(idx) == k and bool((scale == size / k).all()))
    p = torch.full((size,), k / size)
    if method == "adaptive_dropout":
        p = water_fill(torch.sigmoid(0.7 * ((x @ weight + bias).mean(0)) - 0.2), k)
        assert p.sum().item() == pytest.approx(k, rel=1e-5) and p.max() > 1.5 * p.min()
    error = ((1 - p) / p / draws).sqrt()
    assert ((total / draws - 1).abs() < 5 * error + 1e-9).all()


def test_the_estimate_is_the_mean_pre_activation() -> None:
    """Also if only the kept entries of the input are there."""
    x, weight, bias, idx, scale = torch.randn(9, 12), torch.randn(12, 5), torch.randn(5), torch.tensor([1, 4, 10]), torch.tensor([2.0, 0.0, 3.0])
    mask = torch.zeros(12).index_copy_(0, idx, scale)
    assert relative(mean_pre_activation(x[:, idx], weight, bias, idx, scale), (x * mask @ weight + bias).mean(0)) < 1e-6
    assert relative(mean_pre_activation(x, weight, None, None, None), (x @ weight).mean(0)) < 1e-6


FREE = {
    "gelu": F.gelu,
    "offset": lambda h: F.relu(h) + 1,
    "silu, scaled": lambda h: 2 * F.silu(h),
    "sigmoid": torch.sigmoid,
    "dropout behind": lambda h: F.dropout(F.relu(h), 0.3),
}


@pytest.mark.parametrize("name", ["gelu", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in list(FREE)[1:])])
def test_units_behind_any_elementwise_nonlinearity(name: str) -> None:
    sites = plans_of(Hidden(FREE[name]), ALWAYS | {"method": "dropout"}, torch.randn(40, 16))
    assert sites[0].units is not None and sites[1].shrinks == ("one",)


class TwoReaders(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        return self.two(h) + F.linear(h, self.two.weight * 2)


class Skip(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x) + F.pad(x, (0, 8))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zero, self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.zero(x)
        return self.two(h + F.relu(self.one(h)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, str]] = {
    "two readers": (lambda: TwoReaders(F.relu), {}, "one", "its units are read by two"),
    "residual": (Residual, {}, "one", "reads all of its units|added to other values"),
    "a residual of the input": (lambda: Skip(F.relu), {}, "one", "added to other values of the samples before two"),
    "a softmax": (lambda: Hidden(lambda h: h.relu().softmax(-1)), {}, "one", "two reads all of its units: amax reads"),
    "a reader by another method": (lambda: Hidden(F.relu), {"rules": [{"layers": "two", "method": "topk"}]}, "one", "two is approximated in another way"),
    "few units": (lambda: Hidden(F.relu), {"min_k": 24}, "one", "axis of 24, min_k is 24"),
    "no times": (lambda: Hidden(F.relu), {"policy": "cost"}, "one", "would not pay: predicted"),
    "the last": (lambda: Hidden(F.relu), {}, "two", "its units are the model's output"),
}


SHOWN = ("residual", "a residual of the input", "a reader by another method")


@pytest.mark.parametrize("name", [*SHOWN, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in REFUSED if n not in SHOWN)])
def test_a_layer_that_computes_all_units_says_why(name: str) -> None:
    make, more, layer, why = REFUSED[name]
    sites = {s.name: s for s in plans_of(make(), ALWAYS | {"method": "dropout"} | more, torch.randn(40, 16))}
    assert sites[layer].units is None and re.search(why, sites[layer].reason)


MEANINGLESS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "last": (lambda: mlp(16, 32, 8), (8, 16), "2", "2: its units are the model's output"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), (4, 3, 8, 8), "conv", "0: it is no linear layer"),
    "no nonlinearity": (lambda: nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.Linear(32, 8)), (8, 16), "0", "no nonlinearity is between it and 2"),
}


@pytest.mark.parametrize("name", ["last", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in MEANINGLESS if n != "last")])
def test_a_rule_that_means_nothing_is_an_error(name: str) -> None:
    make, shape, layers, why = MEANINGLESS[name]
    options = {"policy": "always", "method": "exact", "rules": [{"layers": layers, "method": "dropout"}]}
    with pytest.raises(ConfigError, match=re.escape(why)):
        explain(make(), torch.randn(shape), config=options)


def test_explain_names_the_chain_and_what_layers_make() -> None:
    report = explain(mlp(20, 64, 48, 8), torch.randn(32, 20), config=ALWAYS | {"method": "dropout"})
    text = " ".join(str(report).split())
    assert "Forward: 2 of 3 layers make 50 % of their units (dropout)." in text
    assert "Chain 0 > 2 > 4: each layer multiplies only the units that the one before makes" in text
    assert "reads 32 of 64, makes 24 of 48 units (dropout)" in text
    assert report.to_dict()["chains"] == [("0", "2", "4")]


def test_a_schedule_switches_units_on_and_off() -> None:
    options = ALWAYS | {"method": "exact", "rules": [{"layers": "linear[:-1]", "steps": "1::2", "method": "dropout"}]}
    model, x = mlp(16, 32, 8), torch.randn(24, 16)
    f, _, plans = compiled(model, options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    left_out = []
    for _ in range(4):
        f(x).sum().backward()
        left_out.append(int(grads(model)[0].eq(0).all(1).sum()) >= 16)
        optimizer.step()
    assert left_out == [False, True, False, True] and len(plans) == 2


def test_the_choice_is_predicted_to_pay_on_large_layers_only() -> None:
    """The cost model counts the pass over the weight that adaptive dropout takes, and hashing."""
    terms, times = {"dropout": False, "adaptive_dropout": "estimate of units", "alsh": "hashing"}, {}
    for method in METHODS:
        sites = plans_of(mlp(64, 1024, 1024, 8), {"method": method}, torch.randn(256, 64))
        assert sites[1].units is not None and "predicted" in sites[1].reason
        times[method] = sum(s.time_sampled_us for s in sites)
        assert all((term in str(sites[1].products[0].terms)) == (of == method) for of, term in terms.items() if term)
    assert times["dropout"] < min(times["adaptive_dropout"], times["alsh"])


@pytest.mark.slow
def test_a_run_with_hash_tables_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Inductor's own code: three steps, a checkpoint, three steps; the resumed run repeats them, though its tables were built from other weights."""
    options = ALWAYS | {"method": "alsh", "ratio": 0.25, "units": {"early_every": 64}}
    x = torch.randn(8, 24, 16)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Tensor) -> None:
        f = torch.compile(model, backend="approx", options=options)
        for batch in batches:
            f(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = mlp(16, 64, 32, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run(model, optimizer, x[:4])
    torch.save([model.state_dict(), optimizer.state_dict(), approx_compile.state_dict(model)], tmp_path / "checkpoint.pt")
    run(model, optimizer, x[4:])
    torch._dynamo.reset()
    resumed = mlp(16, 64, 32, 8)
    again = torch.optim.Adam(resumed.parameters(), lr=0.01)
    saved = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    approx_compile.load_state_dict(resumed, saved[2])
    assert saved[2]["tables"].keys() == {"0.weight", "2.weight"}
    run(resumed, again, x[4:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert approx_compile.state_dict(resumed)["tables"] == approx_compile.state_dict(model)["tables"]


def test_units_that_no_sample_finds_leave_the_bias() -> None:
    """An empty active set: with inputs opposite to all weights nothing is found, and what is read are zeros."""
    model = mlp(16, 64, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(64, 16) + 1)
    x = -(torch.rand(24, 16) + 1)
    f, choices, _ = compiled(model, ALWAYS | {"method": "alsh", "ratio": 0.25, "units": {"bits": 16, "tables": 1}})
    y = f(x)
    y.sum().backward()
    assert not choices["2.output.scale"].any() and torch.equal(y, model[2].bias.expand(24, 8))
    assert not model[0].weight.grad.any() and not model[2].weight.grad.any() and model[2].bias.grad.eq(24).all()


def test_a_weight_that_is_made_has_no_tables() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(16, 64))
    sites = plans_of(nn.Sequential(model, nn.ReLU(), nn.Linear(64, 8)), ALWAYS | {"method": "alsh"}, torch.randn(24, 16))
    assert sites[0].units is None and "hash tables are those of a parameter" in sites[0].reason
