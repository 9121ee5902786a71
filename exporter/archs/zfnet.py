"""ZFNet: M. Zeiler, R. Fergus, "Visualizing and Understanding Convolutional Networks", 2014.

The network of Fig. 3: AlexNet on one GPU, whose first layer looks closer (7x7 with a stride of 2 for 11x11 with 4) and
whose second strides too. What the paper leaves open is AlexNet's: the constants of the normalisation, and that layers 3
to 5 are padded to keep their 13x13.
"""

import torch
from torch import Tensor, nn

from convoynet.exporter.archs.alexnet import classifier, response_norm, spread
from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS, imagenet_labels
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Zeiler, Fergus 2014, Visualizing and Understanding Convolutional Networks, arXiv:1311.2901"


def features() -> nn.Sequential:
    """Layers 1 to 5: N x 3 x 224 x 224 -> N x 256 x 6 x 6; Fig. 3 has the sizes of pools that round up."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 7, stride=2, padding=1),  # N x 96 x 110 x 110
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 96 x 55 x 55
        response_norm(),
        nn.Conv2d(96, 256, 5, stride=2),  # N x 256 x 26 x 26
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 256 x 13 x 13
        response_norm(),
        nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 256 x 6 x 6
    )


class ZFNet(nn.Module):
    """The network of Fig. 3.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = features()
        self.classifier = classifier(num_classes)  # section 3.1: as AlexNet's
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 224 x 224 -> logits, N x num_classes."""
        x = torch.flatten(self.features(x), 1)  # N x 9216
        logits: Tensor = self.classifier(x)
        return logits


@register("zfnet")
def zfnet() -> Arch:
    """The network of the paper."""
    return Arch(
        name="zfnet",
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=IMAGENET_PREPROCESS,
        build=ZFNet,
        labels=imagenet_labels,
    )
