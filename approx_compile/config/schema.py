"""Define the words that settings may use, and the tables of keys for products, gradients and the adaptive policy.

The tables are checked on construction. `resolve` combines them into what is asked of a site.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ESTIMATORS = ("topk", "topk_weights", "crs", "bernoulli", "uniform", "wta")
METHODS = (*ESTIMATORS, "exact")
REPLACEMENTS = {"grad_input": ("max",), "grad_weight": ("zero", "random", "max")}
"""Methods that replace a gradient product by another value, without sampling it (`kernels.gradient_replacements`)."""
SAMPLINGS = ("forward", "backward", "blackbox")
POLICIES = ("cost", "always", "adaptive", "measure")
ROW_METHODS = ("bernoulli", "topk", "uniform", "wta")
LOWERINGS = ("auto", "inductor", "triton", "cuda")
PRODUCTS = ("output", "grad_input", "grad_weight")

LADDER = (0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Shares of the batch, a factor of about the square root of 2 apart."""

OUTPUT_LADDER = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Ratios of outputs under "adaptive". There are few, because each of them is compiled."""

# Methods of the design and the papers that this version lacks. The error message names them as not built yet.
_NOT_BUILT: dict[str, tuple[str, ...]] = {
    "method": ("dropout", "adaptive_dropout", "alsh"),
}


def nearest(word: str, valid: Sequence[str]) -> str:
    """Return a hint for an error message that names the valid word most similar to `word`; empty if none is similar."""
    match = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def choice(key: str, value: Any, valid: Sequence[str], kind: str) -> str:
    """Return the value if it is one of the valid words.

    Args:
        key: The key that has the value.
        value: The value.
        valid: The valid words.
        kind: What the words are, which selects the words that are known but not built yet.

    Returns:
        The value.

    Raises:
        ValueError: The value is not valid; the message lists what is.
    """
    if value in valid and isinstance(value, str):
        return value
    if isinstance(value, str) and value in _NOT_BUILT.get(kind, ()):
        raise ValueError(f"{value!r} is not built yet; this version has {', '.join(valid)}")
    hint = nearest(value, valid) if isinstance(value, str) else ""
    raise ValueError(f"got {value!r}; valid are {', '.join(valid)}.{hint}")


class SamplingKeys(BaseModel):
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
            raise ValueError(f"unknown key {key!r}; valid keys here are {', '.join(valid)}.{nearest(str(key), valid)}")
        return dict(data)

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> Any:
        products = [product for product, methods in REPLACEMENTS.items() if isinstance(value, str) and value in methods]
        if products and value not in cls.methods:
            raise ValueError(f"{value!r} replaces a gradient and can be the method of {' and '.join(products)} only; valid here are {', '.join(cls.methods)}")
        return value if value is None else choice("method", value, cls.methods, "method")

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


class InputTable(ProductTable):
    """Settings of `grad_input`.

    The method "max" computes it from only the `j` entries of largest magnitude in every row of the output gradient.

    Attributes:
        j: The number of entries that "max" keeps of a row; 1 if not set.
        scale: The factor on the result of "max"; 1 if not set.
    """

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
        if value in (None, "auto") or (isinstance(value, float) and 0 < value < 1) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(
            f"got {value!r}; 'auto', an integer of at least 1 or a share in (0, 1) is expected: the side of the tiles that have an entry each, in places or "
            "as a share of the image's longest side"
        )

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
    """Settings of `grad_weight`.

    The method "zero" replaces it by zeros, "random" by normal numbers with mean 0. The method "max" computes it from only the entries of largest magnitude of
    the output gradient. For a linear layer these are the `j` largest of every row. For a convolution they are the `j` largest of every sample's output
    channel, which carry the sum of the whole channel, or with `tile` the largest of every tile of a channel, which carries the sum of the tile.

    Attributes:
        tile: The side of a convolution's tiles: in places, as a share of the longest side (0.5: half of it), or "auto", the smallest side of 4 places or more
            with which a channel has at most 16 tiles. It excludes `j`.
        std: The standard deviation of "random"; 1 / batch if not set.
    """

    methods = (*METHODS, *REPLACEMENTS["grad_weight"])

    tile: int | float | Literal["auto"] | None = None
    std: float | None = None

    @model_validator(mode="after")
    def _entries_of_one_kind(self) -> Self:
        if self.tile is not None and self.j is not None:
            raise ValueError(
                f"tile and j: got {self.tile} and {self.j}; either the j largest entries of a channel count, or the largest of every tile: drop one"
            )
        return self


class GradTable(InputTable):
    """Settings of both gradients.

    Attributes:
        axis: "contraction" samples each product along its own axis. "rows" runs the backward pass on some samples of the batch, which are selected by the
            norms of their gradients; `method` is then one of `ROW_METHODS`.
        batch_norm: With axis "rows", whether BatchNorm's backward pass is "exact", on all rows, or "approximate", on the selected ones.
    """

    axis: str | None = None
    batch_norm: str | None = None

    @field_validator("axis", mode="before")
    @classmethod
    def _check_axis(cls, value: Any) -> Any:
        return value if value is None else choice("axis", value, ("contraction", "rows"), "axis")

    @field_validator("batch_norm", mode="before")
    @classmethod
    def _check_batch_norm(cls, value: Any) -> Any:
        return value if value is None else choice("batch_norm", value, ("exact", "approximate"), "batch_norm")

    @property
    def samples(self) -> bool:
        """Whether the table asks for sampled products, not for rows of the batch."""
        return self.axis != "rows" and super().samples

    @property
    def only_how(self) -> str | None:
        """As for other products; None with axis "rows", which is sampled without further keys."""
        return None if self.axis == "rows" else super().only_how

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
    """Settings of the policy "adaptive", which finds how many rows a step needs, and the ratio of outputs that a rule allows to be sampled.

    Attributes:
        tau: The variance that leaving out rows may add, as a share of the gradient's own.
        ladder: The shares of the batch to choose from.
        error: The relative squared error |g' - g|^2 / |g|^2 that sampled outputs may cause in the gradient g of a batch.
        outputs: The ratios of outputs to choose from, each of which is compiled.
        every: The steps from one measurement of this error to the next.
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
                raise ValueError(f"unknown key {key!r}; valid keys here are {', '.join(cls.model_fields)}.{nearest(str(key), tuple(cls.model_fields))}")
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
