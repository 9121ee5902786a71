"""Network in Network: M. Lin, Q. Chen, S. Yan, "Network In Network", 2013.

`nin-cifar` is the network of section 4.2 and `nin` the one for ImageNet, both with the layer sizes of the Caffe
models that the authors published. Their poolings round up, which Caffe's always do.
"""

import torch
from torch import Tensor, nn

from convoynet.exporter.archs.datasets import (
    CIFAR10_PREPROCESS,
    IMAGENET_PREPROCESS,
    cifar10_labels,
    imagenet_labels,
)
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Lin et al. 2013, Network In Network, arXiv:1312.4400"


def mlpconv(in_channels: int, channels: tuple[int, int, int], kernel: int, *, stride: int = 1) -> list[nn.Module]:
    """A perceptron of three layers that slides over its input (section 3.1): one k x k convolution and two 1x1.

    Args:
        in_channels: Channels of the input.
        channels: Channels after each of the three.
        kernel: Width of the first; odd.
        stride: Of the first; where it is 1, the output is as large as the input.
    """
    first, second, third = channels
    padding = kernel // 2 if stride == 1 else 0
    return [
        nn.Conv2d(in_channels, first, kernel, stride=stride, padding=padding),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(second, third, 1),
        nn.ReLU(inplace=True),
    ]


class NetworkInNetwork(nn.Module):
    """mlpconv layers whose last maps are the classes, averaged over the image (section 3.2).

    Args:
        features: N x 3 x H x W -> N x classes x h x w.
    """

    def __init__(self, *features: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> logits, N x num_classes, none negative: a ReLU comes before the average."""
        return torch.flatten(self.pool(self.features(x)), 1)


def build_imagenet(num_classes: int) -> NetworkInNetwork:
    """The authors' network for ImageNet, 224x224."""
    return NetworkInNetwork(
        *mlpconv(3, (96, 96, 96), 11, stride=4),  # N x 96 x 54 x 54
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 96 x 27 x 27
        *mlpconv(96, (256, 256, 256), 5),  # N x 256 x 27 x 27
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 256 x 13 x 13
        *mlpconv(256, (384, 384, 384), 3),  # N x 384 x 13 x 13
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 384 x 6 x 6
        nn.Dropout(0.5),
        *mlpconv(384, (1024, 1024, num_classes), 3),  # N x num_classes x 6 x 6
    )


def build_cifar(num_classes: int) -> NetworkInNetwork:
    """The network of section 4.2, 32x32."""
    return NetworkInNetwork(
        *mlpconv(3, (192, 160, 96), 5),  # N x 96 x 32 x 32
        nn.MaxPool2d(3, 2, ceil_mode=True),  # N x 96 x 16 x 16
        nn.Dropout(0.5),
        *mlpconv(96, (192, 192, 192), 5),  # N x 192 x 16 x 16
        nn.AvgPool2d(3, 2, ceil_mode=True),  # N x 192 x 8 x 8
        nn.Dropout(0.5),
        *mlpconv(192, (192, 192, num_classes), 3),  # N x num_classes x 8 x 8
    )


@register("nin")
def nin() -> Arch:
    """The network for ImageNet."""
    return Arch(
        name="nin",
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=IMAGENET_PREPROCESS,
        build=build_imagenet,
        labels=imagenet_labels,
    )


@register("nin-cifar")
def nin_cifar() -> Arch:
    """The network for CIFAR-10; the paper whitens its images (section 4.2), which the caller may do instead."""
    return Arch(
        name="nin-cifar",
        paper=PAPER,
        source="own",
        num_classes=10,
        preprocess=CIFAR10_PREPROCESS,
        build=build_cifar,
        labels=cifar10_labels,
    )
