"""The models and batches whose training steps are timed, and a function that makes such a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approx_compile._torch.known_faults import inductor
from examples.models import build


class Block(nn.Module):
    """A transformer block: pre-norm, causal attention, GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


WORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
    "wrn": ("WRN-10-8, 64 x 3 x 32 x 32", lambda: build("wrn-10-8", (3, 32, 32), 10), lambda: torch.randn(64, 3, 32, 32), lambda: torch.randint(10, (64,))),
    "mlp": ("MLP 1024-4096-4096-10, batch 1024", lambda: mlp(1024, 4096, 4096, 10), lambda: torch.randn(1024, 1024), lambda: torch.randint(10, (1024,))),
    "block": ("transformer block, width 1024, 8 x 256 tokens", lambda: Block(1024), lambda: torch.randn(8, 256, 1024), None),
}


ROW_WORKS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
    "mlp1000": ("MLP 1024-4096-4096-10, batch 1000", lambda: mlp(1024, 4096, 4096, 10), lambda: torch.randn(1000, 1024), lambda: torch.randint(10, (1000,))),
    "mlp1024": ("MLP 1024-4096-4096-10, batch 1024", WORKS["mlp"][1], WORKS["mlp"][2], WORKS["mlp"][3]),
    "blocks": (
        "four transformer blocks, width 512, 16 x 128 tokens",
        lambda: nn.Sequential(*[Block(512) for _ in range(4)]),
        lambda: torch.randn(16, 128, 512),
        None,
    ),
    "cnn": (
        "CNN of Adelman et al., 128 x 28 x 28",
        lambda: build("cnn", (1, 28, 28), 10),
        lambda: torch.randn(128, 1, 28, 28),
        lambda: torch.randint(10, (128,)),
    ),
    "resnet": (
        "ResNet-20, 128 x 3 x 32 x 32",
        lambda: build("resnet-20", (3, 32, 32), 10),
        lambda: torch.randn(128, 3, 32, 32),
        lambda: torch.randint(10, (128,)),
    ),
    "wrn": ("WRN-10-2, 128 x 3 x 32 x 32", lambda: build("wrn-10-2", (3, 32, 32), 10), lambda: torch.randn(128, 3, 32, 32), lambda: torch.randint(10, (128,))),
}


def stepper(work: str, options: dict[str, Any] | None) -> Callable[[], None]:
    """A training step without the optimizer, compiled by Inductor (options None) or approx; same weights and data for all."""
    _, make, data, target = (WORKS | ROW_WORKS)[work]
    torch.manual_seed(0)
    model = make()
    x, y = data(), target() if target is not None else None
    compiled = torch.compile(model, backend=inductor) if options is None else torch.compile(model, backend="approx", options=options)

    def step() -> None:
        for p in model.parameters():
            p.grad = None
        out = compiled(x)
        loss = F.cross_entropy(out, y) if y is not None else out.square().mean()
        loss.backward()

    step.model = model  # type: ignore[attr-defined]
    return step
