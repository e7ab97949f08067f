"""Settings that replace a weight gradient, a model compiled with them, and Algorithm 1 of Wang and Nelaturu by loops in numpy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from approx_compile import Backend
from approx_compile.backend import run_as_is

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def options(grad_weight: Any, **more: Any) -> dict[str, Any]:
    """Settings with an exact forward pass and this weight gradient."""
    return {"policy": "always", "output": "exact", "grad_weight": grad_weight} | more


def compile_afresh(model: Any, settings: dict[str, Any], lowering: Any = run_as_is) -> Any:
    """The model compiled under these settings, after everything compiled before is dropped."""
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(settings, inner_compile=lowering))


def algorithm_1(x: Tensor, dy: Tensor, conv: Any, j: int = 1, tile: int | None = None) -> np.ndarray:
    """The weight gradient by loops over channels, samples and taps, in double precision; with `tile`, the algorithm on every tile of a channel by itself."""
    image, gradient = x.detach().double().numpy(), dy.detach().double().numpy()
    df = np.zeros(conv.weight.shape)
    rank, groups = image.ndim - 2, conv.groups
    inputs, outputs = image.shape[1] // groups, gradient.shape[1] // groups
    for c, n, own in itertools.product(range(gradient.shape[1]), range(image.shape[0]), tiles(gradient.shape[2:], tile)):
        plane = np.where(own, gradient[n, c], 0).ravel()
        chosen = [np.argmax(np.where(own.ravel(), np.abs(plane), -1))] if j == 1 else np.argsort(-np.abs(plane))[:j]
        share = (plane.sum() - plane[chosen].sum()) / j
        channels = slice((c // outputs) * inputs, (c // outputs + 1) * inputs)
        for p, tap in itertools.product(chosen, itertools.product(*map(range, conv.kernel_size))):
            value = plane.sum() if j == 1 else plane[p] + share
            place = np.unravel_index(p, gradient.shape[2:])
            pixel = [_pixel(int(place[d]), tap[d], d, conv) for d in range(rank)]
            if all(i is not None and 0 <= i < image.shape[2 + d] for d, i in enumerate(pixel)):
                seen = image[(n, channels, *pixel)] * value
                if conv.transposed:
                    df[(channels, c % outputs, *tap)] += seen
                else:
                    df[(c, slice(None), *tap)] += seen
    return df


def tiles(size: tuple[int, ...], tile: int | None) -> Iterator[np.ndarray]:
    """Yield a mask for every tile of an image, or one mask of the whole image if `tile` is None."""
    steps = [range(0, s, tile or s) for s in size]
    for corner in itertools.product(*steps):
        mask = np.zeros(size, dtype=bool)
        mask[tuple(slice(c, c + (tile or s)) for c, s in zip(corner, size, strict=True))] = True
        yield mask


def _pixel(place: int, tap: int, d: int, conv: Any) -> int | None:
    stride, padding, dilation = conv.stride[d], conv.padding[d], conv.dilation[d]
    if not conv.transposed:
        return place * stride + tap * dilation - padding
    spread = place + padding - tap * dilation
    return spread // stride if spread % stride == 0 else None
