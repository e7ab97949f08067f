"""Batching rules of matrix products, convolutions, attention and linear algebra."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import op_name
from approx_compile.passes.rewrite.custom_ops import CUSTOM_MM, skip_conv_input, skip_matmul, skip_matmul_into
from approx_compile.reasons.rows import (
    BATCH_CONTRACTED,
    DROPOUT_IN_ATTENTION,
    KERNEL_AMONG_ROWS,
    NOT_FIRST_AXIS,
    NOT_LEADING_AXIS,
    ROWS_ADDED,
    ROWS_TIMES_ROWS,
    SAMPLE_WEIGHT,
)
from approx_compile.rows.batch_dim import BatchDimState, Blocked, SampleLayout, ValueLayout, holds_batch
from approx_compile.rows.batching_rules.common import batch_first, broadcast_layout, common_layout


def matmul(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to (.., M, K) x (.., K, N), with or without a bias, and to this package's matmul kernels.

    Samples in M or N stay there. Samples in K of both operands are summed. A leading batch dim pairs with that of the other operand.
    """
    left, right = n.args[:2] if n.target in CUSTOM_MM else n.args[-2:]
    a, b = state.layout_of(left), state.layout_of(right)
    if n.target is skip_matmul and ((a is not None and a.dim == 1) or (b is not None and b.dim == 0)):
        raise Blocked(KERNEL_AMONG_ROWS())
    rank = value.dim()
    layout: SampleLayout | None
    if a is not None and b is not None:
        paired = rank == 3 and a.dim == 0 and b.dim == 0
        if not paired and (a.dim, b.dim) != (rank - 1, rank - 2):
            raise Blocked(ROWS_TIMES_ROWS(op=op_name(n)))
        together = common_layout(a, b if paired else b.at_dim(a.dim))
        layout = together if paired else None
    elif a is not None:
        if a.dim == rank - 1 or (rank == 3 and a.dim == 0):
            raise Blocked(BATCH_CONTRACTED(op=op_name(n)))
        layout = a
    else:
        assert b is not None or len(n.args) == 3
        if b is not None and (b.dim == rank - 2 or (rank == 3 and b.dim == 0)):
            raise Blocked(BATCH_CONTRACTED(op=op_name(n)))
        layout = b
    if n.target is skip_matmul_into and layout is not None and layout.dim == n.args[5]:
        raise Blocked(KERNEL_AMONG_ROWS())
    if len(n.args) == 3 and (bias := broadcast_layout(n.args[0], rank, state)) is not None:
        if layout is None:
            raise Blocked(ROWS_ADDED(op=op_name(n)))
        layout = common_layout(layout, bias)
    return layout


def convolution_backward(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to the gradients of a convolution: that of the input keeps the samples, those of weight and bias are sums over them."""
    dy, x, w = n.args[:3]
    if state.layout_of(w) is not None:
        raise Blocked(SAMPLE_WEIGHT())
    layout = common_layout(state.layout_of(dy), state.layout_of(x))
    if not _is_first(layout):
        raise Blocked(NOT_FIRST_AXIS(op=op_name(n)))
    return (layout if value[0] is not None else None, None, None)


def _is_first(layout: SampleLayout | None) -> bool:
    """Whether dim 0 holds the samples, each with one or several entries."""
    return layout is not None and layout.dim == 0 and not layout.uniform


def custom_convolution(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to this package's kernels for a convolution's gradient in selected input channels: of x, from dY and W, or of W, from x and dY."""
    layout = common_layout(*(state.layout_of(a) for a in n.args[:2]))
    if not _is_first(layout) or (n.target is skip_conv_input and state.layout_of(n.args[1]) is not None):
        raise Blocked(NOT_FIRST_AXIS(op=op_name(n)))
    return layout if n.target is skip_conv_input else None


def attention(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to scaled dot product attention and its gradient, without dropout: the mask would depend on a sample's position in the batch."""
    schema = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
    arguments = dict(zip(schema, n.args, strict=False)) | n.kwargs
    if arguments.get("dropout_p", 0.0) != 0.0:
        raise Blocked(DROPOUT_IN_ATTENTION())
    return batch_first(n, value, state)


def linalg(n: fx.Node, value: Any, state: BatchDimState) -> ValueLayout:
    """Apply to linear algebra on the matrices in the last two dims: one independent problem for each index of the dims before."""
    tensors = [a for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    leading = max(_torch.value(a).dim() for a in tensors) - 2
    layout = common_layout(*(state.layout_of(a) for a in tensors))
    if layout is None or layout.dim >= leading or any(state.layout_of(a) is None and _torch.value(a).dim() > 2 for a in tensors):
        raise Blocked(NOT_LEADING_AXIS(op=op_name(n)))
    return tuple(layout if holds_batch(v, state.batch) else None for v in value) if isinstance(value, tuple | list) else layout
