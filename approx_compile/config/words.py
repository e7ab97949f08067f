"""Define the words and numbers that settings may use, and check values against them with errors that say what is valid."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

Method = Literal["topk", "topk_weights", "crs", "bernoulli", "uniform", "wta", "exact"]
UnitMethod = Literal["dropout", "adaptive_dropout", "alsh"]
LayerMethod = Literal[Method, UnitMethod]
InputMethod = Literal[Method, "max"]
WeightMethod = Literal[Method, "max", "zero", "random"]
AnyMethod = Literal[WeightMethod, UnitMethod]
RowMethod = Literal["bernoulli", "topk", "uniform", "wta"]
Sampling = Literal["forward", "backward", "blackbox"]
Policy = Literal["cost", "always", "adaptive", "measure"]
Lowering = Literal["auto", "inductor", "triton", "cuda"]
Axis = Literal["contraction", "rows", "tokens"]
BatchNorm = Literal["exact", "approximate"]

METHODS: tuple[str, ...] = get_args(Method)
ESTIMATORS: tuple[str, ...] = tuple(m for m in METHODS if m != "exact")
UNIT_METHODS: tuple[str, ...] = get_args(UnitMethod)
"""Methods that choose the units of a hidden layer which a step computes (`kernels.unit_selection`)."""
ROW_METHODS: tuple[str, ...] = get_args(RowMethod)
REPLACEMENTS = {"grad_input": ("max",), "grad_weight": ("zero", "random", "max")}
"""Methods that replace a gradient product by another value, without sampling it (`kernels.gradient_replacements`)."""
ROW_AXES = ("rows", "tokens")
"""Axes of which a part goes through the whole backward pass, or a region of it."""
PRODUCTS = ("output", "grad_input", "grad_weight")

VALID: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "sampling": get_args(Sampling),
    "policy": get_args(Policy),
    "lowering": get_args(Lowering),
    "axis": get_args(Axis),
    "batch_norm": get_args(BatchNorm),
}
"""The valid words of every key that takes one of few."""

LADDER = (0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Shares of the batch, a factor of about the square root of 2 apart."""

OUTPUT_LADDER = (0.25, 0.35, 0.5, 0.7, 1.0)
"""Ratios of outputs under "adaptive". There are few, because each of them is compiled."""


def nearest(word: str, valid: Sequence[str]) -> str:
    """Return a hint for an error message that names the valid word most similar to `word`; empty if none is similar."""
    match = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def choice(key: str, value: Any, valid: Sequence[str] | None = None) -> str:
    """Return the value if it is one of the valid words.

    Args:
        key: The key that has the value.
        value: The value.
        valid: The valid words, if they are not all that the key may have.

    Returns:
        The value.

    Raises:
        ValueError: The value is not valid. The message lists what is, and names the key whose value it is.
    """
    words = VALID[key] if valid is None else valid
    if not isinstance(value, str):
        raise ValueError(f"got {value!r}; valid are {', '.join(words)}.")
    if value in words:
        return value
    if key == "method" and value in UNIT_METHODS:
        raise ValueError(f"{value!r} chooses the units of a whole layer: set it as the method at the top or of a rule; valid here are {', '.join(words)}")
    owner = next((other for other, others in VALID.items() if other != key and value in others), None)
    if owner is not None:
        options: dict[str, Any] = {owner: value}
        if owner in ("axis", "batch_norm"):
            options = {"grad": {"axis": "rows", "ratio": 0.25} if owner == "axis" else {"axis": "rows", **options}}
        raise ValueError(f"got {value!r}, which is a value of {owner}: {options}; valid here are {', '.join(words)}")
    raise ValueError(f"got {value!r}; valid are {', '.join(words)}.{nearest(value, words)}")


def integer(value: Any, what: str) -> int:
    """Return the value if it is an integer of at least 1.

    Args:
        value: The value.
        what: What the number is, with an example, for the error message.

    Returns:
        The value.

    Raises:
        ValueError: The value is no such integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"got {value!r}; an integer of at least 1 is expected, {what}")
    return value


def positive(value: Any, what: str) -> float:
    """Return the value as a float if it is a finite number above 0.

    Args:
        value: The value.
        what: What the number is, with an example, for the error message.

    Returns:
        The value.

    Raises:
        ValueError: The value is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"got {value!r}; a finite number above 0 is expected, {what}")
    return float(value)


def flag(value: Any, what: str) -> bool:
    """Return the value if it is a bool.

    Args:
        value: The value.
        what: What it decides, for the error message.

    Returns:
        The value.

    Raises:
        ValueError: The value is no bool.
    """
    if not isinstance(value, bool):
        raise ValueError(f"got {value!r}; true or false is expected: {what}")
    return value


def is_share(value: Any) -> bool:
    """Whether a value is a number in (0, 1]."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
