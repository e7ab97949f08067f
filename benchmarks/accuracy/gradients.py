"""Gradient approximation by schedules: `python -m benchmarks.accuracy.gradients run --data DIR [--work NAME ..]`, then `table`, `plot`.

After Wang and Nelaturu, on CIFAR-10: full gradients against zero, random and max (approximated) weight gradients under the paper's schedules, and
ResNet-14 as the smaller exact model beside ResNet-20. Conditions that differ from the paper's: fewer images and epochs (each work's `limit` and
`epochs`; all 50,000 images and hundreds of epochs want a GPU: the works that end in -full), no augmentation, cosine decay of the learning rate. Rows
in results/gradients.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from approx_compile.config import presets
from benchmarks.accuracy.study import Setting, Study, Work
from examples import models

METHODS = ("zero", "random", "max")


def two_layer_cnn(width: float) -> nn.Module:
    """Two 5x5 convolutions of 64 channels with BatchNorm and 3x3 pooling, three linear layers (TensorFlow's CIFAR-10 tutorial, its normalisation replaced)."""
    channels = round(64 * width)
    return nn.Sequential(
        *[nn.Conv2d(3, channels, 5, padding=2), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
        *[nn.Conv2d(channels, channels, 5, padding=2), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
        *[nn.Flatten(), nn.Linear(64 * channels, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10)],
    )


def scheduled(schedule: Callable[[presets.Method], presets.RuleList], names: tuple[str, ...] = METHODS) -> dict[str, Setting]:
    """A setting for every method; all else is exact."""
    title = schedule.__name__.replace("_", " ")
    return {f"{title} {m}": Setting({"policy": "always", "method": "exact", "rules": schedule(m)}) for m in names}


FULL = {"exact": Setting()}
SMALLER = {"ResNet-14": Setting(width=0.5)}
FEWER = {"fewer steps": Setting(steps=0.93)}
OTHER_MAX = {
    "schedule 3 max j 4": {"j": 4},
    "schedule 3 max j 16": {"j": 16},
    "schedule 3 max scale .25": {"scale": 0.25},
    "schedule 3 max tile 8": {"tile": 8},
    "schedule 3 max tile 4": {"tile": 4},
    "schedule 3 max tile 8 scale .5": {"tile": 8, "scale": 0.5},
    "schedule 3 max tile auto": {"tile": "auto"},
    "schedule 3 max tile .5 scale .5": {"tile": 0.5, "scale": 0.5},
    "schedule 3 max tile 16 scale .5": {"tile": 16, "scale": 0.5},
    "schedule 3 max tile 16 scale .25": {"tile": 16, "scale": 0.25},
}
"""A channel's whole sum at one place makes a gradient that is longer than the exact one and not very like it. Against that: more entries, a factor, an
entry for every tile."""
TUNED = {name: Setting({"policy": "always", "method": "exact", "rules": presets.schedule_3({"method": "max", **keys})}) for name, keys in OTHER_MAX.items()}
RESNET = TUNED | FULL | SMALLER | FEWER | scheduled(presets.schedule_1) | scheduled(presets.schedule_2) | scheduled(presets.schedule_3)


def resnet(width: float) -> nn.Module:
    return models.build("resnet-20" if width == 1 else "resnet-14", (3, 32, 32), 10)


def work(make: Callable[[float], nn.Module], settings: dict[str, Setting], epochs: int, limit: int | None) -> Work:
    return Work("cifar10", make, epochs=epochs, batch=128, lr=1e-3, limit=limit, settings=settings)


WORKS = {
    "two-layer": work(two_layer_cnn, FULL | scheduled(presets.two_layers), 6, 10_000),
    "resnet-20": work(resnet, RESNET, 8, 6_400),
    "two-layer-full": work(two_layer_cnn, FULL | scheduled(presets.two_layers), 60, None),
    "resnet-20-full": work(resnet, RESNET, 120, None),
    "vgg-19-full": work(lambda width: models.build("vgg-19", (3, 32, 32), 10), FULL | FEWER | scheduled(presets.schedule_1), 100, None),
}

study = Study("gradients", WORKS)

if __name__ == "__main__":
    study.app(__doc__)()
