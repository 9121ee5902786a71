"""A small network that learns in seconds, and images in classes that it can learn."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convoynet.exporter.compression.data import TrainingImages
from convoynet.exporter.data.images import Preprocess

PREPROCESS = Preprocess(size=(16, 16), resize=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = 4


class TinyNet(nn.Module):
    """Two convolutions with batch norms, dropout and a classifier; optionally an auxiliary one in training."""

    def __init__(self, width: int = 8, *, auxiliary: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True))
        self.second = nn.Sequential(nn.Conv2d(width, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(True))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, CLASSES)
        self.auxiliary = nn.Linear(width, CLASSES) if auxiliary else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        early = self.first(x)
        logits: Tensor = self.head(self.dropout(self.second(early).mean((2, 3))))
        if self.auxiliary is not None and self.training:
            return logits, self.auxiliary(early.mean((2, 3)))
        return logits


def tiny_net(seed: int, width: int = 8, *, auxiliary: bool = False) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(width, auxiliary=auxiliary).eval()


def striped(count: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noisy stripes of four kinds, wide or narrow, level or upright: uint8 [count, 16, 16, 3], int64 [count]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = np.empty((count, 16, 16, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        wave = np.sin((np.arange(16) + rng.integers(16)) * (0.6 if label < 2 else 1.8))
        plane = wave[:, None] if label % 2 else wave[None, :]
        image[...] = np.clip(128 + 60 * plane[..., None] + rng.normal(0, 30, (16, 16, 3)), 0, 255)
    return images, labels


def training_images(count: int, seed: int = 0, *, labelled: bool = True) -> TrainingImages:
    images, labels = striped(count, seed)
    return TrainingImages(PREPROCESS, f"{count} striped images", images, labels=labels if labelled else None)


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Between two networks' tensors."""
    theirs = other.state_dict()
    return max(float((value.double() - theirs[name].double()).abs().max()) for name, value in one.state_dict().items())
