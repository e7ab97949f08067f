"""The data classes that describe a joint graph's sites: what the backend knows of the graph (`Context`), the sites and their products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import CONV, MM, users_of_output

NO_GRADIENT = "no gradient flows through it"


@dataclass(frozen=True)
class Input:
    """A graph input as the backend saw it: parameter or buffer, needs a gradient, is data (floating point)."""

    parameter: bool
    requires_grad: bool
    floating: bool


@dataclass(frozen=True)
class Module:
    """A module of the user's model: its name, why its products must be exact if they must (it is in eval mode), whether it is a BatchNorm or a linear layer."""

    name: str
    exact: str | None = None
    batch_norm: bool = False
    linear: bool = False


@dataclass(frozen=True)
class Context:
    """What only the backend knows of a graph. `root`: the compiled module itself, which owns what no submodule's forward made (nameless for a
    function). `exact` gives the reason to leave all of it alone."""

    modules: dict[str, Module] = field(default_factory=dict)
    root: Module = Module("")
    inputs: tuple[Input, ...] = ()
    exact: str | None = None
    last_module: str | None = None

    def nothing_trains(self) -> bool:
        """Whether every module seen must be exact."""
        return all(m.exact for m in self.modules.values()) if self.modules else self.root.exact is not None


@dataclass(frozen=True)
class Product:
    """One of a site's products, as a contraction of two operands.

    `node` computes it; `operands` are contracted over `axes`; `size` is the axis' length, `lead` how many independent contractions there are.
    A gradient also knows the forward operand it reads (`reads`: 0 or 1) and where (`position` in its node's arguments).
    `mask` is the output of a convolution_backward that it is.
    """

    name: str
    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    axes: tuple[Axis, Axis]
    size: int | torch.SymInt
    lead: int | torch.SymInt
    weight: int | None
    reads: int = -1
    position: int = -1
    mask: int = -1

    @property
    def output_grad(self) -> fx.Node | None:
        """dY, for a gradient."""
        if self.name == "output":
            return None
        if self.mask < 0:
            return self.operands[1 - self.position]
        return self.operands[self.mask]  # (dy, w) and (x, dy)

    @property
    def output_grad_dim(self) -> int:
        """The dim of dY that is the site's output channels N."""
        if self.mask >= 0:
            return 1
        contracted = self.axes[1 - self.position].dim
        return contracted if self.reads == 1 else 2 * _torch.value(self.operands[0]).dim() - 3 - contracted

    @property
    def result(self) -> tuple[fx.Node, int] | None:
        """The node that holds a gradient, and its dim along the output's contraction axis."""
        if self.name == "output":
            return None
        if self.mask < 0:
            return self.node, self.position + _torch.value(self.node).dim() - 2
        grad = next(users_of_output(self.node, self.mask), None)
        return (grad, 1) if grad is not None and self.mask == 0 else None

    @property
    def bytes_once(self) -> int:
        """Bytes of both operands and of the result, each counted once: the least that the exact product moves."""
        made = _torch.value(self.node)
        values = (*(_torch.value(o) for o in self.operands), made[self.mask] if self.mask >= 0 else made)
        return sum(_torch.numel_of(v) * v.dtype.itemsize for v in values)


@dataclass(frozen=True)
class Site:
    """One matmul or convolution of the model. `blocked`: why it must stay exact, if so. `shape` has the sizes as traced, `symbolic` those that are
    symbols as such, `traced` what each of these was traced with."""

    name: str
    module: str
    kind: str
    op: str
    node: fx.Node
    shape: str
    dtype: torch.dtype
    products: tuple[Product, ...]
    flops: int
    hazards: frozenset[str]
    reads: tuple[str, ...]
    last: bool
    blocked: str | None
    symbolic: str
    traced: tuple[tuple[str, int], ...]


def one_contraction(site: Site) -> bool:
    """Neither batched nor grouped: one index set, whatever the batch's size."""
    return site.node.target in MM or (site.node.target in CONV and bool(site.node.args[8] == 1))
