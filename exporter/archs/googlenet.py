"""GoogLeNet (Inception v1): C. Szegedy et al., "Going Deeper with Convolutions", 2014.

`googlenet-2014` is the network of the paper, layer by layer as in Table 1: 5x5 kernels, biases, response normalisation,
no batch normalisation. `googlenet` is torchvision's, another network of that name: batch normalisation behind every
convolution and no biases, no response normalisation, and 3x3 kernels in the branch that has 5x5 in the paper (a slip of
the TensorFlow network that its weights come from).

The two auxiliary classifiers (section 5) serve training alone: both networks are built without them, and fine-tuning
puts them around.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.auxiliary import Auxiliaries, Head, Map
from convoynet.exporter.archs.datasets import imagenet_labels
from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.data.images import Preprocess

PAPER = "Szegedy et al. 2014, Going Deeper with Convolutions, arXiv:1409.4842"
TORCHVISION_PAPER = f"{PAPER}; torchvision's: 3x3 for 5x5, batch norm, no LRN"
# Section 5: of each auxiliary classifier's loss.
AUXILIARY_WEIGHT = 0.3


class Widths(NamedTuple):
    """A row of Table 1: the channels of each convolution of an inception module.

    Attributes:
        one: "#1x1".
        three: "#3x3 reduce" and "#3x3".
        five: "#5x5 reduce" and "#5x5".
        pool: "pool proj".
    """

    one: int
    three: tuple[int, int]
    five: tuple[int, int]
    pool: int


BLOCKS = {
    "3a": Widths(64, (96, 128), (16, 32), 32),
    "3b": Widths(128, (128, 192), (32, 96), 64),
    "4a": Widths(192, (96, 208), (16, 48), 64),
    "4b": Widths(160, (112, 224), (24, 64), 64),
    "4c": Widths(128, (128, 256), (24, 64), 64),
    "4d": Widths(112, (144, 288), (32, 64), 64),
    "4e": Widths(256, (160, 320), (32, 128), 128),
    "5a": Widths(256, (160, 320), (32, 128), 128),
    "5b": Widths(384, (192, 384), (48, 128), 128),
}
_POOLED_AFTER = ("3b", "4e")


def response_norm() -> nn.LocalResponseNorm:
    """Local response normalisation; the paper gives no constants, these are those of BVLC's network for Caffe."""
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


def convolution(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with a bias, padded so that stride 1 keeps the size; a ReLU follows each."""
    layer = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
    assert layer.bias is not None
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)  # 112 pixels to 56, as in Table 1


class Inception(nn.Module):
    """Fig. 2b: four branches side by side.

    Args:
        in_channels: Channels of the input.
        widths: Channels of the convolutions.
    """

    def __init__(self, in_channels: int, widths: Widths) -> None:
        super().__init__()
        self.conv_1x1 = convolution(in_channels, widths.one, 1)
        self.conv_3x3_reduce = convolution(in_channels, widths.three[0], 1)
        self.conv_3x3 = convolution(*widths.three, 3)
        self.conv_5x5_reduce = convolution(in_channels, widths.five[0], 1)
        self.conv_5x5 = convolution(*widths.five, 5)
        self.conv_pool_proj = convolution(in_channels, widths.pool, 1)
        self.out_channels = widths.one + widths.three[1] + widths.five[1] + widths.pool

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x out_channels x H x W."""
        one = self.conv_1x1(x)
        three = self.conv_3x3(F.relu(self.conv_3x3_reduce(x)))
        five = self.conv_5x5(F.relu(self.conv_5x5_reduce(x)))
        pooled = self.conv_pool_proj(F.max_pool2d(x, 3, 1, padding=1))
        return F.relu(torch.cat([one, three, five, pooled], 1))


class GoogLeNet2014(nn.Module):
    """The network of Table 1 and Fig. 3.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict(
                conv1_7x7_s2=convolution(3, 64, 7, 2),  # N x 64 x 112 x 112
                relu1=nn.ReLU(inplace=True),
                pool1=_pool(),  # N x 64 x 56 x 56
                norm1=response_norm(),
                conv2_3x3_reduce=convolution(64, 64, 1),
                relu2_reduce=nn.ReLU(inplace=True),
                conv2_3x3=convolution(64, 192, 3),  # N x 192 x 56 x 56
                relu2=nn.ReLU(inplace=True),
                norm2=response_norm(),
                pool2=_pool(),  # N x 192 x 28 x 28
            )
        )
        channels = 192
        self.inception = nn.ModuleDict()
        for name, widths in BLOCKS.items():
            block = Inception(channels, widths)
            self.inception[name] = block
            channels = block.out_channels
        self.dropout = nn.Dropout(0.4)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 224 x 224 -> logits, N x num_classes."""
        x = self.stem(x)
        for name, block in self.inception.items():
            x = block(x)  # 3b: N x 480 x 28 x 28, 4e: N x 832 x 14 x 14, 5b: N x 1024 x 7 x 7
            if name in _POOLED_AFTER:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # N x 1024
        logits: Tensor = self.classifier(self.dropout(x))
        return logits


class AuxiliaryClassifier(nn.Sequential):
    """The network on the side of section 5.

    Args:
        size: (channels, height, width) of the map that it reads: 14x14 for images of 224 pixels.
        num_classes: Outputs.
    """

    def __init__(self, size: Map, num_classes: int) -> None:
        channels, *sides = size
        super().__init__(
            OrderedDict(
                # 4x4 at any size of image, as its matrix wants.
                pool=nn.AvgPool2d(5, 3) if sides == [14, 14] else nn.AdaptiveAvgPool2d(4),
                conv=convolution(channels, 128, 1),
                relu=nn.ReLU(inplace=True),
                flatten=nn.Flatten(),
                fc=nn.Linear(128 * 4 * 4, 1024),
                relu_fc=nn.ReLU(inplace=True),
                dropout=nn.Dropout(0.7),
                classifier=nn.Linear(1024, num_classes),
            )
        )


@register("googlenet-2014")
def googlenet_2014() -> Arch:
    """The network of the paper, which subtracts a mean colour and scales nothing (section 5): Caffe's."""
    return Arch(
        name="googlenet-2014",
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=Preprocess(
            size=(224, 224), resize=256, mean=(123 / 255, 117 / 255, 104 / 255), std=(1 / 255, 1 / 255, 1 / 255)
        ),
        build=GoogLeNet2014,
        labels=imagenet_labels,
        auxiliaries=Auxiliaries(
            {
                "aux1": Head("inception.4a", AuxiliaryClassifier),
                "aux2": Head("inception.4d", AuxiliaryClassifier),
            },
            AUXILIARY_WEIGHT,
        ),
    )


def _torchvision_head(size: Map, num_classes: int) -> nn.Module:
    from torchvision.models.googlenet import InceptionAux

    head: nn.Module = InceptionAux(size[0], num_classes)
    return head


@register("googlenet")
def googlenet() -> Arch:
    """The network of torchvision without the auxiliary classifiers."""
    arch = arch_from_torchvision("googlenet", TORCHVISION_PAPER, aux_logits=False, init_weights=True)
    heads = {"aux1": Head("inception4a", _torchvision_head), "aux2": Head("inception4d", _torchvision_head)}
    return replace(
        arch_with_inception_input(arch),
        training_only=("aux1.", "aux2."),
        auxiliaries=Auxiliaries(heads, AUXILIARY_WEIGHT),
    )


def arch_with_inception_input(arch: Arch) -> Arch:
    """Let the preprocessing do what torchvision's Inceptions do with `transform_input`.

    Their published weights came from TensorFlow and want (x - 0.5) / 0.5. torchvision normalises with the usual
    mean and deviation and makes the one from the other in the network, which then need not be exported.
    """
    return replace(arch, preprocess=replace(arch.preprocess, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
