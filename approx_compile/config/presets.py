"""Named settings: lists of rules for the key `rules` (the schedules of Wang and Nelaturu, and any table with a method per layer and batch), and whole options.

Example:
    >>> from approx_compile import ApproxConfig, presets
    >>> presets.schedule_3("max")
    [{'layers': 'conv', 'steps': '3::4', 'grad_weight': 'max'}]
    >>> config = ApproxConfig(policy="always", method="exact", rules=presets.schedule_3("max"))

Sources: Wang and Nelaturu, "Accelerating Convolutional Neural Network Training via Gradient Approximation" (sections 2.5, 3 and 3.4); Ebrahimi, Advani and
Asudeh, "Sampling-Based Techniques for Training Deep Neural Networks with Limited Computational Resources" (sections 6.2 and 8.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RuleList = list[dict[str, Any]]
Method = str | Mapping[str, Any]

FIGURE_3 = (
    ("exact", "zero", "random", "zero"),
    ("exact", "exact", "random", "exact"),
    ("max", "exact", "random", "exact"),
    ("max", "exact", "exact", "exact"),
    ("max", "zero", "exact", "zero"),
)
"""The paper's example. Its rows are the convolutions of a network, its columns four batches, which repeat."""


def mc(ratio: float = 0.1, least: int = 10, policy: str = "always") -> dict[str, Any]:
    """Return options for MC-approx: an exact forward pass, and Bernoulli sampled products in the backward pass.

    The gradient of a weight sums over the rows of the batch, and that of an input over the output units. Of either axis `ratio` is kept in expectation, and at
    least `least` entries: 10 of a batch of 20, and 100 of 1,000 units. A shorter axis, such as that of ten outputs, is exact.

    Args:
        ratio: The share that is kept.
        least: The fewest entries that are kept.
        policy: "always" samples wherever it is legal, as in the paper; "cost" where it is predicted to save time.

    Returns:
        Options.

    Example:
        >>> import torch
        >>> from approx_compile import presets
        >>> model = torch.compile(torch.nn.Linear(64, 10), backend="approx", options=presets.mc())
    """
    return {"policy": policy, "method": "bernoulli", "sampling": "backward", "ratio": ratio, "min_k": least}


def schedule_1(method: Method) -> RuleList:
    """Return rules for every fourth convolution from the second on, at every step.

    They replace about 25% of the weight gradients (ResNet-20 and VGG-19, tables 3 and 4).
    """
    return [{"layers": "conv[1::4]", "grad_weight": method}]


def schedule_2(method: Method) -> RuleList:
    """Return rules for every other convolution at every other step (table 5)."""
    return [{"layers": "conv[1::2]", "steps": "1::2", "grad_weight": method}]


def schedule_3(method: Method) -> RuleList:
    """Return rules for every convolution at every fourth step (table 5)."""
    return [{"layers": "conv", "steps": "3::4", "grad_weight": method}]


def two_layers(method: Method) -> RuleList:
    """Return rules for the second convolution at every other step (figure 4, table 2)."""
    return [{"layers": "conv[1]", "steps": "1::2", "grad_weight": method}]


def figure_3() -> RuleList:
    """Return the rules of the example in figure 3, for a network of five convolutions."""
    return from_table(FIGURE_3)


def from_table(table: Sequence[Sequence[Method]], layers: str = "conv") -> RuleList:
    """Return rules for the weight gradients from a table of methods.

    Args:
        table: A row for each layer, in execution order, with a method for each step. The steps repeat.
        layers: The kind of layers: "conv", "linear", "matmul" or "site".

    Returns:
        A rule for every entry of the table that is not "exact".

    Raises:
        ValueError: The rows differ in length or are empty, or `layers` is not a kind.
    """
    lengths = {len(row) for row in table}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(f"from_table: rows of {sorted(lengths)} steps; every row needs the same number of them, one or more")
    if layers not in ("conv", "linear", "matmul", "site"):
        raise ValueError(f"from_table: layers={layers!r}; a kind is expected: conv, linear, matmul or site")
    steps = lengths.pop()
    return [
        {"layers": f"{layers}[{i}]", "steps": f"{step}::{steps}", "grad_weight": method}
        for i, row in enumerate(table)
        for step, method in enumerate(row)
        if method != "exact"
    ]
