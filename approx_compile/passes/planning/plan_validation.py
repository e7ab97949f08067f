"""Check that a tuned plan fits a model: it has the modules that the plan names, and weights of the shapes that the plan was tuned with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from approx_compile.config import ConfigError
from approx_compile.config.plan_file import Tuned
from approx_compile.passes.fx_utils import CONV
from approx_compile.passes.sites.site import Site

SHOWN = 8
"""How many sites a message lists."""


def check_modules(tuned: Tuned, modules: Collection[str], model: str) -> None:
    """Check that a model has the modules that a plan names.

    Args:
        tuned: The plan.
        modules: Names of all modules of the model. A site of the root module is named after its op.
        model: Name of the model, for the message.

    Raises:
        ConfigError: Modules are missing.
    """
    bases = {s.name: s.name.split("#")[0] for s in tuned.sites}
    known = {s.op for s in tuned.sites} | set(modules)
    missing = [name for name, base in bases.items() if base not in known and "[" not in base]  # Dynamo spells odd names its own way
    if missing:
        raise ConfigError(
            f"plan: it was made for {tuned.model} with {len(tuned.sites)} sites and does not fit {model}, which lacks {_listed(missing)}. "
            "Tune this model anew (approx_compile.tune); for blocks compiled one by one call approx_compile.annotate(model) first"
        )


def check_shapes(tuned: Tuned, sites: Sequence[Site]) -> list[str]:
    """Check that the weights of a graph's sites have the shapes that a plan was tuned with.

    Args:
        tuned: The plan.
        sites: The sites of the graph.

    Returns:
        Remarks on what else differs: other input shapes, sites that the plan does not have.

    Raises:
        ConfigError: A weight has another shape.
    """
    known = {s.name: s for s in tuned.sites}
    shared = [(s, known[s.name]) for s in sites if s.name in known]
    wrong = [f"{s.name} is {s.shape}, in the plan {p.shape}" for s, p in shared if _weight(s, s.shape) != _weight(s, p.shape)]
    if wrong:
        raise ConfigError(f"plan: it was made for {tuned.model} with other weights: {_listed(wrong, '; ')}. Tune this model anew (approx_compile.tune)")
    remarks = []
    if other := [f"{s.name} is {s.shape}, in the plan {p.shape}" for s, p in shared if s.shape != p.shape]:
        remarks.append(f"the plan was tuned with other inputs ({_listed(other[:1])}): its times and errors may not hold")
    if new := [s.name for s in sites if s.name not in known]:
        remarks.append(f"the plan says nothing of {_listed(new)}")
    return remarks


def _weight(site: Site, shape: str) -> object:
    """The part of a site's shape that is the weight's; None for a product of two activations."""
    if site.node.target in CONV:
        return shape.partition(" * ")[2]
    weight = site.products[0].weight
    dims = shape.split("x")
    return dims[-2:] if weight == 1 else dims[-3:-1] if weight == 0 else None


def _listed(items: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(items[:SHOWN]) + more
