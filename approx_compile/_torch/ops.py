"""What torch declares about operators: tags, schemas, and the ops of max pooling."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx


def is_random(n: fx.Node) -> bool:
    """Return whether a node draws random numbers."""
    tags = getattr(n.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "inductor_rand" in str(n.target)  # Inductor's random ops carry no tag


def is_pointwise(n: fx.Node) -> bool:
    """Return whether a node calls a pointwise op."""
    return torch.Tag.pointwise in getattr(n.target, "tags", ())


def writes_to_arguments(n: fx.Node) -> bool:
    """Return whether a node calls an op that writes to its arguments, or one whose effects have an order."""
    schema = getattr(n.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable) or "with_effects" in str(n.target)


def symbolic_scalar_arguments(n: fx.Node) -> list[fx.Node]:
    """List the symbolic numbers that an op takes as values.

    Args:
        n: A call of the op.

    Returns:
        The nodes of these numbers. Arguments that the op's schema declares as int are sizes and left out.
    """
    schema = getattr(n.target, "_schema", None)
    if schema is None:
        return []
    scalars = []
    for i, a in enumerate(schema.arguments):
        given = n.args[i] if i < len(n.args) else n.kwargs.get(a.name)
        if isinstance(given, fx.Node) and isinstance(given.meta.get("val"), (torch.SymInt, torch.SymFloat)) and "int" not in str(a.real_type):
            scalars.append(given)
    return scalars


@functools.cache
def max_pool_ops() -> tuple[frozenset[Any], Any]:
    """Return the ops of max pooling that also return where the maxima are.

    Returns:
        The ops, and the op of Inductor that converts offsets of its own pooling op to indices; None if this torch has no such op.
    """
    import torch._inductor.inductor_prims

    prims, aten = torch.ops.prims, torch.ops.aten
    low_memory, to_indices = (getattr(prims, n, None) for n in ("_low_memory_max_pool_with_offsets", "_low_memory_max_pool_offsets_to_indices"))
    ops = (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, low_memory)
    return frozenset(op.default for op in ops if op is not None), to_indices.default if to_indices is not None else None
