"""Define the search space of `tune`: the sites that may be sampled, and the settings that sample some of them, in the form that a plan file holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.config.rules import Rule
from approx_compile.config.selectors import LayerPattern
from approx_compile.config.words import UNIT_METHODS
from approx_compile.passes.planning.plan import SitePlan
from approx_compile.passes.planning.rule_matching import match_rules
from approx_compile.reasons import Reason
from approx_compile.reasons.products import LAST_LAYER, RAW_DATA
from approx_compile.tools.tuning.trial import Trials

_DETERMINISTIC = ("topk", "topk_weights", "zero", "max", "exact")
_DEFAULTS: dict[str, Any] = {"min_k": 16, "group": "auto", "sampling": "forward"}


class SearchSpace:
    """The sites that may be sampled under the user's settings.

    Attributes:
        base: The user's settings.
        sites: All sites of the model, in execution order.
        sampled: Those of them that may be sampled, as planned at the lowest ratio.
        excluded: The reasons why the other sites may not be sampled, by their names.
    """

    def __init__(self, base: ApproxConfig) -> None:
        self.base = base
        self.sites: tuple[SitePlan, ...] = ()
        self.sampled: tuple[SitePlan, ...] = ()
        self.excluded: dict[str, Reason] = {}
        self._rules: dict[str, dict[str, Any]] = {}

    @staticmethod
    def of(config: ApproxConfig | Mapping[str, Any] | None) -> SearchSpace:
        """Make the search space of some settings; `survey` finds its sites.

        Args:
            config: The user's settings.

        Returns:
            The search space.

        Raises:
            ConfigError: If the settings leave nothing to tune, ask for sampled rows or for left out units, or change during the run.
        """
        if config is None or isinstance(config, Mapping):
            config = ApproxConfig(**{"policy": "cost", **(config or {})})
        if config.asks_for_rows() and config.policy != "adaptive":
            raise ConfigError("tune: config: grad with axis 'rows' is tried by itself (rows=True); leave it out")
        if any(r.timed for r in config.all_rules()):
            raise ConfigError("tune: config: a plan is tuned for all steps alike; leave steps, phase and total_steps out, and set them beside the plan")
        if config.method == "exact" and not config.rules:
            raise ConfigError("tune: config: method 'exact' leaves nothing to tune; name the method to sample with, such as 'topk'")
        for method in (config.method, *(r.method for r in config.rules)):
            if method in UNIT_METHODS:
                raise ConfigError(
                    f"tune: config: method {method!r} leaves out units, which changes what is trained, so that no error of the gradient can choose its ratio; "
                    "set it beside the plan, in rules of its own"
                )
        policy = config.policy if config.policy == "always" else "cost"
        return SearchSpace(config.model_copy(update={"policy": policy, "plan": None}))

    def survey(self, trials: Trials, ratio: float) -> None:
        """Find the sites, and decide by the settings, the rules and the shapes which of them may be sampled.

        Args:
            trials: Makes the plan of the model's step.
            ratio: The lowest ratio to be tried.
        """
        planned = trials.planned(self.base.model_copy(update={"policy": "always", "ratio": ratio}))
        default_exclusions: dict[str, Reason] = {}
        if self.base.policy != "always":
            everything = (*self.base.rules, Rule(layers=("site",)))
            planned_by_cost = trials.planned(self.base.model_copy(update={"rules": everything}))
            default_exclusions = {s.name: s.reason for s in planned_by_cost if s.reason in (RAW_DATA(), LAST_LAYER())}
        matches, _ = match_rules(planned, self.base)
        self._rules = {s.name: self._rule(planned, s, self.base.merged(m)) for s, m in zip(planned, matches, strict=True)}
        self.sites = planned
        self.sampled = tuple({s.name: s for s in planned if s.decision == "sampled" and s.name not in default_exclusions}.values())
        self.excluded = {s.name: s.reason for s in planned if s.decision == "exact"} | default_exclusions

    @property
    def random(self) -> bool:
        """Whether any site chooses its entries at random."""
        return any(p.method not in _DETERMINISTIC for s in self.sampled for p in s.products if p.decision != "exact")

    def options(self, choices: Mapping[str, float]) -> dict[str, Any]:
        """Make the settings of a plan.

        Args:
            choices: The ratio of each sampled site, by its name. All other sites are exact.

        Returns:
            The keys of `ApproxConfig`.
        """
        options = self._top | {"method": "exact"}
        rules = []
        by_module: dict[str, list[SitePlan]] = {}
        for s in self.sites:
            by_module.setdefault(s.module or s.name, []).append(s)
        for sites in by_module.values():
            begun = False  # the first call has the module's name, whose rule matches the later calls too, so these get separate rules
            for name in dict.fromkeys(s.name for s in sites):
                if name in choices:
                    rules.append(self._rules[name] | {"ratio": choices[name]})
                elif begun:
                    rules.append({"layers": self._rules[name]["layers"], "method": "exact"})
                begun = begun or name in choices
        return options | ({"rules": rules} if rules else {})

    def on_rows(self, ratio: float) -> dict[str, Any]:
        """Make settings under which the backward pass runs on a share of the rows, and nothing else is sampled.

        Args:
            ratio: The share of the rows.

        Returns:
            The keys of `ApproxConfig`.
        """
        return self._top | {"ratio": ratio, "grad": {"axis": "rows"}}

    def pattern(self, name: str) -> str:
        """Return the pattern of a rule's key `layers` that matches a site.

        Args:
            name: The name of the site.

        Returns:
            The pattern.
        """
        return str(self._rules[name]["layers"])

    def overlaps(self) -> dict[tuple[str, str], tuple[SitePlan, int]]:
        """Find the products whose size two sites reduce.

        Such a product shrinks with the entries that its own site keeps of the input, and with the entries that a later site keeps of the output.

        Returns:
            A dict ``{(site, later site): (plan of the site, FLOPs of its products that both reduce)}``.
        """
        overlaps: dict[tuple[str, str], tuple[SitePlan, int]] = {}
        for s in self.sampled:
            for p in s.products:
                if p.skips is not None and p.decision in ("sampled", "coupled"):
                    overlaps[s.name, p.skips] = (s, overlaps.get((s.name, p.skips), (s, 0))[1] + p.flops_exact)
        return overlaps

    @property
    def _top(self) -> dict[str, Any]:
        """The settings at the top level of all plans."""
        top: dict[str, Any] = {"policy": "always"} | ({"lowering": self.base.lowering} if self.base.lowering != "auto" else {})
        top |= {} if self.base.huge_pages else {"huge_pages": False}
        return top | ({"inductor": dict(self.base.inductor)} if self.base.inductor else {})

    def _rule(self, planned: tuple[SitePlan, ...], site: SitePlan, keys: Mapping[str, Any]) -> dict[str, Any]:
        rule: dict[str, Any] = {"layers": _pattern(site.name)}
        for key in ("method", "ratio", "sampling", "min_k", "group", "lowering", "share", "output", "grad", "grad_input", "grad_weight"):
            value = keys.get(key)
            if value is not None and value != (self.base.lowering if key == "lowering" else _DEFAULTS.get(key)):
                rule[key] = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
        return rule


def _pattern(name: str) -> str:
    """Return a pattern of a rule's key `layers` that matches this name: the name itself, unless it has another meaning as a pattern."""
    parsed = LayerPattern.parse(name) if "[" not in name else None
    plain = parsed is not None and parsed.is_name and parsed.regex is None and not set(name) & set("*?[")
    return name if plain else "re:" + re.escape(name)
