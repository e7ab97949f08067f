"""What stands in the place of a gradient product: zeros, random numbers, or the product with the largest entries of the output gradient only.

Wang and Nelaturu, *Accelerated CNN Training Through Gradient Approximation*, 2019 (zero, random, and max for convolutions: Algorithm 1);
Sun et al., *meProp*, ICML 2017 (max for linear layers).

The product with few entries is a weighted sum of rows of a table, `weighted_row_sums`: of the input's pixels, all channels of one a row, for the weight
gradient of a convolution; of samples, or of the weight's rows, for linear layers. No sparse gradient is ever written out, and the only change of
layout is that which puts a pixel's channels side by side (none for channels-last). Shapes never depend on data.

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


@dataclass(frozen=True)
class Replacement:
    """`method` zero, random (normal with mean 0 and standard deviation `std`, None: 1 / batch) or max (the `j` largest entries, or with `tile` the
    largest of every tile of so many places by side; the result times `scale`).
    `lowering`: the code that runs it, "inductor" or "cuda" (the op of `kernels.max_conv`)."""

    method: str
    j: int = 1
    scale: float = 1.0
    std: float | None = None
    tile: int | None = None
    lowering: str = "inductor"

    def entries(self, sizes: Sequence[int]) -> int:
        """How many entries of a channel with these places by dim `max` keeps."""
        return self.j if self.tile is None else math.prod(-(-s // self.tile) for s in sizes)


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution's kernel size, stride, padding and dilation by spatial dim, its groups, and whether it is transposed."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False


def weighted_row_sums(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """out[i] = sum of weights[e] table[rows[e]] over the entries e of bag i, which begin at offsets[i]; (R, D), (E,), (E,), (B,) -> (B, D).

    Sums are fp32 (fp64 for fp64), weights in the table's dtype.
    """
    out: Tensor = torch.ops.aten._embedding_bag_forward_only(table.contiguous(), rows, offsets, False, 0, False, weights.to(table.dtype))[0]
    return out


EXACT_IN_FLOAT32 = 2**22
"""Up to here fp32 has every place p, and floor((p + 1/2) / n) is p // n."""

_UNROLLED = 8
"""Up to here Inductor writes the comparisons out, in every place that reads the result, and so again for every tap."""


def materialized(dy: Tensor, order: Sequence[int] | None = None) -> Tensor:
    """The same values in fp32 (fp64 for fp64) as a buffer, with the dims in this order in memory (None: in their own). What is compared with its own
    largest entry must be the same numbers on both sides: what is no buffer Inductor computes anew in each, here rounded and there not, here in vectors
    and there not."""
    own = sorted(range(dy.dim()), key=lambda d: -_torch.hint(dy.stride(d)))
    return _torch.laid_out(dy.to(torch.float64 if dy.dtype == torch.float64 else torch.float32), own if order is None else order)


def largest_entries(dy: Tensor, j: int) -> Tensor:
    """Indices of the j entries of largest magnitude along the last dim, (.., L) -> (.., j); NaN counts as the largest, of equal ones (j = 1) the first."""
    if j > 1:
        return dy.abs().topk(j, dim=-1, sorted=False).indices
    if dy.device.type != "cpu" or not _UNROLLED < dy.shape[-1] <= EXACT_IN_FLOAT32:
        return dy.abs().argmax(-1, keepdim=True)
    size = materialized(dy).abs()
    # in what Inductor's C++ code does in vectors: largest and smallest values, and places as floats
    found = (size == size.amax(-1, keepdim=True)) | (size != size)
    return torch.where(found, torch.arange(size.shape[-1], dtype=torch.float32, device=dy.device), torch.inf).amin(-1, keepdim=True).long()


def max_conv_weight(x: Tensor, dy: Tensor, how: Replacement, conv: ConvGeometry) -> Tensor:
    """The weight gradient from the j largest entries of every sample's output channel: x (N, C, *in), dy (N, O, *out) -> the weight's shape.

    df[o] = scale * sum over n and the chosen places p of v[n, o, p] patch(x[n], p), where the values v of a channel always have the channel's sum S: with
    j = 1 the one entry is S (Algorithm 1). With more, each carries its own value and an equal share of what the others leave,
    v = dy[p] + (S - sum of the chosen dy) / j, so that j = 1 is Algorithm 1 and j = P the exact product; scaling the chosen entries to the sum
    instead would divide by a sum that may be 0.

    Taps outside the image have weight 0 at the nearest pixel (a NaN or inf there makes a NaN).
    """
    place, value = select_entries(dy, how)
    samples, inputs, outputs = x.shape[0], x.shape[1] // conv.groups, dy.shape[1]
    taps, size, each = math.prod(conv.kernel), math.prod(x.shape[2:]), place.shape[-1]
    whole = _index_dtype(samples, size * conv.groups, outputs * taps * each)
    # a channel's entries in one dim, (O, 1, N J): in vectors however few a sample has
    pixel, inside = _taps(place.reshape(outputs, 1, -1), tuple(x.shape[2:]), tuple(dy.shape[2:]), conv, whole)  # (O, T, N J)
    sample = torch.arange(samples, dtype=whole, device=x.device)
    if each > 1:
        sample = _torch.laid_out(sample.reshape(-1, 1).expand(-1, each).reshape(-1), (0,))
    group = (torch.arange(outputs, dtype=whole, device=x.device) // (outputs // conv.groups)).reshape(-1, 1, 1)
    row = (sample * size + pixel) * conv.groups + group
    weight = torch.where(inside, value.reshape(outputs, 1, -1), 0)
    table = x.movedim(1, -1).reshape(-1, inputs)
    offsets = torch.arange(outputs * taps, dtype=whole, device=x.device) * (samples * each)
    df = weighted_row_sums(table, row.flatten(), weight.flatten(), offsets).reshape(outputs, *conv.kernel, inputs)
    if not conv.transposed:
        return df.movedim(-1, 1)
    by_group = df.reshape(conv.groups, outputs // conv.groups, *conv.kernel, inputs)
    return by_group.movedim(-1, 1).flatten(0, 1)


def select_entries(dy: Tensor, how: Replacement) -> tuple[Tensor, Tensor]:
    """Where the chosen entries of dy (N, O, *out) are, as flat places (whole numbers, of tiles in floats), and their values in the accumulator's precision:
    (O, N, J) each."""
    on_cpu = dy.device.type == "cpu"
    if how.tile is not None or (how.j == 1 and on_cpu):
        # Inductor's C++ code has convolutions' tensors in channels-last, whatever strides they were traced with; comparisons then run across channels
        own = materialized(dy, (0, *range(2, dy.dim()), 1) if on_cpu else None)
        found = _largest_of_tiles(own, [min(how.tile or s, s) for s in dy.shape[2:]])
        place, value = (_torch.laid_out(t.transpose(0, 1), range(3)) for t in found)
        return place, value * how.scale
    flat = dy.flatten(2).transpose(0, 1)
    place = largest_entries(flat, how.j)
    value = flat.sum(-1, keepdim=True, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)
    if how.j > 1:
        own = flat.gather(-1, place).to(value.dtype)
        value = own + (value - own.sum(-1, keepdim=True)) / how.j
    return place, value * how.scale


def _largest_of_tiles(dy: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the largest entry of every tile of dy (N, O, *out) is, of equal ones the first, and the tile's sum: (N, O, J) each. dy is materialized;
    `sides`: a tile's places by dim.

    Places are floats, which compare in vectors. A few neighbours in a row come first, then all the rest of a tile at once: comparisons in one chain wait
    for each other, and so there are fewer of them.
    """
    last, count = dy.dim() - 1, math.prod(dy.shape[2:])
    place = torch.arange(count, dtype=torch.float32 if count <= EXACT_IN_FLOAT32 else torch.float64, device=dy.device).reshape(dy.shape[2:]).expand(dy.shape)
    room = [r for size, side in zip(reversed(dy.shape[2:]), reversed(sides), strict=True) for r in (0, -size % side)]
    of = [torch.nn.functional.pad(t, room, value=v) if any(room) else t for t, v in ((dy.abs(), -1.0), (dy, 0.0), (place, 0.0))]
    few = _few(sides[-1], dy.shape[-1])
    if few > 1:
        of = _largest([t.unflatten(last, (-1, few)) for t in of], (last + 1,))
    for d, side in reversed(list(enumerate((*sides[:-1], sides[-1] // few), 2))):
        of = [t.unflatten(d, (-1, side)) for t in of]
    _, value, place = _largest(of, tuple(range(3, 2 * dy.dim() - 2, 2)))
    return place.flatten(2), value.flatten(2)


def _largest(of: Sequence[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    """Magnitude, sum and place of the largest along these dims."""
    size, value, place = of
    top = size.amax(dims, keepdim=True)
    where = torch.where((size == top) | (size != size), place, torch.inf).amin(dims)
    return [top.squeeze(dims), value.sum(dims), where]


def _few(side: int, size: int) -> int:
    """How many neighbours in a row come first: as few as divide the tile's side; one where that is odd and the tile all of a row."""
    if side % 2 == 0:
        return 2
    return next((f for f in (3, 5, 7) if side % f == 0), 1) if side < size else 1


def _index_dtype(samples: int, *each: int) -> torch.dtype:
    """int32, which C++ code makes in vectors, where it can count so many of each in all samples; a symbolic number of samples is not to be asked."""
    return torch.int32 if isinstance(samples, int) and samples * max(each) < 2**31 else torch.int64


def _taps(place: Tensor, size: tuple[int, ...], out: tuple[int, ...], conv: ConvGeometry, whole: torch.dtype) -> tuple[Tensor, Tensor]:
    """The input pixel that every tap of the kernel has at an output place: place (O, 1, E) -> pixels (O, T, E), and which lie in the image.

    Per dim: at = place stride + tap dilation - padding; transposed: at = (place + padding - tap dilation) / stride where that is whole.
    In floats, which are exact here: C++ code divides integers one by one.
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
    return pixel.to(whole), inside


def divide_whole_floats(n: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """n modulo `by` and n // by, of whole numbers in floats."""
    quotient = ((n + 0.5) / by).floor()
    return n - quotient * by, quotient


def max_linear_weight(x: Tensor, dy: Tensor, how: Replacement) -> Tensor:
    """dW[n] = scale * sum of dy[m, n] x[m] over the rows m that have n among their j largest entries; x (M, K), dy (M, N) -> (N, K).

    Entries are put in the order of their output, so that each has one run of them, however long.
    """
    at = largest_entries(dy, how.j)
    value = (dy.gather(-1, at) * how.scale).flatten()
    output, order = at.flatten().sort(stable=True)
    offsets = torch.searchsorted(output, torch.arange(dy.shape[1], device=dy.device))
    return weighted_row_sums(x, order // how.j, value.gather(0, order), offsets)


def max_linear_input(dy: Tensor, w: Tensor, how: Replacement) -> Tensor:
    """dX[m] = scale * sum of dy[m, n] w[n] over the j largest entries n of the row; dy (M, N), w (N, K) -> (M, K)."""
    at = largest_entries(dy, how.j)
    value = dy.gather(-1, at) * how.scale
    return weighted_row_sums(w, at.flatten(), value.flatten(), torch.arange(dy.shape[0], device=dy.device) * how.j)
