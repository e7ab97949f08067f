"""Does a tuned plan fit this model? The modules it names must be there, and the weights of its sites must have the shapes it was tuned with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from approx_compile.config import ConfigError
from approx_compile.config.plan_file import Tuned
from approx_compile.passes.fx_utils import CONV
from approx_compile.passes.sites.site import Site

SHOWN = 8
"""Sites that a message lists."""


def check_modules(tuned: Tuned, modules: Collection[str], model: str) -> None:
    """Raise ConfigError if the model lacks modules that the plan names. `modules`: names of all modules; a site of the root itself bears its op's name."""
    bases = {s.name: s.name.split("#")[0] for s in tuned.sites}
    known = {s.op for s in tuned.sites} | set(modules)
    missing = [name for name, base in bases.items() if base not in known and "[" not in base]  # Dynamo spells odd names its own way
    if missing:
        raise ConfigError(
            f"plan: it was made for {tuned.model} with {len(tuned.sites)} sites and does not fit {model}, which lacks {_listed(missing)}. "
            "Tune this model anew (approx_compile.tune); for blocks compiled one by one call approx_compile.annotate(model) first"
        )


def check_shapes(tuned: Tuned, sites: Sequence[Site]) -> list[str]:
    """Raise ConfigError where a site's weight has another shape than in the plan. Returns what else differs: other batches, sites that are new."""
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
    """The part of a shape that the batch does not change: nothing for a product of two activations."""
    if site.node.target in CONV:
        return shape.partition(" * ")[2]
    weight = site.products[0].weight
    dims = shape.split("x")
    return dims[-2:] if weight == 1 else dims[-3:-1] if weight == 0 else None


def _listed(items: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return between.join(items[:SHOWN]) + more
