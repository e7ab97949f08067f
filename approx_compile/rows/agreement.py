"""Have the ranks of a data-parallel training agree on adaptive shares, by pooling what each has measured.

Every rank looks at its own samples only. Summed over the ranks, the variance that each share would add and the gradients' sum of squares are those of the
whole batch, so all ranks come to the share that one process with all samples would use: no rank sets the pace, and the adaptive state of one rank is that of
all. (The largest share over the ranks would leave nothing where one rank needs all rows.)

The numbers travel at the end of the exchange of the gradients, and are read one step later. Who exchanges gradients (`approx_compile.distributed`) takes
`VariancePool.local` to the other ranks and gives the sums back by `VariancePool.deliver`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

SLOTS, WIDTH = 64, 32
"""The most controls of a model whose numbers are pooled, and the most numbers of each. The size, 16 KiB, is fixed so that a rank without data sends the
same."""


class PooledControl(Protocol):
    """A control that decides by pooled numbers."""

    def take_pooled(self, sums: Tensor) -> None:
        """Take up the sums over the ranks of the numbers that the controls of all ranks have put."""
        ...


class VariancePool:
    """The numbers that the controls of one model on this rank have measured since the ranks last pooled theirs."""

    def __init__(self) -> None:
        self._controls: list[PooledControl] = []
        self._numbers: dict[int, Tensor] = {}
        self._pending: tuple[Callable[[], Tensor], list[PooledControl]] | None = None

    def put(self, control: PooledControl, numbers: Tensor) -> bool:
        """Store what a control has measured.

        Args:
            control: The control.
            numbers: At most `WIDTH` numbers (n,), which are summed over the ranks.

        Returns:
            False if the pool has no room for them; the rank then decides by itself.
        """
        if control not in self._controls:
            self._controls.append(control)
        slot = self._controls.index(control)
        if slot >= SLOTS or numbers.numel() > WIDTH:
            return False
        self._numbers[slot] = numbers
        return True

    def local(self, device: torch.device) -> Tensor:
        """Return the numbers of this rank (SLOTS, WIDTH), fp64, zeros where nothing was measured, and forget them."""
        local = torch.zeros(SLOTS, WIDTH, dtype=torch.float64, device=device)
        for slot, numbers in self._numbers.items():
            local[slot, : numbers.numel()] = numbers
        self._numbers.clear()
        return local

    def deliver(self, wait: Callable[[], Tensor]) -> None:
        """Take up the sums over the ranks.

        Args:
            wait: Returns the sums (SLOTS, WIDTH) once they are there. It is called when a control starts its next step.
        """
        self.collect()
        self._pending = (wait, list(self._controls))

    def collect(self) -> None:
        """Give the controls the sums that have been delivered, if any."""
        if self._pending is None:
            return
        (wait, controls), self._pending = self._pending, None
        for control, sums in zip(controls, wait(), strict=False):
            control.take_pooled(sums)


_pools = WeakIdKeyDictionary()
"""The pool of each parameter and module of a model whose ranks pool their numbers."""


def pool_for(owners: Iterable[nn.Parameter | nn.Module], pool: VariancePool) -> None:
    """Have the controls of a model pool their numbers.

    Args:
        owners: The parameters and modules of the model.
        pool: The pool.
    """
    for owner in owners:
        _pools[owner] = pool


def pool_of(owner: nn.Parameter | nn.Module) -> VariancePool | None:
    """Return the pool of a parameter or module, None without one."""
    pool: VariancePool | None = _pools.get(owner)
    return pool
