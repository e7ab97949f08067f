"""Define the table of keys for the policy "adaptive"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from approx_compile.config.schema import Table
from approx_compile.config.words import LADDER, OUTPUT_LADDER, flag, integer, is_share, positive


class AdaptiveTable(Table):
    """Settings of the policy "adaptive", which finds how many rows a step needs, and the ratio of outputs that a rule allows to be sampled."""

    tau: float | Literal["auto"] = Field(
        default=0.025,
        description="The variance that leaving out rows may add, as a share of the gradient's own: with row norms g and probabilities p, the sum of (1 - p) / "
        "p g^2 is at most tau times the sum of g^2. What is measured of the whole gradient corrects this bound (`probe`). Raise it to keep fewer "
        "rows; lower it if the training becomes noisier than the exact one. With tokens the same sum is taken over the tokens of every region, and "
        "0 leaves out only tokens whose gradient is exactly zero, such as padding and masked prompts. `auto` bounds nothing: it keeps the share of "
        "the samples at which the time of a step, by its FLOPs, times 1 + v is least, with v the variance added, because where noise dominates "
        "training takes about 1 + v times as many steps.",
        examples=[{"adaptive": {"tau": 0.1}}, {"adaptive": {"tau": "auto"}}],
        json_schema_extra={"minimum": 0},
    )
    probe: int = Field(
        default=400,
        ge=0,
        description="The number of backward passes from one measurement of the variance that leaving out samples adds to the whole gradient to the next; 0 for "
        "none. In such a pass the backward graph runs on all samples, on chosen ones and on half of them, which takes about as long as two more backward "
        "passes. Its result is exact. Where the variance measured exceeds `tau` more samples are kept, and fewer where it is less. With tokens it runs on all "
        "and on chosen tokens in one pass, and on all in the next, and measures more often at first. Raise the number if steps that measure are too long.",
        examples=[{"adaptive": {"probe": 1000}}],
    )
    ladder: tuple[float, ...] = Field(
        default=LADDER,
        description="The shares of the batch to choose from, each in (0, 1]; 1 is always one of them. The share that is needed is rounded up to the next of "
        "these. Leave out small shares to bound how few rows are kept. With tokens the default is the multiples of 1/32.",
        examples=[{"adaptive": {"ladder": [0.25, 0.5]}}],
    )
    agree: bool = Field(
        default=False,
        description="Whether the ranks of a data-parallel training pool what they have measured, so that all keep the same share of their rows: the one that "
        "a single process with all samples would keep. It needs `approx_compile.distributed.register(ddp)`, and has no effect on a single process.",
        examples=[{"adaptive": {"agree": True}}],
    )
    error: float = Field(
        default=0.025,
        gt=0,
        description="The relative squared error e^2 = |g' - g|^2 / |g|^2 that sampled outputs may cause in the gradient g of a batch, where g' is the "
        "gradient with them. `tune(max_error=...)` bounds the same error without the square: `error` 0.025 allows e up to 0.158. It has an effect only where "
        "a rule allows an output to be sampled.",
        examples=[{"adaptive": {"error": 0.01}, "rules": [{"layers": "blocks.*", "output": "topk"}]}],
    )
    outputs: tuple[float, ...] = Field(
        default=OUTPUT_LADDER,
        description="The ratios of outputs to choose from, each in (0, 1]; 1 is always one of them. Each is compiled at the first call, so fewer of them "
        "compile faster.",
        examples=[{"adaptive": {"outputs": [0.5]}, "rules": [{"layers": "blocks.*", "output": "topk"}]}],
    )
    every: int = Field(
        default=200,
        ge=1,
        description="The number of optimizer steps from one measurement of `error` to the next. One measurement takes two or three steps' time.",
        examples=[{"adaptive": {"every": 500}, "rules": [{"layers": "blocks.*", "output": "topk"}]}],
    )

    @field_validator("tau", "error", mode="before")
    @classmethod
    def _check_share(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "tau" and value == "auto":
            return value
        if info.field_name == "tau" and value == 0 and not isinstance(value, bool):
            return 0.0
        also = ", or 'auto'" if info.field_name == "tau" else ""
        return positive(value, f"a share of the gradient's variance or square, such as 0.025{also}")

    @field_validator("every", mode="before")
    @classmethod
    def _check_every(cls, value: Any) -> Any:
        return integer(value, "the steps from one measurement to the next, such as 200")

    @field_validator("agree", mode="before")
    @classmethod
    def _check_agree(cls, value: Any) -> Any:
        return flag(value, "whether ranks pool what they have measured")

    @field_validator("probe", mode="before")
    @classmethod
    def _check_probe(cls, value: Any) -> Any:
        if value == 0 and type(value) is int:
            return 0
        return integer(value, "the backward passes from one measurement to the next, such as 400, or 0 for no measurement")

    @field_validator("ladder", "outputs", mode="before")
    @classmethod
    def _check_ladder(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value or not all(is_share(v) for v in value):
            raise ValueError(f"got {value!r}; a list of shares in (0, 1] is expected, such as {list(LADDER)}")
        return tuple(sorted({float(v) for v in value} | {1.0}))
