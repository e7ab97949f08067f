"""Gradients that replace a gradient product: zeros, random numbers, or the product with the largest entries of the output gradient only (`max`).

Wang and Nelaturu, *Accelerated CNN Training Through Gradient Approximation*, 2019 (zero, random, and max for convolutions: Algorithm 1);
Sun et al., *meProp*, ICML 2017 (max for linear layers).

The product with few entries is a weighted sum of rows of a table (`weighted_row_sums`). For the weight gradient of a convolution a row of the table holds
all channels of a pixel of the input; for linear layers it holds a sample, or a row of the weight. No sparse gradient is ever written out, and the only
change of layout puts a pixel's channels side by side (none for channels-last). Shapes never depend on data.

Legend: N samples, C input and O output channels, P places of the output (Q of the input), T taps of the kernel, J entries kept; of a linear layer
M rows, K inputs, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from approx_compile import _torch
from approx_compile.kernels.gather import memory_order


@dataclass(frozen=True)
class Replacement:
    """What replaces a gradient product.

    Attributes:
        method: "zero"; "random": normal numbers with mean 0; or "max": the product with the largest entries of the output gradient.
        j: Entries that `max` keeps of a channel (convolution) or of a row (linear layer).
        scale: Factor on the result of `max`.
        std: Standard deviation of `random`; None: 1 / batch.
        tile: `max` keeps the largest entry of every tile with so many places by side, in place of the j largest entries; None: no tiles.
        lowering: The code that runs `max`: "inductor", or "cuda" (the op of `kernels.max_conv`).
    """

    method: str
    j: int = 1
    scale: float = 1.0
    std: float | None = None
    tile: int | None = None
    lowering: str = "inductor"

    def entries(self, sizes: Sequence[int]) -> int:
        """Return how many entries of a channel `max` keeps; `sizes`: the places of the output by spatial dim."""
        return self.j if self.tile is None else math.prod(-(-s // self.tile) for s in sizes)


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel size, stride, padding and dilation of a convolution by spatial dim, its groups, and whether it is transposed."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False


def weighted_row_sums(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Compute weighted sums of rows: out[i] = sum of weights[e] table[rows[e]] over the entries e from offsets[i] up to offsets[i + 1].

    Sums are fp32 (fp64 for fp64); weights are rounded to the table's dtype.

    Args:
        table: (R, D).
        rows: Row of the table of each entry, (E,), whole numbers.
        weights: Weight of each entry, (E,).
        offsets: First entry of each sum, (B,), ascending.

    Returns:
        (B, D), in the table's dtype.
    """
    out: Tensor = torch.ops.aten._embedding_bag_forward_only(table.contiguous(), rows, offsets, False, 0, False, weights.to(table.dtype))[0]
    return out


EXACT_IN_FLOAT32 = 2**22
"""Up to this place p, fp32 represents p exactly and floor((p + 1/2) / n) is p // n."""

_UNROLLED = 8
"""Up to this length Inductor unrolls a reduction and inlines it into every reader of the result, here once for every tap of the kernel."""


def materialized(dy: Tensor, order: Sequence[int] | None = None) -> Tensor:
    """Copy dy to a buffer in fp32 (fp64 for fp64), so that comparisons with its own largest entry are exact.

    `x == x.amax()` needs the same numbers on both sides. Inductor recomputes what is no buffer in each of them, and may round in one and not in the other,
    or vectorise one and not the other.

    Args:
        dy: The tensor.
        order: Order of the dims in memory, from the slowest to the fastest; None: dy's own.

    Returns:
        The values of dy, with its shape.
    """
    given = memory_order(dy)
    return _torch.force_memory_order(dy.to(torch.float64 if dy.dtype == torch.float64 else torch.float32), given if order is None else order)


def largest_entries(dy: Tensor, j: int) -> Tensor:
    """Return the indices of the j entries of largest magnitude along the last dim: (.., L) -> (.., j), int64.

    NaN counts as the largest. Of equal magnitudes the first is taken for j = 1; for j > 1 the choice among them is open.

    Args:
        dy: (.., L).
        j: Number of entries.
    """
    if j > 1:
        return dy.abs().topk(j, dim=-1, sorted=False).indices
    if dy.device.type != "cpu" or not _UNROLLED < dy.shape[-1] <= EXACT_IN_FLOAT32:
        return dy.abs().argmax(-1, keepdim=True)
    size = materialized(dy).abs()
    # argmax in operations that Inductor's C++ code vectorises: reductions to the largest and smallest value, and places as floats
    is_largest = (size == size.amax(-1, keepdim=True)) | (size != size)
    return torch.where(is_largest, torch.arange(size.shape[-1], dtype=torch.float32, device=dy.device), torch.inf).amin(-1, keepdim=True).long()


def max_conv_weight(x: Tensor, dy: Tensor, replacement: Replacement, conv: ConvGeometry) -> Tensor:
    """Compute the weight gradient of a convolution from the j largest entries of every channel of every sample.

    df[o] = scale * sum over n and the chosen places p of v[n, o, p] patch(x[n], p). The values v of a channel always have the channel's sum S. For j = 1 the
    one entry is S (Wang and Nelaturu 2019, Algorithm 1). For j > 1 each chosen entry carries its own value and an equal share of what the others leave,
    v = dy[p] + (S - sum of the chosen dy) / j, so that j = 1 is Algorithm 1 and j = P the exact product. Scaling the chosen entries to the sum instead would
    divide by a sum that may be 0.

    A tap outside the image reads the nearest pixel with weight 0; if that pixel is NaN or inf, the result is NaN.

    Args:
        x: Input of the convolution, (N, C, *in).
        dy: Gradient of its output, (N, O, *out).
        replacement: Which entries are kept (`j` or `tile`), and the scale.
        conv: The convolution.

    Returns:
        The gradient, in the shape of the weight and the dtype of x.
    """
    place, value = select_entries(dy, replacement)
    samples, inputs, outputs = x.shape[0], x.shape[1] // conv.groups, dy.shape[1]
    taps, size, each = math.prod(conv.kernel), math.prod(x.shape[2:]), place.shape[-1]
    index_dtype = _index_dtype(samples, size * conv.groups, outputs * taps * each)
    # all entries of a channel in one dim, (O, 1, N J), are vectorised even where a sample has few
    pixel, inside = _taps(place.reshape(outputs, 1, -1), tuple(x.shape[2:]), tuple(dy.shape[2:]), conv, index_dtype)  # (O, T, N J)
    sample = torch.arange(samples, dtype=index_dtype, device=x.device)
    if each > 1:
        sample = _torch.force_memory_order(sample.reshape(-1, 1).expand(-1, each).reshape(-1), (0,))
    group = (torch.arange(outputs, dtype=index_dtype, device=x.device) // (outputs // conv.groups)).reshape(-1, 1, 1)
    row = (sample * size + pixel) * conv.groups + group
    weight = torch.where(inside, value.reshape(outputs, 1, -1), 0)
    table = x.movedim(1, -1).reshape(-1, inputs)
    offsets = torch.arange(outputs * taps, dtype=index_dtype, device=x.device) * (samples * each)
    df = weighted_row_sums(table, row.flatten(), weight.flatten(), offsets).reshape(outputs, *conv.kernel, inputs)
    if not conv.transposed:
        return df.movedim(-1, 1)
    by_group = df.reshape(conv.groups, outputs // conv.groups, *conv.kernel, inputs)
    return by_group.movedim(-1, 1).flatten(0, 1)


def select_entries(dy: Tensor, replacement: Replacement) -> tuple[Tensor, Tensor]:
    """Choose the entries that `max` keeps.

    Args:
        dy: Gradient of the output, (N, O, *out).
        replacement: Which entries are kept, and the scale.

    Returns:
        The flat places of the chosen entries, (O, N, J), as whole numbers (in floating point where entries are chosen by tiles), and their values times the
        scale, (O, N, J), in fp32 (fp64 for fp64).
    """
    on_cpu = dy.device.type == "cpu"
    if replacement.tile is not None or (replacement.j == 1 and on_cpu):
        # Inductor's C++ code lays convolutions' tensors out in channels-last, whatever strides they were traced with; comparisons are then vectorised across
        # channels
        buffer = materialized(dy, (0, *range(2, dy.dim()), 1) if on_cpu else None)
        chosen = _largest_of_tiles(buffer, [min(replacement.tile or s, s) for s in dy.shape[2:]])
        place, value = (_torch.force_memory_order(t.transpose(0, 1), range(3)) for t in chosen)
        return place, value * replacement.scale
    flat = dy.flatten(2).transpose(0, 1)
    place = largest_entries(flat, replacement.j)
    value = flat.sum(-1, keepdim=True, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)
    if replacement.j > 1:
        chosen_values = flat.gather(-1, place).to(value.dtype)
        value = chosen_values + (value - chosen_values.sum(-1, keepdim=True)) / replacement.j
    return place, value * replacement.scale


def _largest_of_tiles(dy: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the place of the largest entry of every tile of dy (N, O, *out), of equal ones the first, and the tile's sum: (N, O, J) each.

    dy comes from `materialized`; `sides`: places of a tile by dim. Places are floats, whose comparisons are vectorised. A few neighbours in a row are reduced
    first, then all the rest of a tile at once: the comparisons of one chain wait for each other, and this makes the chain shorter.
    """
    last, count = dy.dim() - 1, math.prod(dy.shape[2:])
    place = torch.arange(count, dtype=torch.float32 if count <= EXACT_IN_FLOAT32 else torch.float64, device=dy.device).reshape(dy.shape[2:]).expand(dy.shape)
    padding = [r for size, side in zip(reversed(dy.shape[2:]), reversed(sides), strict=True) for r in (0, -size % side)]
    parts = [torch.nn.functional.pad(t, padding, value=v) if any(padding) else t for t, v in ((dy.abs(), -1.0), (dy, 0.0), (place, 0.0))]
    few = _first_step(sides[-1], dy.shape[-1])
    if few > 1:
        parts = _largest([t.unflatten(last, (-1, few)) for t in parts], (last + 1,))
    for d, side in reversed(list(enumerate((*sides[:-1], sides[-1] // few), 2))):
        parts = [t.unflatten(d, (-1, side)) for t in parts]
    _, value, place = _largest(parts, tuple(range(3, 2 * dy.dim() - 2, 2)))
    return place.flatten(2), value.flatten(2)


def _largest(parts: Sequence[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    """Reduce magnitude, sum and place to those of the largest magnitude along these dims."""
    size, value, place = parts
    top = size.amax(dims, keepdim=True)
    where = torch.where((size == top) | (size != size), place, torch.inf).amin(dims)
    return [top.squeeze(dims), value.sum(dims), where]


def _first_step(side: int, size: int) -> int:
    """Return the neighbours in a row to reduce first: the smallest of 2, 3, 5, 7 that divides the side; 1 if none does, or if an odd side is the whole row."""
    if side % 2 == 0:
        return 2
    return next((f for f in (3, 5, 7) if side % f == 0), 1) if side < size else 1


def _index_dtype(samples: int, *each: int) -> torch.dtype:
    """Return int32, whose arithmetic C++ code vectorises, if it can count `each` in all samples, else int64; a symbolic batch must not be compared (guards)."""
    return torch.int32 if isinstance(samples, int) and samples * max(each) < 2**31 else torch.int64


def _taps(place: Tensor, size: tuple[int, ...], out: tuple[int, ...], conv: ConvGeometry, index_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the input pixel that every tap of the kernel reads for an output place, (O, T, E), and whether it lies in the image; place: (O, 1, E).

    Per dim: at = place stride + tap dilation - padding; transposed: at = (place + padding - tap dilation) / stride, if that is whole.
    Computed in floats, which are exact here, because C++ code divides integers one by one.
    """
    place = place.to(torch.float32 if max(math.prod(size), math.prod(out)) <= EXACT_IN_FLOAT32 else torch.float64)
    tap = torch.arange(math.prod(conv.kernel), device=place.device).reshape(-1, 1)
    pixel, inside = torch.zeros_like(place), torch.ones_like(place, dtype=torch.bool)
    step = 1
    for d in reversed(range(len(size))):
        k, tap = tap % conv.kernel[d], tap // conv.kernel[d]
        q, place = divide_whole_floats(place, out[d]) if d else (place, place)
        if conv.transposed:
            rest, at = divide_whole_floats(q + (conv.padding[d] - k * conv.dilation[d]), conv.stride[d])
            inside = inside & (rest == 0)
        else:
            at = q * conv.stride[d] + (k * conv.dilation[d] - conv.padding[d])
        nearest = at.clamp(0, size[d] - 1)
        inside = inside & (at == nearest)
        pixel = pixel + nearest * step
        step *= size[d]
    return pixel.to(index_dtype), inside


def divide_whole_floats(n: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return n modulo `by` and n // by for whole numbers n in floating point, up to `EXACT_IN_FLOAT32` in fp32."""
    quotient = ((n + 0.5) / by).floor()
    return n - quotient * by, quotient


def max_linear_weight(x: Tensor, dy: Tensor, replacement: Replacement) -> Tensor:
    """Compute the weight gradient of a linear layer from the j largest entries of every row (Sun et al. 2017, meProp).

    dW[n] = scale * sum of dy[m, n] x[m] over the rows m that have n among their j largest entries. Entries are sorted by their output n, so that those of an
    output are contiguous, however many there are.

    Args:
        x: Input of the layer, (M, K).
        dy: Gradient of its output, (M, N).
        replacement: `j` and `scale` of `max`.

    Returns:
        (N, K).
    """
    at = largest_entries(dy, replacement.j)
    value = (dy.gather(-1, at) * replacement.scale).flatten()
    output, order = at.flatten().sort(stable=True)
    offsets = torch.searchsorted(output, torch.arange(dy.shape[1], device=dy.device))
    return weighted_row_sums(x, order // replacement.j, value.gather(0, order), offsets)


def max_linear_input(dy: Tensor, w: Tensor, replacement: Replacement) -> Tensor:
    """Compute the input gradient of a linear layer from the j largest entries of every row (Sun et al. 2017, meProp).

    dX[m] = scale * sum of dy[m, n] w[n] over the j largest entries n of row m.

    Args:
        dy: Gradient of the layer's output, (M, N).
        w: Its weight, (N, K).
        replacement: `j` and `scale` of `max`.

    Returns:
        (M, K).
    """
    at = largest_entries(dy, replacement.j)
    value = dy.gather(-1, at) * replacement.scale
    return weighted_row_sums(w, at.flatten(), value.flatten(), torch.arange(dy.shape[0], device=dy.device) * replacement.j)
