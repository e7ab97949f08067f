"""The analysis of a graph by itself: what is blocked before Inductor's passes simplify the graph, which the early decision about a model goes by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from approx_compile import _torch
from approx_compile.rows.batch_dim import ROW_GRAD, BatchSize
from approx_compile.rows.batch_dim_analysis import analyze_batch_dim

aten = torch.ops.aten


def test_a_new_tensor_holds_the_samples_where_the_gradient_does_that_it_is_modelled_on() -> None:
    """Autograd writes the gradient of a part of a tensor into a new tensor, which may have samples and heads in one dim."""

    def copied(grad: Tensor) -> Tensor:
        merged = grad.view(2 * grad.shape[0], 3, 3)
        fresh = merged.new_empty_strided([2 * grad.shape[0], 3, 3], [9, 3, 1])
        return aten.copy.default(fresh, merged).view(grad.shape[0], 2, 3, 3)

    traced = make_fx(copied, tracing_mode="symbolic")(torch.randn(20, 2, 3, 3))
    (tangent,) = traced.graph.find_nodes(op="placeholder")
    (fresh,) = traced.graph.find_nodes(op="call_function", target=aten.new_empty_strided.default)
    batch = BatchSize(_torch.size_expr(tangent.meta["val"].shape[0]))
    state = analyze_batch_dim(traced.graph, batch, tangents=[tangent])
    assert not state.blocked
    layout = state.layout_of(fresh)
    assert layout is not None and state.kind[fresh] == ROW_GRAD
    assert (layout.dim, layout.outer, layout.inner) == (0, 1, 2)
