"""Define the table `units`: the keys of the methods that choose which units of a hidden layer a training step computes."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, field_validator

from approx_compile.config.schema import Table

_OWNER = {"alpha": "adaptive_dropout", "beta": "adaptive_dropout"}
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
