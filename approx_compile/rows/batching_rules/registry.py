"""The table of batching rules: which rule holds for which op.

Each rule is a claim about its ops. `tests/rows` and `tests/conformance` hold it: they compare gradients on a subset of the rows with those of the exact
model under masked output gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from approx_compile import _torch
from approx_compile.passes.fx_utils import BMM, MM, VIEWS, op_name
from approx_compile.passes.rewrite.custom_ops import CUSTOM_CONV, CUSTOM_MM
from approx_compile.rows.batching_rules.common import Rule, along_dim, batch_first, same_as_operand
from approx_compile.rows.batching_rules.elementwise import copy, pointwise, reduction
from approx_compile.rows.batching_rules.indexing import embedding_backward, gather_scatter, index, index_put, masked_index
from approx_compile.rows.batching_rules.products import attention, convolution_backward, custom_convolution, linalg, matmul
from approx_compile.rows.batching_rules.slices import cat, pad, select, select_scatter, slice_, slice_scatter, split
from approx_compile.rows.batching_rules.views import as_strided, as_strided_scatter, expand, permute, squeeze, unsqueeze, view, view_as_complex

aten = torch.ops.aten
prims = torch.ops.prims


_LIKE = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default}
_REDUCTIONS = {aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default, aten.any.dim}
_REDUCTIONS |= {aten.argmax.default, aten.argmin.default, aten.prod.dim_int, aten.var.correction, aten.var_mean.correction, aten.any.dims}
_REDUCTIONS |= {aten.max.dim, aten.min.dim, aten.median.dim}
_SHAPE_KEPT: set[Any] = {aten.clone.default, aten._to_copy.default, prims.convert_element_type.default, aten.lift_fresh_copy.default}
_SHAPE_KEPT |= _LIKE | {aten.detach.default, aten.alias.default}

_BATCH_FIRST = """
    convolution max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d
    _adaptive_avg_pool2d_backward adaptive_max_pool2d_backward adaptive_max_pool3d_backward max_pool3d_with_indices_backward avg_pool3d_backward
    _adaptive_avg_pool3d_backward upsample_nearest2d upsample_nearest2d_backward upsample_bilinear2d upsample_bilinear2d_backward
    upsample_nearest1d_backward _upsample_bilinear2d_aa_backward reflection_pad1d_backward reflection_pad2d_backward replication_pad1d_backward
    replication_pad2d_backward replication_pad3d_backward grid_sampler_2d_backward grid_sampler_3d_backward native_group_norm
    native_group_norm_backward _low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices pixel_shuffle pixel_unshuffle""".split()
_ATTENTION = """
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_efficient_attention
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward""".split()


_LINALG = """
    linalg_inv_ex _linalg_solve_ex linalg_lu_factor_ex linalg_lu_solve linalg_lu lu_unpack linalg_cholesky_ex cholesky_solve linalg_solve_triangular
    triangular_solve _linalg_det _linalg_slogdet linalg_qr _linalg_svd _linalg_eigh tril triu""".split()

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SHAPE_KEPT, same_as_operand),
    aten.copy.default: copy,
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys((aten.permute.default, aten.t.default, aten.transpose.int), permute),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(MM | BMM | CUSTOM_MM, matmul),
    **dict.fromkeys(CUSTOM_CONV, custom_convolution),
    **dict.fromkeys((aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default), squeeze),
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default, aten.cumsum.default, aten.cumprod.default, aten.flip.default), along_dim(1)),
    **dict.fromkeys((aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default), gather_scatter),
    **dict.fromkeys((aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default), along_dim(1)),
    **dict.fromkeys((aten.view_as_real.default, aten.view_as_complex.default), view_as_complex),
    aten.index_select.default: along_dim(1),
    **dict.fromkeys((aten.sort.default, aten.sort.stable, aten.cummax.default, aten.cummin.default), along_dim(1)),
    aten.topk.default: along_dim(2),
    **dict.fromkeys((aten._softmax_backward_data.default, aten._log_softmax_backward_data.default), along_dim(2)),
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
    aten.as_strided.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
    **dict.fromkeys((aten.index.Tensor, aten._unsafe_index.Tensor), index),
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), index_put),
    aten.convolution_backward.default: convolution_backward,
    aten.embedding_dense_backward.default: embedding_backward,
    aten.expand.default: expand,
    aten.split_with_sizes.default: split,
    aten.split.Tensor: split,
    aten.unbind.int: split,
    aten.unsqueeze.default: unsqueeze,
    aten.select.int: select,
    aten.slice.Tensor: slice_,
    aten.cat.default: cat,
    aten.constant_pad_nd.default: pad,
}
_RULES_BY_NAME: dict[str, Rule] = {
    "rev": along_dim(1),
    "inductor_force_stride_order": same_as_operand,
    **dict.fromkeys(("_conj", "_conj_physical", "conj_physical", "resolve_conj"), same_as_operand),
    "_unsafe_masked_index": masked_index,
    "_unsafe_masked_index_put_accumulate": index_put,
    "unfold": along_dim(1),
    **dict.fromkeys(_BATCH_FIRST, batch_first),
    **dict.fromkeys(_LINALG, linalg),
    **dict.fromkeys(_ATTENTION, attention),
}
"""Rules by the op's name, whatever its overload. Inductor registers some of these ops only when it is first used."""


def rule_of(n: fx.Node) -> Rule | None:
    """Return the batching rule of a node's op; None if there is none."""
    return _RULES.get(n.target) or _RULES_BY_NAME.get(op_name(n)) or (pointwise if _torch.is_pointwise(n) else None)
