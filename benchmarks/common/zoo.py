"""The usual MLPs, CNNs and transformers, and, where transformers is installed, Hugging Face's classes with random weights."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.works import Block, mlp
from examples.models import build

Work = tuple[nn.Module, dict[str, Tensor] | tuple[Tensor, ...]]
IMAGES = (3, 32, 32)


def images(name: str, batch: int = 32) -> Callable[[], Work]:
    return lambda: (build(name, IMAGES, 10), (torch.randn(batch, *IMAGES),))


def rows(model: Callable[[], nn.Module], batch: int, width: int) -> Callable[[], Work]:
    return lambda: (model(), (torch.randn(batch, width),))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Glu(nn.Module):
    """down(silu(gate x) * up x)"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Transposed(nn.Module):
    """The module on the last two dims swapped: how an MLP-Mixer mixes tokens."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2)).transpose(1, 2)


class Patches(nn.Module):
    """(B, 3, H, W) -> (B, tokens, width)"""

    def __init__(self, width: int, size: int = 4) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x).flatten(2).transpose(1, 2)


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


def alexnet() -> nn.Module:
    convolutions = [conv(3, 64), nn.MaxPool2d(2), conv(64, 192), nn.MaxPool2d(2), conv(192, 256), conv(256, 256), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Dropout(), nn.Linear(4096, 2048), nn.ReLU(), nn.Dropout(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def mobilenet() -> nn.Module:
    blocks = [nn.Sequential(conv(a, a, stride=2, groups=a), conv(a, b, 1)) for a, b in itertools.pairwise((32, 64, 128, 256))]
    return nn.Sequential(conv(3, 32), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def convnext() -> nn.Module:
    blocks = [Residual(nn.Sequential(nn.Conv2d(96, 96, 7, padding=3, groups=96), nn.BatchNorm2d(96), nn.Conv2d(96, 384, 1), nn.GELU(), nn.Conv2d(384, 96, 1)))]
    return nn.Sequential(nn.Conv2d(3, 96, 4, 4), *blocks * 2, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def unet() -> nn.Module:
    inner = Residual(nn.Sequential(conv(64, 128, stride=2), conv(128, 128), nn.ConvTranspose2d(128, 64, 2, 2)))
    return nn.Sequential(conv(3, 32), conv(32, 64, stride=2), inner, nn.ConvTranspose2d(64, 32, 2, 2), nn.Conv2d(32, 3, 1))


def mixer(width: int = 256, tokens: int = 64) -> nn.Module:
    def mix(size: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    layers = [nn.Sequential(Residual(Transposed(mix(tokens, 128))), nn.LayerNorm(width), Residual(mix(width, 4 * width))) for _ in range(2)]
    return nn.Sequential(Patches(width), *layers, nn.Linear(width, 10))


def encoder(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def tokens(model: Callable[[], nn.Module], batch: int, length: int, width: int) -> Callable[[], Work]:
    return lambda: (model(), (torch.randn(batch, length, width),))


OWN: dict[str, Callable[[], Work]] = {
    "MLP 3 x 500, batch 128": rows(lambda: mlp(784, 500, 500, 500, 10), 128, 784),
    "MLP 3 x 2048, batch 64": rows(lambda: mlp(512, 2048, 2048, 2048, 10), 64, 512),
    "MLP 1024-4096-4096-10, batch 256": rows(lambda: mlp(1024, 4096, 4096, 10), 256, 1024),
    "MLP 6 x 64, batch 1024": rows(lambda: mlp(32, *[64] * 6, 1), 1024, 32),
    "MLP 3 x 1024, batch 1": rows(lambda: mlp(1024, 1024, 1024, 1024, 10), 1, 1024),
    "autoencoder 784-1024-64-1024-784, batch 256": rows(lambda: mlp(784, 1024, 64, 1024, 784), 256, 784),
    "CNN of Adelman et al.": images("cnn"),
    "LeNet": lambda: (lenet(), (torch.randn(64, *IMAGES),)),
    "AlexNet for 32 x 32": lambda: (alexnet(), (torch.randn(32, *IMAGES),)),
    "WRN-10-2": images("wrn-10-2"),
    "WRN-16-4": images("wrn-16-4", 8),
    "ResNet-20": images("resnet-20"),
    "VGG-11": images("vgg-11", 16),
    "MobileNet": lambda: (mobilenet(), (torch.randn(32, *IMAGES),)),
    "ConvNeXt": lambda: (convnext(), (torch.randn(32, 3, 64, 64),)),
    "U-Net": lambda: (unet(), (torch.randn(8, 3, 64, 64),)),
    "MLP-Mixer": lambda: (mixer(), (torch.randn(32, *IMAGES),)),
    "ViT, 2 x 256": lambda: (nn.Sequential(Patches(256), encoder(256, 2), nn.Linear(256, 10)), (torch.randn(16, *IMAGES),)),
    "encoder, 2 x 128, 32 x 32 tokens": tokens(lambda: encoder(128, 2), 32, 32, 128),
    "encoder, 2 x 768, 4 x 128 tokens": tokens(lambda: encoder(768, 2), 4, 128, 768),
    "causal block, width 1024, 4 x 128 tokens": tokens(lambda: Block(1024), 4, 128, 1024),
    "gated MLP 2 x 512-2048, 1024 tokens": tokens(lambda: nn.Sequential(Residual(Glu(512, 2048)), Residual(Glu(512, 2048))), 4, 256, 512),
}

CLASSES = {"bert": "Bert", "gpt2": "GPT2", "llama": "Llama", "distilbert": "DistilBert", "opt": "OPT", "electra": "Electra"}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 4},
    "distilbert": {"dim": 256, "hidden_dim": 1024, "n_layers": 2, "n_heads": 4},
    "opt": {"hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 256},
}


def hugging_face(kind: str) -> Callable[[], Work]:
    def make() -> Work:
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type] # else the link at the top of the checkout is taken for the library of that name
        import transformers

        usual = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = getattr(transformers, f"{CLASSES[kind]}Config")(vocab_size=2000, **SIZES.get(kind, usual))
        model = getattr(transformers, f"{CLASSES[kind]}Model")(config)
        return model.train(), {"input_ids": torch.randint(2, 2000, (8, 64))}

    return make


def works() -> dict[str, Callable[[], Work]]:
    works_by_name = dict(OWN)
    if importlib.util.find_spec("transformers"):
        works_by_name |= {f"Hugging Face {CLASSES[kind]}, 2 x 256, 8 x 64 tokens": hugging_face(kind) for kind in CLASSES}
    return works_by_name
