"""Small models that several test files train, with functions that make their inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class Buckets(nn.Module):
    """Four layers of 1 MiB each: DDP with `bucket_cap_mb=1` puts every layer in its own bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.relu(layer(x))
        return x


class TransformerBlock(nn.Module):
    """Causal attention and a GELU MLP, each behind a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.n1, self.n2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class FlatLogits(nn.Module):
    """Returns the logits of all tokens along one axis: the batch is merged with the sequence length."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out.reshape(-1, out.shape[-1])


class BuiltAttention(nn.Module):
    """Attention by explicit bmm: the batch axis of the bmm holds samples times heads, and the scale depends on the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.q(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        att = torch.bmm(q.reshape(b * 4, t, 4), k.reshape(b * 4, t, 4).transpose(1, 2)) / b
        return self.o(torch.bmm(att.softmax(-1), v.reshape(b * 4, t, 4)).view(b, 4, t, 4).transpose(1, 2).reshape(b, t, d))


class Recurrent(nn.Module):
    """A GRU cell over the sequence, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 12)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class TwoHeads(nn.Module):
    """One body and two heads whose outputs are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(20, 24), nn.Linear(24, 5), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return torch.cat([self.one(h), 3 * self.two(h)], 1)


class Checkpointed(nn.Module):
    """Two MLPs under activation checkpointing, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = mlp(20, 32, 20), mlp(20, 32, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a, self.b):
            x = checkpoint(part, x, use_reentrant=False)  # type: ignore[assignment]
        return self.head(x)


def cnn(channels_last: bool = False) -> nn.Module:
    """Plain, grouped and transposed convolutions with GroupNorm, three poolings and a linear head."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    return net.to(memory_format=torch.channels_last) if channels_last else net


class Gathered(nn.Module):
    """Reads one of five tokens per sample; the indices have a batch axis of their own, which torch only requires to be no larger than the samples'."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.b(self.a(x).gather(1, i[:, None, None].expand(-1, 1, 16)).squeeze(1))


class ResidualLayer(nn.Module):
    """x + tanh(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


IMAGES = (36, 3, 8, 8)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 5)), lambda: torch.randn(48, 20)),
    "equal_sizes": (lambda: mlp(16, 16, 16, 16), lambda: torch.randn(16, 16)),
    "cnn": (cnn, lambda: torch.randn(IMAGES)),
    "channels_last": (lambda: cnn(True), lambda: torch.randn(IMAGES).contiguous(memory_format=torch.channels_last)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Hardswish(), nn.Conv1d(6, 3, 3), nn.Flatten()), lambda: torch.randn(32, 4, 9)),
    "transformer": (
        lambda: nn.Sequential(nn.Embedding(11, 16), TransformerBlock(16), TransformerBlock(16), nn.Linear(16, 11)),
        lambda: torch.randint(0, 11, (12, 6)),
    ),
    "length_is_batch": (lambda: nn.Sequential(nn.Embedding(11, 16), TransformerBlock(16), nn.Linear(16, 11)), lambda: torch.randint(0, 11, (12, 12))),
    "flat_logits": (lambda: FlatLogits(nn.Sequential(nn.Embedding(11, 16), TransformerBlock(16), nn.Linear(16, 11))), lambda: torch.randint(0, 11, (12, 6))),
    "built_attention": (BuiltAttention, lambda: torch.randn(12, 6, 16)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), lambda: torch.randn(12, 6, 16)),
    "dropout": (lambda: nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 5)), lambda: torch.randn(48, 20)),
    "recurrent": (Recurrent, lambda: torch.randn(24, 4, 8)),
    "two_heads": (TwoHeads, lambda: torch.randn(48, 20)),
    "checkpointed": (Checkpointed, lambda: torch.randn(48, 20)),
    "weight_norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(20, 16)), nn.Tanh(), nn.Linear(16, 5)), lambda: torch.randn(48, 20)),
}
"""Models on which rows are sampled, by name: a function that makes the model, and one that makes a batch."""
