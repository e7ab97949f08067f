"""Choose the units of a hidden layer that a training step computes, before the layer's output exists ("sampling from the current layer").

A unit is one output channel of a linear layer, h_j = f(x w_j + b_j). One set of units serves the whole batch. The units left out are 0 in the forward and in
the backward pass, and the kept ones are multiplied by their scale.

| method | choice | scale | source |
|---|---|---|---|
| dropout | k of K units, uniformly | K / k | Srivastava et al. 2014 |
| alsh | the k units that hash tables find most often for the batch (`hash_tables`) | 1, or 0 if not found | Spring and Shrivastava 2017 |
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
from approx_compile.kernels.hash_tables import Hashing, alsh_units


@dataclass(frozen=True)
class UnitChoice:
    """How the units of a layer are chosen: everything static.

    Attributes:
        estimator: The method, the number of units K and how many are kept, k.
        alpha: Of `adaptive_dropout`: the factor of the pre-activation.
        beta: Of `adaptive_dropout`: the summand.
        hashing: Of `alsh`: the settings of the tables.
        salt: Of `alsh`: a number that differs from layer to layer, from which the projections of new tables are drawn.
    """

    estimator: Estimator
    alpha: float = 1.0
    beta: float = 0.0
    hashing: Hashing = Hashing()
    salt: int = 0

    @property
    def by_tables(self) -> bool:
        """Whether the choice is made by hash tables of the weight, which are state, so that the weight must be a parameter."""
        return self.estimator.method == "alsh"


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
    if choice.estimator.method == "adaptive_dropout":
        z = mean_pre_activation(x, weight, bias, x_idx, x_scale)
        score = torch.sigmoid(choice.alpha * z + choice.beta)
    else:
        score = torch.zeros(choice.estimator.size, device=weight.device)
    idx, scale = select_by_score(choice.estimator, score, random)
    assert scale is not None
    return idx, scale


def look_up_units(choice: UnitChoice, x: Tensor, parameter: Tensor, transposed: bool, x_idx: Tensor | None, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose the units of a layer by the hash tables of its weight.

    Args:
        choice: How.
        x: The layer's input, (M, I); with `x_idx` only the kept entries of it, (M, i).
        parameter: The weight, (K, I), or (I, K) if `transposed`. Its tables are kept under the memory that holds it.
        transposed: Whether the parameter is (I, K).
        x_idx: The entries of the input that are not zero, if only these are in x.
        x_scale: The scale of these entries, or None for 1.

    Returns:
        Indices of the kept units, int64, sorted and distinct, and their scale, fp32.
    """
    h = choice.hashing
    fields = [h.bits, h.tables, h.powers, h.early, h.early_every, h.every]
    idx, scale = alsh_units(x.detach(), parameter.detach(), x_idx, x_scale, transposed, choice.estimator.k, fields, choice.salt)
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
