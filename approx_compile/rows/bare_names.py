"""Name the modules and parameters of a model as the bare model does, whatever wraps it: compilation, data parallelism, sharding, Fabric, Lightning, adapters.

A wrapper is a module that holds the user's module as a child and adds no computation with parameters of its own. Its child has the wrapper's own name here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import nn

from approx_compile import _torch

Owner = nn.Parameter | nn.Module

_WRAPPERS: dict[str, tuple[str, ...]] = {
    "OptimizedModule": ("_orig_mod",),
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "CheckpointWrapper": ("_checkpoint_wrapped_module",),
    "_FabricModule": ("_forward_module", "_original_module"),
    "PeftModel": ("base_model",),
    "BaseTuner": ("model",),
    "BaseTunerLayer": ("base_layer",),
}
"""The attributes that hold what a wrapper wraps, by the name of the wrapper's class or of one of its bases."""

_LIGHTNING = "LightningModule"
"""A module of this class is a wrapper if only one of its children has parameters and it has none itself."""


def wrapped_children(module: nn.Module) -> tuple[str, ...]:
    """Find the children that a wrapper wraps.

    Args:
        module: A module.

    Returns:
        The names of the children; none if the module is no wrapper.
    """
    classes = [c.__name__ for c in type(module).__mro__]
    found = [a for c in classes for a in _WRAPPERS.get(c, ()) if isinstance(module._modules.get(a), nn.Module)]
    if not found and _LIGHTNING in classes and not module._parameters:
        with_parameters = [n for n, child in module._modules.items() if child is not None and next(child.parameters(), None) is not None]
        return tuple(with_parameters) if len(with_parameters) == 1 else ()
    return tuple(found)


def named_owners(model: nn.Module) -> Iterator[tuple[str, Owner]]:
    """Yield every module and parameter of a model, once, with its name in the bare model.

    Args:
        model: The model, wrapped or not.

    Yields:
        The name and the module or parameter. A wrapper and what it wraps have the same name; the wrapper comes first. The parameters that FSDP2 gathers for
        a layer come with the name of the sharded parameter.
    """
    seen: set[int] = set()
    partners = _torch.gathered_parameters(model)

    def below(module: nn.Module, name: str) -> Iterator[tuple[str, Owner]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for short, registered in module._parameters.items():
            for p in (registered, partners.get(id(registered))):
                if p is not None and id(p) not in seen:
                    seen.add(id(p))
                    yield _joined(name, short), p
        wrapped = wrapped_children(module)
        for short, child in module._modules.items():
            if child is not None:
                yield from below(child, name if short in wrapped else _joined(name, short))

    return below(model, "")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by their names in the bare model, as the optimizer has them."""
    named: dict[str, nn.Parameter] = {}
    for name, p in named_owners(model):
        if isinstance(p, nn.Parameter):
            named.setdefault(name, p)
    return named


def fitted_names(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Fit names that were saved for one form of a model to another form, by taking away or adding one prefix.

    Args:
        names: The saved names.
        known: The names that the model has.

    Returns:
        For every saved name that fits, the model's own name.
    """

    def without(prefix: str) -> dict[str, str]:
        return {n: n[len(prefix) :] for n in names if n.startswith(prefix) and n[len(prefix) :] in known}

    def within(prefix: str) -> dict[str, str]:
        return {n: prefix + n for n in names if prefix + n in known}

    best = {n: n for n in names if n in known}
    for name in (n for n in names if n not in known):
        parts = name.split(".")
        taken = ["".join(f"{p}." for p in parts[:i]) for i in range(1, len(parts))]
        added = [m.removesuffix(name) for m in known if m.endswith(f".{name}")]
        best = max([best, *map(without, taken), *map(within, added)], key=len)
        if len(best) == len(names):
            break
    return best


def relative_names(names: Iterable[str]) -> list[str]:
    """Take away what all names begin with (whole parts between dots), so that they do not depend on where in a larger model they stand.

    Args:
        names: Names of modules.

    Returns:
        The different names in their order, without the common beginning.
    """
    parts = [n.split(".") if n else [] for n in dict.fromkeys(names)]
    common = 0
    while parts and all(len(p) > common and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]


def _joined(name: str, below: str) -> str:
    return f"{name}.{below}" if name else below
