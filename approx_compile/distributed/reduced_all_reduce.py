"""A communication hook of DDP that exchanges only the slices of the gradients which the ranks have computed.

Where a layer is sampled with `topk_weights`, its choice depends on the weights alone, which are the same on all ranks. All ranks compute the same slices of the
gradients, the rest is zero, and the all-reduce need not send it (Adelman et al. 2021, section 7).

Each bucket takes one collective, issued in the hook's call, so that the order of collectives is the same on all ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from approx_compile import _torch
from approx_compile.backend.runtime.choice_recorder import listen
from approx_compile.distributed import packing
from approx_compile.distributed.gradient_slices import GradientSlices, KeptSlices
from approx_compile.distributed.plan_agreement import check_agreement, share_profile
from approx_compile.rows.agreement import VariancePool, pool_for
from approx_compile.rows.controller import OBSERVE_EVERY, DeferredScalar
from approx_compile.utils import log_once, warn_once

Bucket = Any
"""`torch.distributed.GradBucket`, of which torch shows no types."""

Hook = Callable[[Any, Bucket], torch.futures.Future[Tensor]]


@dataclass(eq=False)
class _Bucket:
    """What is kept of one bucket from step to step."""

    verify: dict[Any, int] = field(default_factory=dict)
    """How many more exchanges of each layout are compared with the full all-reduce."""
    conflict: DeferredScalar | None = None
    names: tuple[str, ...] = ()


class ReducedAllReduce:
    """The state of the hook that `register` has installed.

    Attributes:
        bytes_sent: The bytes that this rank has passed to the all-reduce so far, those of checks (`verify`) left out.
        bytes_whole: The bytes that a full all-reduce would have got.
        exchanges: How often the gradients have been exchanged.
        whole: The parameters whose gradients went whole at the last exchange, by name.
    """

    def __init__(self, ddp: DistributedDataParallel, verify: int) -> None:
        """Listen for the parameters of a model. Use `register`."""
        self.bytes_sent = self.bytes_whole = self.exchanges = 0
        self.whole: tuple[str, ...] = ()
        self._names = WeakIdKeyDictionary()
        for name, p in ddp.module.named_parameters():
            self._names[p] = ".".join(part for part in name.split(".") if part != "_orig_mod")
        self._slices = GradientSlices(self._names)  # type: ignore[arg-type]
        for p in self._names:
            listen(p, self._slices)
        self._ddp = weakref.ref(ddp)
        self._group = ddp.process_group
        self._verify = verify
        self._buckets: dict[int, _Bucket] = {}
        self._active = self._group.size()
        """How many ranks have data in this exchange."""
        self._whole_now: list[str] = []
        self._compared = False
        self._pool = VariancePool()
        pool_for([*ddp.module.modules(), *ddp.module.parameters()], self._pool)

    def hook(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """Exchange one bucket: the hook that DDP calls."""
        known = self._buckets.setdefault(bucket.index(), _Bucket())
        self._raise_on_conflict(known)
        ddp = self._ddp()
        assert ddp is not None
        if not self._compared:
            self._compared = True
            check_agreement(ddp, self._group)
        gradients, buffer = bucket.gradients(), bucket.buffer()
        if bucket.index() == 0:
            self._active = self._ranks_with_data(ddp, buffer.device)
        ranks = self._active if _torch.divides_by_ranks_with_data(ddp) else self._group.size()
        kept = self._kept(bucket.parameters(), gradients)
        named = [(n, k) for n, k in zip(bucket.parameters(), kept, strict=True) if k is not None]
        self._count(bucket, kept)
        if not named:
            future = _all_reduce(buffer.div_(ranks), self._group)
            self._end(bucket, 0)
            return future
        layout = tuple((tuple(g.shape), None if k is None else tuple((a.dim, a.kept) for a in k.axes)) for g, k in zip(gradients, kept, strict=True))
        compared = known.verify.setdefault(layout, self._verify)
        whole: torch.futures.Future[Tensor] | None = None
        if compared > 0:
            known.verify[layout] = compared - 1
            whole = _all_reduce(buffer / ranks, self._group)
        segments = packing.lay_out(gradients, kept)
        flat = packing.pack(gradients, segments, packing.checksums_of([k for _, k in named], buffer.dtype)).div_(ranks)
        known.names = tuple(self._names.get(p, "?") for p, _ in named)

        def put_back(future: torch.futures.Future[Any]) -> Any:
            values = future.value()
            got, full = (values[0].value(), values[1].value()) if whole is not None else (values, None)
            got = got[0] if isinstance(got, list) else got
            packing.unpack(got, gradients, segments)
            self._check(known, got[segments[-1].start + segments[-1].size :].view(len(named), 2, packing.BITS))
            if full is not None:
                _compare(buffer, full[0] if isinstance(full, list) else full, known.names)
            return buffer

        self._end(bucket, flat.numel() * flat.element_size())
        work = _all_reduce(flat, self._group)
        return torch.futures.collect_all([work, whole]).then(put_back) if whole is not None else work.then(put_back)  # type: ignore[arg-type,return-value]

    def _ranks_with_data(self, ddp: DistributedDataParallel, device: torch.device) -> int:
        """Count the ranks that have run a backward pass for this exchange. The others are out of data (`join`): they know of no slices."""
        if not _torch.may_run_out_of_data(ddp):
            return self._group.size()
        count = torch.tensor([float(self._slices.is_backward)], device=device)
        dist.all_reduce(count, group=self._group)
        return int(count.item())

    def _kept(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[KeptSlices | None]:
        """The slices of each gradient of a bucket that are to be sent. All gradients go whole once a rank has no more data."""
        everywhere = self._active == self._group.size()
        kept = [self._slices.of(p) if everywhere and p.is_contiguous() and g.is_contiguous() else None for p, g in zip(parameters, gradients, strict=True)]
        self._whole_now += [self._names.get(p, "?") for p, k in zip(parameters, kept, strict=True) if k is None]
        return kept

    def _count(self, bucket: Bucket, kept: Sequence[KeptSlices | None]) -> None:
        buffer = bucket.buffer()
        self.bytes_whole += buffer.numel() * buffer.element_size()
        if all(k is None for k in kept):
            self.bytes_sent += buffer.numel() * buffer.element_size()

    def _end(self, bucket: Bucket, sent: int) -> None:
        """Count what was sent; after the last bucket of an exchange forget the indices."""
        self.bytes_sent += sent
        if not bucket.is_last():
            return
        if self.exchanges % OBSERVE_EVERY == 0:
            self._pool_numbers(bucket.buffer().device)
        self.exchanges += 1
        self.whole, self._whole_now = tuple(self._whole_now), []
        if self.exchanges == 1 and self._slices.is_backward:
            self._tell()
        self._slices.clear()

    def _pool_numbers(self, device: torch.device) -> None:
        """Sum up what the adaptive controls of all ranks have measured. The sums are read when the next step starts."""
        numbers = self._pool.local(device)
        work = dist.all_reduce(numbers, group=self._group, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            work.wait()
            return numbers

        self._pool.deliver(wait)

    def _tell(self) -> None:
        """Say once what is sent."""
        share = self.bytes_sent / self.bytes_whole if self.bytes_whole else 1.0
        by_data = "".join(f"; {name}: {method} chooses by the data" for name, method in list(self._slices.by_data.items())[:5])
        whole = f", whole: {', '.join(self.whole[:5])}{', ...' if len(self.whole) > 5 else ''}" if self.whole else ""
        log_once(f"approx: the all-reduce sends {share:.0%} of the gradients' bytes{whole}{by_data}", self._ddp())

    def _check(self, known: _Bucket, sums: Tensor) -> None:
        """Compare the index sets of the ranks by their checksums: at once on CPUs, elsewhere at the next exchange, so that the host need not wait."""
        known.conflict = DeferredScalar()
        known.conflict.put(packing.disagreement(sums))
        if sums.device.type == "cpu":
            self._raise_on_conflict(known)

    def _raise_on_conflict(self, known: _Bucket) -> None:
        differs = known.conflict.take() if known.conflict is not None else None
        if differs is not None and bool(differs.any()):
            names = ", ".join(n for n, d in zip(known.names, differs.tolist(), strict=True) if d)
            raise RuntimeError(
                f"approx_compile.distributed: the ranks have chosen different channels for {names}: their weights are no longer equal, and gradients "
                "were not averaged correctly. Resume all ranks from one checkpoint; register(..., verify=10) compares with the full all-reduce"
            )


def _all_reduce(flat: Tensor, group: Any) -> torch.futures.Future[Any]:
    work = dist.all_reduce(flat, group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda f: f.value()[0] if isinstance(f.value(), list) else f.value())  # type: ignore[no-any-return]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The greatest relative difference that `verify` accepts, by dtype; 2e-2 for others."""


def _compare(buffer: Tensor, full: Tensor, names: Sequence[str]) -> None:
    """Compare a bucket with the result of the full all-reduce."""
    size = full.double().norm()
    difference = (buffer.double() - full.double()).norm()
    if bool(difference > TOLERANCE.get(full.dtype, 2e-2) * size + 1e-30):
        raise RuntimeError(
            f"approx_compile.distributed: gradients exchanged in slices differ from those of the full all-reduce by {float(difference / size):.2g} of "
            f"their norm, in a bucket with {', '.join(names)}. This is a defect: please report it with the model, and train without register(...)"
        )


def register(ddp: nn.Module, *, wrapper: Callable[[Hook], Hook] | None = None, verify: int = 0) -> ReducedAllReduce:
    """Have DDP exchange only the slices of the gradients that the ranks compute.

    The machine profile of rank 0 holds on all ranks from then on, so that predicted times lead to the same plans; all ranks must call this function.

    Slices are known where layers are sampled with `topk_weights`, whose choice is the same on all ranks. All other gradients are exchanged whole; so are those
    of a parameter that several layers use, or that gets a gradient from outside the compiled model. What arrives in the gradients is what the full
    all-reduce gives: bit for bit with two ranks.

    Args:
        ddp: The model, wrapped in `DistributedDataParallel`, compiled or not.
        wrapper: Wraps the hook, for example torch's `fp16_compress_wrapper`, so that what is sent is compressed as well.
        verify: In how many exchanges the full all-reduce runs, too, and the results are compared: at the beginning, and again when a schedule or another
            change of the settings has other slices sent for the first time.

    Returns:
        The state of the hook, which counts the bytes.

    Raises:
        TypeError: If `ddp` is not a DDP model.
        ValueError: If `verify` is not an integer of 0 or more.
        RuntimeError: From the first backward pass, on every rank, if the ranks' settings or plans differ; from a later one, if they have chosen different
            channels; and by torch, if the model has a hook already.

    Example:
        >>> import approx_compile.distributed
        >>> approx_compile.distributed.register("model")
        Traceback (most recent call last):
        TypeError: register: got str; a model in torch.nn.parallel.DistributedDataParallel is expected
    """
    model = _torch.uncompiled(ddp)
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"register: got {type(model).__name__}; a model in torch.nn.parallel.DistributedDataParallel is expected")
    if isinstance(verify, bool) or not isinstance(verify, int) or verify < 0:
        raise ValueError(f"register: got verify={verify!r}; the number of exchanges to compare with the full all-reduce is expected, 0 or more")
    if model is not ddp and type(model.module).__module__.startswith("torch.nn.") and _torch.uncompiled(model.module) is model.module:
        kind = type(model.module).__name__
        warn_once(
            f"approx: Dynamo compiles nothing of DDP around a bare nn.{kind}, with any backend: nothing is approximated, and all gradients are exchanged "
            "whole. Compile inside: DDP(torch.compile(model))"
        )
    state = ReducedAllReduce(model, verify)
    share_profile(next(model.parameters()).device.type, model.process_group)
    hook: Hook = lambda hook_state, bucket: state.hook(bucket)  # noqa: E731 (DDP accepts no annotations but its own)
    model.register_comm_hook(state, wrapper(hook) if wrapper is not None else hook)
    return state
