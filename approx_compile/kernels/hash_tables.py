"""Asymmetric locality-sensitive hashing: find the units of a layer whose weights have the largest inner products with the layer's inputs (`alsh`).

The inner product of a weight w and an input a becomes a similarity of P(w) and Q(a), equation 2 of the paper on sampling for training on CPUs:

    P(w) = [w; |w|^2, |w|^4, .., |w|^(2^m)] with the weights scaled so that the longest has norm `LONGEST`,   Q(a) = [a; 1/2, .., 1/2] with |a| = 1.

A table has `bits` random normal projections; the signs of P(w) under them say in which of its 2^bits buckets a unit lies. One bit agrees with probability
1 - angle(P(w), Q(a)) / pi = p, so that a unit is found by a sample in at least one of L tables with probability 1 - (1 - p^bits)^L. The active units of a batch
are the union of its samples' buckets, at most k of them: those that were found most often. What is left of the k slots has the scale 0.

The tables of a layer belong to its weight, and are kept beside it from step to step. They are rebuilt after a number of samples, which is counted in Python, so
that no step waits for the device. Sources: Shrivastava and Li 2014; Spring and Shrivastava 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from approx_compile import _torch

LONGEST = 0.83
"""The norm of the longest weight in P, the value that Shrivastava and Li recommend."""


@dataclass(frozen=True)
class Hashing:
    """The settings of the tables of one layer.

    Attributes:
        bits: Projections of a table, K.
        tables: Tables, L.
        powers: Powers of the norm that P appends, m.
        early: The number of samples during which tables are rebuilt after `early_every` samples.
        early_every: Samples between rebuilds at the beginning.
        every: Samples between rebuilds afterwards.
    """

    bits: int = 6
    tables: int = 5
    powers: int = 3
    early: int = 10_000
    early_every: int = 100
    every: int = 1_000


@dataclass
class HashTables:
    """The tables of one layer.

    Attributes:
        hashing: Their settings.
        seed: The seed of the projections.
        projections: (I + powers, tables * bits), fp32.
        codes: The bucket of every unit in every table, (K, tables), int64.
        samples: Samples that were looked up.
        due: The number of samples at which the tables are rebuilt.
    """

    hashing: Hashing
    seed: int
    projections: Tensor
    codes: Tensor
    samples: int = 0
    due: int = 0

    @staticmethod
    def make(hashing: Hashing, seed: int, weight: Tensor) -> HashTables:
        """Make tables with projections drawn from a seed; they are filled when they are first looked into.

        Args:
            hashing: Their settings.
            seed: The seed.
            weight: The weight, (K, I).
        """
        random = torch.Generator().manual_seed(seed)
        projections = torch.randn(weight.shape[1] + hashing.powers, hashing.tables * hashing.bits, generator=random)
        codes = torch.zeros(weight.shape[0], hashing.tables, dtype=torch.int64, device=weight.device)
        return HashTables(hashing, seed, projections.to(weight.device), codes)

    def count(self, x: Tensor, weight: Tensor, x_idx: Tensor | None = None, x_scale: Tensor | None = None) -> Tensor:
        """Rebuild the tables if they are due, and look up a batch.

        Args:
            x: The inputs, (M, I), or only the entries `x_idx` of them.
            weight: The weight, (K, I).
            x_idx: The entries that are in x; None for all.
            x_scale: Their scale; None for 1.

        Returns:
            How often each unit lies in the bucket of a sample, over all samples and tables, (K,), fp32.
        """
        if self.samples >= self.due:
            self.codes = unit_codes(weight, self.projections, self.hashing)
            self.due = self.samples + (self.hashing.early_every if self.samples < self.hashing.early else self.hashing.every)
        self.samples += x.shape[0]
        found = input_codes(x, self.projections, self.hashing, x_idx, x_scale)
        buckets = x.new_zeros((self.hashing.tables, 2**self.hashing.bits), dtype=torch.float32)
        buckets.scatter_add_(1, found.t(), torch.ones_like(found.t(), dtype=torch.float32))
        return buckets.gather(1, self.codes.t()).sum(0)


def unit_codes(weight: Tensor, projections: Tensor, hashing: Hashing) -> Tensor:
    """Return the bucket of every unit in every table: the signs of P(w), (K, tables), int64.

    Args:
        weight: The weight, (K, I).
        projections: (I + powers, tables * bits).
        hashing: The settings.
    """
    w = weight.detach().float()
    norm = torch.linalg.vector_norm(w, dim=1)
    factor = LONGEST / norm.max().clamp_min(torch.finfo(torch.float32).tiny)
    power, appended = norm * factor, []
    for _ in range(hashing.powers):
        power = power * power
        appended.append(power)
    inner = w.shape[1]
    signs = (w @ projections[:inner]) * factor
    if appended:
        signs = signs + torch.stack(appended, 1) @ projections[inner:]
    return _codes(signs, hashing)


def input_codes(x: Tensor, projections: Tensor, hashing: Hashing, x_idx: Tensor | None = None, x_scale: Tensor | None = None) -> Tensor:
    """Return the bucket of every input in every table: the signs of Q(a), (M, tables), int64.

    Args:
        x: The inputs, (M, I), or only the entries `x_idx` of them.
        projections: (I + powers, tables * bits).
        hashing: The settings.
        x_idx: The entries that are in x; None for all.
        x_scale: Their scale; None for 1.
    """
    inner = projections.shape[0] - hashing.powers
    a = x.detach().float()
    a = a if x_scale is None else a * x_scale
    norm = torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    along = a @ (projections[:inner] if x_idx is None else projections[:inner].index_select(0, x_idx))
    return _codes(along / norm + 0.5 * projections[inner:].sum(0), hashing)


def _codes(signs: Tensor, hashing: Hashing) -> Tensor:
    """Buckets from the values whose signs are the bits, (.., tables * bits)."""
    place = 2 ** torch.arange(hashing.bits, device=signs.device)
    bits: Tensor = (signs > 0).unflatten(-1, (hashing.tables, hashing.bits))
    return (bits * place).sum(-1)


def most_found(count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k units that were found most often, sorted, and their scale: 1, or 0 for a unit that was not found.

    Args:
        count: How often each unit was found, (K,).
        k: Units to return.
    """
    idx = count.topk(k, sorted=False).indices.sort().values
    return idx, (count.gather(0, idx) > 0).float()


# --- the tables of weights, and the op ---

_tables: dict[_torch.StorageRef, HashTables] = {}
"""The tables of every weight that was looked up or loaded, by the memory that holds it."""


def tables_of(parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return the tables of a model's weights as plain values.

    Args:
        parameters: The parameters by name.

    Returns:
        By the name of a parameter: the settings, the seed, the samples that were looked up, when a rebuild is due, and the codes. Empty if there are no tables.
    """
    found = {name: _tables.get(_torch.storage_ref(p)) for name, p in parameters.items()}
    return {
        name: {"hashing": asdict(t.hashing), "seed": t.seed, "samples": t.samples, "due": t.due, "codes": t.codes.tolist()} for name, t in found.items() if t
    }


def load_tables(parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore what `tables_of` returned. Weights that it does not name have no tables afterwards.

    Args:
        parameters: The parameters by name.
        state: What `tables_of` returned.
    """
    for name, p in parameters.items():
        _tables.pop(_torch.storage_ref(p), None)
        if name in state:
            saved = state[name]
            tables = HashTables.make(Hashing(**saved["hashing"]), saved["seed"], p.detach())
            tables.codes = torch.tensor(saved["codes"], dtype=torch.int64, device=p.device)
            tables.samples, tables.due = saved["samples"], saved["due"]
            _tables[_torch.storage_ref(p)] = tables


def _tables_for(parameter: Tensor, weight: Tensor, hashing: Hashing, salt: int) -> HashTables:
    ref = _torch.storage_ref(parameter)
    tables = _tables.get(ref)
    if tables is None or tables.hashing != hashing or tables.codes.shape[0] != weight.shape[0]:
        for old in [r for r in _tables if r.expired()]:
            del _tables[old]
        tables = _tables[ref] = HashTables.make(hashing, (torch.initial_seed() + salt) % 2**63, weight)
    return tables


@torch.library.custom_op("approx_compile::alsh_units", mutates_args=())
def alsh_units(
    x: Tensor, parameter: Tensor, x_idx: Tensor | None, x_scale: Tensor | None, transposed: bool, k: int, hashing: list[int], salt: int
) -> tuple[Tensor, Tensor]:
    """Choose the units of a layer by the hash tables of its weight, which the call rebuilds when they are due.

    Args:
        x: The layer's input, (M, I); with `x_idx` only the kept entries of it.
        parameter: The weight, (K, I), or (I, K) if `transposed`.
        x_idx: The entries of the input that are in x; None for all.
        x_scale: Their scale; None for 1.
        transposed: Whether the parameter is (I, K).
        k: Units to choose.
        hashing: The fields of `Hashing`, in order.
        salt: Added to torch's initial seed for the projections of new tables, so that layers differ.

    Returns:
        Indices of the units, (k,), int64, sorted and distinct, and their scale, (k,), fp32: 1, or 0 for a unit that no sample found.
    """
    weight = parameter.t() if transposed else parameter
    tables = _tables_for(parameter, weight, Hashing(*hashing), salt)
    return most_found(tables.count(x, weight, x_idx, x_scale), k)


@alsh_units.register_fake
def _(
    x: Tensor, parameter: Tensor, x_idx: Tensor | None, x_scale: Tensor | None, transposed: bool, k: int, hashing: list[int], salt: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty((k,), dtype=torch.int64), x.new_empty((k,), dtype=torch.float32)
