"""BN-Inception (Inception v2): S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training", 2015.

The network of the appendix (Fig. 5), which no library has. Layer sizes, biases and the kind of each pooling are those
of the Caffe network that Y. Xiong trained; R. Cadene published its weights for PyTorch.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.datasets import imagenet_labels
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.data.images import Preprocess

PAPER = (
    "Ioffe, Szegedy 2015, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate"
    " Shift, arXiv:1502.03167"
)
# The part after the dash starts the file's SHA-256, and torch.hub checks it.
PUBLISHED_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"


class Widths(NamedTuple):
    """A row of Fig. 5: the channels of each convolution of an inception block.

    Attributes:
        one: "#1x1"; 0 in the blocks with stride 2, which have no such branch.
        three: "#3x3 reduce" and "#3x3".
        double: "double #3x3 reduce" and "double #3x3".
        pool: Of the projection after the pooling; 0 where there is none.
    """

    one: int
    three: tuple[int, int]
    double: tuple[int, int]
    pool: int

    @property
    def stride(self) -> int:
        """2 in the blocks that halve the image."""
        return 1 if self.one else 2


# 4c and 4d are 608 channels wide in the released network.
BLOCKS = {
    "3a": Widths(64, (64, 64), (64, 96), 32),
    "3b": Widths(64, (64, 96), (64, 96), 64),
    "3c": Widths(0, (128, 160), (64, 96), 0),
    "4a": Widths(224, (64, 96), (96, 128), 128),
    "4b": Widths(192, (96, 128), (96, 128), 128),
    "4c": Widths(160, (128, 160), (128, 160), 128),
    "4d": Widths(96, (128, 192), (160, 192), 128),
    "4e": Widths(0, (128, 192), (192, 256), 0),
    "5a": Widths(352, (192, 320), (160, 224), 128),
    "5b": Widths(352, (192, 320), (192, 224), 128),
}
_MAX_POOLED = ("3c", "4e", "5b")  # the others average


class ConvBN(nn.Module):
    """A convolution, batch normalisation and ReLU.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        kernel: Width; odd. The input is padded so that stride 1 keeps its size.
        stride: Of the convolution.
    """

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        # The bias does nothing that the normalisation does not (section 3.2); the published weights have it.
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x channels x H/stride x W/stride."""
        return F.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Up to four branches side by side; two 3x3 convolutions stand for GoogLeNet's 5x5.

    Args:
        in_channels: Channels of the input.
        widths: Channels of the convolutions.
        max_pool: Whether the pooling takes the largest value or the average.
    """

    def __init__(self, in_channels: int, widths: Widths, *, max_pool: bool) -> None:
        super().__init__()
        self.stride = widths.stride
        self.max_pool = max_pool
        self.conv_1x1 = ConvBN(in_channels, widths.one, 1) if widths.one else None
        reduced, channels = widths.three
        self.conv_3x3_reduce = ConvBN(in_channels, reduced, 1)
        self.conv_3x3 = ConvBN(reduced, channels, 3, self.stride)
        reduced, channels = widths.double
        self.conv_double_3x3_reduce = ConvBN(in_channels, reduced, 1)
        self.conv_double_3x3_1 = ConvBN(reduced, channels, 3)
        self.conv_double_3x3_2 = ConvBN(channels, channels, 3, self.stride)
        self.conv_pool_proj = ConvBN(in_channels, widths.pool, 1) if widths.pool else None
        pooled = widths.pool or in_channels
        self.out_channels = widths.one + widths.three[1] + widths.double[1] + pooled

    def forward(self, x: Tensor) -> Tensor:
        """N x in_channels x H x W -> N x out_channels x H/stride x W/stride."""
        branches = [] if self.conv_1x1 is None else [self.conv_1x1(x)]
        branches.append(self.conv_3x3(self.conv_3x3_reduce(x)))
        branches.append(self.conv_double_3x3_2(self.conv_double_3x3_1(self.conv_double_3x3_reduce(x))))
        pooled = self._pool(x)
        branches.append(pooled if self.conv_pool_proj is None else self.conv_pool_proj(pooled))
        return torch.cat(branches, 1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return F.max_pool2d(x, 3, 2, ceil_mode=True)
        if self.max_pool:
            return F.max_pool2d(x, 3, 1, padding=1)
        return F.avg_pool2d(x, 3, 1, padding=1)


class BNInception(nn.Module):
    """The network of Fig. 5.

    Args:
        num_classes: Outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1_7x7_s2 = ConvBN(3, 64, 7, 2)
        self.conv2_3x3_reduce = ConvBN(64, 64, 1)
        self.conv2_3x3 = ConvBN(64, 192, 3)
        channels = 192
        self.inception = nn.ModuleDict()
        for name, widths in BLOCKS.items():
            block = Inception(channels, widths, max_pool=name in _MAX_POOLED)
            self.inception[name] = block
            channels = block.out_channels
        self.last_linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x 224 x 224 -> logits, N x num_classes."""
        x = self.conv1_7x7_s2(x)  # N x 64 x 112 x 112
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)  # N x 64 x 56 x 56
        x = self.conv2_3x3(self.conv2_3x3_reduce(x))  # N x 192 x 56 x 56
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)  # N x 192 x 28 x 28
        for block in self.inception.values():
            x = block(x)  # 3c: N x 576 x 14 x 14, 4e: N x 1056 x 7 x 7, 5b: N x 1024 x 7 x 7
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # N x 1024
        logits: Tensor = self.last_linear(x)
        return logits


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the published tensors our names, RGB input and one-dimensional normalisation."""
    converted = {}
    for name, tensor in tensors.items():
        layer, kind = name.rsplit(".", 1)
        if layer == "last_linear":
            converted[name] = tensor
            continue
        layer = re.sub(r"^inception_(\d[a-e])_", r"inception.\1.conv_", layer)
        if layer.endswith("_bn"):
            # Some copies of the file keep Caffe's first dimension of 1.
            converted[f"{layer.removesuffix('_bn')}.bn.{kind}"] = tensor.reshape(-1)
        else:
            bgr = layer == "conv1_7x7_s2" and kind == "weight"
            converted[f"{layer}.conv.{kind}"] = tensor.flip(1) if bgr else tensor
    return converted


def _published() -> dict[str, Tensor]:
    return from_published(
        torch.hub.load_state_dict_from_url(
            PUBLISHED_URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    )


@register("bninception")
def bninception() -> Arch:
    """The network with Caffe's preprocessing: means of 104, 117 and 128 for blue, green and red, not scaled."""
    return Arch(
        name="bninception",
        paper=PAPER,
        source="own",
        num_classes=1000,
        preprocess=Preprocess(
            size=(224, 224), resize=256, mean=(128 / 255, 117 / 255, 104 / 255), std=(1 / 255, 1 / 255, 1 / 255)
        ),
        build=BNInception,
        labels=imagenet_labels,
        published=_published,
        published_name=PUBLISHED_URL,
    )
