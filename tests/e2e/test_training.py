"""Habits of plain torch users: autocast and GradScaler, gradient accumulation, whole compiled steps, resuming, copies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Plans, compiled
from helpers.models import Buckets, mlp
from helpers.oracles import grads, relative
from helpers.sampling import all_but
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approx_compile import Backend, ConfigError
from approx_compile.backend import run_as_is

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}


def sampled_mlp(model: nn.Sequential, x: Tensor, ratio: float = 0.5) -> Tensor:
    """The model with top-k linear layers, written by hand."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            k = round(layer.in_features * ratio)
            score = x.detach().square().sum(0).sqrt() * layer.weight.detach().square().sum(0).sqrt()
            idx = score.topk(k).indices
            x = F.linear(x[:, idx], layer.weight[:, idx], layer.bias)
        else:
            x = layer(x)
    return x


@pytest.mark.slow
def test_a_model_through_inductor_equals_hand_written_sampling() -> None:
    model, x = mlp(64, 96, 64), torch.randn(32, 64)
    torch.compile(model, backend="approx", options=ALWAYS)(x).square().sum().backward()
    got = grads(model)
    sampled_mlp(model, x).square().sum().backward()
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


def test_accumulation_and_retain_graph() -> None:
    model, x, y = mlp(64, 64, 64), torch.randn(32, 64), torch.randn(32, 64)
    f, _, _ = compiled(model, ALWAYS)
    f(x).square().sum().backward()
    f(y).square().sum().backward()
    got = grads(model)
    (sampled_mlp(model, x).square().sum() + sampled_mlp(model, y).square().sum()).backward()
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5
    with torch._functorch.config.patch(donated_buffer=False):
        loss = f(x).square().sum()
        loss.backward(retain_graph=True)
        once = [g.clone() for g in grads(model)]
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(once, grads(model), strict=True))


def test_autocast_and_gradscaler() -> None:
    model = mlp(64, 64, 64)
    f, _, plans = compiled(model, ALWAYS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, before = torch.randn(32, 64), model[0].weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = f(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert plans[0].sampled == 2 and plans.sites[0].dtype == "float16"
    assert not torch.equal(before, model[0].weight) and model[0].weight.isfinite().all()
    assert scaler.get_scale() == 1024.0


def test_in_place_compile_and_fullgraph_and_state_dict_keys() -> None:
    model = mlp(64, 64, 64)
    keys = list(model.state_dict())
    plans = Plans()
    model.compile(backend=Backend(ALWAYS, inner_compile=run_as_is, on_plan=plans), fullgraph=True)
    model.train()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

        def forward(self, x: Tensor) -> Tensor:
            return self.net[1](torch.relu(self.net[0](x)))

    holder = Holder()
    holder.compile(backend=Backend(ALWAYS, inner_compile=run_as_is, on_plan=plans), fullgraph=True)
    holder(torch.randn(32, 64)).sum().backward()
    assert [s.name for s in plans.sites] == ["net.0", "net.1"] and plans[0].sampled == 2
    assert list(model.state_dict()) == keys
    assert not any(k.startswith("_orig_mod") or "approx" in k for k in holder.state_dict())


def test_copies_of_a_compiled_model_train() -> None:
    model = mlp(64, 64, 64)
    f, _, _ = compiled(model, ALWAYS)
    x = torch.randn(32, 64)
    f(x).sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    torch.compile(other, backend=Backend(ALWAYS, inner_compile=run_as_is))(x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(other), strict=True))


def test_forward_and_loss_in_one_compiled_function() -> None:
    model, x, y = mlp(64, 64, 64), torch.randn(32, 64), torch.randint(0, 64, (32,))
    plans = Plans()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    f = torch.compile(loss_of, backend=Backend(ALWAYS, inner_compile=run_as_is, on_plan=plans))
    f(x, y).backward()
    got = grads(model)
    F.cross_entropy(sampled_mlp(model, x), y).backward()
    assert plans[0].sampled == 2
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


def test_a_whole_compiled_step() -> None:
    """With backward() and the optimizer inside the compiled function Dynamo breaks the graph there; the forward graph is sampled nevertheless."""
    model, x = mlp(64, 64, 64), torch.randn(32, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plans = Plans()

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    f = torch.compile(step, backend=Backend(ALWAYS, inner_compile=run_as_is, on_plan=plans))
    want = copy.deepcopy(model)
    for _ in range(3):
        f(x)
    assert sum(p.sampled for p in plans) == 2
    exact = torch.optim.SGD(want.parameters(), lr=0.1)
    for _ in range(3):
        exact.zero_grad()
        sampled_mlp(want, x).square().mean().backward()
        exact.step()
    assert max(relative(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True)) < 1e-5


@pytest.mark.slow
def test_compiled_autograd() -> None:
    model, x = mlp(64, 64, 64), torch.randn(32, 64)
    f, _, plans = compiled(model, ALWAYS)
    f(x).square().sum().backward()
    want = grads(model)
    torch._dynamo.reset()
    g, _, again = compiled(model, ALWAYS)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        g(x).square().sum().backward()
    assert plans[0].sampled == again[0].sampled == 2
    assert max(relative(a, b) for a, b in zip(grads(model), want, strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("inner", all_but([run_as_is], [run_as_is, None]))
def test_a_resumed_run_repeats_the_uninterrupted_one(inner: Any) -> None:
    """The estimator draws random numbers, so torch's random state must be resumed too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop, self.head = mlp(64, 64, 64), nn.Dropout(0.1), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(torch.relu(self.body(x))))

    data = torch.randn(8, 32, 64)
    labels = torch.randint(0, 10, (8, 32))

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(5)
        model = Net()
        options = ALWAYS | {"method": "bernoulli", "ratio": 0.25}
        return model, torch.optim.Adam(model.parameters()), torch.compile(model, backend=Backend(options, inner_compile=inner))

    def train(f: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            optimizer.zero_grad()
            F.cross_entropy(f(data[i]), labels[i]).backward()
            optimizer.step()

    model, optimizer, f = start()
    train(f, optimizer, range(8))
    want = [p.detach().clone() for p in model.parameters()]

    model, optimizer, f = start()
    train(f, optimizer, range(4))
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, saved)
    torch._dynamo.reset()
    model, optimizer, f = start()
    saved.seek(0)
    state = torch.load(saved)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    train(f, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want, strict=True))


def test_a_memory_budget_and_random_choices_are_refused() -> None:
    model, x = mlp(64, 64, 64), torch.randn(32, 64)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        with pytest.raises(ConfigError, match=r"activation_memory_budget is 0\.5"):
            compiled(model, ALWAYS | {"method": "bernoulli", "ratio": 0.25})[0](x)
        f, _, plans = compiled(model, ALWAYS)
        f(x).square().sum().backward()
    assert plans[-1].sampled == 2
    got = grads(model)
    sampled_mlp(model, x).square().sum().backward()
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


def test_eager_checkpoint_around_a_compiled_block() -> None:
    """Outside the graph the forward pass runs twice. Checkpointing preserves the generator's state by default, so both draw the same choice."""
    block = mlp(64, 64, 64)
    for method in ("topk", "bernoulli"):
        f, _, _ = compiled(block, ALWAYS | {"method": method, "ratio": 0.25})
        x = torch.randn(32, 64, requires_grad=True)
        torch.manual_seed(7)
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).sum().backward()
        got = grads(block, x)
        torch.manual_seed(7)
        f(x).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(got, grads(block, x), strict=True))


def test_saved_memory_is_that_of_the_sampled_operands() -> None:
    """The backward pass keeps the gathered operand in place of the whole activation, where nothing else needs the activation."""

    def saved(options: dict[str, Any]) -> int:
        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x))

        model = Chain()
        f, _, _ = compiled(model, options)
        own = {p.data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in own:
                held[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            f(torch.randn(4096, 256)).sum().backward()
        return sum(held.values())

    exact, half = saved({"method": "exact"}), saved(ALWAYS)
    assert half < 0.6 * exact


@pytest.mark.slow
@pytest.mark.exhaustive
def test_checkpoint_inside_inductor_equals_plain() -> None:
    model = mlp(64, 64, 64)
    x = torch.randn(32, 64)
    f = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="approx", options=ALWAYS)
    f(x).square().sum().backward()
    got = grads(model)
    sampled_mlp(model, x).square().sum().backward()
    assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("one_rank")
def test_ddp_calls_the_backend_once_per_bucket() -> None:
    net = Buckets()
    model = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1)
    f, _, plans = compiled(model, ALWAYS | {"rules": [{"layers": "*body.1", "ratio": 0.25}]})
    x = torch.randn(32, 512)
    f(x).sum().backward()
    assert len(plans) > 1  # DDPOptimizer cuts the graph at the buckets
    assert {s.name: s.products[0].k for s in plans.sites} == {"body.0": 256, "body.1": 128, "body.2": 256, "body.3": 256}
    got = grads(net)
    h = x
    for layer, k in zip(net.body, (256, 128, 256, 256), strict=True):
        idx = (h.detach().square().sum(0).sqrt() * layer.weight.detach().square().sum(0).sqrt()).topk(k).indices
        h = torch.relu(F.linear(h[:, idx], layer.weight[:, idx], layer.bias))
    h.sum().backward()
    assert max(relative(a, b) for a, b in zip(got, grads(net), strict=True)) < 1e-5
    seen = len(plans)
    model.eval()
    f(x).sum().backward()
    assert {s.decision for s in plans.sites[-4:]} == {"exact"}
    model.train()
    f(x)
    assert len(plans) == 2 * seen
