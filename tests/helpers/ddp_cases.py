"""Cases of data-parallel training, run on every rank (`helpers.ranks`).

The reference is data parallelism by hand: every rank runs the compiled model without DDP on its own data, and the gradients are averaged.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

import approx_compile
from approx_compile import ApproxWarning
from approx_compile.backend.runtime.output_probe import OutputControl
from approx_compile.distributed import register
from approx_compile.rows import row_cost
from helpers.ddp import (
    WEIGHTS,
    assert_close,
    assert_equal_on_ranks,
    backend,
    batch,
    compiled,
    global_gradients,
    gradients,
    loss_of,
    small,
    train,
    wrapped,
)  # fmt: skip
from helpers.models import Buckets

ROWS: dict[str, Any] = {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5, "method": "topk"}}
"""Half the samples of each rank, by a choice without random numbers."""


class Net(nn.Module):
    """A model that Dynamo compiles inside DDP, which it does not do for an `nn.Sequential`."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.net, self.checkpointed = small(), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False) if self.checkpointed else self.net(x)


class Unused(Net):
    """A model with parameters that get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(16, 16)


def _average(model: nn.Module, world: int) -> None:
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world


def _step_by_hand(model: nn.Module, call: Any, data: list[Tensor], world: int, optimizer: Any) -> None:
    for x in data:
        loss_of(call(x)).backward()
    _average(model, world)
    optimizer.step()
    optimizer.zero_grad()


def _same_as_by_hand(
    model: nn.Module,
    rank: int,
    world: int,
    options: dict[str, Any],
    order: str = "inner",
    micro: int = 1,
    steps: int = 3,
    rows: Callable[[int], int] = lambda step: 32,
    bound: float = 1e-6,
    **kwargs: Any,
) -> None:
    """Train in DDP and by hand, with `micro` backward passes a step, all but the last under `no_sync`."""
    alone = copy.deepcopy(model)
    ddp, call = wrapped(model, options, order, **kwargs), compiled(alone, options)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, alone))
    for step in range(steps):
        data = [batch(rank, step * micro + i, rows(step)) for i in range(micro)]
        for i, x in enumerate(data):
            with ddp.no_sync() if i < micro - 1 else contextlib.nullcontext():
                loss_of(ddp(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        _step_by_hand(alone, call, data, world, other)
    assert_equal_on_ranks(model)
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in alone.parameters()], bound)


def weights_against_the_global_batch(rank: int, world: int) -> None:
    for order in ("inner", "outer"):
        model = Net()
        expected = global_gradients(model, WEIGHTS, [batch(r) for r in range(world)])
        ddp = wrapped(model, WEIGHTS, order)  # it must outlive the backward pass
        loss_of(ddp(batch(rank))).backward()
        assert_close(gradients(model), expected)


def weights_in_small_buckets(rank: int, world: int) -> None:
    model = Buckets()
    expected = global_gradients(model, WEIGHTS, [batch(r, inputs=512) for r in range(world)])
    ddp = wrapped(model, WEIGHTS, "outer", bucket_cap_mb=1)
    loss_of(ddp(batch(rank, inputs=512))).backward()
    assert_close(gradients(model), expected)


def rows_with_accumulation(rank: int, world: int) -> None:
    _same_as_by_hand(Net(), rank, world, ROWS, micro=3)


def rows_of_both_orders(rank: int, world: int) -> None:
    _same_as_by_hand(Net(), rank, world, ROWS, "outer")


def products_by_the_data(rank: int, world: int) -> None:
    for options in ({"method": "topk"}, {"method": "bernoulli", "sampling": "backward"}):
        torch.manual_seed(rank)
        state = torch.get_rng_state()
        model = Net()
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)
        alone = copy.deepcopy(model)
        torch.set_rng_state(state)
        ddp = wrapped(model, {"policy": "always", "ratio": 0.5} | options)  # it must outlive the backward pass
        loss_of(ddp(batch(rank))).backward()
        torch.set_rng_state(state)
        loss_of(compiled(alone, {"policy": "always", "ratio": 0.5} | options)(batch(rank))).backward()
        _average(alone, world)
        assert_close(gradients(model), gradients(alone))


def static_graph(rank: int, world: int) -> None:
    _same_as_by_hand(Net(), rank, world, ROWS, static_graph=True)


def unused_parameters(rank: int, world: int) -> None:
    _same_as_by_hand(Unused(), rank, world, ROWS, find_unused_parameters=True)


def checkpointing(rank: int, world: int) -> None:
    _same_as_by_hand(Net(checkpointed=True), rank, world, WEIGHTS)


def autocast(rank: int, world: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _same_as_by_hand(Net(), rank, world, WEIGHTS, bound=1e-3)


def schedule(rank: int, world: int) -> None:
    options = {"policy": "always", "method": "exact", "rules": [{"layers": "*", "steps": "1::2", "method": "topk_weights", "ratio": 0.25}]}
    _same_as_by_hand(Net(), rank, world, options, steps=4)


def smaller_last_batch(rank: int, world: int) -> None:
    _same_as_by_hand(Net(), rank, world, ROWS, steps=4, rows=lambda step: 20 if step == 2 and rank == 1 else 32)


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Let rows count as worth it in small models."""
    row_cost.ANY_SIZE = True
    try:
        yield
    finally:
        row_cost.ANY_SIZE = False


def _uneven(rank: int, step: int, rows: int, inputs: int) -> Tensor:
    """On rank 0 few samples matter, on the others all do alike."""
    x = batch(rank, step, rows, inputs)
    return x * (torch.arange(rows) < 4)[:, None] if rank == 0 else x


def _sparse_loss(ddp: Any, optimizer: Any, rank: int, step: int) -> None:
    x = _uneven(rank, step, 32, 64)
    (ddp(x).square().sum(1) * x.abs().amax(1)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


ADAPTIVE: dict[str, Any] = {"policy": "adaptive", "adaptive": {"tau": 0.5}}


def adaptive_rows(rank: int, world: int) -> None:
    """100 steps: the shares of the ranks differ, the weights do not."""
    with _any_size():
        for order in ("inner", "outer"):
            model = Net()
            whole = copy.deepcopy(model)
            ddp = wrapped(model, ADAPTIVE, order)
            loss_of(ddp(batch(rank))).backward()
            loss_of(whole(torch.cat([batch(r) for r in range(world)]))).backward()
            assert_close(gradients(model), gradients(whole))  # all rows, before anything is known
            model.zero_grad()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            for step in range(100):
                _sparse_loss(ddp, optimizer, rank, step)
            assert_equal_on_ranks(model)
            (control,) = approx_compile.controls(model).values()
            ratios: list[Any] = [None] * world
            dist.all_gather_object(ratios, control.ratio)
            assert ratios[0] < ratios[1], ratios


def resume(rank: int, world: int) -> None:
    """With every rank's state the run goes on bit for bit; with that of rank 0 everywhere the ranks stay equal."""
    with _any_size():
        model = Net()
        ddp, optimizer = wrapped(model, ADAPTIVE), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(30):
            _sparse_loss(ddp, optimizer, rank, step)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), approx_compile.state_dict(model)))
        for step in range(30, 36):
            _sparse_loss(ddp, optimizer, rank, step)
        for first_only in (False, True):
            state = [saved]
            if first_only:
                dist.broadcast_object_list(state, 0)
            again = Net()
            again.load_state_dict(state[0][0])
            approx_compile.load_state_dict(again, state[0][2])
            ddp, optimizer = wrapped(again, ADAPTIVE), torch.optim.SGD(again.parameters(), lr=0.01, momentum=0.9)
            optimizer.load_state_dict(state[0][1])
            for step in range(30, 36):
                _sparse_loss(ddp, optimizer, rank, step)
            assert_equal_on_ranks(again)
            if not first_only:
                assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def agreement(rank: int, world: int) -> None:
    """With pooled shares all ranks keep the same, fewer than the one that needs all rows by itself; also when one runs out of data."""
    with _any_size():
        model = Net()
        options = ADAPTIVE | {"adaptive": {"tau": 0.5, "agree": True}}
        ddp, optimizer = wrapped(model, options), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        register(ddp)
        for step in range(100):
            _sparse_loss(ddp, optimizer, rank, step)
        (control,) = approx_compile.controls(model).values()
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, (list(control.changes), control.measured))
        assert shares[0] == shares[1] and control.ratio < 1, shares
        with ddp.join():
            for step in range(100, 106 + 5 * rank):
                _sparse_loss(ddp, optimizer, rank, step)
        assert_equal_on_ranks(model)


def agreement_of_outputs(rank: int, world: int) -> None:
    model = Net()
    options = {"policy": "adaptive", "rules": [{"layers": "*", "output": "topk"}], "adaptive": {"error": 2.0, "outputs": [0.25, 0.5, 1.0], "every": 4}}
    ddp = wrapped(model, options)
    register(ddp)
    train(ddp, model.parameters(), rank, 24)
    outputs = [c for c in approx_compile.controls(model).values() if isinstance(c, OutputControl)]
    changes: list[Any] = [None] * world
    dist.all_gather_object(changes, [(list(c.changes), c.measured) for c in outputs])
    assert changes[0] == changes[1] and outputs and len(outputs[0].changes) > 1, changes
    assert_equal_on_ranks(model)


def uneven_inputs(rank: int, world: int) -> None:
    with _any_size():
        model = Net()
        ddp, optimizer = wrapped(model, ADAPTIVE), torch.optim.SGD(model.parameters(), lr=0.01)
        with ddp.join():
            for step in range(6 + 5 * rank):
                _sparse_loss(ddp, optimizer, rank, step)
        assert_equal_on_ranks(model)


class Block(nn.Module):
    """A module that Dynamo compiles by itself, which it does not do for layers of `torch.nn` with hooks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def blocks_of_fsdp(rank: int, world: int) -> None:
    """Blocks that FSDP2 shards: sampled products by rule, and a schedule that follows the optimizer or the user."""
    options = {"policy": "always", "method": "exact", "rules": [{"layers": "*", "steps": "1::2", "method": "topk_weights", "ratio": 0.5}]}
    model = nn.Sequential(Block(64, 128), Block(128, 128), Block(128, 10))
    alone = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (world,))
    for block in model:
        fully_shard(block, mesh=mesh)
        block.compile(backend=backend(options))
    fully_shard(model, mesh=mesh)
    blocks = [compiled(block, options) for block in alone]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
    for step in (0, 1, 2, 7):
        if step == 7:
            for m in (model, alone):
                approx_compile.set_step(m, step)
        loss_of(model(batch(rank))).backward()
        out = torch.cat([batch(r) for r in range(world)])
        for block in blocks:
            out = block(out)
        loss_of(out).backward()
        got = [p.grad.full_tensor() for p in model.parameters()]
        assert_close(got, gradients(alone))
        zero = float((got[0] == 0).float().mean())
        assert (zero > 0.4) == (step % 2 == 1), (step, zero)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def states_of_fsdp(rank: int, world: int) -> None:
    """Models that FSDP and FSDP2 shard name their state as the bare model does, which takes it up."""

    def sharded(model: nn.Module, version: int) -> nn.Module:
        if version == 1:
            return FullyShardedDataParallel(compiled(model, ADAPTIVE), device_id=torch.device("cpu"), use_orig_params=True)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (world,)))
        model.compile(backend=backend(ADAPTIVE))
        return model

    names = [n for n, _ in Net().named_parameters()]
    for version in (1, 2):
        torch._dynamo.reset()
        model = sharded(Net(), version)
        train(model, model.parameters(), rank, 3)
        saved = approx_compile.state_dict(model)
        assert [(group["step"], sorted(group["parameters"])) for group in saved["clocks"]] == [(3, sorted(names))], saved
        assert all(n in ("", *names) for n in saved["controls"]), saved
        bare = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("error", approx_compile.ApproxWarning)
            approx_compile.load_state_dict(bare, saved)
        assert approx_compile.state_dict(bare) == saved


def rows_of_fsdp(rank: int, world: int) -> None:
    """Blocks that FSDP2 shards, each compiled by itself, run on one choice of rows."""
    model = nn.Sequential(Block(64, 128), Block(128, 128), Block(128, 10))
    alone = copy.deepcopy(model)
    mesh = dist.init_device_mesh("cpu", (world,))
    for block in model:
        fully_shard(block, mesh=mesh)
        block.compile(backend=backend(ROWS))
    fully_shard(model, mesh=mesh)
    out = batch(rank)
    loss_of(model(out)).backward()
    for block in alone:
        out = compiled(block, ROWS)(out)
    loss_of(out).backward()
    _average(alone, world)
    got = [p.grad.full_tensor() for p in model.parameters()]
    assert_close(got, gradients(alone))
    alone.zero_grad()
    loss_of(alone(torch.cat([batch(r) for r in range(world)]))).backward()
    with pytest.raises(AssertionError):
        assert_close(got, gradients(alone), 0.1)  # the rows left out are missing


def bare_sequential_in_compiled_ddp(rank: int, world: int) -> None:
    ddp = wrapped(small(), WEIGHTS, "outer")
    with pytest.warns(ApproxWarning, match="compiles nothing of DDP around a bare nn.Sequential; compile inside") as said:
        train(ddp, ddp.parameters(), rank, 4)
        train(ddp, ddp.parameters(), rank, 4)
    assert len([w for w in said if "compiles nothing" in str(w.message)]) == 1


def killed_rank_of_the_reduced_all_reduce(rank: int, world: int) -> None:
    killed_rank(rank, world, WEIGHTS, reduced=True)


def killed_rank(rank: int, world: int, options: dict[str, Any] = ROWS, reduced: bool = False) -> None:
    model = Net()
    ddp = wrapped(model, options)
    if reduced:
        register(ddp)
    train(ddp, model.parameters(), rank, 1)
    if rank == 1:
        os._exit(3)
    try:
        train(ddp, model.parameters(), rank, 2)
    except RuntimeError as e:
        assert "onnection" in str(e) or "imed out" in str(e), e
        return
    raise AssertionError("no error")


IN_MAKE_TEST = ("weights_against_the_global_batch", "rows_with_accumulation", "adaptive_rows", "agreement", "resume", "smaller_last_batch")
OTHERS = (
    "weights_in_small_buckets rows_of_both_orders products_by_the_data static_graph unused_parameters checkpointing autocast schedule uneven_inputs "
    "agreement_of_outputs blocks_of_fsdp states_of_fsdp rows_of_fsdp bare_sequential_in_compiled_ddp"
).split()
