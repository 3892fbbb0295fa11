"""Images to train on: digits that come with scikit-learn, Fashion-MNIST, CIFAR, or a folder."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
ROOT = Path("data")  # where torchvision puts what it downloads


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) of mean 0 and deviation 1, to train on and to test with, and labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    @classmethod
    def load(cls, source: str, size: int = 64) -> Images:
        """By name (``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``) or from a folder.

        The folder holds either the four idx files of an MNIST-like data set, gzipped or not, or ``train/CLASS/*`` and
        ``val/CLASS/*``, whose images are resized to ``size`` × ``size``.

        Raises:
            SystemExit: ``source`` is neither.
        """
        folder = Path(source)
        if source in _NAMED:
            raw = _NAMED[source]()
        elif (folder / "train").is_dir():
            raw = _from_folders(folder, size)
        elif any(folder.glob("train-images-idx3-ubyte*")):
            raw = _from_idx(folder)
        else:
            raise SystemExit(f"--data {source}: expected {', '.join(_NAMED)}, or a folder of idx files or of train/ and val/")
        train, train_labels, test, test_labels = raw
        mean, deviation = (f(train.float(), dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        train, test = ((images.float() - mean) / deviation for images in (train, test))
        return cls(train, train_labels.long(), test, test_labels.long())

    def limited(self, images: int) -> Images:
        """The first so many of them."""
        return Images(self.train[:images], self.train_labels[:images], self.test[:images], self.test_labels[:images])


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file, gzipped or not, in the shape that its header says."""
    data = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    shape = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, data[3] + 1)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[4 + 4 * len(shape) :].reshape(shape)


def shifted(images: Tensor, by: int) -> Tensor:
    """A batch moved by up to so many pixels each way, drawn from torch's generator."""
    x, y = torch.randint(0, 2 * by + 1, (2,)).tolist()
    height, width = images.shape[2:]
    return F.pad(images, [by] * 4, mode="replicate")[:, :, y : y + height, x : x + width].contiguous()


Raw = tuple[Tensor, Tensor, Tensor, Tensor]


def _digits() -> Raw:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, labels = torch.tensor(raw.images).unsqueeze(1), torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fit, test = order[:1280], order[1280:]
    return images[fit], labels[fit], images[test], labels[test]


def _fashion_mnist() -> Raw:
    if DEBIAN.is_dir():
        return _from_idx(DEBIAN)
    from torchvision.datasets import FashionMNIST

    fit, test = (FashionMNIST(ROOT, train=train, download=True) for train in (True, False))
    return fit.data.unsqueeze(1), fit.targets, test.data.unsqueeze(1), test.targets


def _cifar(name: str) -> Raw:
    import torchvision

    fit, test = (getattr(torchvision.datasets, name)(ROOT, train=train, download=True) for train in (True, False))
    found = [torch.tensor(part.data).permute(0, 3, 1, 2) for part in (fit, test)]
    return found[0], torch.tensor(fit.targets), found[1], torch.tensor(test.targets)


def _from_idx(folder: Path) -> Raw:
    parts = [read_idx(folder / f"{p}-{w}") for p in ("train", "t10k") for w in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return parts[0].unsqueeze(1), parts[1], parts[2].unsqueeze(1), parts[3]


def _from_folders(folder: Path, size: int) -> Raw:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import functional as T

    def image(picture) -> Tensor:
        return T.center_crop(T.resize(T.pil_to_tensor(picture), [size], antialias=True), [size, size])

    raw: list[Tensor] = []
    for part in ("train", "val"):
        found = ImageFolder(folder / part, transform=image)
        pictures, labels = zip(*found, strict=True)
        raw += [torch.stack(pictures), torch.tensor(labels)]
    return raw[0], raw[1], raw[2], raw[3]


_NAMED: dict[str, Callable[[], Raw]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda: _cifar("CIFAR10"),
    "cifar100": lambda: _cifar("CIFAR100"),
}
