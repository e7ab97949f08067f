"""Give the readers of a narrowed gradient its full size: the kept entries in place, zeros elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from approx_compile import _torch
from approx_compile.kernels.gather import untake, untake_block
from approx_compile.passes.fx_utils import update_fake_value
from approx_compile.passes.planning.index_sharing import Sum
from approx_compile.passes.planning.zero_propagation import find_relu_backward
from approx_compile.passes.rewrite.gradient_task import NarrowedAxis, SharedSum
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, inline, match_layout


def scatter_back(
    graph: fx.Graph,
    m: fx.Node,
    narrowed: Sequence[NarrowedAxis],
    activation: tuple[fx.Node, fx.Node] | None = None,
    shared_sum: SharedSum | None = None,
) -> None:
    """Update the fake value of a gradient that has become narrow, and give its users the full-size gradient.

    If the activation is a ReLU's output and this is its only gradient, the ReLU's backward moves in front of the scatter and reads the kept entries of
    the activation. The gradient is zero in the other entries anyway, and so the mask of the whole activation need not be saved.

    Args:
        graph: The joint graph, which is edited.
        m: The node of the gradient; its arguments are narrow already, its fake value still has the full size.
        narrowed: The axes on which it is narrow.
        activation: The activation that this is the gradient of, whole and cut to the kept entries, if the gradient has its orientation.
        shared_sum: The sum that is scattered back in place of this gradient; the gradient is only added to it here.
    """
    layout = MemoryLayout.of(_torch.value(m))
    if shared_sum is not None:
        shared_sum.gradients.insert(0, m)  # gradients come in reverse order
        shared_sum.narrowed, shared_sum.activation, shared_sum.layout = tuple(narrowed), shared_sum.activation or activation, layout
        update_fake_value(m)
        return
    users = list(m.users)
    masked = find_relu_backward(m, activation[0]) if activation is not None else None
    update_fake_value(m)
    if not narrowed:
        return
    full = insert_full_size(graph, m.next, m, narrowed, activation[1] if masked and activation else None, layout)
    for u in users:
        u.replace_input_with(m, full)
    _bypass(masked)


def scatter_back_sum(graph: fx.Graph, shared_sum: SharedSum) -> None:
    """Give the users of a sum of gradients, all of which are narrow by now, the sum in full size.

    Args:
        graph: The joint graph, which is edited.
        shared_sum: The narrow gradients, to which `scatter_back` has added all of them.
    """
    total, order = shared_sum.total, shared_sum.order

    def run(*gradients: Tensor) -> Tensor:
        return _add_up(order, gradients)

    assert shared_sum.layout is not None
    masked = find_relu_backward(total, shared_sum.activation[0]) if shared_sum.activation is not None else None
    y = inline(graph, total, run, shared_sum.gradients, total)
    kept_activation = shared_sum.activation[1] if masked and shared_sum.activation else None
    full = insert_full_size(graph, total, y, shared_sum.narrowed, kept_activation, shared_sum.layout)
    shape, layout = tuple(s if isinstance(s, int) else -1 for s in _torch.value(total).shape), MemoryLayout.of(_torch.value(total))
    full = inline(graph, total, lambda x: match_layout(x.reshape(shape), layout), (full,), total)
    total.replace_all_uses_with(full)
    _bypass(masked)


def _add_up(order: Sum, gradients: Sequence[Tensor]) -> Tensor:
    return gradients[order] if isinstance(order, int) else _add_up(order[0], gradients) + _add_up(order[1], gradients)


def insert_full_size(
    graph: fx.Graph, before: fx.Node, gradient: fx.Node, narrowed: Sequence[NarrowedAxis], kept_activation: fx.Node | None, layout: MemoryLayout
) -> fx.Node:
    """Insert the full-size value of a narrow gradient.

    Args:
        graph: The joint graph, which is edited.
        before: Where the new nodes are inserted.
        gradient: The narrow gradient.
        narrowed: The axes on which it is narrow.
        kept_activation: The kept entries of a ReLU's output; where they are not positive, the gradient becomes 0.
        layout: The memory layout that the graph expects.

    Returns:
        The node of the full-size gradient.
    """
    places = tuple((n.axis, n.sampled.estimator.unit, n.sampled.estimator.size) for n in narrowed)
    block = _block_order(narrowed) if _torch.value(gradient).dim() == 2 else None

    def run(y: Tensor, x: Tensor | None, *selections: Tensor | None) -> Tensor:
        y = torch.where(x <= 0, 0, y) if x is not None else y
        if block is not None:
            rows, columns = (selections[2 * i : 2 * i + 2] for i in block)
            assert rows[0] is not None and columns[0] is not None
            shape = (places[block[0]][2], places[block[1]][2])
            return match_layout(untake_block(y, (rows[0], columns[0]), (rows[1], columns[1]), shape), layout)
        for (axis, unit, size), idx, scale in zip(places, selections[::2], selections[1::2], strict=True):
            assert idx is not None
            y = untake(y, axis, idx, scale, unit, size)
        return match_layout(y, layout)

    selections = [node for n in narrowed for node in (n.sampled.idx, n.scale)]
    full = inline(graph, before, run, (gradient, kept_activation, *selections), gradient)
    assert isinstance(full, fx.Node)
    return full


def _block_order(narrowed: Sequence[NarrowedAxis]) -> tuple[int, int] | None:
    """The numbers of the narrow axes of a matrix in the order of its dims, if both are narrow and indices stand for single entries."""
    if len(narrowed) != 2 or any(n.axis.lead is not None or n.axis.split is not None or n.sampled.estimator.unit != 1 for n in narrowed):
        return None
    return (0, 1) if narrowed[0].axis.dim == 0 else (1, 0)


def _bypass(masked: fx.Node | None) -> None:
    """Let the users of where(activation <= 0, 0, gradient) read the gradient, which has been masked before the scatter."""
    if masked is not None:
        masked.replace_all_uses_with(masked.args[2])  # type: ignore[arg-type]
