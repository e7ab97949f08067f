"""Narrow the gradient products of a matmul to the entries that the output kept, or to those of dY that are not zero."""

from __future__ import annotations

from torch import fx

from approx_compile import _torch
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.gather import Axis
from approx_compile.passes.rewrite import custom_ops
from approx_compile.passes.rewrite.gradient_task import GradientTask, NarrowedAxis
from approx_compile.passes.rewrite.graph_edit import inline, take_kept
from approx_compile.passes.rewrite.scatter_back import scatter_back
from approx_compile.passes.sites.matmul_gradients import permutation_between


def narrow_matmul_gradient(graph: fx.Graph, forward: tuple[fx.Node, fx.Node], task: GradientTask) -> None:
    """Let a coupled gradient, or one of a dY with zeros, contract or compute the kept entries only.

    With Y' = A[:, idx] diag(scale) B[idx, :] it is dA[:, idx] = dY B'^T with B' = diag(scale) B[idx, :], or dB[idx, :] = diag(scale) A'^T dY with
    A' = A[:, idx]; zeros elsewhere. Of dY only the columns are read that are not zero. An operand that a custom kernel skips in stays whole.

    Args:
        graph: The joint graph, which is edited.
        forward: A and B, the operands of the exact output.
        task: The gradient product and the selections to use.
    """
    p = task.product
    m, position = p.node, p.position
    coupled = task.coupled if task.decision.lowering not in CUSTOM_KERNELS else None
    skipped = task.skipped if task.decision.skips_by not in CUSTOM_KERNELS else None
    operand, dy = m.args[position], m.args[1 - position]
    assert isinstance(operand, fx.Node) and isinstance(dy, fx.Node)
    first_matrix_dim = _torch.value(m).dim() - 2
    lead = 0 if first_matrix_dim == 1 else None
    narrowed = []
    # dB reads A, which is not cut along dY's columns; dA reads B, which may have been cut along them with the output
    has_all_outputs = task.narrow_operands is None or p.reads == 0
    cut = coupled.operands if coupled is not None else None if has_all_outputs else task.narrow_operands
    if coupled is not None and coupled.whole:
        operand = take_kept(graph, m, operand, Axis(position), coupled)
    elif cut is not None:
        order = tuple(permutation_between(forward[p.reads], operand))
        operand = cut[p.reads]
        if list(order) != sorted(order):
            operand = inline(graph, m, lambda x: x.permute(order), (operand,))
    if coupled is not None and not task.keep_narrow:
        scale = coupled.scale if p.reads == 0 or coupled.whole else None  # B' has been multiplied by its scale already
        narrowed.append(NarrowedAxis(Axis(position + first_matrix_dim, lead), coupled, scale))
    if skipped is not None:
        dy = take_kept(graph, m, dy, Axis(p.output_grad_dim), skipped)
        if p.reads == 1 and has_all_outputs:
            operand = take_kept(graph, m, operand, p.axes[position], skipped)
        elif p.reads == 0:
            narrowed.append(NarrowedAxis(Axis(1 - position + first_matrix_dim), skipped, None))
    m.args = (operand, dy) if position == 0 else (dy, operand)
    if task.coupled is not None and coupled is None:
        custom_ops.skip_in_matmul(m, task.coupled, task.coupled.scale, position)
    elif task.skipped is not None and skipped is None:
        custom_ops.skip_in_matmul(m, task.skipped, None, None if p.reads == 1 else 1 - position)
    activation = None
    if coupled is not None and not coupled.whole and p.reads == position == 1:  # dA, in the orientation of A
        activation = (forward[0], coupled.operands[0])
    scatter_back(graph, m, narrowed, activation, task.shared_sum)
