"""Data classes for the sites of a joint graph: what the backend knows of the graph (`Context`), its sites, and their products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import CONV, MM, users_of_output
from approx_compile.reasons import Reason


@dataclass(frozen=True)
class Input:
    """An input of the graph as the backend received it.

    Attributes:
        parameter: It is a parameter or a buffer.
        requires_grad: It needs a gradient.
        floating: Its dtype is floating point.
    """

    parameter: bool
    requires_grad: bool
    floating: bool


@dataclass(frozen=True)
class Module:
    """A module of the user's model.

    Attributes:
        name: Its qualified name.
        exact: Why its products must stay exact (it is in eval mode, say); None if they need not.
        batch_norm: It is a BatchNorm.
        linear: It is a linear layer.
    """

    name: str
    exact: Reason | None = None
    batch_norm: bool = False
    linear: bool = False


@dataclass(frozen=True)
class Context:
    """What the backend knows of a graph and the graph itself does not say.

    Attributes:
        modules: The modules whose forward made nodes, by their key in `nn_module_stack`.
        root: The compiled module, which owns what no submodule's forward made; it has no name if a function was compiled.
        inputs: The inputs of the graph, in order.
        exact: Why the whole graph must stay exact; None if it need not.
        last_module: The name of the module that computes the model's output, if known.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    root: Module = Module("")
    inputs: tuple[Input, ...] = ()
    exact: Reason | None = None
    last_module: str | None = None

    def nothing_trains(self) -> bool:
        """Return whether every module of the graph must stay exact."""
        return all(m.exact for m in self.modules.values()) if self.modules else self.root.exact is not None


@dataclass(frozen=True)
class Product:
    """One of the products of a site, as a contraction of two operands.

    Attributes:
        name: "output", "grad_input", "grad_weight", or "grad_input#2" for the second activation of a product without a weight.
        node: The node that computes it.
        operands: The two nodes that are contracted.
        axes: Where the contraction axis lies in each operand.
        size: The length of the contraction axis.
        lead: How many independent contractions there are: the batch of a bmm, the groups of a convolution.
        weight: Which operand is the weight (0 or 1); None if neither is.
        reads: For a gradient: which operand of the output it reads (0 or 1).
        position: For a gradient: at which argument of `node` it reads it.
        mask: For a gradient of a convolution: which output of the convolution_backward it is; else -1.
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
        """The node of dY, for a gradient."""
        if self.name == "output":
            return None
        if self.mask < 0:
            return self.operands[1 - self.position]
        return self.operands[self.mask]  # the operands of grad_input are (dY, W), those of grad_weight (X, dY)

    @property
    def output_grad_dim(self) -> int:
        """The dim of dY that holds the site's output channels N."""
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
        """The bytes of both operands and of the result, each counted once: the least that the exact product moves."""
        made = _torch.value(self.node)
        values = (*(_torch.value(o) for o in self.operands), made[self.mask] if self.mask >= 0 else made)
        return sum(_torch.numel_of(v) * v.dtype.itemsize for v in values)


PRODUCT_KEY = "approx_compile_product"
"""Key in the meta of a gradient product of a linear layer: "grad_input" or "grad_weight". The backward graph inherits it."""


@dataclass(frozen=True)
class Site:
    """One matmul or convolution of the model's forward pass, with its gradients.

    Attributes:
        name: The module's name, or the op's where there is none, with "#2", "#3" and so on for further sites of the same name.
        module: The name of the module that owns it.
        kind: "linear" (with a weight), "conv" or "matmul" (without a weight).
        op: The op, such as "addmm" or "conv2d".
        node: The node of the forward pass.
        shape: The sizes in words, symbolic ones as traced.
        dtype: The dtype of the output.
        products: The output first, then the gradients.
        flops: The FLOPs of one product; all products of a site have the same number.
        hazards: What reaches its activation with no other product in between: "raw data", "BatchNorm".
        reads: The names of the sites whose outputs reach it with no other product in between.
        last: No other site depends on it in the forward pass.
        blocked: Why it must stay exact; None if it need not.
        symbolic: The sizes in words, symbolic ones as expressions.
        traced: The symbolic sizes, each with the number that it was traced with.
    """

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
    blocked: Reason | None
    symbolic: str
    traced: tuple[tuple[str, int], ...]


def one_contraction(site: Site) -> bool:
    """Return whether a site is neither batched nor grouped, so that it has one set of indices."""
    return site.node.target in MM or (site.node.target in CONV and bool(site.node.args[8] == 1))
