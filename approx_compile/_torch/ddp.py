"""DDP: ranks that run out of data (`join`)."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel


def may_run_out_of_data(ddp: DistributedDataParallel) -> bool:
    """Return whether DDP answers for ranks without data. It does from the first `with ddp.join()` on, which is the same step on all ranks."""
    return bool(ddp._join_config.enable)


def divides_by_ranks_with_data(ddp: DistributedDataParallel) -> bool:
    """Return whether gradients are divided by the number of ranks that still have data (`join(divide_by_initial_world_size=False)`), not by that of all."""
    return not getattr(ddp, "_divide_by_initial_world_size", True)
