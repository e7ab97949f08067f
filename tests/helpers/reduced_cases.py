"""Cases of the reduced all-reduce, run on every rank (`helpers.ranks`): each compares it with DDP's full one."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from approx_compile import ApproxWarning, explain, machine
from approx_compile.distributed import ReducedAllReduce, packing, reduced_all_reduce, register
from helpers.ddp import WEIGHTS, assert_close, assert_equal_on_ranks, backend, batch, small, train, wrapped
from helpers.models import Buckets, TransformerBlock

MACHINE = Path(__file__).parent / "machine.json"


def _same_weights(a: nn.Module, b: nn.Module, world: int) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if world == 2:
            assert torch.equal(p, q), name
        else:
            assert_close([p.detach()], [q.detach()], 1e-6)


def _compare(
    model: nn.Module,
    rank: int,
    world: int,
    options: dict[str, Any] = WEIGHTS,
    order: str = "inner",
    steps: int = 4,
    verify: int = 2,
    run: Callable[..., Any] = train,
    inputs: int = 64,
    rows: int = 32,
    **kwargs: Any,
) -> ReducedAllReduce:
    """Train a model with the full and with the reduced all-reduce; the weights must be the same."""
    full = copy.deepcopy(model)
    run(wrapped(full, options, order, **kwargs), full.parameters(), rank, steps, rows, inputs)
    ddp = wrapped(model, options, order, **kwargs)
    state = register(ddp, verify=verify)
    run(ddp, model.parameters(), rank, steps, rows, inputs)
    _same_weights(model, full, world)
    assert_equal_on_ranks(model)
    return state


def one_graph(rank: int, world: int) -> None:
    model = small()
    report = explain(model, batch(rank), config=WEIGHTS)
    state = _compare(model, rank, world)
    checksums = 4 * 4 * 2 * packing.BITS * 5  # of 5 parameters in 4 exchanges
    assert 4 * report.gradient_bytes == state.bytes_whole and 4 * report.kept_bytes + checksums == state.bytes_sent
    assert state.exchanges == 4 and state.bytes_sent < 0.6 * state.bytes_whole, state.bytes_sent / state.bytes_whole


def buckets(rank: int, world: int) -> None:
    state = _compare(Buckets(), rank, world, order="outer", inputs=512, bucket_cap_mb=1)
    assert state.bytes_sent < 0.7 * state.bytes_whole, state.bytes_sent / state.bytes_whole


class _Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [(8, 32), (32, 64), (64, 64)]
        self.body = nn.Sequential(*(m for i, o in sizes for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.view(len(x), 8, 4, -1)).mean((2, 3)))


def convolutions(rank: int, world: int) -> None:
    state = _compare(_Convs(), rank, world, WEIGHTS | {"rules": [{"layers": "conv", "ratio": 0.5}]}, inputs=256, rows=8)
    assert state.bytes_sent < 0.7 * state.bytes_whole, state.bytes_sent / state.bytes_whole


EVERY_OTHER_STEP: dict[str, Any] = {
    "policy": "always",
    "method": "exact",
    "rules": [{"layers": "*", "steps": "1::2", "method": "topk_weights", "ratio": 0.5}],
}


def schedule(rank: int, world: int) -> None:
    """Exact steps after sampled ones must not use the indices of these. Of three sampled steps the first two are compared with the full all-reduce."""
    with patch.object(reduced_all_reduce, "_compare", wraps=reduced_all_reduce._compare) as compare:
        state = _compare(small(), rank, world, EVERY_OTHER_STEP, steps=6)
    assert 0.5 < state.bytes_sent / state.bytes_whole < 0.9
    assert compare.call_count == 2


def _accumulate(ddp: Any, parameters: Any, rank: int, steps: int, rows: int, inputs: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(steps):
        with ddp.no_sync():
            ddp(batch(rank, 2 * step, rows, inputs)).square().mean().backward()
        ddp(batch(rank, 2 * step + 1, rows, inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulation(rank: int, world: int) -> None:
    state = _compare(small(), rank, world, run=_accumulate)
    assert state.bytes_sent < 0.6 * state.bytes_whole


def _accumulate_other_weights(ddp: Any, parameters: Any, rank: int, steps: int, rows: int, inputs: int) -> None:
    """The weights change between two backward passes whose gradients are added: their indices differ."""
    parameters = list(parameters)
    for step in range(steps):
        with ddp.no_sync():
            ddp(batch(rank, 2 * step, rows, inputs)).square().mean().backward()
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(step + i)))
        ddp(batch(rank, 2 * step + 1, rows, inputs)).square().mean().backward()
        with torch.no_grad():
            for p in parameters:
                p.sub_(0.1 * p.grad)
                p.grad = None


def accumulation_over_a_change_of_weights(rank: int, world: int) -> None:
    state = _compare(small(), rank, world, run=_accumulate_other_weights)
    assert state.bytes_sent > 0.9 * state.bytes_whole


class _Penalty(nn.Module):
    """A model whose first weight also gets a gradient from outside the compiled part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        torch._dynamo.graph_break()
        return out + 1e-3 * self.net[0].weight.square().sum()


def gradient_from_outside(rank: int, world: int) -> None:
    model = _Penalty()
    state = _compare(model, rank, world, verify=100)
    assert any("0.weight" in name for name in state.whole) and state.bytes_sent < 0.95 * state.bytes_whole, state.whole


def half_precision(rank: int, world: int) -> None:
    model = small()
    ddp = wrapped(model, WEIGHTS)
    state = register(ddp, wrapper=fp16_compress_wrapper)
    train(ddp, model.parameters(), rank, 3)
    assert_equal_on_ranks(model)
    assert state.bytes_sent < 0.6 * state.bytes_whole


def choice_by_the_data_goes_whole(rank: int, world: int) -> None:
    state = _compare(small(), rank, world, WEIGHTS | {"method": "topk"})
    assert state.bytes_sent == state.bytes_whole and len(state.whole) == 6


def different_weights_raise_on_all_ranks(rank: int, world: int) -> None:
    model = small()
    ddp = wrapped(model, WEIGHTS)
    register(ddp)
    train(ddp, model.parameters(), rank, 1)
    with torch.no_grad():
        model[2].weight.mul_(torch.rand(model[2].weight.shape, generator=torch.Generator().manual_seed(rank)))
    with pytest.raises(RuntimeError) as error:
        train(ddp, model.parameters(), rank, 1)
    assert "have chosen different channels for" in str(error.value) and "2.weight" in str(error.value) and "checkpoint" in str(error.value)


def different_settings_raise_on_all_ranks(rank: int, world: int) -> None:
    model = small()
    ddp = wrapped(model, WEIGHTS | {"ratio": 0.25 + 0.125 * rank})
    register(ddp)
    with pytest.raises(RuntimeError) as error:
        train(ddp, model.parameters(), rank, 1)
    said = str(error.value)
    assert "the ranks were given different settings: rank 0" in said and "'ratio': 0.25" in said and "'ratio': 0.375" in said


def profile_of_rank_0(rank: int, world: int) -> None:
    """Under the policy `cost` two ranks with different profiles make the plans of rank 0."""
    own = machine.load(os.environ.pop("APPROX_COMPILE_MACHINE"))
    try:
        machine.adopt(own.model_copy(update={"quick": rank == 1}), "cpu")
        ddp = DDP(torch.compile(small(), backend=backend({"ratio": 0.5})))
        register(ddp)
        stored = machine.stored("cpu")
        assert stored is not None and not stored.quick
    finally:
        os.environ["APPROX_COMPILE_MACHINE"] = str(MACHINE)


def _run_out_of_data(rank: int, world: int, steps: Callable[[int], int], options: dict[str, Any] = WEIGHTS, verify: int = 0, **kwargs: Any) -> None:
    """Train each rank for a number of steps of its own, with the full and with the reduced all-reduce."""
    model = small()
    results = []
    for reduced in (False, True):
        net = copy.deepcopy(model)
        ddp = wrapped(net, options)
        if reduced:
            register(ddp, verify=verify)
        with ddp.join(**kwargs):
            train(ddp, net.parameters(), rank, steps(rank))
        assert_equal_on_ranks(net)
        results.append(net)
    _same_weights(*results, world)


def uneven_inputs(rank: int, world: int) -> None:
    """A rank without data does not know whether a schedule's step is sampled."""
    _run_out_of_data(rank, world, lambda r: 2 + 3 * r, EVERY_OTHER_STEP, verify=1)


def a_rank_without_any_data(rank: int, world: int) -> None:
    _run_out_of_data(rank, world, lambda r: 3 * r)


def average_over_ranks_with_data(rank: int, world: int) -> None:
    _run_out_of_data(rank, world, lambda r: 2 + 2 * r, divide_by_initial_world_size=False)


def checkpointing(rank: int, world: int) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    state = _compare(Checkpointed(), rank, world)
    assert state.bytes_sent < 0.6 * state.bytes_whole, state.whole


def autocast(rank: int, world: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        state = _compare(small(), rank, world)
    assert state.bytes_sent < 0.6 * state.bytes_whole, state.whole


class _Shared(nn.Module):
    """A layer that is used twice: its gradient is the sum of two with different zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.middle(torch.relu(self.first(x)))))))


def shared_layer(rank: int, world: int) -> None:
    state = _compare(_Shared(), rank, world)
    assert "middle.weight" in state.whole and "first.weight" not in state.whole


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), -1, 64)
        for block in self.blocks:
            x = block(x)
        return x


def transformer_blocks(rank: int, world: int) -> None:
    state = _compare(_Blocks(), rank, world, inputs=256, rows=8)
    assert state.bytes_sent < 0.5 * state.bytes_whole, state.bytes_sent / state.bytes_whole


def static_graph(rank: int, world: int) -> None:
    state = _compare(small(), rank, world, static_graph=True)
    assert state.bytes_sent < 0.7 * state.bytes_whole


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = small(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def unused_parameters(rank: int, world: int) -> None:
    state = _compare(_Unused(), rank, world, find_unused_parameters=True, gradient_as_bucket_view=True)
    assert state.bytes_sent < 0.7 * state.bytes_whole


def wrong_arguments(rank: int, world: int) -> None:
    for model, kwargs, kind in ((small(), {}, TypeError), (wrapped(small(), WEIGHTS), {"verify": -1}, ValueError)):
        try:
            register(model, **kwargs)
        except kind as e:
            assert "register: got" in str(e)
        else:
            raise AssertionError(kwargs)


def random_delays(rank: int, world: int, steps: int = 1000) -> None:
    """Ranks that are late by turns, under a schedule: nothing hangs, and the weights stay equal bit for bit."""
    options = {"policy": "always", "method": "exact", "rules": [{"layers": "*", "steps": "1::3", "method": "topk_weights", "ratio": 0.5}]}
    model = small()
    ddp = wrapped(model, options)
    register(ddp)
    delays = random.Random(rank)

    def late(*where: int) -> Tensor:
        time.sleep(delays.random() * 0.004 if delays.random() < 0.3 else 0)
        return batch(*where)

    train(ddp, model.parameters(), rank, steps, rows=8, data=late)
    assert_equal_on_ranks(model)


def bare_sequential_in_compiled_ddp(rank: int, world: int) -> None:
    with pytest.warns(ApproxWarning, match="Dynamo compiles nothing of DDP around a bare nn.Sequential"):
        register(wrapped(small(), WEIGHTS, "outer"))


def verify_finds_a_wrong_gradient(rank: int, world: int) -> None:
    """The check against the full all-reduce fails where more than the kept slices differ between the ranks."""
    model = small()
    ddp = wrapped(model, WEIGHTS)
    state = register(ddp, verify=1)
    state._slices._arrive = _arrives_spoiled(state._slices._arrive, rank)
    with pytest.raises(RuntimeError) as error:
        train(ddp, model.parameters(), rank, 1)
    assert "differ from those of the full all-reduce" in str(error.value)
    dist.barrier()


def _arrives_spoiled(arrive: Callable[..., None], rank: int) -> Callable[..., None]:
    def spoiled(parameter: Tensor, gradient: Tensor) -> None:
        arrive(parameter, gradient)
        gradient.add_(rank)

    return spoiled


IN_MAKE_TEST = (
    "one_graph schedule accumulation gradient_from_outside uneven_inputs wrong_arguments bare_sequential_in_compiled_ddp different_weights_raise_on_all_ranks"
).split()
OTHERS = (
    "buckets convolutions transformer_blocks shared_layer autocast checkpointing "
    "accumulation_over_a_change_of_weights half_precision choice_by_the_data_goes_whole static_graph unused_parameters "
    "verify_finds_a_wrong_gradient a_rank_without_any_data average_over_ranks_with_data different_settings_raise_on_all_ranks profile_of_rank_0"
).split()
FOUR_RANKS = "one_graph buckets transformer_blocks schedule accumulation convolutions uneven_inputs".split()
