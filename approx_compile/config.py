"""What the user asks for: one schema for `options`, `ApproxConfig` and (later) plan files, checked on construction.

Rules are merged key by key, later wins. `settings` turns the merged keys into one decision request per product; whether a
site can honour it is `passes.plan`'s business.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from approx_compile import _torch

ESTIMATORS = ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta")
METHODS = (*ESTIMATORS, "exact")
SAMPLINGS = ("forward", "backward", "blackbox")
POLICIES = ("cost", "always", "adaptive", "measure")
ROW_METHODS = ("bernoulli", "topk", "uniform", "wta")
LOWERINGS = ("auto", "inductor")
KINDS = ("conv", "linear", "matmul", "site")
PRODUCTS = ("output", "grad_input", "grad_weight")

LADDER = (0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Shares of the batch, a factor of about the square root of 2 apart."""

LEAST_ROWS = 2
"""`min_k` of row sampling, if its table has none. (Compiled code takes one row for another case than many.)"""

# Named in the design and the papers, not in this version: refused by name, so that nobody waits for an effect.
_NOT_BUILT: dict[str, tuple[str, ...]] = {
    "method": ("zero", "random", "max", "dropout", "adaptive_dropout", "alsh"),
    "lowering": ("triton", "cuda"),
    "key": ("steps", "plan", "j", "scale", "std"),
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
            if key in _NOT_BUILT["key"]:
                raise ValueError(f"key {key!r} is not built yet; valid keys here are {', '.join(valid)}")
            raise ValueError(f"unknown key {key!r}; valid keys here are {', '.join(valid)}.{_nearest(str(key), valid)}")
        return dict(data)

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        return value if value is None else _choice("method", value, METHODS, "method")

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


class ProductTable(_Keys):
    """Settings of one product: `{"method": ..., "ratio": ..., "min_k": ..., "group": ...}`, each optional."""


class GradTable(ProductTable):
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
    """How `policy: "adaptive"` decides how many rows a step needs.

    `tau`: the variance that leaving out rows may add, as a share of the gradient's own; `ladder`: the shares of the batch to choose from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tau: float = 0.025
    ladder: tuple[float, ...] = LADDER

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"got {data!r}; a table (dict) is expected")
        for key in data:
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}; valid keys here are {', '.join(cls.model_fields)}.{_nearest(str(key), tuple(cls.model_fields))}")
        return dict(data)

    @field_validator("tau", mode="before")
    @classmethod
    def _check_tau(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"got {value!r}; a number above 0 is expected, the added share of the gradient's variance (0.025)")
        return float(value)

    @field_validator("ladder", mode="before")
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
    output: ProductTable | None = None
    grad: GradTable | None = None
    grad_input: ProductTable | None = None
    grad_weight: ProductTable | None = None

    @field_validator("sampling", mode="before")
    @classmethod
    def _check_sampling(cls, value: Any) -> Any:
        return value if value is None else _choice("sampling", value, SAMPLINGS, "sampling")

    @field_validator("policy", mode="before")
    @classmethod
    def _check_policy(cls, value: Any) -> Any:
        return value if value is None else _choice("policy", value, POLICIES, "policy")

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
    """Settings for the sites that `layers` matches.

    `layers`: a kind (`conv`, `linear`, `matmul`, `site`), bare or with an index or slice in execution order (`conv[1::4]`); else a glob
    on the module's name, `*` crossing dots, or `re:` and a regular expression; a list means any of them.
    """

    layers: tuple[str, ...] = Field(min_length=1)

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not items or not all(isinstance(i, str) for i in items):
            raise ValueError(f"got {value!r}; a pattern or a list of patterns (strings) is expected")
        for item in items:
            Pattern.parse(item)
        return tuple(items)


@dataclass(frozen=True)
class Pattern:
    """One parsed entry of `layers`."""

    text: str
    kind: str | None = None
    index: slice | int | None = None
    regex: re.Pattern[str] | None = None

    @staticmethod
    def parse(text: str) -> Pattern:
        if not text.strip():
            raise ValueError("layers: an empty pattern; write 'site' for every site")
        if text.startswith("re:"):
            try:
                return Pattern(text, regex=re.compile(text[3:]))
            except re.error as e:
                raise ValueError(f"layers: {text!r} is not a regular expression: {e}") from None
        kind = re.fullmatch(rf"({'|'.join(KINDS)})(\[.*)?", text)
        if kind is None:
            if text.count("[") != text.count("]"):
                raise ValueError(f"layers: {text!r} has an unbalanced bracket; '[abc]' in a glob is a set of characters")
            return Pattern(text)
        if kind[2] is None:
            return Pattern(text, kind=kind[1])
        return Pattern(text, kind=kind[1], index=_parse_slice(text, kind[2]))

    @property
    def is_name(self) -> bool:
        """Whether it is matched against module names (and not against kinds)."""
        return self.kind is None

    def matches_name(self, *names: str) -> bool:
        if self.regex is not None:
            return any(self.regex.fullmatch(n) for n in names)
        return any(fnmatchcase(n, self.text) for n in names)

    def matches_position(self, position: int, count: int) -> bool:
        """Whether `index` holds the site at `position` among `count` of its kind."""
        if self.index is None:
            return True
        if isinstance(self.index, int):
            return position == (self.index if self.index >= 0 else self.index + count)
        return position in range(count)[self.index]


def _parse_slice(text: str, brackets: str) -> slice | int:
    inside = re.fullmatch(r"\[\s*(-?\d*)\s*(?::\s*(-?\d*)\s*(?::\s*(-?\d*)\s*)?)?\]", brackets)
    try:
        if inside is None:
            raise ValueError
        parts = [p for p in inside.groups() if p is not None]
        if len(parts) == 1:
            return int(parts[0])
        numbers = [int(p) if p else None for p in parts]
        if len(numbers) == 3 and numbers[2] == 0:
            raise ValueError
        return slice(*numbers)
    except ValueError:
        raise ValueError(
            f"layers: {text!r} is no valid slice; write conv[3], conv[1::4], linear[:-1] (a kind, then a Python index or slice with a step other than 0)"
        ) from None


@dataclass(frozen=True)
class ProductSettings:
    """What is asked of one product of one site. `method` "coupled" = through the entries that the output kept; `whole`: k is rounded up to its multiples."""

    method: str
    ratio: float
    min_k: int
    group: int | Literal["auto"]
    whole: int = 1


@dataclass(frozen=True)
class RowSettings:
    """What is asked of the backward pass from a site down: which rows go on. `ratio` None: as many as the measured variance asks for."""

    method: str
    ratio: float | None
    min_k: int
    approximate_batch_norm: bool


@dataclass(frozen=True)
class SiteSettings:
    """What is asked of one site. `named` = a rule matched it (which lifts the default policy's modesty)."""

    output: ProductSettings
    grad_input: ProductSettings
    grad_weight: ProductSettings
    policy: str
    named: bool
    rows: RowSettings | None = None


class ApproxConfig(_Rules):
    """The backend's settings; the same keys as `options` of `torch.compile(model, backend="approx", options=...)`.

    Keys: `method` (one of `ESTIMATORS` or "exact"), `ratio` in (0, 1], `min_k` (shorter axes are exact), `group` (contiguous indices kept or
    dropped together), `sampling` (forward | backward | blackbox), `output` / `grad_input` / `grad_weight` / `grad` (a method's name or a
    table; `grad` with `axis: "rows"`: samples of the batch), `policy` (adaptive | cost | measure | always; without
    it, adaptive if no other key says what to sample, else cost), `adaptive` (see `AdaptiveTable`), `rules` (a list
    of tables with `layers`), `lowering` (auto | inductor), `inductor` (Inductor's own options, `mode` included). Frozen, hashable, deep-copyable,
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
    lowering: str = "auto"
    inductor: Mapping[str, Any] = Field(default_factory=dict)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
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

    @field_validator("method", "ratio", "min_k", "group", "sampling", "policy", mode="before")
    @classmethod
    def _not_none(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("got None; leave the key out for its default")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_policy(cls, data: Any) -> Any:
        """ "adaptive", unless something says how products are to be sampled: then "cost"."""
        if isinstance(data, Mapping) and "policy" not in data and (set(data) - {"adaptive", "inductor", "lowering"}):
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

    @field_validator("rules", mode="before")
    @classmethod
    def _rules_list(cls, value: Any) -> Any:
        if isinstance(value, Mapping) or not isinstance(value, (list, tuple)):
            raise ValueError(f"got {value!r}; a list of rules (dicts with 'layers') is expected")
        return tuple(value)

    @field_validator("lowering", mode="before")
    @classmethod
    def _check_lowering(cls, value: Any) -> Any:
        return _choice("lowering", value, LOWERINGS, "lowering")

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
        content = self.model_dump(mode="python", exclude={"inductor"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(Pattern.parse(t) for t in dict.fromkeys(t for rule in self.rules for t in rule.layers))

    def asks_for_rows(self) -> bool:
        """Whether the top level or a rule may sample rows."""
        here = [_row_settings(_own_keys(self)), *(_row_settings(_own_keys(self) | _own_keys(r)) for r in self.rules)]
        return any(r is not None for r in here)

    def asks_for_products(self) -> bool:
        """Whether any product may be sampled along its own axis. Rules, which may combine in many ways, count as asking."""
        settings = self.settings([False] * len(self.rules))
        return bool(self.rules) or any(p.method != "exact" for p in (settings.output, settings.grad_input, settings.grad_weight))

    def measures(self) -> bool:
        """Whether any site may be decided by timing it."""
        return "measure" in [self.policy, *(rule.policy for rule in self.rules)]

    def least_rows(self) -> int:
        """The smallest `min_k` that row sampling may meet."""
        return min(r.grad.min_k if r.grad is not None and r.grad.min_k is not None else LEAST_ROWS for r in (self, *self.rules))

    def settings(self, matches: Sequence[bool]) -> SiteSettings:
        """The settings of a site, given which of `rules` match it."""
        keys = _own_keys(self)
        for rule, hit in zip(self.rules, matches, strict=True):
            if not hit:
                continue
            new = _own_keys(rule)
            if new.get("method") == "exact":
                for key in (*PRODUCTS, "grad"):
                    keys.pop(key, None)
            keys |= new
        return _interpret(keys, any(matches))


def _own_keys(rules: _Rules) -> dict[str, Any]:
    names = _Rules.model_fields
    return {k: getattr(rules, k) for k in names if getattr(rules, k) is not None}


def _interpret(keys: dict[str, Any], named: bool) -> SiteSettings:
    """Merged keys -> one request per product: a product's key beats `grad`, which beats `sampling`."""
    base = ProductSettings(keys["method"], keys["ratio"], keys["min_k"], keys["group"])
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
                given |= {k: v for k, v in table.model_dump(include=set(_Keys.model_fields)).items() if v is not None}
        if not given:
            return start
        return replace(base, **given)

    both = keys.get("grad") if rows is None else None
    output = with_table(output, keys.get("output"))
    grads = [with_table(grad, both, keys.get(name)) for name in ("grad_input", "grad_weight")]
    if output.method == "exact":  # nothing to couple to
        grads = [replace(g, method="exact") if g.method == "coupled" else g for g in grads]
    return SiteSettings(output, grads[0], grads[1], keys["policy"], named, rows)


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
        lines.append(f"{where}: {text}" if where and not text.startswith(where + ":") else text)
    return "; ".join(dict.fromkeys(lines))
