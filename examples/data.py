"""Image data sets, read from files in their public layouts.

| name | files below the directory |
|---|---|
| `digits` | none: the 1,797 images of 8x8 that come with scikit-learn |
| `mnist` | `MNIST/raw/train-images-idx3-ubyte.gz` and so on |
| `fashion-mnist` | `FashionMNIST/raw/train-images-idx3-ubyte.gz` and so on |
| `emnist-letters` | `EMNIST/raw/emnist-letters-train-images-idx3-ubyte.gz` and so on |
| `cifar10` | `cifar-10-batches-bin/data_batch_{1..5}.bin`, `test_batch.bin` (the "binary version") |

These are the folders torchvision makes (CIFAR-10 apart, of which it takes the Python version). The files may also lie in the directory itself,
and IDX files may be unpacked (no `.gz`).
"""

from __future__ import annotations

import difflib
import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Part = tuple[NDArray[np.generic], NDArray[np.generic]]
"""Images and labels, for training or for testing."""

TRAIN, TEST = "train", "test"
CIFAR_IMAGE = (3, 32, 32)
CIFAR_RECORD = 1 + math.prod(CIFAR_IMAGE)
IDX_IMAGE = (28, 28)


class DataError(ValueError):
    """A data set that is not there or is damaged. Says which file, what was found, what is expected and what to try."""


@dataclass(frozen=True)
class Dataset:
    """Images (float32, N x C x H x W, per channel zero mean and unit variance over the training images) and labels (int64, 0 to `classes` - 1)."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _Idx:
    """Where a set in MNIST's format lies and what is special about it."""

    folder: str
    stems: tuple[tuple[str, str], tuple[str, str]]
    """File names up to `-images-idx3-ubyte`, for train and test."""
    classes: int
    first_label: int
    transposed: bool
    source: str


_MNIST_STEMS = ((TRAIN, "train"), (TEST, "t10k"))
_EMNIST_STEMS = ((TRAIN, "emnist-letters-train"), (TEST, "emnist-letters-test"))
_IDX = {
    "mnist": _Idx("MNIST/raw", _MNIST_STEMS, 10, 0, False, "torchvision.datasets.MNIST(directory, download=True)"),
    "fashion-mnist": _Idx("FashionMNIST/raw", _MNIST_STEMS, 10, 0, False, "torchvision.datasets.FashionMNIST(directory, download=True)"),
    # NIST's scans were stored column by column, and the letters numbered from 1
    "emnist-letters": _Idx("EMNIST/raw", _EMNIST_STEMS, 26, 1, True, "torchvision.datasets.EMNIST(directory, split='letters', download=True)"),
}
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_SOURCE = "unpacking cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) in the directory"

NAMES = ("digits", *_IDX, "cifar10")


def load(name: str, directory: Path | str | None = None) -> Dataset:
    """The data set `name` (one of `NAMES`) from the files below `directory`; `digits` takes none.

    Raises `DataError` for an unknown name, a directory missing or not needed, and files that are missing or damaged.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        raise DataError(f"data set {name!r} is unknown; valid are {', '.join(NAMES)}." + (f" Did you mean {near[0]!r}?" if near else ""))
    if name == "digits":
        if directory is not None:
            raise DataError(f"digits comes with scikit-learn and reads no directory, got {str(directory)!r}; drop it, or name one of {', '.join(NAMES[1:])}")
        return _digits()
    if directory is None:
        raise DataError(f"{name} is read from files; name the directory that holds them ({_source(name)} fills one)")
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is no directory; name the one that holds {name} ({_source(name)} fills one)")
    return _cifar10(directory) if name == "cifar10" else _idx(name, directory)


def read_idx(path: Path, shape: Sequence[int] = ()) -> Bytes:
    """The array (count, *shape) of bytes in an IDX file, gzipped if its name ends in `.gz`.

    The format: two zero bytes, 8 for "unsigned bytes", the number of dimensions, each dimension as a big-endian int32, the values.
    Raises `DataError` for a file that can't be read or unpacked, is not IDX, holds other shapes, or is shorter or longer than it says.
    """
    content = _read(path)
    dimensions = 1 + len(shape)
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        what = f"{path} starts with the bytes {content[:4].hex(' ') or '(none)'}; an IDX file of {dimensions} dimensions starts with {magic.hex(' ')}"
        raise DataError(f"{what}. It is another kind of file, or images and labels are exchanged: get it again")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path} ends within its header, after {len(content)} of {start} bytes: get it again")
    count, *sizes = (int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if sizes != list(shape):
        raise DataError(f"{path} holds entries of {_times(sizes)}; {_times(shape)} is expected: it belongs to another data set")
    expected = start + count * math.prod(shape)
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path} is {state}: {len(content)} bytes found, {expected} expected for the {count} entries its header announces. Get it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(count, *shape)


def read_cifar10(path: Path, records: int = 10_000) -> tuple[Bytes, Bytes]:
    """Images (records, 3, 32, 32) and labels of one file of CIFAR-10's binary version: per image a label byte, then 3,072 bytes, red first.

    Raises `DataError` for a file that can't be read or is not `records` x 3,073 bytes long (the format has no header that could tell more).
    """
    content = _read(path)
    if len(content) != records * CIFAR_RECORD:
        what = f"{len(content)} bytes found, {records * CIFAR_RECORD} expected ({records} images of {CIFAR_RECORD} bytes)"
        raise DataError(f"{path} has the wrong size: {what}. Get it again, by {_CIFAR_SOURCE}")
    table = np.frombuffer(content, np.uint8).reshape(records, CIFAR_RECORD)
    return table[:, 1:].reshape(records, *CIFAR_IMAGE), table[:, 0]


# --- the sets ---


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError("digits needs scikit-learn: pip install scikit-learn, or name another data set and its directory") from None
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x.reshape(-1, 1, 8, 8), y, test_size=0.2, stratify=y, random_state=0)
    return _normalised("digits", (train_x, train_y), (test_x, test_y), 10)


def _idx(name: str, directory: Path) -> Dataset:
    layout = _IDX[name]
    parts: dict[str, tuple[Bytes, Bytes]] = {}
    for part, stem in layout.stems:
        files = [_find_idx(name, directory, f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        images, labels = read_idx(files[0], IDX_IMAGE), read_idx(files[1])
        if not len(images):
            raise DataError(f"{files[0]} holds no image: get it again, e.g. by {layout.source}")
        if len(images) != len(labels):
            raise DataError(f"{files[0]} holds {len(images)} images and {files[1]} {len(labels)} labels: they are of different sets or parts of one")
        _check_labels(files[1], labels, layout.first_label, layout.classes)
        if layout.transposed:
            images = images.transpose(0, 2, 1)
        parts[part] = (images[:, None], labels - np.uint8(layout.first_label))
    return _normalised(name, parts[TRAIN], parts[TEST], layout.classes)


def _cifar10(directory: Path) -> Dataset:
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    names = [*train, "test_batch.bin"]
    folder = next((f for f in (directory / _CIFAR_FOLDER, directory) if any((f / n).is_file() for n in names)), None)
    missing = [n for n in names if folder is None or not (folder / n).is_file()]
    if missing:
        where = folder or f"{directory / _CIFAR_FOLDER} or {directory}"
        raise DataError(f"cifar10 lacks {', '.join(missing)} in {where}; all of {', '.join(names)} are expected. Try {_CIFAR_SOURCE}")
    assert folder is not None
    parts = {n: read_cifar10(folder / n) for n in names}
    for n, (_, labels) in parts.items():
        _check_labels(folder / n, labels, 0, 10)
    images, labels = (np.concatenate([parts[n][i] for n in train]) for i in (0, 1))
    return _normalised("cifar10", (images, labels), parts["test_batch.bin"], 10)


def _normalised(name: str, train: Part, test: Part, classes: int) -> Dataset:
    train_x, test_x = (torch.from_numpy(x.astype(np.float32, order="C")) for x, _ in (train, test))
    train_y, test_y = (torch.from_numpy(y.astype(np.int64)) for _, y in (train, test))
    std, mean = torch.std_mean(train_x, dim=(0, 2, 3), correction=0, keepdim=True)
    std[std == 0] = 1  # a channel that is constant becomes 0, not NaN
    for x in (train_x, test_x):
        x.sub_(mean).div_(std)
    return Dataset(name, train_x, train_y, test_x, test_y, classes)


# --- files ---


def _find_idx(name: str, directory: Path, file: str) -> Path:
    layout = _IDX[name]
    places = [folder / (file + end) for folder in (directory / layout.folder, directory) for end in (".gz", "")]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise DataError(f"{name} lacks {file}.gz (or {file}) in {places[0].parent} and in {directory}. Try {layout.source}")
    return path


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path} can't be read: {e.strerror or e}") from None
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path} ({len(content)} bytes) is no whole gzip file: {e}. Get it again, or put the unpacked file beside it without .gz") from None


def _check_labels(path: Path, labels: Bytes, first: int, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < first or high >= first + classes:
        raise DataError(f"{path} holds labels from {low} to {high}; {first} to {first + classes - 1} are expected: it is damaged or of another data set")


def _source(name: str) -> str:
    return _CIFAR_SOURCE if name == "cifar10" else _IDX[name].source


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1 byte"
