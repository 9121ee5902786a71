"""Small networks of the blocks of large families: what tracing and quantization meet there, a few times each."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from timm.models.xception import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import AlexNet, DenseNet, MobileNetV3
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch
from convoynet.exporter.archs.dilated_resnet import PSPNet, PyramidPooling
from convoynet.exporter.archs.drn import BasicBlock
from convoynet.exporter.archs.fcn8s import FCN8s
from convoynet.exporter.archs.from_torchvision import damp_residuals
from convoynet.exporter.archs.googlenet import Inception as Inception2014
from convoynet.exporter.archs.googlenet import Widths, convolution, response_norm
from convoynet.exporter.archs.unet import UNet
from convoynet.exporter.archs.vgg import layers
from convoynet.exporter.archs.zfnet import features
from tests.exporter.small_nets import DilatedTrunk


class _AlexNet(AlexNet):
    """A classifier of 128 neurons in the place of 4096."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 128), nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Linear(128, 128), nn.ReLU(inplace=True), nn.Linear(128, classes),
        )  # fmt: skip


def densenet(classes: int) -> nn.Module:
    """Two dense blocks and the transition between them."""
    return DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, bn_size=2, num_classes=classes)


def efficientnet(classes: int) -> nn.Module:
    """Swish and squeeze-and-excitation, with and without a shortcut, 3x3 and 5x5."""
    settings = [
        MBConvConfig(1, 3, 1, 32, 16, 1, 1.0, 1.0),
        MBConvConfig(6, 3, 2, 16, 24, 2, 1.0, 1.0),
        MBConvConfig(6, 5, 2, 24, 40, 1, 1.0, 1.0),
    ]
    return EfficientNet(settings, dropout=0.2, num_classes=classes)


def mobilenet_v3(classes: int) -> nn.Module:
    """Hard swish and hard sigmoid, with and without squeeze-and-excitation and a shortcut."""
    settings = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 72, 24, False, "HS", 2, 1, 1.0),
        InvertedResidualConfig(24, 5, 88, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(settings, last_channel=128, num_classes=classes)


class _GoogLeNet(nn.Sequential):
    def __init__(self, classes: int) -> None:
        super().__init__(
            BasicConv2d(3, 32, kernel_size=7, stride=2, padding=3), nn.MaxPool2d(3, 2, ceil_mode=True),
            Inception(32, 16, 24, 32, 4, 8, 8), nn.MaxPool2d(3, 2, ceil_mode=True),
            Inception(64, 32, 24, 48, 8, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(112, classes),
        )  # fmt: skip


class _GoogLeNet2014(nn.Sequential):
    def __init__(self, classes: int) -> None:
        super().__init__(
            convolution(3, 32, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True), response_norm(),
            Inception2014(32, Widths(16, (24, 32), (4, 8), 8)), nn.MaxPool2d(3, 2, ceil_mode=True),
            Inception2014(64, Widths(32, (24, 48), (8, 16), 16)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(112, classes),
        )  # fmt: skip


class _VGG(nn.Module):
    """Two of configuration D's five stages, narrow, with the batch normalisation and the classifier of vgg16-cifar."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = layers("3-32 3-32 pool 3-64 3-64 pool", batch_norm=True)
        self.classifier = nn.Linear(64 * 8 * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


class _DRN(nn.Module):
    """Residual blocks with strides and with dilations, the second without a shortcut, as at the end of DRN-C."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, padding=3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            BasicBlock(16, 32, stride=2), BasicBlock(32, 48, dilation=2), BasicBlock(48, 48, dilation=2, residual=False)
        )
        self.fc = nn.Conv2d(48, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.blocks(self.stem(x))
        return torch.flatten(self.fc(F.adaptive_avg_pool2d(maps, 1)), 1)


class _Xception(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            Block(32, 48, 2, 2, start_with_relu=False), Block(48, 48, 3, 1), Block(48, 64, 2, 2, grow_first=False)
        )
        self.last = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


class _ZFNet(nn.Sequential):
    """All of its convolutions, and a classifier of 128 neurons."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            features(), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(inplace=True), nn.Linear(128, classes)
        )  # fmt: skip


def _fcn8s(classes: int) -> nn.Module:
    return FCN8s(classes, stages=((8,), (16,), (32,), (32,), (32,)), hidden=64)


class _PSPNet(PSPNet):
    """Its head on a trunk an eighth as wide."""

    def __init__(self, classes: int) -> None:
        nn.Module.__init__(self)
        self.backbone = DilatedTrunk()
        damp_residuals(self.backbone)
        self.classifier = PyramidPooling(DilatedTrunk.CHANNELS, classes)


# Each is built in the stead of a network of the zoo, whose preprocessing it takes.
BUILDERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "alexnet": ("alexnet", _AlexNet),
    "densenet": ("densenet121", densenet),
    "drn": ("drn_d_22", _DRN),
    "fcn8s": ("fcn8s_vgg16", _fcn8s),
    "pspnet": ("pspnet_resnet50", _PSPNet),
    "unet": ("unet", partial(UNet, widths=(8, 16, 32, 48, 64))),
    "efficientnet": ("efficientnet_b0", efficientnet),
    "googlenet": ("googlenet", _GoogLeNet),
    "googlenet-2014": ("googlenet-2014", _GoogLeNet2014),
    "mobilenet_v3": ("mobilenet_v3_small", mobilenet_v3),
    "vgg": ("vgg16-cifar", _VGG),
    "xception": ("xception", _Xception),
    "zfnet": ("zfnet", _ZFNet),
}


def small(family: str) -> Arch:
    """The small network of a family."""
    name, build = BUILDERS[family]
    return replace(archs.get(name), name=f"small {family}", build=build)
