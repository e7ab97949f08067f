"""Joint graph -> sites: every matmul and convolution of the forward pass with its gradient products, and what is legal to do with them.

A forward node and its gradients carry the same `seq_nr`; that alone is no proof (nodes without autograd reuse the last number), so a
gradient product counts only if it also reads one of the forward operands, through views, where the chain rule puts it. Nothing is edited here.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import BMM, CONV, MM, PRODUCTS, VIEWS

aten = torch.ops.aten

_GRADS = {aten.mm.default, aten.bmm.default, aten.convolution_backward.default}
_PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}

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
    fed_by: frozenset[str]
    reads: tuple[str, ...]
    last: bool
    blocked: str | None
    symbolic: str
    traced: tuple[tuple[str, int], ...]


def find_sites(graph: fx.Graph, context: Context) -> list[Site]:
    """Every product of the forward pass in execution order; empty for a graph without a backward part."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    backward = [n for n in nodes if _torch.is_backward(n)]
    if not backward:
        return []
    after_tangents = _after_tangents(graph)
    forward = [n for n in nodes if not _torch.is_backward(n) and n.target in PRODUCTS and n not in after_tangents]
    by_seq: dict[Any, list[fx.Node]] = defaultdict(list)
    for n in backward:
        by_seq[n.meta.get("seq_nr")].append(n)
    feeds = _feeds(graph, context)
    last = _last(nodes, set(forward))
    seen: dict[str, int] = defaultdict(int)
    sites = []
    for n in forward:
        owner = module_of(n, context)
        base = owner.name or _op_name(n)
        seen[base] += 1
        name = base if seen[base] == 1 else f"{base}#{seen[base]}"
        feeds.names[n] = name
        sites.append(_site(n, name, owner, by_seq[n.meta.get("seq_nr")], feeds, n in last, context))
    return sites


def without_product(graph: fx.Graph, sites: Sequence[Site], context: Context) -> list[str]:
    """The linear layers that train and have no site: of one row or one input Inductor writes some products as elementwise operations and sums."""
    if not _torch.has_backward(graph):
        return []
    owners = [module_of(n, context) for n in graph.nodes if n.op == "call_function" and not _torch.is_backward(n)]
    known = {s.module for s in sites}
    return list(dict.fromkeys(m.name for m in owners if m.linear and m.exact is None and m.name not in known))


def _after_tangents(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an output's gradient: backward ones even where a tag is missing (custom autograd functions)."""
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if (n.op == "placeholder" and _torch.is_backward(n)) or any(i in found for i in n.all_input_nodes):
            found.add(n)
    return found


def module_of(node: fx.Node, context: Context) -> Module:
    """The innermost module whose forward made the node."""
    for key in reversed(list(node.meta.get("nn_module_stack") or {})):
        found = context.modules.get(key.split("@")[0])
        if found is not None:
            return found
    return context.root


def _site(n: fx.Node, name: str, owner: Module, mates: list[fx.Node], feeds: _Feeds, last: bool, context: Context) -> Site:
    conv = n.target in CONV
    a, b = (n.args[0], n.args[1]) if conv else (n.args[-2], n.args[-1])
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    weight = 1 if conv or feeds.is_weight(b) else 0 if feeds.is_weight(a) else None
    describe = _conv_products if conv else _matmul_products
    products, blocked = describe(n, a, b, weight, mates)
    dtype = _torch.value(n).dtype
    if not dtype.is_floating_point:
        blocked = f"{str(dtype).removeprefix('torch.')} products are not sampled"
    elif context.exact or _torch.exact_mark(n):
        blocked = context.exact or _torch.exact_mark(n)
    elif owner.exact:
        blocked = owner.exact
    elif len(products) == 1 and blocked is None:
        blocked = NO_GRADIENT
    act = a if weight != 0 else b
    fed_by = feeds.of(act) | (frozenset() if weight is not None else feeds.of(b))
    if last and context.last_module is not None:
        last = owner.name == context.last_module
    return Site(
        name=name,
        module=owner.name,
        kind="conv" if conv else "linear" if weight is not None else "matmul",
        op=_op_name(n),
        node=n,
        shape=_shape(n, a, b, _torch.hint),
        dtype=dtype,
        products=tuple(products),
        flops=_flops(n, a, b),
        fed_by=fed_by,
        reads=tuple(dict.fromkeys(feeds.names[p] for o in (a, b) for p in feeds.products.get(o, ()))),
        last=last,
        blocked=blocked,
        symbolic=_shape(n, a, b, _torch.size_expr),
        traced=_traced(a, b),
    )


# --- matmuls ---


def _matmul_products(n: fx.Node, a: fx.Node, b: fx.Node, weight: int | None, mates: list[fx.Node]) -> tuple[list[Product], str | None]:
    """Y = A B: output contracts K; dA = dY B^T contracts N; dB = A^T dY contracts M (each written either way round in the graph)."""
    batched = int(n.target in BMM)
    lead = _torch.value(a).shape[0] if batched else 1
    k = _torch.value(a).shape[-1]
    left, right = (Axis(2, 0), Axis(1, 0)) if batched else (Axis(1), Axis(0))
    products = [Product("output", n, (a, b), (left, right), k, lead, weight)]
    target = aten.bmm.default if batched else aten.mm.default
    found: dict[int, Product] = {}
    root_a, root_b = _root(a), _root(b)
    for m in mates:
        reads = _reads(m, root_a, root_b)
        if not reads:
            continue
        if root_a[0] is root_b[0]:
            return products, "both operands are views of one tensor"
        if not (m.target is target or _is_outer_product(m)) or len(reads) != 1:
            return products, "its backward pass is not understood"
        (position, operand), lhs, rhs = reads[0], m.args[0], m.args[1]
        assert isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)
        # K must be the free dim of the operand there, or this is another product
        dim = _dim_in(m.args[position], (a, b)[operand], (root_a, root_b)[operand], batched + 1 - operand)
        grad_of = 1 - operand
        if dim != batched + position or grad_of in found:
            return products, "its backward pass is not understood"
        own_weight = position if operand == weight else None
        name = "grad_weight" if grad_of == weight else "grad_input"
        if name == "grad_input" and weight is None and grad_of == 1:
            name = "grad_input#2"
        contraction = _torch.value(lhs).shape[-1]
        found[grad_of] = Product(name, m, (lhs, rhs), (left, right), contraction, lead, own_weight, operand, position)
    return products + [found[i] for i in sorted(found)], None


def _is_outer_product(m: fx.Node) -> bool:
    """Whether it is (N, 1) times (1, K), op by op: what Inductor makes of a matmul that contracts an axis of one entry (a weight's gradient for one row)."""
    if m.target is not aten.mul.Tensor or not all(isinstance(arg, fx.Node) for arg in m.args):
        return False
    left, right = (_torch.value(arg).shape for arg in m.args)
    return len(left) == len(right) >= 2 and left[:-2] == right[:-2] and left[-1] == 1 and right[-2] == 1


def _reads(m: fx.Node, root_a: tuple[Any, Any], root_b: tuple[Any, Any]) -> list[tuple[int, int]]:
    """(position, operand) for every argument of a backward node that is a permuted forward operand; views and casts of them are not reads."""
    if m.target in _PERMUTES or m.target in VIEWS:
        return []
    hits = []
    for position, arg in enumerate(m.args):
        if isinstance(arg, fx.Node):
            root = _root(arg)[0]
            hits += [(position, i) for i, r in enumerate((root_a, root_b)) if root is r[0]]
    return hits


def _root(n: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The node under a chain of permutations, and the permutation from its dims to n's (dim i of n is dim perm[i] of the root)."""
    if not isinstance(n, fx.Node):
        return n, None
    perm = list(range(_torch.value(n).dim())) if isinstance(_torch.value(n), torch.Tensor) else []
    while n.target in _PERMUTES:
        source = n.args[0]
        assert isinstance(source, fx.Node)
        step = _permutation(n)
        perm = [step[d] for d in perm]
        n = source
    return n, tuple(perm)


def _permutation(n: fx.Node) -> list[int]:
    dims: list[int] = list(range(_torch.value(n).dim()))
    if n.target is aten.permute.default:
        return [int(d) % len(dims) for d in n.args[1]]  # type: ignore[arg-type,union-attr]
    i: Any = n.args[1] if n.target is aten.transpose.int else 0
    j: Any = n.args[2] if n.target is aten.transpose.int else len(dims) - 1
    dims[i], dims[j] = dims[j], dims[i]
    return dims


def _dim_in(arg: Any, operand: fx.Node, root: tuple[Any, Any], dim: int) -> int:
    """Where dim `dim` of a forward operand lies in `arg`, a permutation of the same root."""
    in_root = root[1][dim]
    return _root(arg)[1].index(in_root)  # type: ignore[union-attr]


def permutation_between(operand: fx.Node, arg: fx.Node) -> list[int]:
    """The permutation that turns a forward operand into `arg`, which shares its root."""
    of_operand, of_arg = _root(operand)[1], _root(arg)[1]
    assert of_operand is not None and of_arg is not None
    return [of_operand.index(d) for d in of_arg]


# --- convolutions ---


def conv_weight_axes(transposed: bool, groups: int) -> tuple[Axis, Axis]:
    """The input-channel and the output-channel axis of a convolution's weight: (O, I/g, ..), transposed (I, O/g, ..)."""
    first, second = (Axis(0), Axis(1)) if groups == 1 else (Axis(1, 0, (0, groups)), Axis(2, 0, (0, groups)))
    return (first, second) if transposed else (second, first)


def conv_groups(n: fx.Node) -> int:
    """Of a convolution in the forward pass; of a symbolic number the hint."""
    groups: Any = n.args[8]
    return _torch.hint(groups.meta["val"] if isinstance(groups, fx.Node) else groups)


def channel_axis(groups: int) -> Axis:
    return Axis(1) if groups == 1 else Axis(2, 1, (1, groups))


def _conv_products(n: fx.Node, x: fx.Node, w: fx.Node, weight: int | None, mates: list[fx.Node]) -> tuple[list[Product], str | None]:
    """output contracts input channels (per group), grad_input output channels, grad_weight the samples."""
    transposed, groups = bool(n.args[6]), conv_groups(n)
    w_in, w_out = conv_weight_axes(transposed, groups)
    channels = channel_axis(groups)
    c_in, c_out = _torch.value(x).shape[1] // groups, _torch.value(n).shape[1] // groups
    products = [Product("output", n, (x, w), (channels, w_in), c_in, groups, 1)]
    if not isinstance(n.args[8], int):  # one group for every sample, say
        return products, "the number of its groups is a symbol"
    own = [m for m in mates if m.target is aten.convolution_backward.default and m.args[1] is x and m.args[2] is w]
    if len(own) != 1:
        strangers = [m for m in mates if m.target not in _PERMUTES | VIEWS and {x, w} & set(m.all_input_nodes)]
        return products, "its backward pass is not understood" if own or strangers else None
    m = own[0]
    dy, mask = m.args[0], m.args[10]
    assert isinstance(dy, fx.Node) and isinstance(mask, (list, tuple))
    if any(u.target is not operator.getitem for u in m.users):
        return products, "its backward pass is not understood"
    if mask[0]:
        products.append(Product("grad_input", m, (dy, w), (channels, w_out), c_out, groups, 1, 1, 2, 0))
    if mask[1]:
        products.append(Product("grad_weight", m, (x, dy), (Axis(0), Axis(0)), _torch.value(x).shape[0], 1, None, 0, 1, 1))
    return products, None


# --- what feeds a site, what comes after it ---


class _Feeds:
    """Per forward node: whether it depends on anything but parameters, and which hazards and products reach it through no (other) product."""

    def __init__(self) -> None:
        self.hazards: dict[fx.Node, frozenset[str]] = {}
        self.products: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.names: dict[fx.Node, str] = {}
        self.from_data: set[fx.Node] = set()
        self.from_parameter: set[fx.Node] = set()

    def of(self, n: fx.Node) -> frozenset[str]:
        return self.hazards.get(n, frozenset())

    def is_weight(self, n: fx.Node) -> bool:
        return n in self.from_parameter and n not in self.from_data


def _feeds(graph: fx.Graph, context: Context) -> _Feeds:
    feeds = _Feeds()
    for n in graph.nodes:
        if _torch.is_backward(n):
            continue
        if n.op == "placeholder":
            index = _torch.input_index(n)
            known = context.inputs[index] if index is not None and index < len(context.inputs) else None
            if _torch.is_own_state(n) or (known is not None and known.parameter):
                feeds.from_parameter.add(n)
            else:
                feeds.from_data.add(n)
                if known is not None and known.floating and not known.requires_grad:
                    feeds.hazards[n] = frozenset({"raw data"})
            continue
        sources = n.all_input_nodes
        if any(s in feeds.from_data for s in sources) or _torch.is_random(n):
            feeds.from_data.add(n)
        if any(s in feeds.from_parameter for s in sources):
            feeds.from_parameter.add(n)
        feeds.products[n] = (n,)
        if n.target not in PRODUCTS:
            feeds.products[n] = tuple(dict.fromkeys(p for s in sources for p in feeds.products.get(s, ())))
            hazards = frozenset().union(*(feeds.of(s) - _drowned(s, n, feeds) for s in sources)) if sources else frozenset()
            if module_of(n, context).batch_norm:
                hazards |= {"BatchNorm"}
            feeds.hazards[n] = hazards
    return feeds


def _drowned(source: fx.Node, n: fx.Node, feeds: _Feeds) -> frozenset[str]:
    """Raw data that is only a mask, a bias or a scale beside an activation does not make the result raw."""
    others = any(feeds.products.get(s) for s in n.all_input_nodes if s is not source)
    if "raw data" not in feeds.of(source) or not others or n.target is aten.cat.default:
        return frozenset()
    tensors = isinstance(source.meta.get("val"), torch.Tensor) and isinstance(n.meta.get("val"), torch.Tensor)
    return frozenset({"raw data"}) if tensors and _torch.numel(source) < _torch.numel(n) else frozenset()


def _last(nodes: list[fx.Node], forward: set[fx.Node]) -> set[fx.Node]:
    """Products with no further product behind them in the forward pass."""
    ahead: dict[fx.Node, bool] = {}
    for n in reversed(nodes):
        ahead[n] = any(u in forward or ahead.get(u, False) for u in n.users if not _torch.is_backward(u))
    return {n for n in forward if not ahead[n]}


# --- shapes ---


def _op_name(n: fx.Node) -> str:
    if n.target not in CONV:
        return str(n.target).split(".")[1]
    rank = _torch.value(n).dim() - 2
    return f"conv_transpose{rank}d" if n.args[6] else f"conv{rank}d"


def _shape(n: fx.Node, a: fx.Node, b: fx.Node, shown: Callable[[Any], Any]) -> str:
    def by(sizes: Any) -> str:
        return "x".join(str(shown(s)) for s in sizes)

    va, vb = _torch.value(a), _torch.value(b)
    if n.target in CONV:
        groups = f" g{conv_groups(n)}" if n.args[8] != 1 else ""
        return by(va.shape) + " * " + by(vb.shape) + groups
    return by((*va.shape, vb.shape[-1]))


def _traced(*operands: fx.Node) -> tuple[tuple[str, int], ...]:
    sizes = [s for o in operands for s in _torch.value(o).shape if not _torch.size_expr(s).is_Integer]
    return tuple(dict.fromkeys((str(_torch.size_expr(s)), _torch.hint(s)) for s in sizes))


def _flops(n: fx.Node, a: fx.Node, b: fx.Node) -> int:
    """Of one product; all three of a site have the same (2 per multiply-add)."""
    va, vb, vy = _torch.value(a), _torch.value(b), _torch.value(n)
    if n.target not in CONV:
        return 2 * _prod(va.shape) * _torch.hint(vb.shape[-1])
    places = va if n.args[6] else vy  # a transposed convolution spreads every input place
    return 2 * _torch.hint(va.shape[0]) * _prod(places.shape[2:]) * _prod(vb.shape) if vb.numel() else 0


def _prod(sizes: Any) -> int:
    return math.prod(_torch.hint(s) for s in sizes)


def one_contraction(site: Site) -> bool:
    """Neither batched nor grouped: one index set, whatever the batch's size."""
    return site.node.target in MM or (site.node.target in CONV and bool(site.node.args[8] == 1))


def users_of_output(m: fx.Node, index: int) -> Iterator[fx.Node]:
    """The getitem nodes that take one output of a node with several."""
    for u in m.users:
        if u.target is operator.getitem and u.args[1] == index:
            yield u
