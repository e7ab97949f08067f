"""What the keys that hold for a site ask of its products and of the backward pass: one request per product. Whether the site can honour it is
`passes.plan`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from approx_compile.config.rules import RuleKeys
from approx_compile.config.schema import PRODUCTS, REPLACEMENTS, GradTable, ProductTable

LEAST_ROWS = 2
"""`min_k` of row sampling, if its table has none. (Compiled code takes one row for another case than many.)"""


@dataclass(frozen=True)
class ProductSettings:
    """What is asked of one product of one site. `method` "coupled" = through the entries that the output kept; `whole`: k is rounded up to its
    multiples; `lowering`: which code runs it. `j`, `scale`, `tile`, `std`: of a replacement."""

    method: str
    ratio: float
    min_k: int
    group: int | Literal["auto"]
    whole: int = 1
    lowering: str = "auto"
    j: int = 1
    scale: float = 1.0
    std: float | None = None
    tile: int | float | Literal["auto"] | None = None

    @property
    def replaces(self) -> bool:
        return any(self.method in methods for methods in REPLACEMENTS.values())


@dataclass(frozen=True)
class RowSettings:
    """What is asked of the backward pass from a site down: which rows go on. `ratio` None: as many as the measured variance asks for."""

    method: str
    ratio: float | None
    min_k: int
    approximate_batch_norm: bool


@dataclass(frozen=True)
class SiteSettings:
    """What is asked of one site. `named` = a rule matched it (which lifts the default policy's modesty); `share`: whether its output is sampled
    at the entries that other sites keep of the same activation (None: where that is predicted to pay)."""

    output: ProductSettings
    grad_input: ProductSettings
    grad_weight: ProductSettings
    policy: str
    named: bool
    rows: RowSettings | None = None
    share: bool | None = None

    def of(self, product: str) -> ProductSettings:
        """By a product's name (a second grad_input is asked for what the first is)."""
        return {"output": self.output, "grad_weight": self.grad_weight}.get(product, self.grad_input)


def set_keys(rules: RuleKeys) -> dict[str, Any]:
    names = RuleKeys.model_fields
    return {k: getattr(rules, k) for k in names if getattr(rules, k) is not None}


def merge_rule(keys: Mapping[str, Any], rule: RuleKeys) -> dict[str, Any]:
    """The keys with a rule's over them. `method: exact` takes back what tables ask for, not what they leave exact; rows that are made exact stay a matter of
    rows, so that the forward pass remains exact."""
    below, above = dict(keys), set_keys(rule)
    if above.get("method") == "exact":
        for key in (*PRODUCTS, "grad"):
            if (table := below.get(key)) is not None and (table.samples or table.replaces):
                del below[key]
    if _on_rows(below) and (above.get("method") == "exact" or ("grad" in above and above["grad"].method == "exact")):
        above["grad"] = GradTable(axis="rows", method="exact")
    return below | above


def interpret(keys: dict[str, Any], named: bool) -> SiteSettings:
    """Merged keys -> one request per product: a product's key beats `grad`, which beats `sampling`."""
    base = ProductSettings(keys["method"], keys["ratio"], keys["min_k"], keys["group"], lowering=keys["lowering"])
    exact = replace(base, method="exact")
    on_rows = _on_rows(keys)
    by_sampling = {
        "forward": (base, replace(base, method="coupled")),
        "backward": (exact, base),
        "blackbox": (base, exact),
    }
    # rows, all of them too, are those of the backward pass of an exact forward pass, unless an output is set by itself
    output, grad = (exact, exact) if base.method == "exact" or on_rows or keys["policy"] == "adaptive" else by_sampling[keys["sampling"]]

    def with_table(start: ProductSettings, *tables: ProductTable | None) -> ProductSettings:
        given: dict[str, Any] = {}
        for table in tables:
            if table is not None:
                given |= {k: v for k, v in table.model_dump(exclude={"axis", "batch_norm"}).items() if v is not None}
        if not given or (start.method == "exact" and not given.keys() & {"method", "ratio"}):  # how to sample, where nothing is sampled
            return start
        return replace(base, **given)

    both = keys.get("grad") if not on_rows else None
    output = with_table(output, keys.get("output"))
    if keys["policy"] == "adaptive" and output.method != "exact":  # a rule allows it: then as everywhere else
        grad = by_sampling[keys["sampling"]][1]
    grads = [with_table(grad, both, keys.get(name)) for name in ("grad_input", "grad_weight")]
    if output.method == "exact":  # nothing to couple to
        grads = [replace(g, method="exact") if g.method == "coupled" else g for g in grads]
    return SiteSettings(output, grads[0], grads[1], keys["policy"], named, row_settings(keys), keys.get("share"))


def _on_rows(keys: Mapping[str, Any]) -> bool:
    return "grad" in keys and keys["grad"].axis == "rows"


def row_settings(keys: dict[str, Any]) -> RowSettings | None:
    table: GradTable | None = keys.get("grad")
    adaptive = keys["policy"] == "adaptive"
    if keys["method"] == "exact" or not (table.axis == "rows" if table is not None else adaptive):
        return None
    method = (table.method if table is not None else None) or "bernoulli"
    ratio = (table.ratio if table is not None else None) or (None if adaptive else keys["ratio"])
    if method == "exact" or ratio == 1:
        return None
    min_k = (table.min_k if table is not None else None) or LEAST_ROWS
    return RowSettings(method, ratio, min_k, table is not None and table.batch_norm == "approximate")


def chooses_output_ratio(keys: Mapping[str, Any]) -> bool:
    """Whether a site's output is to be sampled at a ratio that nobody says."""
    output = keys.get("output")
    return keys["policy"] == "adaptive" and output is not None and output.samples and output.ratio is None


def samples_products(keys: Mapping[str, Any]) -> bool:
    """Whether products are sampled where these keys hold, so that keys that say how have an effect."""
    return keys["policy"] != "adaptive" or any(keys[k].samples for k in (*PRODUCTS, "grad") if k in keys)
