"""Define `ApproxConfig`, the settings of the backend, which are checked on construction.

`options`, `ApproxConfig` and plan files share one schema. The keys of all rules that match a site are merged, later rules over earlier ones, and `resolve`
turns the merged keys into what is asked of the site.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from approx_compile import _torch
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.config.messages import message
from approx_compile.config.plan_file import RECORD, Tuned, TunedPlan
from approx_compile.config.resolve import LEAST_ROWS, SiteSettings, chooses_output_ratio, interpret, merge_rule, row_settings, samples_products, set_keys
from approx_compile.config.rules import Rule, RuleKeys, also_text
from approx_compile.config.schema import GradTable, OutputTable, restated
from approx_compile.config.selectors import LayerPattern, StepSlice, needs_total
from approx_compile.config.words import LayerMethod, Lowering, Policy, Sampling, flag, integer, is_share, nearest

FINAL_EXACT = 0.2
"""The default of `final_exact`. In this last share of a run of known length no output is sampled, so that training ends on the network that is evaluated."""


_SAMPLING_KEYS = ("ratio", "sampling", "group", "min_k", "share", "method")
"""Keys that say how products are sampled."""


class ConfigError(_torch.UnwrappedBackendError, ValueError):
    """Raised for a wrong key, value, pattern or combination. The message names the key, what it got, what is valid and the nearest match.

    Example:
        >>> import approx_compile
        >>> approx_compile.ApproxConfig(tau=0.1)
        Traceback (most recent call last):
            ...
        approx_compile.config.approx_config.ConfigError: tau belongs in adaptive: {'adaptive': {'tau': 0.1}}
    """


class ApproxConfig(RuleKeys):
    """The backend's settings, with the same keys as `options` of `torch.compile(model, backend="approx", options=...)`.

    A config is frozen and hashable, and can be deep-copied and pickled. Construction raises `ConfigError` if anything in it is wrong. Every key is a field, and
    `ApproxConfig.model_json_schema()` has its description, its valid values and examples; the documentation's page on configuration is made from it.

    Example:
        >>> import approx_compile
        >>> config = approx_compile.ApproxConfig(grad={"axis": "rows", "ratio": 0.25}, rules=[{"layers": "head", "method": "exact"}])
        >>> config.grad.ratio
        0.25
        >>> backend = approx_compile.Backend(config)  # torch.compile(model, backend=backend)
    """

    method: LayerMethod = restated(RuleKeys, "method", "topk")
    ratio: float = restated(RuleKeys, "ratio", 0.5)
    min_k: int = restated(RuleKeys, "min_k", 16)
    group: int | Literal["auto"] = restated(RuleKeys, "group", "auto")
    sampling: Sampling = restated(RuleKeys, "sampling", "forward")
    policy: Policy = restated(RuleKeys, "policy", "adaptive")
    lowering: Lowering = restated(RuleKeys, "lowering", "auto")
    adaptive: AdaptiveTable = Field(
        default_factory=AdaptiveTable,
        description="Settings of the policy `adaptive`: what variance or error it may add, and what it chooses from.",
        examples=[{"adaptive": {"tau": 0.1}}],
    )
    rules: tuple[Rule, ...] = Field(
        default=(),
        description="Settings for some layers, steps or phases: a list of tables. The keys of all rules that match a site are merged key by key over those at "
        "the top, and a later rule overrides an earlier one.",
        examples=[{"rules": [{"layers": "head", "method": "exact"}, {"layers": "conv[1::4]", "steps": "3::4", "grad_weight": "max"}]}],
    )
    plan: Tuned | None = Field(
        default=None,
        description="What `tune` found: the path of a plan file, a `TunedPlan`, or a table like a plan file. The keys beside it override its settings at the "
        "top and in each of its rules, but what it leaves exact stays exact. It is refused if it names a site that the model lacks.",
        examples=[{"plan": {"policy": "always", "method": "exact", "rules": [{"layers": "0", "method": "topk", "ratio": 0.5}]}}],
        json_schema_extra=also_text(),
    )
    total_steps: int | None = Field(
        default=None,
        ge=1,
        description="The number of optimizer steps of the whole run. Give it where rules have `steps` in percent, or where outputs are sampled, so that "
        "training ends with exact steps (`final_exact`).",
        examples=[{"ratio": 0.5, "total_steps": 10_000}],
    )
    final_exact: float = Field(
        default=FINAL_EXACT,
        ge=0,
        lt=1,
        description="The last share of `total_steps` in which no output is sampled, so that training ends on the network that is evaluated. It has no effect "
        "where all outputs are exact.",
        examples=[{"ratio": 0.5, "total_steps": 10_000, "final_exact": 0.1}],
    )
    huge_pages: bool = Field(
        default=True,
        description="Whether new buffers of 8 MiB and more of training steps on Linux CPUs ask the system for huge pages, which makes first writes to them "
        "faster. No value changes. Set `false` where memory is so fragmented that huge pages are slow to get.",
        examples=[{"huge_pages": False}],
    )
    inductor: Mapping[str, Any] = Field(
        default_factory=dict,
        description="Inductor's own options, with the names of `torch._inductor.list_options()`, and `mode`, with the words of `torch.compile(mode=...)`.",
        examples=[{"inductor": {"mode": "max-autotune-no-cudagraphs"}}, {"inductor": {"max_autotune": True}}],
    )

    def __init__(self, **data: Any) -> None:
        self._set(data)
        self._refuse_keys_without_effect()

    def _set(self, data: Mapping[str, Any]) -> None:
        """Set all fields from keys, and check each of them."""
        try:
            super().__init__(**_with_plan(data))
        except pydantic.ValidationError as e:
            raise ConfigError(message(e, ApproxConfig)) from None

    @staticmethod
    def of(config: ApproxConfig | Mapping[str, Any] | None) -> ApproxConfig:
        """Return a config from a config, a mapping with the same keys, or None for the defaults.

        Args:
            config: The config or mapping.

        Returns:
            The config itself, or a new one.

        Raises:
            ConfigError: A key, value or combination is wrong, or the argument is neither a config nor a mapping.
        """
        if isinstance(config, ApproxConfig):
            return config
        if config is None:
            return ApproxConfig()
        if not isinstance(config, Mapping):
            raise ConfigError(f"options: got {config!r}; a dict or an ApproxConfig is expected")
        return ApproxConfig(**{str(k): v for k, v in config.items()})

    @field_validator("method", "ratio", "min_k", "group", "sampling", "policy", "lowering", mode="before")
    @classmethod
    def _not_none(cls, value: Any) -> Any:
        """Refuse None for keys that have a default at the top."""
        if value is None:
            raise ValueError("got None; leave the key out for its default")
        return value

    @model_validator(mode="after")
    def _default_policy(self) -> ApproxConfig:
        """Set the policy if it is not given: "cost" if a key asks for sampled products, else "adaptive".

        Keys that make something exact, or that have no effect by themselves, do not change the policy, so that asking for more exactness samples no output.
        """
        if "policy" not in self.model_fields_set:
            said = {"ratio", "sampling"} | ({"method"} if self.method != "exact" else set())
            asked = bool(said & self.model_fields_set) or any(t.samples for t in self.tables.values()) or any(r.samples for r in self.rules)
            object.__setattr__(self, "policy", "cost" if asked else "adaptive")  # the config is frozen, so a plain assignment would raise
        return self

    def _refuse_keys_without_effect(self) -> None:
        """Refuse keys without effect: under "adaptive" the forward pass is exact and the number of rows is found automatically.

        The settings of one moment (`at`) may hold such keys: a rule that gives them an effect may not hold then.
        """
        idle = "has no effect under policy 'adaptive', which keeps the forward pass exact and finds the number of rows itself; "
        products = "for sampled products set policy 'cost' or 'always' beside it"
        for where, keys, others in (("", self, self.rules), *((f"rules[{i}].", r, self._near(r)) for i, r in enumerate(self.rules))):
            said = [k for k in _SAMPLING_KEYS if k in keys.model_fields_set and getattr(keys, k) is not None and (k, getattr(keys, k)) != ("method", "exact")]
            alone = merge_rule(set_keys(self), keys)
            if said and not any(samples_products(k) for k in (alone, *(merge_rule(alone, r) for r in others))):
                exact = "for exact products method='exact', " if said[0] == "ratio" and keys.ratio == 1 else ""
                raise ConfigError(f"{where}{said[0]} {idle}{exact}{products}, for a fixed share of rows grad={{'axis': 'rows', 'ratio': ...}}")
            for name, table in keys.tables.items() if alone["policy"] == "adaptive" else ():
                if (key := table.only_how) is not None:
                    raise ConfigError(f"{where}{name}: {key} {idle}{products}, or a method into {name}")

    @model_validator(mode="after")
    def _one_axis(self) -> ApproxConfig:
        """Refuse rows and tokens side by side."""
        if self.asks_for_rows("rows") and self.asks_for_rows("tokens"):
            raise ValueError("grad.axis: rows in one place and tokens in another; write the same axis at the top and in all rules that set one")
        return self

    def _near(self, rule: Rule) -> list[Rule]:
        """Return the rules that hold for the sites of this rule, as far as their `layers` show."""
        return [r for r in self.rules if r.layers == rule.layers or ("site",) in (r.layers, rule.layers)]

    @model_validator(mode="after")
    def _shares_of_a_known_run(self) -> ApproxConfig:
        """Refuse shares of a run, in the steps of a rule or in `final_exact`, if `total_steps` is missing."""
        for i, rule in enumerate(self.rules):
            if rule.steps is not None and needs_total(rule.steps):
                try:
                    StepSlice.parse(rule.steps, self.total_steps)
                except ValueError as e:
                    raise ValueError(f"rules[{i}].{e}") from None
        if "final_exact" in self.model_fields_set and self.total_steps is None:
            raise ValueError("final_exact: a share of the run; set total_steps, the number of optimizer steps it will have")
        return self

    @model_validator(mode="after")
    def _auto_for_samples(self) -> ApproxConfig:
        """Refuse `tau` "auto" for tokens: the time that a single region takes is not known."""
        if self.adaptive.tau == "auto" and any(k.grad is not None and k.grad.axis == "tokens" for k in (self, *self.rules)):
            raise ValueError("adaptive.tau: got 'auto', which chooses the share of the samples; with axis 'tokens' give a number, such as 0.025")
        return self

    @field_validator("total_steps", mode="before")
    @classmethod
    def _check_total_steps(cls, value: Any) -> Any:
        return value if value is None else integer(value, "the optimizer steps of the whole run, such as 10000")

    @field_validator("final_exact", mode="before")
    @classmethod
    def _check_final_exact(cls, value: Any) -> Any:
        if isinstance(value, bool) or not (value == 0 or (is_share(value) and value < 1)):
            raise ValueError(f"got {value!r}; a number in [0, 1) is expected, the share of total_steps, such as {FINAL_EXACT}")
        return float(value)

    @field_validator("huge_pages", mode="before")
    @classmethod
    def _check_huge_pages(cls, value: Any) -> Any:
        return flag(value, "whether large new buffers on CPUs ask for huge pages")

    @field_validator("rules", mode="before")
    @classmethod
    def _rules_list(cls, value: Any) -> Any:
        if isinstance(value, Mapping) or not isinstance(value, (list, tuple)):
            raise ValueError(f"got {value!r}; a list of rules (dicts with 'layers') is expected")
        return tuple(value)

    @field_validator("inductor", mode="before")
    @classmethod
    def _check_inductor(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"got {value!r}; a dict of Inductor's options is expected")
        rest = dict(value)
        mode = rest.pop("mode", None)
        modes = _torch.inductor_modes()
        if mode is not None and mode not in modes:
            raise ValueError(f"mode: got {mode!r}; valid are {', '.join(modes)}.{nearest(str(mode), modes)}")
        if "joint_custom_pre_pass" in rest:
            raise ValueError("joint_custom_pre_pass is where this backend works; set torch._inductor.config.joint_custom_pre_pass to run yours before it")
        known = _torch.inductor_options()
        for key in rest:
            if str(key).replace("-", "_") not in known:
                raise ValueError(f"Inductor has no option {key!r}.{nearest(str(key), sorted(known))} torch._inductor.list_options() has them all")
        return dict(value)

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], ApproxConfig], tuple[dict[str, Any]]]:
        """Pickle the config as plain options, so that a pickle does not depend on the modules and classes of the tables."""
        return unpickle, (self.options(),)

    def options(self) -> dict[str, Any]:
        """Return plain options, of which an equal config can be made."""
        defaults = {k: field.get_default(call_default_factory=True) for k, field in type(self).model_fields.items()}
        options = {k: v for k, v in self.model_dump(exclude_none=True, exclude={"inductor", "plan"}).items() if getattr(self, k) != defaults[k]}
        if self.inductor:
            options["inductor"] = dict(self.inductor)
        if self.plan is not None:
            options["plan"] = {RECORD: self.plan.model_dump(exclude_none=True)}
        return options | {"policy": self.policy}  # its default depends on the other keys

    def digest(self) -> str:
        """Return a hash of everything that decides a rewrite; Inductor's options are part of Inductor's own key."""
        content = self.model_dump(mode="python", exclude={"inductor", "plan"}) | {"plan": self.plan.fingerprint() if self.plan is not None else None}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()

    def patterns(self) -> tuple[LayerPattern, ...]:
        """Return the patterns of all rules, each once, in the order of the rules."""
        return tuple({p.text: p for rule in self.rules for p in rule.patterns}.values())

    def all_rules(self) -> tuple[Rule, ...]:
        """Return the rules, with one more for the final exact phase of a run of known length that samples outputs."""
        if self.total_steps is None or not self.final_exact or not self._samples_outputs():
            return self.rules
        begin = round((1 - self.final_exact) * self.total_steps)
        return (*self.rules, Rule(steps=f"{begin}:", output=OutputTable(method="exact")))

    def _samples_outputs(self) -> bool:
        return any(s.output.method != "exact" for s in self._settings_alone())

    def each_alone(self) -> list[dict[str, Any]]:
        """Return the keys at the top, and for each rule these keys with that rule alone merged over them."""
        return [set_keys(self), *(merge_rule(set_keys(self), r) for r in self.rules)]

    def _settings_alone(self) -> list[SiteSettings]:
        """Return what the keys of `each_alone` ask of a site."""
        return [interpret(keys, False) for keys in self.each_alone()]

    def at(self, step: int = 0, phase: str | None = None) -> ApproxConfig:
        """Return the settings that hold at one moment of a run.

        Args:
            step: Completed optimizer steps.
            phase: The phase that is set, or None.

        Returns:
            The config with only the rules that hold then, without their `steps` and `phase`.
        """
        held = [r for r in self.all_rules() if r.when(self.total_steps).holds(step, phase)]
        whole = [i for i, r in enumerate(held) if r.layers == ("site",) and r.method == "exact" and all(later.only_exact for later in held[i:])]
        held = held[whole[-1] if whole else 0 :]  # drop the rules that it overrides, so that they do not lead to another compilation
        bare = tuple(r.model_copy(update={"steps": None, "phase": None}) for r in held)
        return self.model_copy(update={"rules": bare, "total_steps": None, "final_exact": FINAL_EXACT})

    def by_output_ratio(self) -> tuple[tuple[float, ApproxConfig], ...]:
        """Return the ratios of outputs to choose from, from the smallest to 1, with the settings for each; only (1, self) if there is nothing to choose."""
        places = [(), *(r.layers for r in self.rules)]
        if not any(
            chooses_output_ratio(keys) and not self._exact_later(i, layers) for i, (keys, layers) in enumerate(zip(self.each_alone(), places, strict=True))
        ):
            return ((1.0, self),)
        return tuple((r, self._with_outputs(r)) for r in self.adaptive.outputs)

    def _exact_later(self, place: int, layers: tuple[str, ...]) -> bool:
        """Whether a rule from index `place` on makes the outputs of these layers (empty: of all layers), or of every site, exact."""
        later = (r for r in self.rules[place:] if r.layers == ("site",) or r.layers == layers)
        return any(r.method == "exact" or (r.output is not None and r.output.method == "exact") for r in later)

    def _with_outputs(self, ratio: float) -> ApproxConfig:
        """Return the settings with this ratio at every output that has none."""

        def filled(keys: Any) -> dict[str, Any]:
            output = keys.output
            return {} if output is None or output.ratio is not None else {"output": output.model_copy(update={"ratio": ratio})}

        return self.model_copy(update={**filled(self), "rules": tuple(r.model_copy(update=filled(r)) for r in self.rules)})

    def asks_for_rows(self, axis: str | None = None) -> bool:
        """Whether the top level or a rule may sample rows or tokens; with an axis, those of this axis."""
        return any((s := row_settings(keys)) is not None and axis in (None, s.axis) for keys in self.each_alone())

    def leaves_axis_open(self) -> bool:
        """Whether the settings ask for samples or tokens and do not say which: the policy "adaptive" without a `grad` table, with a number for `tau`.

        A table that only says `exact`, as in a rule for one layer, says nothing about the others.
        Where ranks agree on their shares samples are chosen: what they exchange has room for few controls.
        """
        tables = any(k.grad is not None and k.grad.method != "exact" for k in (self, *self.rules)) or any("policy" in r.model_fields_set for r in self.rules)
        return self.policy == "adaptive" and not tables and self.adaptive.tau != "auto" and not self.adaptive.agree and self.asks_for_rows()

    def on_tokens(self) -> ApproxConfig:
        """Return these settings with tokens chosen, where they leave the axis open."""
        return self.model_copy(update={"grad": GradTable(axis="tokens")})

    def asks_for_products(self) -> bool:
        """Whether a product may be sampled along its own axis, by the settings at the top or by these and one rule.

        Combinations of rules need no check, because one of them or the top names the method.
        """
        asked = [p for s in self._settings_alone() for p in (s.output, s.grad_input, s.grad_weight)]
        return any(p.method != "exact" and not p.replaces for p in asked) or any(s.units is not None for s in self._settings_alone())

    def measures(self) -> bool:
        """Whether any site may be decided by timing it."""
        return "measure" in [self.policy, *(rule.policy for rule in self.rules)]

    def least_rows(self) -> int:
        """Return the smallest `min_k` of row sampling, at the top or in a rule."""
        return min(r.grad.min_k if r.grad is not None and r.grad.min_k is not None else LEAST_ROWS for r in (self, *self.rules))

    def settings(self, matches: Sequence[bool]) -> SiteSettings:
        """Return what is asked of a site.

        Args:
            matches: For each of `rules`, whether it matches the site.

        Returns:
            The settings of the site's products and rows.
        """
        return interpret(self.merged(matches), any(hit and rule.names for rule, hit in zip(self.rules, matches, strict=True)))

    def merged(self, matches: Sequence[bool]) -> dict[str, Any]:
        """Return the keys that hold for a site.

        Args:
            matches: For each of `rules`, whether it matches the site.

        Returns:
            The keys at the top with those of the matching rules merged over them, in order.
        """
        keys = set_keys(self)
        for rule, hit in zip(self.rules, matches, strict=True):
            keys = merge_rule(keys, rule) if hit else keys
        return keys


def unpickle(options: dict[str, Any]) -> ApproxConfig:
    """Make a config of pickled options, which may be those of one moment of a run. Pickles name this function as `approx_compile.config.unpickle`."""
    config = ApproxConfig.__new__(ApproxConfig)
    config._set(options)
    return config


def _with_plan(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given keys merged over those of the plan they name; under `plan` only the plan's record is left."""
    beside = {k: v for k, v in data.items() if k != "plan"}
    given = data.get("plan")
    if given is None or isinstance(given, Tuned):
        return dict(data)
    try:
        plan, where = TunedPlan.given(given)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    products = {"policy": "cost"}  # the policy of a plan that names none, because a plan says what to sample
    try:
        ApproxConfig(**products | dict(plan.options))  # so that an error in the file is not reported as one in the keys beside it
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    return products | plan.overridden(beside) | {"plan": plan.tuned}
