"""Residual networks: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", 2015.

The ImageNet networks (section 4.1) are torchvision's, and so are their descendants ResNeXt (S. Xie et al.,
2016) and wide ResNet (S. Zagoruyko, N. Komodakis, 2016); the CIFAR-10 networks (section 4.2) are built here,
with the tensor names of the weights that Y. Idelbayev published for them.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.datasets import CIFAR10_PREPROCESS, cifar10_labels
from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import Arch, register

PAPER = "He et al. 2015, Deep Residual Learning for Image Recognition, arXiv:1512.03385"
RESNEXT_PAPER = "Xie et al. 2016, Aggregated Residual Transformations for Deep Neural Networks, arXiv:1611.05431"
WIDE_PAPER = "Zagoruyko, Komodakis 2016, Wide Residual Networks, arXiv:1605.07146"
_PUBLISHED_URL = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models"
# The part after the dash starts the file's SHA-256, and torch.hub checks it.
_PUBLISHED_FILES = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
    110: "resnet110-1d1ed7c2.th",
    1202: "resnet1202-f3b1deed.th",
}


class PaddedShortcut(nn.Module):
    """A shortcut without parameters (section 4.2, option A): fewer pixels, and zeros for the channels that lack.

    Args:
        stride: It takes every stride-th pixel.
        before: Channels of zeros that come first.
        after: Channels of zeros that come last.
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x before+C+after x H/stride x W/stride."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.before or self.after:
            x = F.pad(x, (0, 0, 0, 0, self.before, self.after))
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (section 4.2, option A).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output; the shortcut pads the missing ones with zeros.
        stride: Of the first convolution; the shortcut takes every stride-th pixel.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        missing = channels - in_channels
        self.shortcut = PaddedShortcut(stride, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x channels x H/stride x W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR-10 network of section 4.2: 6n+2 weighted layers, 16, 32 and 64 channels.

    Args:
        depth: 6n+2.
        num_classes: Outputs.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015b, as section 3.4 says

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 32 x 32 -> logits, N x num_classes."""
        x = F.relu(self.bn1(self.conv1(x)))  # N x 16 x 32 x 32
        x = self.layer3(self.layer2(self.layer1(x)))  # N x 64 x 8 x 8
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # N x 64
        logits: Tensor = self.linear(x)
        return logits


def _stage(blocks: int, in_channels: int, channels: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _published(url: str) -> dict[str, Tensor]:
    checkpoint = torch.hub.load_state_dict_from_url(
        url, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint["state_dict"].items()}


def _cifar_arch(depth: int) -> Arch:
    url = f"{_PUBLISHED_URL}/{_PUBLISHED_FILES[depth]}"
    return Arch(
        name=f"resnet{depth}",
        paper=f"{PAPER}, section 4.2 (CIFAR-10)",
        source="own",
        num_classes=10,
        preprocess=CIFAR10_PREPROCESS,
        build=partial(CifarResNet, depth),
        labels=cifar10_labels,
        published=partial(_published, url),
        published_name=url,
    )


for _name, _paper in (
    *((f"resnet{depth}", PAPER) for depth in (18, 34, 50, 101, 152)),
    *((f"resnext{size}", RESNEXT_PAPER) for size in ("50_32x4d", "101_32x8d", "101_64x4d")),
    *((f"wide_resnet{size}", WIDE_PAPER) for size in ("50_2", "101_2")),
):
    register(_name)(partial(arch_from_torchvision, _name, _paper))
for _depth in _PUBLISHED_FILES:
    register(f"resnet{_depth}")(partial(_cifar_arch, _depth))
