"""Define the table `units`: the keys of the methods that choose which units of a hidden layer a training step computes."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, field_validator

from approx_compile.config.schema import Table
from approx_compile.config.words import integer

_OWNER = {
    **dict.fromkeys(("alpha", "beta"), "adaptive_dropout"),
    **dict.fromkeys(("bits", "tables", "powers", "early_samples", "early_every", "every"), "alsh"),
}
"""The method that each key belongs to."""


class UnitsTable(Table):
    """Settings of the methods that choose units of a layer."""

    alpha: float = Field(
        default=1.0,
        description="With the method `adaptive_dropout`: the factor of the estimated pre-activation z in the probability sigmoid(alpha z + beta) that a unit "
        "is computed. The larger it is, the more the choice follows z; 0 makes all units equally likely.",
        examples=[{"policy": "always", "method": "adaptive_dropout", "units": {"alpha": 2.0}}],
    )
    beta: float = Field(
        default=0.0,
        description="With the method `adaptive_dropout`: the summand in the probability sigmoid(alpha z + beta). The probabilities are then scaled so that "
        "`ratio` of the units is expected; a large beta makes them more equal, a small one lets few units stand out.",
        examples=[{"policy": "always", "method": "adaptive_dropout", "units": {"beta": -1.0}}],
    )

    bits: int = Field(
        default=6,
        ge=1,
        le=16,
        description="With the method `alsh`: the bits of a bucket's number, K in the paper; a table has 2^bits buckets. More bits find fewer units.",
        examples=[{"policy": "always", "method": "alsh", "ratio": 0.05, "units": {"bits": 8}}],
    )
    tables: int = Field(
        default=5,
        ge=1,
        description="With the method `alsh`: the number of hash tables, L in the paper. More tables find more units, and take longer.",
        examples=[{"policy": "always", "method": "alsh", "ratio": 0.05, "units": {"tables": 10}}],
    )
    powers: int = Field(
        default=3,
        ge=1,
        description="With the method `alsh`: how many powers of a weight's norm its transform P appends, m in the paper.",
        examples=[{"policy": "always", "method": "alsh", "ratio": 0.05, "units": {"powers": 2}}],
    )
    early_samples: int = Field(
        default=10_000,
        ge=1,
        description="With the method `alsh`: for so many training samples the tables are rebuilt after `early_every` samples, later after `every` samples.",
        examples=[{"policy": "always", "method": "alsh", "ratio": 0.05, "units": {"early_samples": 50_000}}],
    )
    early_every: int = Field(
        default=100,
        ge=1,
        description="With the method `alsh`: the samples from one rebuild of the tables to the next at the beginning of the training.",
        examples=[{"policy": "always", "method": "alsh", "ratio": 0.05, "units": {"early_every": 500}}],
    )
    every: int = Field(
        default=1_000,
        ge=1,
        description="With the method `alsh`: the samples from one rebuild of the tables to the next, after the first `early_samples`. Fewer keep up with "
        "the weights more closely and take longer.",
        examples=[{"policy": "always", "method": "alsh", "ratio": 0.05, "units": {"every": 5_000}}],
    )

    @field_validator("bits", "tables", "powers", "early_samples", "early_every", "every", mode="before")
    @classmethod
    def _check_count(cls, value: Any) -> Any:
        return integer(value, "such as 5")

    @field_validator("alpha", "beta", mode="before")
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"got {value!r}; a finite number is expected, such as 1.0")
        return float(value)

    def check_method(self, method: str) -> None:
        """Raise ValueError if a key is set that has no effect with a method.

        Args:
            method: The method beside the table.
        """
        for key in sorted(self.model_fields_set):
            if _OWNER[key] != method:
                raise ValueError(f"units: {key} belongs to method {_OWNER[key]!r}, and the method beside it is {method!r}; drop {key}")
