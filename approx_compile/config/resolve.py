"""Resolve the keys that hold for a site into settings: one request for each of its products, and one for the rows of the backward pass.

Whether a site can honour the request is decided in `passes.planning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from approx_compile.config.rules import RuleKeys
from approx_compile.config.schema import GradTable, ProductTable
from approx_compile.config.units import UnitsTable
from approx_compile.config.words import PRODUCTS, REPLACEMENTS, ROW_AXES, UNIT_METHODS

LEAST_ROWS = 2
"""The default of `min_k` for row sampling. It is 2 because compiled code treats a batch of one row as a case by itself."""


@dataclass(frozen=True)
class ProductSettings:
    """What is asked of one product of one site.

    Attributes:
        method: An estimator, "exact", a replacement, or "coupled": through the entries that the output kept.
        ratio: The share of the axis that is kept.
        min_k: The fewest entries to keep of an axis; axes that are not longer are exact.
        group: Contiguous entries that are kept or dropped together.
        whole: k is rounded up to a multiple of this.
        lowering: The code that runs the product.
        j: Of a replacement "max": the entries that count.
        scale: Of a replacement "max": the factor of its result.
        std: Of a replacement "random": the standard deviation.
        tile: Of a replacement "max": the side of the tiles with an entry each.
    """

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
        """Whether the product is replaced and not sampled."""
        return any(self.method in methods for methods in REPLACEMENTS.values())


@dataclass(frozen=True)
class RowSettings:
    """What is asked of the backward pass from a site down: which rows of the batch it keeps.

    Attributes:
        method: The method that chooses rows, one of `ROW_METHODS`.
        ratio: The share of the rows that is kept; None for as many as the measured variance asks for.
        min_k: The smallest number of rows.
        approximate_batch_norm: Whether batch norm may be differentiated from the kept rows alone.
        axis: "rows" for samples of the batch; "tokens" for the tokens of every region that keeps them apart, of which all the above is then said.
    """

    method: str
    ratio: float | None
    min_k: int
    approximate_batch_norm: bool
    axis: str = "rows"


@dataclass(frozen=True)
class UnitSettings:
    """What is asked of the units of a hidden layer.

    Attributes:
        method: How units are chosen, one of `UNIT_METHODS`.
        ratio: The share of the units that is computed.
        min_k: The fewest units to compute; a layer that has no more is exact.
        table: The keys of the methods.
    """

    method: str
    ratio: float
    min_k: int
    table: UnitsTable


@dataclass(frozen=True)
class SiteSettings:
    """What is asked of one site.

    Attributes:
        output: The request for the output.
        grad_input: The request for the gradient of the input.
        grad_weight: The request for the gradient of the weight.
        policy: The policy that decides whether requests are followed.
        named: Whether a rule that is about sampling matched the site, which lifts the exclusions of the default policy.
        rows: The request for rows of the batch; None for all rows.
        share: Whether the output is sampled at the entries that other sites keep of the same activation; None where that is predicted to pay.
        units: The request for the layer's units; None for all of them.
    """

    output: ProductSettings
    grad_input: ProductSettings
    grad_weight: ProductSettings
    policy: str
    named: bool
    rows: RowSettings | None = None
    share: bool | None = None
    units: UnitSettings | None = None

    def of(self, product: str) -> ProductSettings:
        """Return the request for a product by its name; a second grad_input has the request of the first."""
        return {"output": self.output, "grad_weight": self.grad_weight}.get(product, self.grad_input)


def set_keys(rules: RuleKeys) -> dict[str, Any]:
    """Return the keys that are set in a rule, or at the top of a config."""
    names = RuleKeys.model_fields
    return {k: getattr(rules, k) for k in names if getattr(rules, k) is not None}


def merge_rule(keys: Mapping[str, Any], rule: RuleKeys) -> dict[str, Any]:
    """Return keys with those of a rule merged over them.

    `method: exact` drops tables that ask for something, and keeps tables that leave something exact. Where rows are made exact, the table still says
    `axis: rows`, so that the forward pass remains exact.

    Args:
        keys: The merged keys so far.
        rule: The rule.

    Returns:
        The merged keys.
    """
    below, above = dict(keys), set_keys(rule)
    if above.get("method") == "exact":
        for key in (*PRODUCTS, "grad"):
            if (table := below.get(key)) is not None and (table.samples or table.replaces):
                del below[key]
    if _on_rows(below) and (above.get("method") == "exact" or ("grad" in above and above["grad"].method == "exact")):
        above["grad"] = GradTable(axis=below["grad"].axis, method="exact")
    return below | above


def interpret(keys: dict[str, Any], named: bool) -> SiteSettings:
    """Return what merged keys ask of a site; the key of a product beats `grad`, which beats `sampling`.

    Args:
        keys: The merged keys.
        named: Whether a rule that is about sampling matched the site.

    Returns:
        One request for each product, and one for the rows.
    """
    units = _unit_settings(keys)
    base = ProductSettings("exact" if units is not None else keys["method"], keys["ratio"], keys["min_k"], keys["group"], lowering=keys["lowering"])
    exact = replace(base, method="exact")
    on_rows = _on_rows(keys)
    by_sampling = {
        "forward": (base, replace(base, method="coupled")),
        "backward": (exact, base),
        "blackbox": (base, exact),
    }
    # Row sampling, even of all rows, means an exact forward pass, unless an output is set by itself.
    output, grad = (exact, exact) if base.method == "exact" or on_rows or keys["policy"] == "adaptive" else by_sampling[keys["sampling"]]

    def with_table(start: ProductSettings, *tables: ProductTable | None) -> ProductSettings:
        given: dict[str, Any] = {}
        for table in tables:
            if table is not None:
                given |= {k: v for k, v in table.model_dump(exclude={"axis", "batch_norm"}).items() if v is not None}
        if not given or (start.method == "exact" and not given.keys() & {"method", "ratio"}):  # other keys do not make an exact product sampled
            return start
        return replace(base, **given)

    both = keys.get("grad") if not on_rows else None
    output = with_table(output, keys.get("output"))
    if keys["policy"] == "adaptive" and output.method != "exact":  # a rule allows a sampled output: then its gradients follow `sampling`
        grad = by_sampling[keys["sampling"]][1]
    grads = [with_table(grad, both, keys.get(name)) for name in ("grad_input", "grad_weight")]
    if output.method == "exact":  # there is no selection to couple to
        grads = [replace(g, method="exact") if g.method == "coupled" else g for g in grads]
    return SiteSettings(output, grads[0], grads[1], keys["policy"], named, row_settings(keys), keys.get("share"), units)


def _unit_settings(keys: Mapping[str, Any]) -> UnitSettings | None:
    if keys["method"] not in UNIT_METHODS:
        return None
    return UnitSettings(keys["method"], keys["ratio"], keys["min_k"], keys.get("units") or UnitsTable())


def _on_rows(keys: Mapping[str, Any]) -> bool:
    return "grad" in keys and keys["grad"].axis in ROW_AXES


def row_settings(keys: dict[str, Any]) -> RowSettings | None:
    """Return what merged keys ask of the rows of the backward pass, None for all rows."""
    table: GradTable | None = keys.get("grad")
    adaptive = keys["policy"] == "adaptive"
    if keys["method"] == "exact" or not (table.axis in ROW_AXES if table is not None else adaptive):
        return None
    method = (table.method if table is not None else None) or "bernoulli"
    ratio = (table.ratio if table is not None else None) or (None if adaptive else keys["ratio"])
    if method == "exact" or ratio == 1:
        return None
    min_k = (table.min_k if table is not None else None) or LEAST_ROWS
    axis = (table.axis if table is not None else None) or "rows"
    return RowSettings(method, ratio, min_k, table is not None and table.batch_norm == "approximate", axis)


def chooses_output_ratio(keys: Mapping[str, Any]) -> bool:
    """Whether a site's output is sampled at a ratio that the "adaptive" policy chooses because no key gives one."""
    output = keys.get("output")
    return keys["policy"] == "adaptive" and output is not None and output.samples and output.ratio is None


def samples_products(keys: Mapping[str, Any]) -> bool:
    """Whether products are sampled where these keys hold, so that keys that say how to sample have an effect."""
    return keys["policy"] != "adaptive" or any(keys[k].samples for k in (*PRODUCTS, "grad") if k in keys)
