"""Edit the gradients of a convolution: one convolution_backward is split into calls that compute gradients of the kept entries only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from approx_compile import _torch
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gather import Axis
from approx_compile.passes.fx_utils import update_fake_value, users_of_output
from approx_compile.passes.rewrite import custom_ops
from approx_compile.passes.rewrite.gradient_task import GradientTask, NarrowedAxis
from approx_compile.passes.rewrite.graph_edit import MemoryLayout, SampledOperands, inline, replace_output, take_kept, take_output
from approx_compile.passes.rewrite.replace_gradient import release_activation, replace_conv_weight
from approx_compile.passes.rewrite.sample_product import gather_operands
from approx_compile.passes.rewrite.scatter_back import insert_full_size, scatter_back
from approx_compile.passes.sites.conv_gradients import channel_axis, conv_weight_axes
from approx_compile.passes.sites.site import Product, Site


def edit_conv_gradients(graph: fx.Graph, site: Site, tasks: Sequence[GradientTask]) -> None:
    """Carry out what is to be done to the gradients of one convolution.

    One convolution_backward computes up to three gradients. Gradients that are narrowed alike share one new call, the others get a call of their own.
    The bias gradient stays exact, over all samples. Where the weight's gradient is no longer computed beside it, it becomes a plain sum, because on CPUs
    convolution_backward would compute both.

    Args:
        graph: The joint graph, which is edited.
        site: The convolution.
        tasks: What is to be done to its gradient products.
    """
    if not tasks:
        return
    m = tasks[0].product.node
    mask = list(m.args[10])  # type: ignore[arg-type]
    alike: dict[tuple[bool, str | None], list[GradientTask]] = {}
    calls = [m]
    for task in tasks:
        if task.coupled is not None and task.decision.lowering in CUSTOM_KERNELS:
            _use_skip_kernel(graph, m, task.product, task.coupled, task.skipped)
        elif task.decision.replacement is not None:
            replace_conv_weight(graph, task.product, task.decision.replacement)
        elif task.decision.decision == "sampled":
            assert task.decision.how is not None
            calls.append(_sample_own_axis(graph, m, site, task.product, task.decision.how))
        else:
            alike.setdefault((task.coupled is not None, task.decision.skips), []).append(task)
    for group in alike.values():
        calls.append(_narrow(graph, site, m, group))
    done = {task.product.mask for task in tasks}
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


def _use_skip_kernel(graph: fx.Graph, m: fx.Node, p: Product, coupled: SampledOperands, skipped: SampledOperands | None) -> None:
    """Compute a gradient by a kernel that skips the input channels that were not kept; output channels of dY that are not zero are gathered."""
    dy, x, w = m.args[:3]
    assert isinstance(dy, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
    layout = MemoryLayout.of(_torch.value(m)[p.mask])
    if skipped is not None:
        dy, w = take_kept(graph, m, dy, Axis(1), skipped), take_kept(graph, m, w, Axis(0), skipped)
    gradient = custom_ops.insert_skip_conv_gradient(graph, m, p, (dy, x, w), coupled)
    narrowed = [NarrowedAxis(Axis(0), skipped, None)] if skipped is not None and p.mask == 1 else []
    replace_output(graph, m, p.mask, insert_full_size(graph, m, gradient, narrowed, None, layout))


def _narrow(graph: fx.Graph, site: Site, m: fx.Node, group: Sequence[GradientTask]) -> fx.Node:
    """Compute gradients from the kept input channels of x and w, from the output channels of dY and w that are not zero, or from both.

    All tasks of the group use the same selections. Returns the new convolution_backward.
    """
    coupled, skipped, narrow_operands = group[0].coupled, group[0].skipped, group[0].narrow_operands
    transposed, groups = bool(m.args[7]), _groups(m)
    w_in, w_out = conv_weight_axes(transposed, groups)
    dy = m.args[0]
    x, w = coupled.operands if coupled is not None else narrow_operands or (m.args[1], m.args[2])
    assert isinstance(dy, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
    if skipped is not None:
        dy = take_kept(graph, m, dy, Axis(1), skipped)
        w = w if narrow_operands is not None else take_kept(graph, m, w, w_out, skipped)
    call = _insert_conv_backward(graph, m, dy, (x, w), [i in {t.product.mask for t in group} for i in range(3)])
    for task in group:
        of_weight = task.product.mask == 1
        if task.keep_narrow:
            _redirect_output(m, call, task.product.mask)
            continue
        gradient = take_output(graph, call, task.product.mask)
        activation = None
        narrowed = []
        if coupled is not None:
            narrowed.append(NarrowedAxis(w_in if of_weight else channel_axis(groups), coupled, coupled.scale if of_weight else None))
            activation = None if of_weight else (site.products[0].operands[0], coupled.operands[0])
        if skipped is not None and of_weight:
            narrowed.append(NarrowedAxis(w_out, skipped, None))
        gradient.meta["val"] = _torch.value(m)[task.product.mask]  # the full size, from which scatter_back reads the layout
        replace_output(graph, m, task.product.mask, gradient)
        scatter_back(graph, gradient, narrowed, activation, task.shared_sum)
    return call


def _sample_own_axis(graph: fx.Graph, m: fx.Node, site: Site, p: Product, estimator: Estimator) -> fx.Node:
    """Compute grad_input from kept output channels of dY and w, or grad_weight from kept samples of x and dY."""
    x, w = m.args[1], m.args[2]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    first, second = gather_operands(graph, m, site, p, estimator).operands
    if p.mask == 0:  # only the shape of x is read
        call = _insert_conv_backward(graph, m, first, (x, second), [True, False, False])
    else:
        call = _insert_conv_backward(graph, m, second, (first, w), [False, True, False])
    replace_output(graph, m, p.mask, take_output(graph, call, p.mask))
    return call


def _redirect_output(m: fx.Node, call: fx.Node, index: int) -> None:
    """Let the nodes that take an output of `m` take that of `call`."""
    for item in list(users_of_output(m, index)):
        item.args = (call, index)
        update_fake_value(item)


def _groups(m: fx.Node) -> int:
    groups = m.args[9]
    assert isinstance(groups, int)
    return groups


def _insert_conv_backward(graph: fx.Graph, m: fx.Node, dy: Any, operands: tuple[Any, Any], mask: list[bool]) -> fx.Node:
    """Insert a convolution_backward like `m` on other tensors, before `m`."""
    with graph.inserting_before(m):
        call = graph.call_function(m.target, (dy, *operands, *m.args[3:10], mask))  # type: ignore[arg-type]
    _torch.copy_provenance(m, call)
    update_fake_value(call)
    return call
