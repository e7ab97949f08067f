"""Image classifiers in plain PyTorch; nothing here knows about approximation.

| name | network | `width` (default) |
|---|---|---|
| `mlp` | three hidden layers of ReLU units | units of a hidden layer (2048) |
| `cnn` | the MNIST network of Adelman et al. (arXiv:1805.08079): two 5x5 convolutions, two linear layers, dropout | channels of the first convolution (32) |
| `wrn-D-K` | Wide ResNet (Zagoruyko and Komodakis, arXiv:1605.07146), depth D = 6n + 4, widening factor K | channels before widening (16) |
| `resnet-N` | CIFAR ResNet (He et al., arXiv:1512.03385), depth N = 6n + 2, shortcuts without parameters | channels of the first stage (16) |
| `vgg-11`, `-13`, `-16`, `-19` | VGG (Simonyan and Zisserman, arXiv:1409.1556) with BatchNorm and one linear layer | channels of the first stage (64) |
"""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]
VALID = "mlp, cnn, wrn-D-K (wrn-28-10; D = 10, 16, 22, ...), resnet-N (resnet-20; N = 8, 14, 20, ...), vgg-11, vgg-13, vgg-16, vgg-19"
_KNOWN = ("mlp", "cnn", "wrn-10-2", "wrn-16-4", "wrn-28-10", "wrn-40-4", "resnet-14", "resnet-20", "resnet-56", "vgg-11", "vgg-13", "vgg-16", "vgg-19")


def build(name: str, in_shape: Shape, classes: int, width: int | None = None) -> nn.Module:
    """The network `name` for images of `in_shape` (channels, height, width), giving `classes` logits; `width` as in the table above.

    Raises ValueError for an unknown name, an impossible depth, a `width` below 1 and images that are too small for the network.
    """
    if width is not None and width < 1:
        raise ValueError(f"width: got {width}; at least 1 is expected")
    for pattern, make in _FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            return make(name, [int(n) for n in match.groups()], in_shape, classes, width)
    near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.5)
    raise ValueError(f"model {name!r} is unknown; valid are {VALID}." + (f" Did you mean {near[0]!r}?" if near else ""))


def _mlp(name: str, numbers: list[int], in_shape: Shape, classes: int, width: int | None) -> nn.Module:
    channels, height, across = in_shape
    units = width or 2048
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = channels * height * across
    for i in range(3):
        layers[f"hidden{i}"] = nn.Linear(inputs, units)
        layers[f"relu{i}"] = nn.ReLU()
        inputs = units
    layers["head"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)


def _cnn(name: str, numbers: list[int], in_shape: Shape, classes: int, width: int | None) -> nn.Module:
    _check_size(name, in_shape, 4)
    first = width or 32
    channels, height, across = in_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, 2 * first, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(2 * first * (height // 4) * (across // 4), 32 * first),
            relu3=nn.ReLU(),
            dropout=nn.Dropout(0.5),
            head=nn.Linear(32 * first, classes),
        )
    )


class WideBlock(nn.Module):
    """Pre-activation: BatchNorm, ReLU, convolution, twice, beside a shortcut that is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(h))))
        return residual + shortcut


def _wide_resnet(name: str, numbers: list[int], in_shape: Shape, classes: int, width: int | None) -> nn.Module:
    depth, factor = numbers
    if depth < 10 or (depth - 4) % 6 or factor < 1:
        raise ValueError(f"{name}: got depth {depth} and widening factor {factor}; wrn-D-K takes D = 6n + 4 (10, 16, 22, 28, 40, ...) and K of at least 1")
    _check_size(name, in_shape, 8)
    stem = width or 16
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv3(in_shape[0], stem))
    channels = stem
    for stage in range(3):
        for block in range((depth - 4) // 6):
            outputs = stem * factor * 2**stage
            layers[f"stage{stage}_{block}"] = WideBlock(channels, outputs, 2 if stage and not block else 1)
            channels = outputs
    layers |= OrderedDict(bn=nn.BatchNorm2d(channels), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(channels, classes))
    return _initialised(nn.Sequential(layers))


class ResidualBlock(nn.Module):
    """Convolution, BatchNorm, ReLU, convolution, BatchNorm, plus the input (every second pixel and zeros for new channels where the shape changes), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(h + x)


def _resnet(name: str, numbers: list[int], in_shape: Shape, classes: int, width: int | None) -> nn.Module:
    (depth,) = numbers
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"{name}: got depth {depth}; resnet-N takes N = 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...)")
    _check_size(name, in_shape, 8)
    channels = width or 16
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_conv3(in_shape[0], channels), bn=nn.BatchNorm2d(channels), relu=nn.ReLU())
    for stage in range(3):
        for block in range((depth - 2) // 6):
            shrinks = stage > 0 and block == 0
            layers[f"stage{stage}_{block}"] = ResidualBlock(channels, 2 * channels if shrinks else channels, 2 if shrinks else 1)
            channels = 2 * channels if shrinks else channels
    layers |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(channels, classes))
    return _initialised(nn.Sequential(layers))


_VGG_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions per stage; a stage ends with a 2x2 pooling."""


def _vgg(name: str, numbers: list[int], in_shape: Shape, classes: int, width: int | None) -> nn.Module:
    (depth,) = numbers
    if depth not in _VGG_DEPTHS:
        raise ValueError(f"{name}: got depth {depth}; valid are {', '.join(f'vgg-{d}' for d in _VGG_DEPTHS)}")
    _check_size(name, in_shape, 32)
    first = width or 64
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_shape[0]
    for stage, count in enumerate(_VGG_DEPTHS[depth]):
        outputs = first * min(2**stage, 8)
        for i in range(count):
            # BatchNorm subtracts the mean, so a bias before it would do nothing
            layers |= OrderedDict({f"conv{stage}_{i}": _conv3(channels, outputs), f"bn{stage}_{i}": nn.BatchNorm2d(outputs), f"relu{stage}_{i}": nn.ReLU()})
            channels = outputs
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers |= OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(channels, classes))
    return _initialised(nn.Sequential(layers))


_FAMILIES: dict[str, Callable[[str, list[int], Shape, int, int | None], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    r"wrn-(\d+)-(\d+)": _wide_resnet,
    r"resnet-(\d+)": _resnet,
    r"vgg-(\d+)": _vgg,
}


def _conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _initialised(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _check_size(name: str, in_shape: Shape, least: int) -> None:
    if min(in_shape[1:]) < least:
        size, needed = f"{in_shape[1]}x{in_shape[2]}", f"{least}x{least}"
        raise ValueError(f"{name}: images of {size} are too small; it halves them on its way and needs at least {needed}. Try mlp, or pad the images")
