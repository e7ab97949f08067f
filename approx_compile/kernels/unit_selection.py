"""Choose the units of a hidden layer that a training step computes, before the layer's output exists ("sampling from the current layer").

A unit is one output channel of a linear layer, h_j = f(x w_j + b_j). One set of units serves the whole batch. The units left out are 0 in the forward and in
the backward pass, and the kept ones are multiplied by their scale.

| method | choice | scale | source |
|---|---|---|---|
| dropout | k of K units, uniformly | K / k | Srivastava et al. 2014 |
| adaptive_dropout | each unit by itself with p_j in proportion to sigmoid(alpha z_j + beta), sum p = k | 1 / p_j | Ba and Frey 2013 |

Here z is the layer's pre-activation of the mean of the batch's inputs, z_j = mean(x) w_j + b_j, which is the mean of the pre-activations. It takes one pass
over the weight, not one for each sample. The probabilities are water-filled (`estimators.water_fill`), so that no p_j exceeds 1 and their sum is k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from approx_compile.kernels.estimators import Estimator, select_by_score
from approx_compile.kernels.gather import Axis, untake


@dataclass(frozen=True)
class UnitChoice:
    """How the units of a layer are chosen: everything static.

    Attributes:
        estimator: The method, the number of units K and how many are kept, k.
        alpha: Of `adaptive_dropout`: the factor of the pre-activation.
        beta: Of `adaptive_dropout`: the summand.
    """

    estimator: Estimator
    alpha: float = 1.0
    beta: float = 0.0

    @property
    def reads_input(self) -> bool:
        """Whether the choice depends on the layer's input and weight."""
        return self.estimator.method != "dropout"


def choose_units(
    choice: UnitChoice, x: Tensor, weight: Tensor, bias: Tensor | None, x_idx: Tensor | None, x_scale: Tensor | None, random: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the units of a layer.

    Args:
        choice: How.
        x: The layer's input, (M, I); with `x_idx` only the kept entries of it, (M, i).
        weight: The whole weight, (I, K).
        bias: The bias, (K,), or None.
        x_idx: The entries of the input that are not zero, (i,), if only these are in x.
        x_scale: The scale of these entries, (i,), or None for 1.
        random: The generator to draw from; None draws from torch's default one. A graph takes no generators.

    Returns:
        Indices of the kept units, int64, sorted and distinct, and their scale, fp32.
    """
    if choice.reads_input:
        z = mean_pre_activation(x, weight, bias, x_idx, x_scale)
        score = torch.sigmoid(choice.alpha * z + choice.beta)
    else:
        score = torch.zeros(choice.estimator.size, device=weight.device)
    idx, scale = select_by_score(choice.estimator, score, random)
    assert scale is not None
    return idx, scale


def mean_pre_activation(x: Tensor, weight: Tensor, bias: Tensor | None, x_idx: Tensor | None, x_scale: Tensor | None) -> Tensor:
    """Return the mean over the batch of a layer's pre-activations, z = mean(x) W + b, (K,) in fp32; the arguments are those of `choose_units`.

    A zero-filled input of full length meets the whole weight, because gathering rows of the weight would take longer than the product.
    """
    mean = x.detach().mean(0, dtype=torch.float32)
    if x_scale is not None:
        mean = mean * x_scale
    if x_idx is not None:
        mean = untake(mean, Axis(0), x_idx, None, 1, weight.shape[0])
    z = (mean.unsqueeze(0).to(weight.dtype) @ weight.detach()).squeeze(0).float()
    return z if bias is None else z + bias.detach().float()
