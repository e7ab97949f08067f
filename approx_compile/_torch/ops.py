"""What torch declares about operators: tags, schemas, and the ops of max pooling."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx


def is_random(n: fx.Node) -> bool:
    tags = getattr(n.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "inductor_rand" in str(n.target)  # Inductor's own carry no tag


def is_pointwise(n: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(n.target, "tags", ())


def symbolic_scalar_arguments(n: fx.Node) -> list[fx.Node]:
    """The symbolic numbers that an op takes as a value; where its schema says int it takes them as a size."""
    schema = getattr(n.target, "_schema", None)
    if schema is None:
        return []
    found = []
    for i, a in enumerate(schema.arguments):
        given = n.args[i] if i < len(n.args) else n.kwargs.get(a.name)
        if isinstance(given, fx.Node) and isinstance(given.meta.get("val"), (torch.SymInt, torch.SymFloat)) and "int" not in str(a.real_type):
            found.append(given)
    return found


@functools.cache
def max_pool_ops() -> tuple[frozenset[Any], Any]:
    """The ops of max pooling that also say where, and Inductor's own that turns what its kind says into places; where that is gone, none is found."""
    import torch._inductor.inductor_prims

    prims, aten = torch.ops.prims, torch.ops.aten
    own, places = (getattr(prims, n, None) for n in ("_low_memory_max_pool_with_offsets", "_low_memory_max_pool_offsets_to_indices"))
    ops = (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, own)
    return frozenset(op.default for op in ops if op is not None), places.default if places is not None else None
