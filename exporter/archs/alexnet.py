"""AlexNet: A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks".

`alexnet-2012` is the network of that paper (section 3), two halves that meet only in some layers; `alexnet` is
torchvision's, the single tower of A. Krizhevsky, "One weird trick for parallelizing convolutional neural
networks", 2014, without response normalisation.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS, imagenet_labels
from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Krizhevsky et al. 2012, ImageNet Classification with Deep Convolutional Neural Networks, NIPS 25"
ONE_TOWER_PAPER = "Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks, arXiv:1404.5997"


def response_norm() -> nn.LocalResponseNorm:
    """Local response normalisation with the constants of section 3.3: k=2, n=5, alpha=1e-4, beta=0.75.

    The paper multiplies the sum of the n squares by alpha; PyTorch multiplies their mean, so its alpha is n
    times as large.
    """
    n = 5
    return nn.LocalResponseNorm(n, alpha=n * 1e-4, beta=0.75, k=2.0)


class AlexNet2012(nn.Module):
    """The network of Fig. 2. The two GPUs' halves are groups, in the layers that see only their own half.

    The input is 227 pixels wide: with the 224 of the text, the first layer would not have 55x55 outputs.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4),  # N x 96 x 55 x 55
            nn.ReLU(inplace=True),
            response_norm(),
            nn.MaxPool2d(3, 2),  # N x 96 x 27 x 27; overlapping (section 3.4)
            nn.Conv2d(96, 256, 5, padding=2, groups=2),  # N x 256 x 27 x 27
            nn.ReLU(inplace=True),
            response_norm(),
            nn.MaxPool2d(3, 2),  # N x 256 x 13 x 13
            nn.Conv2d(256, 384, 3, padding=1),  # N x 384 x 13 x 13; sees both halves
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2),  # N x 384 x 13 x 13
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2),  # N x 256 x 13 x 13
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),  # N x 256 x 6 x 6
        )
        self.classifier = classifier(num_classes)
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 227 x 227 -> logits, N x num_classes."""
        x = torch.flatten(self.features(x), 1)  # N x 9216
        logits: Tensor = self.classifier(x)
        return logits


def classifier(num_classes: int) -> nn.Sequential:
    """Its fully connected layers (section 3.5), with dropout before the first two: N x 9216 -> N x num_classes."""
    return nn.Sequential(
        nn.Dropout(0.5),  # section 4.2
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, num_classes),
    )


def spread(network: nn.Module) -> None:
    """Fill an untrained network with He's normal weights and no biases.

    With section 5's deviation of 0.01 its signal would vanish, and comparing outputs would show nothing.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


@register("alexnet-2012")
def alexnet_2012() -> Arch:
    """The network of the paper."""
    return Arch(
        name="alexnet-2012",
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=replace(IMAGENET_PREPROCESS, size=(227, 227)),
        build=AlexNet2012,
        labels=imagenet_labels,
    )


register("alexnet")(partial(arch_from_torchvision, "alexnet", ONE_TOWER_PAPER))
