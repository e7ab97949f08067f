"""Define the keys of rules: those that may also stand at the top of a config, and `layers`, `steps` and `phase`, which say where and when a rule holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from approx_compile.config.schema import GradTable, InputTable, OutputTable, ProductTable, SamplingKeys, WeightTable, restated
from approx_compile.config.selectors import ActivePeriod, LayerPattern, StepSlice
from approx_compile.config.units import UnitsTable
from approx_compile.config.words import METHODS, UNIT_METHODS, LayerMethod, Lowering, Policy, Sampling, choice, flag


def also_text(*words: str) -> Callable[[dict[str, Any]], None]:
    """Return what adds to the JSON schema of a key that it may be text as well, which a validator turns into the key's own type.

    Args:
        *words: The valid texts; none if any is valid.

    Returns:
        A function for pydantic's `json_schema_extra`.
    """

    def change(schema: dict[str, Any]) -> None:
        text: dict[str, Any] = {"type": "string"} | ({"enum": list(words)} if words else {})
        alternatives = schema.pop("anyOf", None) or [{k: schema.pop(k) for k in ("type", "items", "$ref") if k in schema}]
        schema["anyOf"] = [text, *alternatives]

    return change


class RuleKeys(SamplingKeys):
    """The keys that may stand in a rule and at the top of a config (see `ApproxConfig`). None means not set here."""

    methods = (*METHODS, *UNIT_METHODS)

    method: LayerMethod | None = restated(SamplingKeys, "method", None)
    units: UnitsTable | None = Field(
        default=None,
        description="Settings of the methods that choose the units of a layer: `adaptive_dropout` and `alsh`.",
        examples=[{"policy": "always", "method": "adaptive_dropout", "units": {"alpha": 2.0}}],
    )
    sampling: Sampling | None = Field(
        default=None,
        description="Which products `method` applies to. `forward`: the output, with gradients through the same entries. `backward`: the gradients, and the "
        "output is exact. `blackbox`: the output, and its gradients are exact. Set `backward` to keep the forward pass exact.",
        examples=[{"ratio": 0.5, "sampling": "backward"}],
    )
    policy: Policy | None = Field(
        default=None,
        description="What decides whether a product is sampled. `adaptive`: the forward pass is exact, and the backward pass runs on as many samples, or "
        "tokens, as the variance of the gradient asks for. `cost`: a product is sampled where that is predicted to save enough time on this machine. "
        "`measure`: the same, by timing each site alone, once. `always`: every site where it is legal. If it is not set, it is `cost` where another key asks "
        "for sampled products (a `ratio`, a `method` other than `exact`, `sampling`, a table with one of these, a `plan`), else `adaptive`.",
        examples=[{"policy": "always", "ratio": 0.5, "sampling": "backward"}, {"policy": "adaptive"}],
    )
    lowering: Lowering | None = Field(
        default=None,
        description="The code that runs sampled products. `inductor` gathers the kept entries for a library's product. `triton` and `cuda` are kernels for "
        "NVIDIA GPUs that skip the other entries. `auto` takes what is predicted to be fastest among those that fit. A lowering that does not fit a site is "
        "replaced by `inductor`, and the report has the reason. Set it to compare kernels.",
        examples=[{"policy": "cost", "lowering": "inductor"}],
    )
    output: OutputTable | None = Field(
        default=None,
        description="Settings of the output of a layer. A method's name stands for a table with this method. It overrides `sampling` for this product.",
        examples=[{"policy": "cost", "output": {"method": "topk", "ratio": 0.5}}, {"policy": "cost", "output": "exact"}],
        json_schema_extra=also_text(*OutputTable.methods),
    )
    grad: GradTable | None = Field(
        default=None,
        description="Settings of both gradients, or of the samples or tokens that the backward pass runs on. A method's name stands for a table with this "
        "method. If it samples with axis `contraction`, the output is sampled too unless `sampling` is `backward`.",
        examples=[{"grad": {"axis": "rows", "ratio": 0.25}}, {"rules": [{"layers": "head", "grad": "exact"}]}],
        json_schema_extra=also_text(*GradTable.methods),
    )
    grad_input: InputTable | None = Field(
        default=None,
        description="Settings of the gradient of the input. A method's name stands for a table with this method. It overrides `grad` and `sampling` for this "
        "product. The other products follow `sampling`: if the table samples, set `output` to `exact` to sample nothing else.",
        examples=[{"output": "exact", "grad_input": {"method": "bernoulli", "ratio": 0.5}}],
        json_schema_extra=also_text(*InputTable.methods),
    )
    grad_weight: WeightTable | None = Field(
        default=None,
        description="Settings of the gradient of the weight. A method's name stands for a table with this method. It overrides `grad` and `sampling` for this "
        "product. The other products follow `sampling`: if the table samples, set `output` to `exact` to sample nothing else.",
        examples=[{"output": "exact", "grad_weight": {"method": "bernoulli", "ratio": 0.3}}, {"rules": [{"layers": "conv", "grad_weight": "max"}]}],
        json_schema_extra=also_text(*WeightTable.methods),
    )
    share: bool | None = Field(
        default=None,
        description="Whether sites that read the same activation (query, key and value; gate and up) keep the same entries of it. If it is not set, they do "
        "where that is predicted to save enough time. Set `false` where accuracy is tight: shared entries are no longer the best choice of each site.",
        examples=[{"ratio": 0.5, "share": False}],
    )

    @field_validator("share", mode="before")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        return value if value is None else flag(value, "whether sites that read the same activation keep the same entries of it")

    @field_validator("sampling", "policy", "lowering", mode="before")
    @classmethod
    def _check_words(cls, value: Any, info: ValidationInfo) -> Any:
        return value if value is None else choice(str(info.field_name), value)

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
        if self.method in UNIT_METHODS:
            self._only_units()
        if self.method == "exact":
            for key, table in self.tables.items():
                if table.method != "exact":
                    raise ValueError(
                        f"method 'exact' makes all three products exact, but {key} is set beside it; "
                        f"drop {key}, or set output='exact' in place of method='exact'"
                    )
        return self

    def _only_units(self) -> None:
        """Refuse keys that have no effect beside a method that chooses units."""
        if self.group not in (None, 1, "auto"):
            raise ValueError(f"group: got {self.group!r}; method {self.method!r} chooses units one by one, leave it out")
        for key in ("sampling", "share", *self.tables):
            if getattr(self, key) is not None and key in self.model_fields_set:
                raise ValueError(f"{key}: it has no effect beside method {self.method!r}, which leaves out whole units in all products; drop {key}")
        if self.units is not None:
            self.units.check_method(str(self.method))


class Rule(RuleKeys):
    """Settings for the sites that `layers` matches, while `steps` and `phase` hold."""

    layers: tuple[str, ...] = Field(
        default=("site",),
        description="Where the rule holds: a pattern, or a list of which any may match. A pattern is a kind (`conv`, `linear`, `matmul`, `site`), alone or "
        "with an index or slice in execution order (`conv[1::4]`); a glob on the name of the module, in which `*` matches dots too; or `re:` followed by a "
        "regular expression. A module that is called twice is two sites, `name` and `name#2`. In a rule with `steps` or `phase` it may be left out and means "
        "every site.",
        examples=[{"rules": [{"layers": ["stem.*", "head"], "method": "exact"}]}, {"rules": [{"layers": "conv[1::4]", "grad_weight": "max"}]}],
        json_schema_extra=also_text(),
    )
    steps: str | None = Field(
        default=None,
        description="At which completed optimizer steps the rule holds: a Python slice, counted from 0. Its ends may be shares of `total_steps`, in percent.",
        examples=[
            {"rules": [{"steps": "3::4", "layers": "conv", "grad_weight": "zero"}]},
            {"total_steps": 10_000, "rules": [{"steps": "80%:", "method": "exact"}]},
        ],
    )
    phase: tuple[str, ...] | None = Field(
        default=None,
        description="In which phase the rule holds: the name that `set_phase` gives, or a list of names.",
        examples=[{"rules": [{"phase": "warm-up", "method": "exact"}]}],
        json_schema_extra=also_text(),
    )

    @model_validator(mode="after")
    def _says_where(self) -> Rule:
        if not {"layers", "steps", "phase"} & self.model_fields_set:
            raise ValueError("layers: this key is required in a rule without steps or phase; 'site' means every site")
        return self

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
