"""Dilated residual networks: F. Yu, V. Koltun, T. Funkhouser, "Dilated Residual Networks", 2017.

Residual networks whose last two strides became dilations (section 2), with the layers that remove the gridding
(section 4): DRN-C has residual blocks at both ends, DRN-D plain convolutions. The tensors have the names of the
authors' weights.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS, imagenet_labels
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Yu, Koltun, Funkhouser 2017, Dilated Residual Networks, arXiv:1705.09914"
_CHANNELS = (16, 32, 64, 128, 256, 512, 512, 512)
_STRIDES = (1, 2, 2, 2, 1, 1, 1, 1)
_DILATIONS = (1, 1, 1, 1, 2, 4, 2, 1)
_PUBLISHED_URL = "http://dl.yf.io/drn"

# Blocks of the levels 3 to 6, whether they are bottlenecks, and the authors' file: the part after the dash starts its
# SHA-256, and torch.hub checks it.
_NETWORKS = {
    "drn_c_26": ((2, 2, 2, 2), False, "drn_c_26-ddedf421.pth"),
    "drn_c_42": ((3, 4, 6, 3), False, "drn_c_42-9d336e8c.pth"),
    "drn_c_58": ((3, 4, 6, 3), True, "drn_c_58-0a53a92c.pth"),
    "drn_d_22": ((2, 2, 2, 2), False, "drn_d_22-4bd2f8ea.pth"),
    "drn_d_38": ((3, 4, 6, 3), False, "drn_d_38-eebb45f0.pth"),
    "drn_d_54": ((3, 4, 6, 3), True, "drn_d_54-0e0534ff.pth"),
    "drn_d_105": ((3, 4, 23, 3), True, "drn_d_105-12b40979.pth"),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with the same dilation.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Of the first convolution.
        dilation: Of both.
        residual: Whether the input is added; the last levels leave it out, since it would carry the grid on.
    """

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1, residual: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x channels x H/stride x W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out if self.downsample is None else out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolutions; the output has four times the channels of the first two.

    Args:
        in_channels: Channels of the input.
        channels: Channels inside.
        stride: Of the 3x3 convolution.
        dilation: Of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(in_channels, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x 4*channels x H/stride x W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


def _conv(in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def _projection(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(channels),
    )


class DRN(nn.Module):
    """The networks C and D of Fig. 5 and of the authors' code: eight levels, the output at an eighth of the input.

    Args:
        name: Such as "drn_c_26".
        num_classes: Outputs.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        blocks, bottleneck, _ = _NETWORKS[name]
        block: type[BasicBlock | Bottleneck] = Bottleneck if bottleneck else BasicBlock
        plain = name.startswith("drn_d")
        stem = (nn.Conv2d(3, 16, 7, padding=3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        if plain:
            self.layer0 = nn.Sequential(*stem)
        else:
            self.conv1, self.bn1, self.relu = stem
        channels = 16
        for level, (width, stride, dilation) in enumerate(zip(_CHANNELS, _STRIDES, _DILATIONS, strict=True), 1):
            if 3 <= level <= 6:
                first = block(channels, width, stride=stride, dilation=dilation)
                channels = width * block.expansion
                more = [block(channels, width, dilation=dilation) for _ in range(blocks[level - 3] - 1)]
                layer = nn.Sequential(first, *more)
            elif plain:
                convolution = _conv(channels, width, stride=stride, dilation=dilation)
                layer = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
                channels = width
            else:
                layer = nn.Sequential(BasicBlock(channels, width, stride=stride, dilation=dilation, residual=level < 7))
                channels = width
            self.add_module(f"layer{level}", layer)
        self.fc = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> logits, N x num_classes."""
        x = self.layer0(x) if hasattr(self, "layer0") else self.relu(self.bn1(self.conv1(x)))
        for level in range(1, 9):
            x = self.get_submodule(f"layer{level}")(x)  # at last N x 512 x H/8 x W/8
        logits = self.fc(F.adaptive_avg_pool2d(x, 1))
        return torch.flatten(logits, 1)


def _published(url: str) -> dict[str, Tensor]:
    return dict(
        torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    )


def _arch(name: str) -> Arch:
    url = f"{_PUBLISHED_URL}/{_NETWORKS[name][2]}"
    return Arch(
        name=name,
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=IMAGENET_PREPROCESS,
        build=partial(DRN, name),
        labels=imagenet_labels,
        published=partial(_published, url),
        published_name=url,
        # The authors' code makes this projection in the bottleneck networks and never applies it.
        training_only=("layer7.0.downsample.",),
    )


for _name in _NETWORKS:
    register(_name)(partial(_arch, _name))
