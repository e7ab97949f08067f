"""Accuracy against seconds: `python -m benchmarks.accuracy.accuracy run --data DIR [--work NAME ..]`, then `table` and `plot`.

Every work is trained with several settings: exact training; the two controls of about the approximation's cost (exact with fewer steps, a narrower
exact model); and approximations. All settings of a seed run in one process and take turns, an epoch each, so they meet the same machine; every one
has its own model from the same seed, sees the same batches, and decays its learning rate to 0 over its own steps (cosine; but for the works named
constant, whose small batches and constant rate end where Adelman et al. report exact training, at 98.2 and 99.35%). Seconds are those of the
training steps; the first one, which compiles, is kept apart.

`run` appends one JSON line per training to results/accuracy.jsonl and leaves out what is there, so it can be stopped and started again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.study import Setting, Study, Work, text, tokens
from benchmarks.common.works import Block
from examples import models

EXACT = {"exact": Setting()}


def rows(ratio: float, method: str = "bernoulli") -> Setting:
    return Setting({"grad": {"axis": "rows", "method": method, "ratio": ratio}})


def topk(ratio: float, **more: Any) -> Setting:
    return Setting({"policy": "always", "ratio": ratio, "rules": [{"layers": "site[0]", "method": "exact"}, {"layers": "site[-1]", "method": "exact"}], **more})


def ends_exact(setting: Setting) -> Setting:
    return replace(setting, known_length=True)


def adaptive(tau: float | str, **grad: str) -> Setting:
    options = {"policy": "adaptive", "adaptive": {"tau": tau}}
    return Setting(options | ({"grad": {"axis": "rows", **grad}} if grad else {}))


AUTO = {"adaptive tau auto": adaptive("auto")}
PRUNED = {"infobatch": Setting(pruned=0.5)}


def controls_at(share: float, width: float) -> dict[str, Setting]:
    return {"fewer steps": Setting(steps=share), "narrower": Setting(width=width)}


def _mlp(hidden: int) -> Callable[[float], nn.Module]:
    def make(width: float) -> nn.Module:
        return models.build("mlp", (1, 28, 28), 10, round(hidden * width))

    return make


class CharTransformer(nn.Module):
    """Characters to logits of the next one, learned positions, causal blocks."""

    def __init__(self, width: int, blocks: int, characters: int, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.place)))
        return out


def prompts(directory: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of text of which only the second half has a loss, as where a model is trained to answer prompts."""
    x, y, test_x, test_y = text(directory / "tinyshakespeare.txt", 128, 1600)
    y, test_y = y.clone(), test_y.clone()
    y[:, :64], test_y[:, :64] = -100, -100  # what `cross_entropy` ignores
    return x, y, test_x, test_y


FINETUNE = Work(
    "emnist-letters",
    lambda width: models.build("cnn", (1, 28, 28), 10, 32),
    epochs=3,
    batch=256,
    lr=5e-4,
    limit=20_000,
    pretrain="mnist",
    settings=EXACT | {"fewer steps": Setting(steps=0.67), "adaptive": adaptive(0.025), "adaptive tau .1": adaptive(0.1), "rows .25": rows(0.25)},
)


def _wrn(name: str) -> Callable[[float], nn.Module]:
    return lambda width: models.build(name, (3, 32, 32), 10, round(16 * width))


WRN = Work(
    "cifar10",
    _wrn("wrn-10-2"),
    epochs=8,
    batch=128,
    lr=0.1,
    momentum=0.9,
    limit=12_800,
    settings=EXACT
    | {"fewer steps": Setting(steps=0.5), "adaptive": adaptive(0.025)}
    | {"rows .5 through BatchNorm": Setting({"grad": {"axis": "rows", "ratio": 0.5, "batch_norm": "approximate"}})},
)

CHARACTERS = Work(
    "text",
    lambda width: CharTransformer(128, 4, 65, 128),
    epochs=4,
    batch=16,
    lr=1e-3,
    score="loss",
    limit=100,
    settings=EXACT
    | {"fewer steps": Setting(steps=0.5), "adaptive": adaptive(0.025), **AUTO, "rows .5": rows(0.5)}
    | {"tokens .5": Setting({"policy": "always", "sampling": "backward", "grad_input": "exact", "grad_weight": {"method": "bernoulli", "ratio": 0.5}})},
)

WORKS: dict[str, Work] = {
    "mnist-mlp": Work(
        "mnist",
        _mlp(500),
        epochs=12,
        batch=512,
        lr=2e-3,
        settings=EXACT
        | controls_at(0.58, 0.68)
        | {
            "adaptive": adaptive(0.025),
            "adaptive tau .1": adaptive(0.1),
            **AUTO,
            **PRUNED,
            "rows .25": rows(0.25),
            "rows .125": rows(0.125),
            "rows .25 uniform": rows(0.25, "uniform"),
        }
        | {"forward topk .5": topk(0.5), "forward topk .25": topk(0.25), "forward topk .5, end exact": ends_exact(topk(0.5))},
    ),
    "mnist-mlp-constant": Work(
        "mnist",
        _mlp(500),
        epochs=20,
        batch=50,
        lr=1e-3,
        decays=False,
        settings=EXACT | {"forward topk .5": topk(0.5), "forward topk .5, end exact": ends_exact(topk(0.5))},
    ),
    "fashion-mlp": Work(
        "fashion-mnist",
        _mlp(1024),
        epochs=20,
        batch=512,
        lr=1e-3,
        settings=EXACT
        | controls_at(0.65, 0.75)
        | {"adaptive": adaptive(0.025), "adaptive tau .1": adaptive(0.1), **AUTO, **PRUNED, "rows .25": rows(0.25), "forward topk .5": topk(0.5)}
        | {"forward topk .5, end exact": ends_exact(topk(0.5))},
    ),
    "mnist-cnn": Work(
        "mnist",
        lambda width: models.build("cnn", (1, 28, 28), 10, round(32 * width)),
        epochs=5,
        batch=256,
        lr=1e-3,
        limit=20_000,
        settings=EXACT
        | controls_at(0.6, 0.7)
        | {"adaptive": adaptive(0.025), "rows .25": rows(0.25), "forward topk .33": topk(0.33), "forward topk .33, end exact": ends_exact(topk(0.33))},
    ),
    "mnist-cnn-constant": Work(
        "mnist",
        lambda width: models.build("cnn", (1, 28, 28), 10, 32),
        epochs=10,
        batch=50,
        lr=1e-4,
        decays=False,
        settings=EXACT | {"forward topk .33": topk(0.33), "forward topk .33, end exact": ends_exact(topk(0.33))},
    ),
    "emnist-finetune": FINETUNE,
    "emnist-finetune-8": replace(
        FINETUNE,
        epochs=8,
        settings=EXACT
        | {"fewer steps": Setting(steps=0.67), "adaptive": adaptive(0.025), **PRUNED}
        | {"adaptive, rungs of 2^(1/4)": Setting({"policy": "adaptive", "adaptive": {"ladder": [2 ** (-i / 4) for i in range(17)]}})},
    ),
    "char-transformer": CHARACTERS,
    "char-transformer-prompts": replace(
        CHARACTERS,
        epochs=8,
        read=prompts,
        settings=EXACT
        | {
            "fewer steps": Setting(steps=0.75),
            "adaptive rows": Setting({"grad": {"axis": "rows"}}),
            "default": Setting({}),
            "tokens without a gradient": tokens(0.0),
        },
    ),
    "cifar-wrn": WRN,
    "cifar-resnet": replace(
        WRN,
        make=lambda width: models.build("resnet-20", (3, 32, 32), 10, round(16 * width)),
        epochs=30,
        limit=None,
        settings=EXACT
        | {"fewer steps": Setting(steps=0.7), "rows .5 through BatchNorm": WRN.settings["rows .5 through BatchNorm"]}
        | {f"adaptive tau {tau} through BatchNorm": adaptive(tau, batch_norm="approximate") for tau in (0.025, 0.1, 0.25, "auto")},
    ),
    "cifar-wrn-full": replace(
        WRN,
        make=_wrn("wrn-28-10"),
        epochs=60,
        limit=None,
        settings=WRN.settings | controls_at(0.6, 0.7) | {"forward topk .5": topk(0.5), "forward topk .5, end exact": ends_exact(topk(0.5))},
    ),
}


study = Study("accuracy", WORKS)

if __name__ == "__main__":
    study.app(__doc__)()
