"""Plan -> graph: executes the decisions, makes none. Graphs are edited here only (`splice` holds the means).

A sampled product keeps its node's op and gets gathered operands; a coupled gradient reads the operand the output kept and is put back in
place. The pieces are traced from `kernels` on the nodes' fake values and spliced in, so Inductor sees aten ops; only where a kernel of ours runs a
product (`own_kernels`) does it see an op of ours, whose code the cache key covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gather import Axis, sample, take, untake
from approx_compile.passes.fx_utils import CONV, update_fake_value, users_of_output
from approx_compile.passes.planning import index_sharing
from approx_compile.passes.planning.index_sharing import Sum
from approx_compile.passes.planning.plan import Plan, ProductPlan
from approx_compile.passes.planning.zero_propagation import relu_backward
from approx_compile.passes.rewrite import custom_ops
from approx_compile.passes.rewrite.graph_edit import Layout, Sampled, as_it_is, hoist, inline, keep_choice, like, output_of, replace_output
from approx_compile.passes.rewrite.narrow_region import Narrowing, regions
from approx_compile.passes.rewrite.replace_gradient import release_activation, replace_conv_weight, replace_matmul
from approx_compile.passes.sites.conv_gradients import channel_axis, conv_weight_axes
from approx_compile.passes.sites.matmul_gradients import permutation_between
from approx_compile.passes.sites.site import Product, Site

aten = torch.ops.aten


def rewrite(graph: fx.Graph, sites: Sequence[Site], plan: Plan) -> None:
    """Carry out `plan` (made from `sites` of this graph), then remove what it made dead and lint."""
    kept: dict[str, Sampled] = {}
    narrow: dict[str, tuple[fx.Node, fx.Node]] = {}
    readers = index_sharing.readers(sites, plan)
    sums = {name: _Shared(*total) for name, total in index_sharing.sums(sites, plan).items()}
    found, narrowing = regions(sites, plan), dict[str, Narrowing]()
    for site, planned in zip(sites, plan.sites, strict=True):
        output = planned.products[0]
        if site.name in found:
            narrowing[site.name] = Narrowing(graph, found[site.name])
            kept[site.name] = narrowing[site.name].forward(kept, narrow)
        elif output.decision == "sampled":
            leader = kept[output.shares] if output.shares is not None else None
            kept[site.name] = _sample_in_place(graph, site, as_it_is(site.products[0]), output, leader, readers.get(site.name, ()))
    for site, planned in zip(reversed(sites), reversed(plan.sites), strict=True):  # as the backward pass goes
        todo = []
        for product, decision in zip(site.products[1:], planned.products[1:], strict=True):
            coupled = kept[site.name] if decision.decision == "coupled" else None
            skipped = kept[decision.skips] if decision.skips is not None else None
            if decision.decision in ("sampled", "replaced") or coupled or skipped:
                fed = site.name in narrowing and product.name == "grad_input"
                into = sums.get(decision.shares or site.name) if product.name == "grad_input" else None
                through = coupled or planned.products[0].decision == "exact"  # else the output's operands are cut to entries that this gradient does not know
                todo.append(_Gradient(as_it_is(product), decision, coupled, skipped, narrow.get(site.name) if through else None, fed, into))
        _gradients(graph, site, todo)
        if site.name in narrowing:
            narrowing[site.name].backward()
    for total in sums.values():
        _put_back_sum(graph, total)
    graph.eliminate_dead_code()
    graph.lint()


def _gradients(graph: fx.Graph, site: Site, todo: Sequence[_Gradient]) -> None:
    if site.node.target in CONV:
        _conv_gradients(graph, site, todo)
        return
    for work in todo:
        if work.decision.replacement is not None:
            replace_matmul(graph, work.product, work.decision.replacement)
        elif work.decision.decision == "sampled":
            _sample_in_place(graph, site, work.product, work.decision)
        else:
            _narrow_matmul(graph, site.products[0].operands, work)


class _Gradient(NamedTuple):
    """What is to be done to one gradient product: replaced, sampled on its own axis, or narrowed to kept inputs (`coupled`), kept outputs (`skipped`) or
    both. `narrow`: the operands of an output that is made for the kept ones only; `fed`: the activation came narrow, and so may its gradient leave;
    `into`: the sum that is put back in its stead."""

    product: Product
    decision: ProductPlan
    coupled: Sampled | None
    skipped: Sampled | None
    narrow: tuple[fx.Node, fx.Node] | None
    fed: bool
    into: _Shared | None


@dataclass
class _Shared:
    """Gradients of one activation through the same entries, which are put back in place once, summed up in their `order`; `total` is the sum."""

    total: fx.Node
    order: Sum
    narrow: list[fx.Node] = field(default_factory=list)
    holes: tuple[_Hole, ...] = ()
    activation: tuple[fx.Node, fx.Node] | None = None
    layout: Layout | None = None


class _Hole(NamedTuple):
    """An axis of a narrowed result on which the kept entries are to be put back in place."""

    axis: Axis
    kept: Sampled
    scale: fx.Node | None


# --- outputs, and gradients of matmuls ---


def _sample_in_place(
    graph: fx.Graph, site: Site, product: Product, decision: ProductPlan, leader: Sampled | None = None, readers: Sequence[Product] = ()
) -> Sampled:
    """Gather both operands of a product along its contraction axis and let its node work on those, or let it skip along that axis by itself. `leader`: whose
    indices and activation it uses; `readers`: products that will use its own, whose weights have their say in the choice and must stand before it."""
    assert decision.how is not None
    node, how = product.node, decision.how
    for other in readers:
        hoist(other.operands[1], node)
    if decision.lowering in CUSTOM_KERNELS:
        idx, scale = custom_ops.choice(graph, node, product, how, readers) if leader is None else (leader.idx, leader.scale)
        if leader is None:
            _mark_choice(site, product, idx, scale)
        custom_ops.sample_output(graph, product, how, idx, scale)
        return Sampled(how, idx, scale, product.operands, whole=True)
    kept = _gathered(graph, node, site, product, how, readers) if leader is None else _joined(graph, product, leader)
    args = list(node.args)
    first = len(args) - 2 if node.target not in CONV else 0
    args[first], args[first + 1] = kept.operands
    node.args = tuple(args)
    return kept


def _gathered(graph: fx.Graph, before: fx.Node, site: Site, product: Product, how: Estimator, readers: Sequence[Product] = ()) -> Sampled:
    axes, more = product.axes, tuple(r.axes[1] for r in readers)

    def run(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor) -> Any:
        return sample(how, a, b, *axes, list(zip(others, more, strict=True)))

    idx, scale, a, b = inline(graph, before, run, (*product.operands, *(r.operands[1] for r in readers)))
    _mark_choice(site, product, idx, scale)
    return Sampled(how, idx, scale, (a, b))


def _mark_choice(site: Site, product: Product, idx: fx.Node, scale: fx.Node | None) -> None:
    for node, name in ((idx, "idx"), (scale, "scale")):
        if node is not None:
            keep_choice(node, f"{site.name}.{product.name}.{name}")


def _joined(graph: fx.Graph, product: Product, leader: Sampled) -> Sampled:
    """The operands of a product at the entries that another one kept of the same activation."""
    axis, unit = product.axes[1], leader.how.unit

    def run(b: torch.Tensor, idx: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return take(b, axis, idx, scale, unit)

    b = inline(graph, product.node, run, (product.operands[1], leader.idx, leader.scale))
    return leader._replace(operands=(leader.operands[0], b))


def _narrow_matmul(graph: fx.Graph, forward: tuple[fx.Node, fx.Node], work: _Gradient) -> None:
    """dA[:, idx] = dY B'^T or dB[idx, :] = diag(scale) A'^T dY, zeros elsewhere; of dY only the columns that are not zero. What a kernel of ours steps over
    stays whole."""
    p = work.product
    m, position = p.node, p.position
    coupled = work.coupled if work.decision.lowering not in CUSTOM_KERNELS else None
    skipped = work.skipped if work.decision.skips_by not in CUSTOM_KERNELS else None
    operand, dy = m.args[position], m.args[1 - position]
    assert isinstance(operand, fx.Node) and isinstance(dy, fx.Node)
    lead = 0 if _torch.value(m).dim() == 3 else None
    holes = []
    whole = work.narrow is None or p.reads == 0
    cut = coupled.operands if coupled is not None else None if whole else work.narrow
    if coupled is not None and coupled.whole:
        operand = _taken(graph, m, operand, Axis(position), coupled)
    elif cut is not None:
        order = tuple(permutation_between(forward[p.reads], operand))
        operand = cut[p.reads]
        if list(order) != sorted(order):
            operand = inline(graph, m, lambda x: x.permute(order), (operand,))
    if coupled is not None and not work.fed:
        scale = coupled.scale if p.reads == 0 or coupled.whole else None  # else B' holds its scale already
        holes.append(_Hole(Axis(position + _torch.value(m).dim() - 2, lead), coupled, scale))
    if skipped is not None:
        columns = Axis(p.output_grad_dim)
        dy = _taken(graph, m, dy, columns, skipped)
        if p.reads == 1 and whole:
            operand = _taken(graph, m, operand, p.axes[position], skipped)
        elif p.reads == 0:
            holes.append(_Hole(Axis(1 - position + _torch.value(m).dim() - 2), skipped, None))
    m.args = (operand, dy) if position == 0 else (dy, operand)
    if work.coupled is not None and coupled is None:
        custom_ops.step_over(m, work.coupled, work.coupled.scale, position)
    elif work.skipped is not None and skipped is None:
        custom_ops.step_over(m, work.skipped, None, None if p.reads == 1 else 1 - position)
    cut_activation = coupled is not None and not coupled.whole and p.reads == position == 1  # dA, in A's own orientation
    activation = (forward[0], coupled.operands[0]) if coupled is not None and cut_activation else None
    _put_back(graph, m, holes, activation, work.into)


def _taken(graph: fx.Graph, before: fx.Node, x: fx.Node, axis: Axis, kept: Sampled) -> fx.Node:
    if x in kept.narrow:
        return kept.narrow[x]
    unit = kept.how.unit
    new = inline(graph, before, lambda x, idx: take(x, axis, idx, None, unit), (x, kept.idx))
    assert isinstance(new, fx.Node)
    return new


def _put_back(graph: fx.Graph, m: fx.Node, holes: Sequence[_Hole], activation: tuple[fx.Node, fx.Node] | None = None, into: _Shared | None = None) -> None:
    """Recompute the meta of a node that now makes the kept entries only, and give its users the full-size result.

    `activation`: the one whose gradient this is, whole and kept. If it is a ReLU's output and this its only gradient, the ReLU's backward moves in
    front of the un-gather: outside the kept entries the gradient is zero anyway, and the mask of the whole activation need not be saved.
    `into`: the sum that is put back in its stead.
    """
    layout = Layout.of(_torch.value(m))
    if into is not None:
        into.narrow.insert(0, m)  # gradients come in reverse order
        into.holes, into.activation, into.layout = tuple(holes), into.activation or activation, layout
        update_fake_value(m)
        return
    users = list(m.users)
    masked = relu_backward(m, activation[0]) if activation is not None else None
    update_fake_value(m)
    if not holes:
        return
    full = _filled(graph, m.next, m, holes, activation[1] if masked and activation else None, layout)
    for u in users:
        u.replace_input_with(m, full)
    _drop_mask(masked)


def _put_back_sum(graph: fx.Graph, work: _Shared) -> None:
    """Give the users of a sum of gradients, each of the kept entries only by now, that sum in place."""
    total, order = work.total, work.order

    def run(*parts: torch.Tensor) -> torch.Tensor:
        return _added(order, parts)

    assert work.layout is not None
    masked = relu_backward(total, work.activation[0]) if work.activation is not None else None
    y = inline(graph, total, run, work.narrow, total)
    full = _filled(graph, total, y, work.holes, work.activation[1] if masked and work.activation else None, work.layout)
    shape, layout = tuple(s if isinstance(s, int) else -1 for s in _torch.value(total).shape), Layout.of(_torch.value(total))
    full = inline(graph, total, lambda x: like(x.reshape(shape), layout), (full,), total)
    total.replace_all_uses_with(full)
    _drop_mask(masked)


def _added(order: Sum, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[order] if isinstance(order, int) else _added(order[0], parts) + _added(order[1], parts)


def _filled(graph: fx.Graph, before: fx.Node, narrow: fx.Node, holes: Sequence[_Hole], masked: fx.Node | None, layout: Layout) -> fx.Node:
    """The full-size gradient, laid out as `layout` says, of what is kept of it; zero where the kept activation `masked` is not positive."""
    places = tuple((h.axis, h.kept.how.unit, h.kept.how.size) for h in holes)

    def run(y: torch.Tensor, x: torch.Tensor | None, *chosen: torch.Tensor | None) -> torch.Tensor:
        y = torch.where(x <= 0, 0, y) if x is not None else y
        for (axis, unit, size), idx, scale in zip(places, chosen[::2], chosen[1::2], strict=True):
            assert idx is not None
            y = untake(y, axis, idx, scale, unit, size)
        return like(y, layout)

    chosen = [n for hole in holes for n in (hole.kept.idx, hole.scale)]
    full = inline(graph, before, run, (narrow, masked, *chosen), narrow)
    assert isinstance(full, fx.Node)
    return full


def _drop_mask(masked: fx.Node | None) -> None:
    if masked is not None:
        masked.replace_all_uses_with(masked.args[2])  # type: ignore[arg-type]


# --- gradients of convolutions ---


def _conv_gradients(graph: fx.Graph, site: Site, todo: Sequence[_Gradient]) -> None:
    """One convolution_backward makes up to three gradients; those that are narrowed alike share a call, others get one of their own.

    The bias gradient stays exact, over all samples; without the weight's beside it, it is a sum of its own (CPUs would make both).
    """
    if not todo:
        return
    m = todo[0].product.node
    mask = list(m.args[10])  # type: ignore[arg-type]
    alike: dict[tuple[bool, str | None], list[_Gradient]] = {}
    calls = [m]
    for work in todo:
        if work.coupled is not None and work.decision.lowering in CUSTOM_KERNELS:
            _step_over_conv(graph, m, work.product, work.coupled, work.skipped)
        elif work.decision.replacement is not None:
            replace_conv_weight(graph, work.product, work.decision.replacement)
        elif work.decision.decision == "sampled":
            assert work.decision.how is not None
            calls.append(_own_axis_conv(graph, m, site, work.product, work.decision.how))
        else:
            alike.setdefault((work.coupled is not None, work.decision.skips), []).append(work)
    for group in alike.values():
        calls.append(_narrow_conv(graph, site, m, group))
    done = {work.product.mask for work in todo}
    left = [bool(on) and i not in done for i, on in enumerate(mask)]
    if left[2] and not left[1]:
        dy = m.args[0]
        assert isinstance(dy, fx.Node)
        replace_output(graph, m, 2, inline(graph, m, lambda dy: dy.sum([0, *range(2, dy.dim())]), (dy,)))
        left[2] = False
    if any(left):
        m.args = (*m.args[:10], left)
        update_fake_value(m)
    for call in calls:
        release_activation(graph, call)


def _step_over_conv(graph: fx.Graph, m: fx.Node, p: Product, coupled: Sampled, skipped: Sampled | None) -> None:
    """A gradient by a kernel that steps over input channels that were not kept; of output channels those that are not zero are gathered."""
    dy, x, w = m.args[:3]
    assert isinstance(dy, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
    layout = Layout.of(_torch.value(m)[p.mask])
    if skipped is not None:
        dy, w = _taken(graph, m, dy, Axis(1), skipped), _taken(graph, m, w, Axis(0), skipped)
    grad = custom_ops.narrow_conv(graph, m, p, (dy, x, w), coupled)
    holes = [_Hole(Axis(0), skipped, None)] if skipped is not None and p.mask == 1 else []
    replace_output(graph, m, p.mask, _filled(graph, m, grad, holes, None, layout))


def _narrow_conv(graph: fx.Graph, site: Site, m: fx.Node, group: Sequence[_Gradient]) -> fx.Node:
    """Gradients from kept input channels of x and w, from the output channels of dy and w that are not zero, or both."""
    coupled, skipped, narrow = group[0].coupled, group[0].skipped, group[0].narrow
    transposed, groups = bool(m.args[7]), _groups(m)
    w_in, w_out = conv_weight_axes(transposed, groups)
    dy = m.args[0]
    x, w = coupled.operands if coupled is not None else narrow or (m.args[1], m.args[2])
    assert isinstance(dy, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
    if skipped is not None:
        dy = _taken(graph, m, dy, Axis(1), skipped)
        w = w if narrow is not None else _taken(graph, m, w, w_out, skipped)
    call = _conv_backward(graph, m, dy, (x, w), [i in {g.product.mask for g in group} for i in range(3)])
    for work in group:
        of_weight = work.product.mask == 1
        if work.fed:
            _come_from(m, call, work.product.mask)
            continue
        grad = output_of(graph, call, work.product.mask)
        activation = None
        holes = []
        if coupled is not None:
            holes.append(_Hole(w_in if of_weight else channel_axis(groups), coupled, coupled.scale if of_weight else None))
            activation = None if of_weight else (site.products[0].operands[0], coupled.operands[0])
        if skipped is not None and of_weight:
            holes.append(_Hole(w_out, skipped, None))
        grad.meta["val"] = _torch.value(m)[work.product.mask]  # the full size, which _put_back restores
        replace_output(graph, m, work.product.mask, grad)
        _put_back(graph, grad, holes, activation, work.into)
    return call


def _come_from(m: fx.Node, call: fx.Node, index: int) -> None:
    """Let the node that takes an output of `m` take that of `call`."""
    for item in list(users_of_output(m, index)):
        item.args = (call, index)
        update_fake_value(item)


def _own_axis_conv(graph: fx.Graph, m: fx.Node, site: Site, p: Product, how: Estimator) -> fx.Node:
    """grad_input from kept output channels of dy and w; grad_weight from kept samples of x and dy."""
    x, w = m.args[1], m.args[2]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    first, second = _gathered(graph, m, site, p, how).operands
    if p.mask == 0:  # x gives its shape only
        call = _conv_backward(graph, m, first, (x, second), [True, False, False])
    else:
        call = _conv_backward(graph, m, second, (first, w), [False, True, False])
    replace_output(graph, m, p.mask, output_of(graph, call, p.mask))
    return call


def _groups(m: fx.Node) -> int:
    groups = m.args[9]
    assert isinstance(groups, int)
    return groups


def _conv_backward(graph: fx.Graph, m: fx.Node, dy: Any, operands: tuple[Any, Any], mask: list[bool]) -> fx.Node:
    with graph.inserting_before(m):
        call = graph.call_function(m.target, (dy, *operands, *m.args[3:10], mask))  # type: ignore[arg-type]
    _torch.copy_provenance(m, call)
    update_fake_value(call)
    return call
