"""Define the keys of rules: those that may also stand at the top of a config, and `layers`, `steps` and `phase`, which say where and when a rule holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator, model_validator

from approx_compile.config.schema import LOWERINGS, POLICIES, SAMPLINGS, GradTable, InputTable, ProductTable, SamplingKeys, WeightTable, choice
from approx_compile.config.selectors import ActivePeriod, LayerPattern, StepSlice


class RuleKeys(SamplingKeys):
    """The keys that may stand in a rule and at the top of a config (see `ApproxConfig`). None means not set here."""

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
        return value if value is None else choice("sampling", value, SAMPLINGS, "sampling")

    @field_validator("policy", mode="before")
    @classmethod
    def _check_policy(cls, value: Any) -> Any:
        return value if value is None else choice("policy", value, POLICIES, "policy")

    @field_validator("lowering", mode="before")
    @classmethod
    def _check_lowering(cls, value: Any) -> Any:
        return value if value is None else choice("lowering", value, LOWERINGS, "lowering")

    @field_validator("output", "grad", "grad_input", "grad_weight", mode="before")
    @classmethod
    def _name_or_table(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @property
    def tables(self) -> dict[str, ProductTable]:
        """The tables of products that are set here."""
        return {k: table for k in ("output", "grad", "grad_input", "grad_weight") if (table := getattr(self, k)) is not None}

    @model_validator(mode="after")
    def _combinations(self) -> RuleKeys:
        if self.grad_weight is not None and self.grad_weight.method == "topk_weights":
            raise ValueError(
                "grad_weight: method 'topk_weights' ranks by the weight's norms, and the weight is no operand of grad_weight; "
                "use topk, crs, bernoulli, uniform or wta"
            )
        if self.method == "exact":
            for key, table in self.tables.items():
                if table.method != "exact":
                    raise ValueError(
                        f"method 'exact' makes all three products exact, but {key} is set beside it; "
                        f"drop {key}, or set output='exact' in place of method='exact'"
                    )
        return self


class Rule(RuleKeys):
    """Settings for the sites that `layers` matches, while `steps` and `phase` hold.

    Attributes:
        layers: A pattern, or a list of which any may match. A pattern is a kind (`conv`, `linear`, `matmul`, `site`), alone or with an index or slice in
            execution order (`conv[1::4]`); a glob on the module's name, in which `*` matches dots too; or `re:` followed by a regular expression. In a
            rule with `steps` or `phase` it may be left out and means every site.
        steps: A Python slice over completed optimizer steps, from 0 ("::2", "3::4", ":8000"). Its ends may be shares of `total_steps` ("80%:").
        phase: The name or names of the phases in which the rule holds (see `set_phase`).
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
            LayerPattern.parse(item)  # raises if it is not a pattern
        return tuple(items)

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"got {value!r}; a slice over optimizer steps as a string is expected: '::2', '3::4', ':8000', '80%:'")
        StepSlice.parse(value, 1_000_000)  # checks the syntax; shares are checked where total_steps is known
        return value

    @field_validator("phase", mode="before")
    @classmethod
    def _check_phase(cls, value: Any) -> Any:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not items or not all(isinstance(i, str) and i for i in items):
            raise ValueError(f"got {value!r}; the name of a phase or a list of names (strings) is expected")
        return tuple(items)

    @property
    def patterns(self) -> tuple[LayerPattern, ...]:
        """The entries of `layers`, parsed."""
        return tuple(LayerPattern.parse(text) for text in self.layers)

    @property
    def timed(self) -> bool:
        """Whether the rule holds at some steps or phases only."""
        return self.steps is not None or self.phase is not None

    def when(self, total: int | None) -> ActivePeriod:
        """Return the steps and phases at which the rule holds, in a run of `total` optimizer steps (None if unknown)."""
        return ActivePeriod(StepSlice.parse(self.steps, total) if self.steps is not None else None, self.phase)

    @property
    def samples(self) -> bool:
        """Whether the rule asks for sampled products; exact or replaced products and rows of the batch do not count."""
        itself = self.method != "exact" and self.ratio != 1 and any(v is not None for v in (self.method, self.ratio, self.sampling))
        return itself or any(t.samples for t in self.tables.values())

    @property
    def only_exact(self) -> bool:
        """Whether the rule only makes something exact."""
        return self._only_tables and all(t.method == "exact" for t in self.tables.values())

    @property
    def names(self) -> bool:
        """Whether the rule is about sampling its sites, and does not only make some of their products exact or replace them."""
        return not (self._only_tables and all(t.method == "exact" or t.replaces for t in self.tables.values()))

    @property
    def _only_tables(self) -> bool:
        said = any(v is not None for v in (self.ratio, self.sampling, self.group, self.min_k, self.lowering, self.share))
        return not said and self.method in (None, "exact") and (self.method == "exact" or bool(self.tables))
