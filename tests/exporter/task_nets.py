"""Small networks for segmentation and detection, as a user's own code would describe them to the exporter."""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch
from convoynet.exporter.archs.detection import Limits
from convoynet.exporter.data.images import Preprocess
from tests.exporter.detection_nets import narrow

LABELS = ("background", "sky", "water", "sand", "tree")
SIDE = 128


class Segmenter(nn.Module):
    """Two layers at half the resolution, and back."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(32, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> N x num_classes x H x W."""
        return F.interpolate(self.head(self.trunk(x)), size=x.shape[-2:], mode="bilinear", align_corners=False)


def segmenter() -> Arch:
    """A factory for --arch."""
    return Arch(
        name="segmenter",
        paper="none",
        source="user",
        num_classes=len(LABELS),
        preprocess=Preprocess((48, 64), 64, (0.45,) * 3, (0.25,) * 3, fit="pad"),
        build=Segmenter,
        labels=lambda: list(LABELS),
        task="segmentation",
    )


class _Classifier(nn.Module):
    """A map of an eighth of the sides, and the layers behind it that a fully convolutional network slides over it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(nn.Linear(4 * 4 * 32, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 32 x 32 -> N x num_classes."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def classifier() -> Arch:
    """A factory for --arch: images of 32 by 32 pixels."""
    return Arch(
        name="classifier",
        paper="none",
        source="user",
        num_classes=len(LABELS),
        preprocess=Preprocess((32, 32), 32, (0.45,) * 3, (0.25,) * 3),
        build=_Classifier,
        labels=lambda: list(LABELS),
    )


def detector() -> Arch:
    """A narrow Faster R-CNN, with few boxes of small images."""
    arch = archs.get("fasterrcnn_resnet101_fpn")
    limits = Limits(level_proposals=60, proposals=30, detections=10, candidates=100)
    return replace(
        arch,
        name="detector",
        num_classes=8,
        preprocess=replace(arch.preprocess, size=(SIDE, SIDE), resize=SIDE),
        build=partial(narrow, limits=limits),
        labels=lambda: [f"thing {index}" for index in range(8)],
    )
