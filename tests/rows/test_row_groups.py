"""Samples that own several rows of the model's tensors: views of an image, frames of a clip, copies. A sample left out is one whose rows all have weight 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, Plans, rows_of
from helpers.models import TransformerBlock, mlp
from helpers.oracles import ChosenRows, grads
from helpers.sampling import all_but
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
B, D, T = 6, 10, 4
Outputs = tuple[Tensor, ...]


class Net(nn.Module):
    """An encoder of vectors, one of images, attention and a head, which `use` puts together."""

    def __init__(self, use: Callable[..., Outputs]) -> None:
        super().__init__()
        self.use, self.weight = use, torch.ones(())
        self.vectors, self.head, self.block = mlp(D, 16, 8), nn.Linear(8, 5), TransformerBlock(8)
        pool = nn.Sequential(nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8))
        self.images = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *pool)

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.use(self, *inputs)

    def marked(self, z: Tensor) -> Tensor:
        """The same values, whose gradient's rows are multiplied by `weight`, where the exact model is to leave out samples."""
        if self.weight.dim():
            z.register_hook(lambda g: g * self.weight.repeat(len(g) // B)[:, None])
        return z


def vectors(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, D, dtype=torch.float64)


def clips(*order: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, T, 3, 6, 6, dtype=torch.float64).permute(0, *(order or (1, 2, 3, 4))).contiguous()


def concatenated(m: Any, a: Tensor, b: Tensor) -> Outputs:
    """Two views one behind the other, taken apart again in all ways."""
    z, n = m.vectors(torch.cat([a, b])), len(a)
    first, second = m.vectors(torch.cat([a.flip(1), 1.1 * a])).chunk(2)  # one input augmented twice
    predicted, other = z.view(2, -1, 8).flip(0), z.view(2, -1, 8)[torch.tensor([1, 0])]
    return *z.chunk(2), *z.split(n), z.view(2, n, 8)[1], z[:n], z[len(z) // 2 :], z, first * second.sin(), predicted[0].cos(), other[0].exp()


def stacked(m: Any, a: Tensor, b: Tensor) -> Outputs:
    """Two views of each sample one behind the other."""
    z = m.vectors(torch.stack([a, b], 1).flatten(0, 1))
    repeated = m.vectors(a.repeat_interleave(3, 0)).unflatten(0, (-1, 3)).sin().mean(1)
    return *z.view(-1, 2, 8).unbind(1), z[::2], z[1::2], repeated


def flat_stacked(m: Any, a: Tensor, b: Tensor) -> Outputs:
    return (m.vectors(torch.stack([a, b], 1).flatten(0, 1)),)


def frames(m: Any, x: Tensor) -> Outputs:
    """Clips whose frames pass through an encoder of images, pooled over time in several ways, and folded back before a loss."""
    z = m.images(x.flatten(0, 1))
    attended = m.block(z.unflatten(0, x.shape[:2])).mean(1)
    folded = m.head(z).view(-1, T, 5).log_softmax(2).mean(1)
    in_turn = m.images(x.transpose(0, 1).flatten(0, 1)).view(T, -1, 8)
    return m.head(z.unflatten(0, x.shape[:2]).mean(1)), z.view(-1, T, 8).amax(1), attended, folded, in_turn.mean(0)


def flat_frames(m: Any, x: Tensor) -> Outputs:
    return (m.images(x.flatten(0, 1)),)


def frames_behind_channels(m: Any, x: Tensor) -> Outputs:
    """(batch, channels, time, ..), as for convolutions over time."""
    return (m.images(x.transpose(1, 2).flatten(0, 1)).view(len(x), -1, 8).mean(1),)


def called_again(m: Any, a: Tensor, p: Tensor, n: Tensor) -> Outputs:
    """Siamese and triplet networks: one encoder, called for every view."""
    x, y, z = map(m.vectors, (a, p, n))
    return (x - y).abs().sum(1), F.triplet_margin_loss(x, y, z, margin=9.0, reduction="none")


def views_and_crops(m: Any, a: Tensor, b: Tensor, crops: Tensor) -> Outputs:
    """Two views and several crops at once, and negatives of each query."""
    keys = m.vectors(crops.flatten(0, 1)).view(-1, T, 8)
    return *m.vectors(torch.cat([a, b, crops.transpose(0, 1).flatten(0, 1)])).chunk(2 + T), torch.einsum("bd,bkd->bk", m.vectors(b), keys)


def copies(m: Any, x: Tensor) -> Outputs:
    """The batch repeated and expanded, as for ensembles and beams."""
    weight = torch.linspace(0.5, 2, 3)
    repeated, tiled = m.vectors(x.repeat(3, 1)).view(3, -1, 8), torch.stack(m.vectors(x.tile(3, 1)).chunk(3))
    expanded = m.vectors((x[None].expand(3, -1, -1) * weight[:, None, None]).flatten(0, 1)).view(3, -1, 8)
    by_sample = m.vectors((x[:, None].expand(-1, 3, -1) * weight[:, None]).reshape(-1, D)).view(-1, 3, 8)
    return repeated.sin().mean(0), tiled.sin().mean(0), expanded.mean(0), by_sample.mean(1)


def called_apart(m: Any, a: Tensor, b: Tensor) -> Outputs:
    """One encoder, called for two views that nothing in the model compares: their sizes are one because more runs on rows then."""
    return m.vectors(a), m.vectors(b)


def taken_apart(m: Any, x: Tensor) -> Outputs:
    """A batch that comes with both views of all samples, and is taken apart in the model."""
    z = m.vectors(x)
    first, second = z.chunk(2)
    return z.view(2, -1, 8).sin().mean(0), first * second, torch.cat([m.vectors(part).sin() for part in x.view(2, -1, D).unbind()])


def frames_taken_apart(m: Any, x: Tensor) -> Outputs:
    """A batch that comes with the frames of all clips, whose channels are shifted in time as in TSM."""
    clips = x.view(len(x) // T, T, *x.shape[1:])
    shifted = torch.cat([clips[:, :, :1].roll(1, 1), clips[:, :, 1:]], 2)
    return m.head(m.images(x).view(-1, T, 8).mean(1)), m.images(shifted.view(x.shape)).view(len(x) // T, T, 8).amax(1)


Make = Callable[[int], Tensor]
CASES: dict[Callable[..., Outputs], list[Make]] = {
    concatenated: [vectors()] * 2,
    stacked: [vectors()] * 2,
    flat_stacked: [vectors()] * 2,
    frames: [clips()],
    flat_frames: [clips()],
    frames_behind_channels: [clips(2, 1, 3, 4)],
    called_again: [vectors()] * 3,
    called_apart: [vectors()] * 2,
    taken_apart: [lambda n: vectors()(2 * n)],
    frames_taken_apart: [lambda n: clips()(n).flatten(0, 1)],
    views_and_crops: [vectors(), vectors(), vectors(T)],
    copies: [vectors()],
}
SAMPLE_MAJOR = (flat_stacked, flat_frames)
"""Whose outputs hold all rows of a sample one behind the other; the others' hold each sample once, or all samples again and again."""


def against_masked_tangents(use: Callable[..., Outputs], data: list[Make], monkeypatch: pytest.MonkeyPatch) -> Plans:
    """Compare the gradients on half the samples with those of the exact model whose output gradients are multiplied by the samples' weights."""
    chosen = ChosenRows(monkeypatch)
    model, inputs = Net(use).double(), [make(B).requires_grad_() for make in data]
    f, plans = rows_of(model, HALF)
    outputs = f(*inputs)
    tangents = [torch.randn_like(o) * torch.rand(len(o), dtype=o.dtype).view(-1, *[1] * (o.dim() - 1)) for o in outputs]
    torch.autograd.backward(outputs, tangents)
    model.requires_grad_(False)
    used = [p.requires_grad_() for p in model.parameters() if p.grad is not None]
    got = grads(model, *inputs)
    assert used and [len(idx) for idx, _ in chosen.choices] == [B // 2]
    mask = chosen.mask(B)
    exact = model(*inputs)
    weights = [mask.repeat_interleave(len(o) // B) if use in SAMPLE_MAJOR else mask.repeat(len(o) // B) for o in exact]
    torch.autograd.backward(exact, [t * w.view(-1, *[1] * (t.dim() - 1)) for t, w in zip(tangents, weights, strict=True)])
    for a, b in zip(got, grads(model, *inputs), strict=True):
        assert (a - b).norm() <= 1e-9 * (1 + b.norm())
    return plans


@pytest.mark.slow
@pytest.mark.sample(5)
@pytest.mark.parametrize("use", all_but(set(CASES) - {frames, frames_taken_apart}, CASES), ids=lambda f: f.__name__)
def test_a_sample_left_out_is_one_whose_rows_all_have_weight_0(use: Callable[..., Outputs], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = against_masked_tangents(use, CASES[use], monkeypatch)
    (cut,) = plans[0].cuts
    assert cut.reason == "the whole backward pass" and cut.rows == B


def contrastive(m: Any, a: Tensor, b: Tensor) -> Outputs:
    """A loss inside that compares all views of all samples with each other (NT-Xent)."""
    n = len(a)
    z = F.normalize(m.marked(m.vectors(torch.cat([a, b]))))
    other = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
    return (F.cross_entropy(z @ z.t() / 0.5 - 1e9 * torch.eye(2 * n), other),)


def similarities(m: Any, a: Tensor, b: Tensor) -> Outputs:
    """Outputs that compare each sample's first view with the second views of all (CLIP)."""
    x, y = m.marked(m.vectors(torch.cat([a, b]))).chunk(2)
    logits = 5 * F.normalize(x) @ F.normalize(y).t()
    return logits, logits.t()


@pytest.mark.slow
@pytest.mark.parametrize("use", [contrastive, similarities], ids=lambda f: f.__name__)
def test_rows_begin_below_what_compares_samples(use: Callable[..., Outputs], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is exact on all rows. The samples left out below it are those whose views' gradients get weight 0 where they leave the encoder."""
    chosen = ChosenRows(monkeypatch)
    model, inputs = Net(use).double(), [torch.randn(B, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    f, plans = rows_of(model, HALF)
    outputs = f(*inputs)
    tangents = [torch.randn_like(o) for o in outputs]
    torch.autograd.backward(outputs, tangents)
    model.requires_grad_(False)
    for p in (used := [*model.vectors.parameters()][:-1]):  # the last bias, above the rows' beginning, is exact
        p.requires_grad_()
    got = grads(model, *inputs)
    (cut,) = plans[0].cuts
    assert cut.decision == "rows" and "similarities of samples" in cut.reason
    assert used and [len(idx) for idx, _ in chosen.choices] == [B // 2]
    model.weight = chosen.mask(B)
    torch.autograd.backward(model(*inputs), tangents)
    for a, b in zip(got, grads(model, *inputs), strict=True):
        assert (a - b).norm() <= 1e-9 * (1 + b.norm())
