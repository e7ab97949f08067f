"""Weak references to the memory that holds a tensor."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef as StorageRef

__all__ = ["StorageRef", "storage_ref"]


def storage_ref(x: torch.Tensor) -> StorageRef:
    """Return a weak reference to a tensor's memory. Those of a tensor and of its views are equal; none equals that of memory which has been freed since."""
    return StorageRef(x.untyped_storage())
