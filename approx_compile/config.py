"""What the user asks for: one schema for `options`, `ApproxConfig` and plan files, checked on construction.

Rules are merged key by key, later wins. `settings` turns the merged keys into one decision request per product; whether a
site can honour it is `passes.plan`'s business.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from approx_compile import _torch
from approx_compile.patterns import Pattern, Steps, When, needs_total
from approx_compile.plans import Tuned, TunedPlan

ESTIMATORS = ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta")
METHODS = (*ESTIMATORS, "exact")
REPLACEMENTS = {"grad_input": ("max",), "grad_weight": ("zero", "random", "max")}
"""What may stand in the place of a gradient product, where it is not sampled but made up (`kernels.replacements`)."""
SAMPLINGS = ("forward", "backward", "blackbox")
POLICIES = ("cost", "always", "adaptive", "measure")
ROW_METHODS = ("bernoulli", "topk", "uniform", "wta")
LOWERINGS = ("auto", "inductor", "triton", "cuda")
PRODUCTS = ("output", "grad_input", "grad_weight")

LADDER = (0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Shares of the batch, a factor of about the square root of 2 apart."""

FINAL_EXACT = 0.2
"""The last share of a run of known length in which no output is sampled: training ends on the network that is evaluated."""

OUTPUT_LADDER = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Ratios of outputs under "adaptive": few, for each is a compilation."""

LEAST_ROWS = 2
"""`min_k` of row sampling, if its table has none. (Compiled code takes one row for another case than many.)"""

# Named in the design and the papers, not in this version: refused by name, so that nobody waits for an effect.
_NOT_BUILT: dict[str, tuple[str, ...]] = {
    "method": ("dropout", "adaptive_dropout", "alsh"),
}


class ConfigError(_torch.PassesThroughDynamo, ValueError):
    """A wrong key, value, pattern or combination. Says the key, what it got, what is valid and the nearest match."""


def _nearest(word: str, valid: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _choice(key: str, value: Any, valid: Sequence[str], kind: str) -> str:
    if value in valid and isinstance(value, str):
        return value
    if isinstance(value, str) and value in _NOT_BUILT.get(kind, ()):
        raise ValueError(f"{value!r} is not built yet; this version has {', '.join(valid)}")
    hint = _nearest(value, valid) if isinstance(value, str) else ""
    raise ValueError(f"got {value!r}; valid are {', '.join(valid)}.{hint}")


class _Keys(BaseModel):
    """The keys that a product's table, a rule and the whole config share. None means: not set here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    methods: ClassVar[tuple[str, ...]] = METHODS

    method: str | None = None
    ratio: float | None = None
    min_k: int | None = None
    group: int | Literal["auto"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"got {data!r}; a table (dict) is expected")
        valid = tuple(cls.model_fields)
        for key in data:
            if key in valid:
                continue
            if key in ("axis", "batch_norm"):
                raise ValueError(f"key {key!r} belongs under grad: one set of rows serves all gradients; valid keys here are {', '.join(valid)}")
            if key in ("layers", "steps", "phase"):
                raise ValueError(f"key {key!r} belongs in a rule: rules=[{{{key!r}: ...}}]; valid keys here are {', '.join(valid)}")
            if key in _REPLACEMENT_KEYS:
                raise ValueError(
                    f"key {key!r} belongs in the table of a gradient that method {_REPLACEMENT_KEYS[key]!r} replaces; valid keys here are {', '.join(valid)}"
                )
            raise ValueError(f"unknown key {key!r}; valid keys here are {', '.join(valid)}.{_nearest(str(key), valid)}")
        return dict(data)

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        found = [product for product, methods in REPLACEMENTS.items() if isinstance(value, str) and value in methods]
        if found and value not in cls.methods:
            raise ValueError(f"{value!r} replaces a gradient and can be the method of {' and '.join(found)} only; valid here are {', '.join(cls.methods)}")
        return value if value is None else _choice("method", value, cls.methods, "method")

    @field_validator("ratio", mode="before")
    @classmethod
    def _check_ratio(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(f"got {value!r}; a number in (0, 1] is expected, the share of the axis that is kept")
        return float(value)

    @field_validator("min_k", mode="before")
    @classmethod
    def _check_min_k(cls, value: Any) -> Any:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"got {value!r}; an integer of at least 1 is expected")
        return value

    @field_validator("group", mode="before")
    @classmethod
    def _check_group(cls, value: Any) -> Any:
        if value in (None, "auto"):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"got {value!r}; 'auto' or an integer of at least 1 is expected")
        return value


_REPLACEMENT_KEYS = {"j": "max", "tile": "max", "scale": "max", "std": "random"}
_SAMPLING_KEYS = ("ratio", "min_k", "group")


class ProductTable(_Keys):
    """Settings of one product: `{"method": ..., "ratio": ..., "min_k": ..., "group": ...}`, each optional."""


class InputTable(ProductTable):
    """Settings of `grad_input`. Method "max": through the `j` (1) entries of largest magnitude of every row of the output gradient, times `scale` (1)."""

    methods = (*METHODS, *REPLACEMENTS["grad_input"])

    j: int | None = None
    scale: float | None = None

    @field_validator("j", mode="before")
    @classmethod
    def _check_j(cls, value: Any) -> Any:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"got {value!r}; an integer of at least 1 is expected, the entries of the output gradient that count")
        return value

    @field_validator("tile", mode="before", check_fields=False)
    @classmethod
    def _check_tile(cls, value: Any) -> Any:
        if value not in (None, "auto") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"got {value!r}; 'auto' or an integer of at least 1 is expected, the side in places of the tiles that have an entry each")
        return value

    @field_validator("scale", "std", mode="before", check_fields=False)
    @classmethod
    def _check_positive(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"got {value!r}; a finite number above 0 is expected")
        return float(value)

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> Self:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None]
        for key in given:
            owner = _REPLACEMENT_KEYS.get(key, self.method)
            if owner != self.method:
                raise ValueError(f"{key} belongs to method {owner!r}, which this table does not set (method: {self.method!r}); set it here, or drop {key}")
            if key in _SAMPLING_KEYS and self.method not in (None, *METHODS):
                raise ValueError(f"{key} has no effect with method {self.method!r}, which keeps no share of an axis; drop it")
        return self


class WeightTable(InputTable):
    """Settings of `grad_weight`. Method "zero": zeros; "random": normal numbers with mean 0 and standard deviation `std` (1 / batch); "max": for a
    convolution, of every sample's output channel only the `j` (1) entries of largest magnitude, which carry the channel's whole sum, for a linear
    layer those of every row, times `scale` (1); with `tile`, of a convolution's output channels every tile of so many places by side has its own
    largest entry, which carries the tile's sum ("auto": of 4 places, or of so many more that a channel has 16 tiles)."""

    methods = (*METHODS, *REPLACEMENTS["grad_weight"])

    tile: int | Literal["auto"] | None = None
    std: float | None = None

    @model_validator(mode="after")
    def _entries_of_one_kind(self) -> Self:
        if self.tile is not None and self.j is not None:
            raise ValueError(
                f"tile and j: got {self.tile} and {self.j}; either the j largest entries of a channel count, or the largest of every tile: drop one"
            )
        return self


class GradTable(InputTable):
    """Settings of both gradients. `axis`: "contraction" (each product along its own axis) or "rows": the backward pass runs on some samples of the
    batch, chosen by the norm of their gradient; `method` is then one of `ROW_METHODS`. `batch_norm`: "exact" or "approximate"."""

    axis: str | None = None
    batch_norm: str | None = None

    @field_validator("axis", mode="before")
    @classmethod
    def _check_axis(cls, value: Any) -> Any:
        return value if value is None else _choice("axis", value, ("contraction", "rows"), "axis")

    @field_validator("batch_norm", mode="before")
    @classmethod
    def _check_batch_norm(cls, value: Any) -> Any:
        return value if value is None else _choice("batch_norm", value, ("exact", "approximate"), "batch_norm")

    @model_validator(mode="after")
    def _rows(self) -> GradTable:
        if self.axis == "rows":
            if self.method is not None and self.method not in (*ROW_METHODS, "exact"):
                raise ValueError(f"method: got {self.method!r}, which can't choose rows; valid with axis 'rows' are {', '.join(ROW_METHODS)}")
            if self.group not in (None, 1, "auto"):
                raise ValueError(f"group: got {self.group!r}; rows are chosen one by one, leave it out with axis 'rows'")
        elif self.batch_norm is not None:
            raise ValueError("batch_norm: only with axis 'rows'")
        return self


class AdaptiveTable(BaseModel):
    """How `policy: "adaptive"` decides how many rows a step needs, and what share of outputs that a rule allows to be sampled.

    `tau`: the variance that leaving out rows may add, as a share of the gradient's own; `ladder`: the shares of the batch to choose from. For outputs:
    `error`, what sampling them may do to the gradient g of a batch, |g' - g|^2 / |g|^2; `outputs`, the ratios to choose from, each of which is compiled;
    `every`, the steps from one measurement to the next.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tau: float = 0.025
    ladder: tuple[float, ...] = LADDER
    error: float = 0.025
    outputs: tuple[float, ...] = OUTPUT_LADDER
    every: int = Field(default=200, strict=True, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"got {data!r}; a table (dict) is expected")
        for key in data:
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}; valid keys here are {', '.join(cls.model_fields)}.{_nearest(str(key), tuple(cls.model_fields))}")
        return dict(data)

    @field_validator("tau", "error", mode="before")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"got {value!r}; a number above 0 is expected, a share of the gradient's variance or square (0.025)")
        return float(value)

    @field_validator("ladder", "outputs", mode="before")
    @classmethod
    def _check_ladder(cls, value: Any) -> Any:
        good = isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= 1 for v in value)
        if not good:
            raise ValueError(f"got {value!r}; a list of shares in (0, 1] is expected, such as {list(LADDER)}")
        return tuple(sorted({float(v) for v in value} | {1.0}))


class _Rules(_Keys):
    """Keys that may stand in a rule and at the top."""

    sampling: str | None = None
    policy: str | None = None
    lowering: str | None = None
    output: ProductTable | None = None
    grad: GradTable | None = None
    grad_input: InputTable | None = None
    grad_weight: WeightTable | None = None
    share: bool | None = None

    @field_validator("share", mode="before")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"got {value!r}; true or false is expected: whether sites that read the same activation keep the same entries of it")
        return value

    @field_validator("sampling", mode="before")
    @classmethod
    def _check_sampling(cls, value: Any) -> Any:
        return value if value is None else _choice("sampling", value, SAMPLINGS, "sampling")

    @field_validator("policy", mode="before")
    @classmethod
    def _check_policy(cls, value: Any) -> Any:
        return value if value is None else _choice("policy", value, POLICIES, "policy")

    @field_validator("lowering", mode="before")
    @classmethod
    def _check_lowering(cls, value: Any) -> Any:
        return value if value is None else _choice("lowering", value, LOWERINGS, "lowering")

    @field_validator("output", "grad", "grad_input", "grad_weight", mode="before")
    @classmethod
    def _name_or_table(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combinations(self) -> _Rules:
        tables = {k: getattr(self, k) for k in ("output", "grad", "grad_input", "grad_weight")}
        for key in ("grad_weight", "grad"):
            if tables[key] is not None and tables[key].method == "topk_weights" and key == "grad_weight":
                raise ValueError(
                    "grad_weight: method 'topk_weights' ranks by the weight's norms, and the weight is no operand of grad_weight; "
                    "use topk, crs, bernoulli, uniform or wta"
                )
        if self.method == "exact":
            for key, table in tables.items():
                if table is not None and table.method != "exact":
                    raise ValueError(
                        f"method 'exact' makes all three products exact, but {key} is set beside it; "
                        f"drop {key}, or set output='exact' in place of method='exact'"
                    )
        return self


class Rule(_Rules):
    """Settings for the sites that `layers` matches, while `steps` and `phase` hold.

    `layers`: a kind (`conv`, `linear`, `matmul`, `site`), bare or with an index or slice in execution order (`conv[1::4]`); else a glob
    on the module's name, `*` crossing dots, or `re:` and a regular expression; a list means any of them. May be left out beside `steps` or `phase`: then
    every site. `steps`: a Python slice over completed optimizer steps, from 0 ("::2", "3::4", ":8000"), ends as shares of `total_steps` too ("80%:").
    `phase`: the name, or names, under which the rule holds (`set_phase`).
    """

    layers: tuple[str, ...] = ("site",)
    steps: str | None = None
    phase: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _says_where(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not {"layers", "steps", "phase"} & set(data):
            raise ValueError("layers: this key is required in a rule without steps or phase; 'site' means every site")
        return data

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not items or not all(isinstance(i, str) for i in items):
            raise ValueError(f"got {value!r}; a pattern or a list of patterns (strings) is expected")
        for item in items:
            Pattern.parse(item)
        return tuple(items)

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"got {value!r}; a slice over optimizer steps as a string is expected: '::2', '3::4', ':8000', '80%:'")
        Steps.parse(value, 1_000_000)  # the syntax; what is a share is checked where total_steps is known
        return value

    @field_validator("phase", mode="before")
    @classmethod
    def _check_phase(cls, value: Any) -> Any:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not items or not all(isinstance(i, str) and i for i in items):
            raise ValueError(f"got {value!r}; the name of a phase or a list of names (strings) is expected")
        return tuple(items)

    @property
    def timed(self) -> bool:
        return self.steps is not None or self.phase is not None

    def when(self, total: int | None) -> When:
        return When(Steps.parse(self.steps, total) if self.steps is not None else None, self.phase)

    @property
    def only_exact(self) -> bool:
        """Whether all it says is that something is to be exact."""
        tables = [t for t in (self.output, self.grad, self.grad_input, self.grad_weight) if t is not None]
        said = any(v is not None for v in (self.ratio, self.sampling, self.group, self.min_k, self.lowering, self.share))
        return not said and self.method in (None, "exact") and (self.method == "exact" or bool(tables)) and all(t.method == "exact" for t in tables)


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
    tile: int | Literal["auto"] | None = None

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


class ApproxConfig(_Rules):
    """The backend's settings; the same keys as `options` of `torch.compile(model, backend="approx", options=...)`.

    Keys: `method` (one of `ESTIMATORS` or "exact"), `ratio` in (0, 1], `min_k` (shorter axes are exact), `group` (contiguous indices kept or
    dropped together), `sampling` (forward | backward | blackbox), `output` / `grad_input` / `grad_weight` / `grad` (a method's name or a
    table; `grad` with `axis: "rows"`: samples of the batch), `policy` (adaptive | cost | measure | always; without
    it, adaptive if no other key says what to sample, else cost), `share` (whether sites that read the same activation keep the same entries of it; left out:
    where that saves more than it loses), `adaptive` (see `AdaptiveTable`), `rules` (a list
    of tables with `layers`, `steps`, `phase`: see `Rule`), `plan` (a plan file, a `TunedPlan` or a table like a plan file: its settings, under the keys given
    beside it; the attribute then holds its record), `total_steps` (the optimizer steps of the whole run), `final_exact` (the last share of them in which
    no output is sampled), `lowering` (the code that runs sampled products: auto | inductor | triton | cuda, the last two on GPUs), `huge_pages` (whether
    large new buffers on CPUs ask for them: `pages`), `inductor` (Inductor's own options, `mode` included). Frozen, hashable, deep-copyable,
    picklable. Raises `ConfigError`.
    """

    method: str = "topk"
    ratio: float = 0.5
    min_k: int = 16
    group: int | Literal["auto"] = "auto"
    sampling: str = "forward"
    policy: str = "adaptive"
    adaptive: AdaptiveTable = Field(default_factory=AdaptiveTable)
    rules: tuple[Rule, ...] = ()
    plan: Tuned | None = None
    total_steps: int | None = Field(default=None, strict=True, ge=1)
    final_exact: float = Field(default=FINAL_EXACT, strict=True, ge=0, lt=1)
    lowering: str = "auto"
    huge_pages: bool = True
    inductor: Mapping[str, Any] = Field(default_factory=dict)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**_with_plan(data))
        except pydantic.ValidationError as e:
            raise ConfigError(_message(e)) from None

    @staticmethod
    def of(config: ApproxConfig | Mapping[str, Any] | None) -> ApproxConfig:
        """A config from a config, a mapping with the same keys, or None for the defaults."""
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
        if value is None:
            raise ValueError("got None; leave the key out for its default")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_policy(cls, data: Any) -> Any:
        """ "adaptive", unless something says how products are to be sampled: then "cost"."""
        silent = {"adaptive", "inductor", "lowering", "huge_pages", "total_steps", "final_exact"}
        if isinstance(data, Mapping) and "policy" not in data and set(data) - silent:
            return {**data, "policy": "cost"}
        return data

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> ApproxConfig:
        """Under "adaptive" the forward pass is exact and the number of rows is found: keys that say otherwise would do nothing."""
        said = ("ratio", "sampling", "group", "min_k", "method")
        for where, keys in (("", self), *((f"rules[{i}]: ", r) for i, r in enumerate(self.rules))):
            policy = keys.policy or self.policy
            own = [k for k in said if k in keys.model_fields_set and getattr(keys, k) is not None and not (k == "method" and keys.method == "exact")]
            if policy == "adaptive" and own and keys.output is None and keys.grad is None and keys.grad_input is None and keys.grad_weight is None:
                raise ValueError(
                    f"{where}{own[0]} has no effect under policy 'adaptive', which keeps the forward pass exact and finds the number of rows itself; "
                    f"for sampled products set policy 'cost' or 'always' beside it, for a fixed share of rows grad={{'axis': 'rows', 'ratio': ...}}"
                )
        return self

    @model_validator(mode="after")
    def _shares_of_a_known_run(self) -> ApproxConfig:
        for i, rule in enumerate(self.rules):
            if rule.steps is not None and needs_total(rule.steps):
                try:
                    Steps.parse(rule.steps, self.total_steps)
                except ValueError as e:
                    raise ValueError(f"rules[{i}].{e}") from None
        if "final_exact" in self.model_fields_set and self.total_steps is None:
            raise ValueError("final_exact: a share of the run; set total_steps, the number of optimizer steps it will have")
        return self

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
            raise ValueError(f"mode: got {mode!r}; valid are {', '.join(modes)}.{_nearest(str(mode), modes)}")
        if "joint_custom_pre_pass" in rest:
            raise ValueError("joint_custom_pre_pass is where this backend works; set torch._inductor.config.joint_custom_pre_pass to run yours before it")
        known = _torch.inductor_options()
        for key in rest:
            if str(key).replace("-", "_") not in known:
                raise ValueError(f"Inductor has no option {key!r}.{_nearest(str(key), sorted(known))} torch._inductor.list_options() has them all")
        return dict(value)

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """A hash of everything that decides a rewrite (Inductor's own options are in Inductor's own key)."""
        content = self.model_dump(mode="python", exclude={"inductor", "plan"}) | {"plan": self.plan.fingerprint() if self.plan is not None else None}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern.parse(t) for t in dict.fromkeys(t for rule in self.rules for t in rule.layers))

    def all_rules(self) -> tuple[Rule, ...]:
        """The rules, and the final exact phase of a run of known length that samples outputs."""
        if self.total_steps is None or not self.final_exact or not self._samples_outputs():
            return self.rules
        begin = round((1 - self.final_exact) * self.total_steps)
        return (*self.rules, Rule(steps=f"{begin}:", output=ProductTable(method="exact")))

    def _samples_outputs(self) -> bool:
        return any(_interpret(keys, False).output.method != "exact" for keys in self._each_alone())

    def _each_alone(self) -> list[dict[str, Any]]:
        """The keys at the top, and these with each rule by itself over them."""
        return [_own_keys(self), *(_own_keys(self) | _own_keys(r) for r in self.rules)]

    def at(self, step: int = 0, phase: str | None = None) -> ApproxConfig:
        """The settings that hold after `step` optimizer steps in a phase: the same, with the rules that hold and without times."""
        held = [r for r in self.all_rules() if r.when(self.total_steps).holds(step, phase)]
        whole = [i for i, r in enumerate(held) if r.layers == ("site",) and r.method == "exact"]
        held = held[whole[-1] if whole else 0 :]  # what such a rule overrules makes no other assignment
        bare = tuple(r.model_copy(update={"steps": None, "phase": None}) for r in held)
        return self.model_copy(update={"rules": bare, "total_steps": None, "final_exact": FINAL_EXACT})

    def rungs(self) -> tuple[tuple[float, ApproxConfig], ...]:
        """The ratios of outputs to choose from, from the smallest to 1, and the settings with each; one if there is nothing to choose."""
        places = [(), *(r.layers for r in self.rules)]
        if not any(_finds_output(keys) and not self._exact_later(i, layers) for i, (keys, layers) in enumerate(zip(self._each_alone(), places, strict=True))):
            return ((1.0, self),)
        return tuple((r, self._with_outputs(r)) for r in self.adaptive.outputs)

    def _exact_later(self, place: int, layers: tuple[str, ...]) -> bool:
        """Whether a rule from `place` on makes the outputs of these layers (empty: all), or of every site, exact."""
        later = (r for r in self.rules[place:] if r.layers == ("site",) or r.layers == layers)
        return any(r.method == "exact" or (r.output is not None and r.output.method == "exact") for r in later)

    def _with_outputs(self, ratio: float) -> ApproxConfig:
        """The same with a ratio at every output that has none."""

        def filled(keys: Any) -> dict[str, Any]:
            output = keys.output
            return {} if output is None or output.ratio is not None else {"output": output.model_copy(update={"ratio": ratio})}

        return self.model_copy(update={**filled(self), "rules": tuple(r.model_copy(update=filled(r)) for r in self.rules)})

    def asks_for_rows(self) -> bool:
        """Whether the top level or a rule may sample rows."""
        return any(_row_settings(keys) is not None for keys in self._each_alone())

    def asks_for_products(self) -> bool:
        """Whether a product may be sampled along its own axis: by the settings at the top, or by these and one rule (where rules combine, one of them or
        the top names the method)."""
        asked = [p for s in (_interpret(keys, False) for keys in self._each_alone()) for p in (s.output, s.grad_input, s.grad_weight)]
        return any(p.method != "exact" and not p.replaces for p in asked)

    def measures(self) -> bool:
        """Whether any site may be decided by timing it."""
        return "measure" in [self.policy, *(rule.policy for rule in self.rules)]

    def least_rows(self) -> int:
        """The smallest `min_k` that row sampling may meet."""
        return min(r.grad.min_k if r.grad is not None and r.grad.min_k is not None else LEAST_ROWS for r in (self, *self.rules))

    def settings(self, matches: Sequence[bool]) -> SiteSettings:
        """The settings of a site, given which of `rules` match it."""
        return _interpret(self.merged(matches), any(hit and not rule.only_exact for rule, hit in zip(self.rules, matches, strict=True)))

    def merged(self, matches: Sequence[bool]) -> dict[str, Any]:
        """The keys that hold for a site, given which of `rules` match it."""
        keys = _own_keys(self)
        for rule, hit in zip(self.rules, matches, strict=True):
            if not hit:
                continue
            new = _own_keys(rule)
            if new.get("method") == "exact":
                for key in (*PRODUCTS, "grad"):
                    keys.pop(key, None)
            keys |= new
        return keys


def _finds_output(keys: Mapping[str, Any]) -> bool:
    """Whether a site's output is to be sampled at a ratio that nobody says."""
    output = keys.get("output")
    return keys["policy"] == "adaptive" and output is not None and output.method != "exact" and output.ratio is None


def _with_plan(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with a plan's under them, and of the plan the record alone."""
    own = {k: v for k, v in data.items() if k != "plan"}
    given = data.get("plan")
    if given is None or isinstance(given, Tuned):
        return dict(data)
    try:
        plan, where = TunedPlan.given(given)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    try:
        ApproxConfig(**plan.options)  # what is wrong with the file is the file's fault, not that of the keys beside it
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    return plan.overridden(own) | {"plan": plan.tuned}


def _own_keys(rules: _Rules) -> dict[str, Any]:
    names = _Rules.model_fields
    return {k: getattr(rules, k) for k in names if getattr(rules, k) is not None}


def _interpret(keys: dict[str, Any], named: bool) -> SiteSettings:
    """Merged keys -> one request per product: a product's key beats `grad`, which beats `sampling`."""
    base = ProductSettings(keys["method"], keys["ratio"], keys["min_k"], keys["group"], lowering=keys["lowering"])
    exact = replace(base, method="exact")
    rows = _row_settings(keys)
    by_sampling = {
        "forward": (base, replace(base, method="coupled")),
        "backward": (exact, base),
        "blackbox": (base, exact),
    }
    # rows are sampled in the backward pass of an exact forward pass, unless an output is set by itself
    output, grad = (exact, exact) if base.method == "exact" or rows is not None or keys["policy"] == "adaptive" else by_sampling[keys["sampling"]]

    def with_table(start: ProductSettings, *tables: ProductTable | None) -> ProductSettings:
        given: dict[str, Any] = {}
        for table in tables:
            if table is not None:
                given |= {k: v for k, v in table.model_dump(exclude={"axis", "batch_norm"}).items() if v is not None}
        if not given:
            return start
        return replace(base, **given)

    both = keys.get("grad") if rows is None else None
    output = with_table(output, keys.get("output"))
    if keys["policy"] == "adaptive" and output.method != "exact":  # a rule allows it: then as everywhere else
        grad = by_sampling[keys["sampling"]][1]
    grads = [with_table(grad, both, keys.get(name)) for name in ("grad_input", "grad_weight")]
    if output.method == "exact":  # nothing to couple to
        grads = [replace(g, method="exact") if g.method == "coupled" else g for g in grads]
    return SiteSettings(output, grads[0], grads[1], keys["policy"], named, rows, keys.get("share"))


def _row_settings(keys: dict[str, Any]) -> RowSettings | None:
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


def _message(error: pydantic.ValidationError) -> str:
    """pydantic's report as one line per problem: `rules[1].ratio: got 3; ...`."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        where = ""
        for part in item["loc"]:
            where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            text = "this key is required"
        text = text.removeprefix(f"{where.rpartition('.')[2]}: ") if where else text  # patterns and slices name their key themselves
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(dict.fromkeys(lines))
