"""VGG: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014.

Configurations A, B, D and E of Table 1 (vgg11 to vgg19), with and without batch normalisation, are torchvision's.
A-LRN and C are built here around torchvision's classifier, and so is the variant that is usual for CIFAR-10.
"""

from functools import partial

import torch
from torch import Tensor, nn

from convoynet.exporter.archs.alexnet import response_norm
from convoynet.exporter.archs.datasets import (
    CIFAR10_PREPROCESS,
    IMAGENET_PREPROCESS,
    cifar10_labels,
    imagenet_labels,
)
from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Simonyan, Zisserman 2014, Very Deep Convolutional Networks for Large-Scale Image Recognition, arXiv:1409.1556"
CIFAR_PAPER = (
    "Liu, Deng 2015, Very Deep Convolutional Neural Network Based Image Classification Using Small Training Sample"
    " Size, ACPR"
)

# Columns of Table 1, from top to bottom: "3-64" is a 3x3 convolution to 64 channels.
CONFIGURATION_A_LRN = "3-64 lrn pool 3-128 pool 3-256 3-256 pool 3-512 3-512 pool 3-512 3-512 pool"
CONFIGURATION_C = "3-64 3-64 pool 3-128 3-128 pool 3-256 3-256 1-256 pool 3-512 3-512 1-512 pool 3-512 3-512 1-512 pool"
CONFIGURATION_D = "3-64 3-64 pool 3-128 3-128 pool 3-256 3-256 3-256 pool 3-512 3-512 3-512 pool 3-512 3-512 3-512 pool"


def layers(configuration: str, *, batch_norm: bool = False) -> nn.Sequential:
    """The convolutional layers of a column of Table 1: N x 3 x H x W -> N x 512 x H/32 x W/32.

    Args:
        configuration: The column.
        batch_norm: Whether a batch normalisation follows each convolution.
    """
    made: list[nn.Module] = []
    channels = 3
    for layer in configuration.split():
        if layer == "pool":
            made.append(nn.MaxPool2d(2, 2))
        elif layer == "lrn":
            made.append(response_norm())  # section 2.1: with AlexNet's constants
        else:
            kernel, outputs = map(int, layer.split("-"))
            made.append(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2))
            made += [nn.BatchNorm2d(outputs)] if batch_norm else []
            made.append(nn.ReLU(inplace=True))
            channels = outputs
    return nn.Sequential(*made)


class CifarVGG(nn.Module):
    """Configuration D with batch normalisation and a single linear layer, for 32x32 images.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = layers(CONFIGURATION_D, batch_norm=True)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 32 x 32 -> logits, N x num_classes."""
        x = torch.flatten(self.features(x), 1)  # N x 512
        logits: Tensor = self.classifier(x)
        return logits


def _build(configuration: str, num_classes: int) -> nn.Module:
    from torchvision.models import VGG

    network: nn.Module = VGG(layers(configuration), num_classes=num_classes)
    return network


def _imagenet_arch(name: str, configuration: str) -> Arch:
    return Arch(
        name=name,
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=IMAGENET_PREPROCESS,
        build=partial(_build, configuration),
        labels=imagenet_labels,
    )


@register("vgg16-cifar")
def vgg16_cifar() -> Arch:
    """The usual network of that name for CIFAR-10; weights of the common implementations have its names."""
    return Arch(
        name="vgg16-cifar",
        paper=CIFAR_PAPER,
        source="own",
        num_classes=10,
        preprocess=CIFAR10_PREPROCESS,
        build=CifarVGG,
        labels=cifar10_labels,
    )


register("vgg11-lrn")(partial(_imagenet_arch, "vgg11-lrn", CONFIGURATION_A_LRN))
register("vgg16-c")(partial(_imagenet_arch, "vgg16-c", CONFIGURATION_C))
for _depth in (11, 13, 16, 19):
    for _name in (f"vgg{_depth}", f"vgg{_depth}_bn"):
        register(_name)(partial(arch_from_torchvision, _name, PAPER))
