"""Define the tables of keys for products, gradients and the adaptive policy, with what every key does.

The tables are checked on construction. `resolve` combines them into what is asked of a site. The description of a key is read by people in
docs/reference/configuration.md, which is made from it. The `examples` of a key are whole options, so that each of them can be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from approx_compile.config.words import (
    ESTIMATORS,
    METHODS,
    REPLACEMENTS,
    ROW_AXES,
    ROW_METHODS,
    AnyMethod,
    Axis,
    BatchNorm,
    InputMethod,
    Method,
    WeightMethod,
    choice,
    integer,
    is_share,
    positive,
)


def restated(model: type[BaseModel], key: str, default: Any) -> Any:
    """Return a field with the description, the bounds and the examples that a key has in another model, and with another default.

    Args:
        model: The other model.
        key: The key.
        default: The default.

    Returns:
        What `pydantic.Field` returns.
    """
    field = model.model_fields[key]
    copied = Field(default, description=field.description, examples=field.examples, json_schema_extra=field.json_schema_extra)
    copied.metadata = list(field.metadata)
    return copied


class Table(BaseModel):
    """A table of settings: frozen, and with known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _a_table(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"got {data!r}; a table (dict) is expected")
        return dict(data)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Take up a pickled state. Keys that a table of an earlier version lacks get their defaults."""
        super().__setstate__(state)
        for key, field in type(self).model_fields.items():
            self.__dict__.setdefault(key, field.get_default(call_default_factory=True))


class SamplingKeys(Table):
    """The keys that a product's table, a rule and the whole config share. None means: not set here."""

    methods: ClassVar[tuple[str, ...]] = METHODS

    method: AnyMethod | None = Field(
        default=None,
        description="How the kept entries of a product's contraction axis are chosen. `topk` keeps the entries with the largest product of the operands' "
        "norms, `topk_weights` those with the largest norm of the weight; neither rescales them (biased, with the smallest error). `crs`, `bernoulli` and "
        "`uniform` draw entries at random and rescale them, so that the product is unbiased; `wta` always keeps the largest and draws the rest. `exact` "
        "computes the products exactly. Set `exact` in a rule to leave layers alone; set an unbiased method where only gradients are sampled. `dropout`, "
        "`adaptive_dropout` and `alsh` choose units of hidden linear layers: a training step computes `ratio` of them, the others are 0 in both passes. "
        "`dropout` draws them uniformly, `adaptive_dropout` by estimated outputs, and `alsh` looks up those with large outputs in hash tables.",
        examples=[
            {"method": "crs", "sampling": "backward"},
            {"rules": [{"layers": "head", "method": "exact"}]},
            {"policy": "always", "method": "dropout", "ratio": 0.5},
        ],
    )
    ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The share of the axis that is kept, without unit; 1 is exact. A smaller ratio saves more time and adds more error. A `ratio` at the top, "
        "or in a rule, asks for sampled products, forward pass included, unless `sampling` is `backward`. Leave it out to let the policy `adaptive` choose.",
        examples=[{"ratio": 0.25, "sampling": "backward"}],
    )
    min_k: int | None = Field(
        default=None,
        ge=1,
        description="The fewest entries to keep of an axis, as a count. An axis that is not longer than this is exact. Raise it where narrow layers lose "
        "accuracy; lower it to sample narrow layers.",
        examples=[{"policy": "cost", "min_k": 32}],
    )
    group: int | Literal["auto"] | None = Field(
        default=None,
        description="How many contiguous indices are kept or dropped together, as a count. With `auto` the policies `cost` and `measure` choose single "
        "indices or longer runs, whichever takes less time; else it is 1 for axes below 256 entries, for convolutions and for `grad_weight`, and a run that "
        "is gathered at full speed (16 on CPUs, 32 on GPUs) for the rest. Set 1 for the smallest error, and a larger number for faster gathers.",
        examples=[{"policy": "cost", "group": 16}],
        json_schema_extra={"minimum": 1},
    )

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        products = [product for product, methods in REPLACEMENTS.items() if isinstance(value, str) and value in methods]
        if products and value not in cls.methods:
            raise ValueError(f"{value!r} replaces a gradient and can be the method of {' and '.join(products)} only; valid here are {', '.join(cls.methods)}")
        return value if value is None else choice("method", value, cls.methods)

    @field_validator("ratio", mode="before")
    @classmethod
    def _check_ratio(cls, value: Any) -> Any:
        if value is not None and not is_share(value):
            example = value / 100 if isinstance(value, int | float) and 10 <= value < 100 else 0.5  # who gives 25 may think of percent
            raise ValueError(f"got {value!r}; a number in (0, 1] is expected, the share of the axis that is kept, such as {example:g}")
        return value if value is None else float(value)

    @field_validator("min_k", mode="before")
    @classmethod
    def _check_min_k(cls, value: Any) -> Any:
        return value if value is None else integer(value, "the fewest entries to keep, such as 16")

    @field_validator("group", mode="before")
    @classmethod
    def _check_group(cls, value: Any) -> Any:
        if value in (None, "auto"):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"got {value!r}; 'auto' or an integer of at least 1 is expected, such as 16")
        return value


_REPLACEMENT_KEYS = {"j": "max", "tile": "max", "scale": "max", "std": "random"}
_SAMPLING_KEYS = ("ratio", "min_k", "group")


class ProductTable(SamplingKeys):
    """Settings of one product: `{"method": ..., "ratio": ..., "min_k": ..., "group": ...}`, each optional."""

    @property
    def samples(self) -> bool:
        """Whether a method or a ratio asks for the product to be sampled; `min_k` and `group` only say how."""
        return self.ratio != 1 and (self.method in ESTIMATORS or (self.method is None and self.ratio is not None))

    @property
    def replaces(self) -> bool:
        """Whether the method replaces the product."""
        return any(self.method in methods for methods in REPLACEMENTS.values())

    @property
    def only_how(self) -> str | None:
        """A key that says how to sample although none asks for the product to be sampled; None if there is no such key."""
        if self.method is not None or self.ratio is not None:
            return None
        return next((k for k in ("min_k", "group") if getattr(self, k) is not None), None)


class OutputTable(ProductTable):
    """Settings of the output of a layer."""

    method: Method | None = Field(
        default=None,
        description="How the output is approximated, with the words of the key `method` at the top. Under the policy `adaptive` a method here allows the "
        "output to be sampled, at the ratio that `adaptive.error` allows.",
        examples=[{"policy": "cost", "output": {"method": "topk_weights"}}, {"rules": [{"layers": "blocks.*", "output": {"method": "topk"}}]}],
    )


class GradientTable(ProductTable):
    """Settings of a gradient product, with the keys of the method "max"."""

    j: int | None = Field(
        default=None,
        ge=1,
        description="With the method `max`: how many entries of largest magnitude of every row of the output gradient count; 1 if not set. More entries bring "
        "the gradient closer to the exact one and take longer.",
        examples=[{"rules": [{"layers": "linear", "grad_input": {"method": "max", "j": 8}}]}],
    )
    scale: float | None = Field(
        default=None,
        gt=0,
        description="With the method `max`: the factor on the result; 1 if not set. Below 1 it shortens a gradient that the sum of a whole channel at one "
        "place makes too long.",
        examples=[{"rules": [{"layers": "linear", "grad_input": {"method": "max", "scale": 0.5}}]}],
    )

    @field_validator("j", mode="before")
    @classmethod
    def _check_j(cls, value: Any) -> Any:
        return value if value is None else integer(value, "the entries of the output gradient that count, such as 4")

    @field_validator("tile", mode="before", check_fields=False)
    @classmethod
    def _check_tile(cls, value: Any) -> Any:
        if value in (None, "auto") or (isinstance(value, float) and 0 < value < 1) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(
            f"got {value!r}; 'auto', an integer of at least 1 or a share in (0, 1) is expected: the side of the tiles that have an entry each, in places or "
            "as a share of the image's longest side"
        )

    @field_validator("scale", mode="before")
    @classmethod
    def _check_scale(cls, value: Any) -> Any:
        return value if value is None else positive(value, "the factor on the gradient, such as 0.5")

    @field_validator("std", mode="before", check_fields=False)
    @classmethod
    def _check_std(cls, value: Any) -> Any:
        return value if value is None else positive(value, "the standard deviation of the random gradient, such as 0.01")

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


class InputTable(GradientTable):
    """Settings of `grad_input`.

    The method "max" computes it from only the `j` entries of largest magnitude in every row of the output gradient.
    """

    methods = (*METHODS, *REPLACEMENTS["grad_input"])

    method: InputMethod | None = Field(
        default=None,
        description="How the gradient of the input is approximated: one of the words of the key `method` at the top, or `max`, which computes it from only "
        "the `j` entries of largest magnitude of every row of the output gradient (linear layers only).",
        examples=[{"rules": [{"layers": "linear", "grad_input": {"method": "max", "j": 8}}]}],
    )


class WeightTable(GradientTable):
    """Settings of `grad_weight`.

    The method "zero" replaces it by zeros, "random" by normal numbers with mean 0. The method "max" computes it from only the entries of largest magnitude of
    the output gradient. For a linear layer these are the `j` largest of every row. For a convolution they are the `j` largest of every sample's output
    channel, which carry the sum of the whole channel, or with `tile` the largest of every tile of a channel, which carries the sum of the tile.
    """

    methods = (*METHODS, *REPLACEMENTS["grad_weight"])

    method: WeightMethod | None = Field(
        default=None,
        description="How the gradient of the weight is approximated: one of the words of the key `method` at the top except `topk_weights`, or a replacement. "
        "`zero` puts zeros in its place, and `random` normal numbers with mean 0. `max` computes it from only the entries of largest magnitude of the output "
        "gradient: of a linear layer the `j` largest of every row, of a convolution the `j` largest of every sample's output channel, which carry the sum of "
        "the whole channel, or with `tile` the largest of every tile.",
        examples=[{"rules": [{"layers": "conv[1::4]", "steps": "3::4", "grad_weight": {"method": "max", "tile": 0.5, "scale": 0.5}}]}],
    )
    j: int | None = Field(
        default=None,
        ge=1,
        description="With the method `max`: how many entries of largest magnitude count, of every row (linear layers) or of every sample's output channel "
        "(convolutions); 1 if not set. It excludes `tile`.",
        examples=[{"rules": [{"layers": "linear", "grad_weight": {"method": "max", "j": 8}}]}],
    )
    tile: int | float | Literal["auto"] | None = Field(
        default=None,
        description="With the method `max`, for convolutions: the side of the tiles of which the largest entry counts. An integer is a number of places, a "
        "number below 1 a share of the image's longest side (0.5: half of it), and `auto` the smallest side of 4 places or more with which a channel has at "
        "most 16 tiles. Smaller tiles bring the gradient closer to the exact one and take longer. It excludes `j`.",
        examples=[{"rules": [{"layers": "conv", "grad_weight": {"method": "max", "tile": "auto"}}]}],
        json_schema_extra={"exclusiveMinimum": 0},
    )
    std: float | None = Field(
        default=None,
        gt=0,
        description="With the method `random`: the standard deviation, in the unit of the gradient; 1 / batch if not set, where a linear layer's batch counts "
        "tokens.",
        examples=[{"rules": [{"layers": "conv", "grad_weight": {"method": "random", "std": 0.01}}]}],
    )

    @model_validator(mode="after")
    def _entries_of_one_kind(self) -> Self:
        if self.tile is not None and self.j is not None:
            raise ValueError(
                f"tile and j: got {self.tile} and {self.j}; either the j largest entries of a channel count, or the largest of every tile: drop one"
            )
        return self


class GradTable(GradientTable):
    """Settings of both gradients."""

    methods = (*METHODS, *REPLACEMENTS["grad_input"])

    method: InputMethod | None = Field(
        default=None,
        description="With axis `contraction`: how both gradients are approximated, by one of the words of the key `method` at the top, or by `max`, which "
        "computes them from only the `j` entries of largest magnitude of every row of the output gradient (linear layers only). With axis `rows` or `tokens`: "
        "how samples or tokens are chosen, one of `bernoulli` (the default), `topk`, `uniform` and `wta`, or `exact` for all.",
        examples=[{"sampling": "backward", "grad": {"method": "crs", "ratio": 0.5}}, {"grad": {"axis": "rows", "method": "uniform", "ratio": 0.5}}],
    )
    axis: Axis | None = Field(
        default=None,
        description="What is sampled. `contraction` (the default of a table) samples each gradient product along its own axis. `rows` runs the whole backward "
        "pass on some samples of the batch, which are chosen by the norms of their gradients: `ratio` of them, or, if it is not set, as many as "
        "the policy finds. `min_k` is then the fewest samples, 2 if not set. `tokens` does so for tokens, the (sample, position) entries of a "
        "batch of sequences, in every part of the backward pass that keeps them apart, such as the MLP of a transformer block. Without a table the "
        "policy `adaptive` chooses tokens where most of the work is in linear layers that see several tokens of every sample, and samples "
        "elsewhere.",
        examples=[{"grad": {"axis": "rows", "ratio": 0.25}}, {"grad": {"axis": "tokens", "ratio": 0.25}}],
    )
    batch_norm: BatchNorm | None = Field(
        default=None,
        description="With axis `rows`: whether the backward pass of BatchNorm is `exact`, on all samples, so that rows end there, or `approximate`, on the "
        "chosen samples alone. `approximate` saves time in networks with BatchNorm, with a bias of order 1 / batch and more noise; check the accuracy. "
        "Every sample is then kept with a probability of at least half the share of the samples.",
        examples=[{"grad": {"axis": "rows", "ratio": 0.5, "batch_norm": "approximate"}}],
    )

    @field_validator("axis", "batch_norm", mode="before")
    @classmethod
    def _check_words(cls, value: Any, info: ValidationInfo) -> Any:
        return value if value is None else choice(str(info.field_name), value)

    @property
    def samples(self) -> bool:
        """Whether the table asks for sampled products, not for rows or tokens."""
        return self.axis not in ROW_AXES and super().samples

    @property
    def only_how(self) -> str | None:
        """As for other products; None with axis "rows" or "tokens", which are sampled without further keys."""
        return None if self.axis in ROW_AXES else super().only_how

    @model_validator(mode="after")
    def _rows(self) -> GradTable:
        if self.axis in ROW_AXES:
            if self.method is not None and self.method not in (*ROW_METHODS, "exact"):
                raise ValueError(f"method: got {self.method!r}, which can't choose {self.axis}; valid with axis {self.axis!r} are {', '.join(ROW_METHODS)}")
            if self.group not in (None, 1, "auto"):
                raise ValueError(f"group: got {self.group!r}; {self.axis} are chosen one by one, leave it out with axis {self.axis!r}")
        if self.axis != "rows" and self.batch_norm is not None:
            raise ValueError("batch_norm: only with axis 'rows'")
        return self
