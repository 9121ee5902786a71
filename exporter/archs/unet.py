"""U-Net: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015.

The network of Fig. 1: 23 convolutions without padding, so that what leaves it is 184 pixels smaller than what enters.
Many implementations pad instead, and are another network near the border. Here the image itself is mirrored at its
borders first, as in the overlap-tile strategy of Fig. 2: an image of 388x388 becomes the tile of 572x572 of Fig. 1, and
every pixel has its logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput

PAPER = (
    "Ronneberger, Fischer, Brox 2015, U-Net: Convolutional Networks for Biomedical Image Segmentation, arXiv:1505.04597"
)
# The paper's images are grey; how they are scaled it does not say.
PREPROCESS = Preprocess(size=(388, 388), resize=388, mean=(0.5,), std=(0.25,), fit="pad")
WIDTHS = (64, 128, 256, 512, 1024)
# What the convolutions take off each side of a tile.
MARGIN = 92
_STRIDE = 16
# Sides of what leaves: 388, and any other that differs by multiples of 16, have pools whose inputs are even.
_REMAINDER = 388 % _STRIDE
SMALLEST = 108  # mirrored by its margin and up to 15 more


def _pair(in_channels: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions without padding, each with a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """The network of Fig. 1, for images of any size.

    Args:
        num_classes: Outputs, the background included.
        channels: Of the image.
        widths: Channels of each level, from the finest to the bottom.
    """

    def __init__(self, num_classes: int, channels: int = 1, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.contracting = nn.ModuleList(
            _pair(inner, outer) for inner, outer in zip((channels, *widths), widths, strict=False)
        )
        upwards = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up_convolutions = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for below, width in upwards)
        self.expanding = nn.ModuleList(_pair(2 * width, width) for _, width in upwards)
        self.dropout = nn.Dropout(0.5)  # at the end of the contracting path, section 3.1
        self.output = nn.Conv2d(widths[0], num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)  # section 3
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x H x W -> logits, N x num_classes x H x W; H and W are at least 108."""
        height, width = x.shape[-2:]
        if min(height, width) < SMALLEST:
            raise BadInput(f"an input of {height}x{width}: this network needs {SMALLEST}x{SMALLEST} or more")
        below, right = (MARGIN + (_REMAINDER - side) % _STRIDE for side in (height, width))
        x = F.pad(x, (MARGIN, right, MARGIN, below), mode="reflect")
        maps = []
        for level, pair in enumerate(self.contracting):
            x = pair(F.max_pool2d(x, 2) if level else x)
            x = self.dropout(x) if level >= len(self.contracting) - 2 else x
            maps.append(x)
        x = maps.pop()
        for up, pair in zip(self.up_convolutions, self.expanding, strict=True):
            x = up(x)
            x = pair(torch.cat([_cropped(maps.pop(), x), x], 1))
        logits: Tensor = self.output(x)
        return logits[:, :, :height, :width]


def _cropped(x: Tensor, like: Tensor) -> Tensor:
    """The middle of `x`, of the size of `like`."""
    top, left = ((old - new) // 2 for old, new in zip(x.shape[-2:], like.shape[-2:], strict=True))
    return x[:, :, top : top + like.shape[-2], left : left + like.shape[-1]]


@register("unet")
def unet() -> Arch:
    """The network of the paper, for its two classes."""
    return Arch(
        name="unet",
        paper=PAPER,
        source="own",
        num_classes=2,
        preprocess=PREPROCESS,
        build=UNet,
        labels=lambda: ["background", "cell"],
        task="segmentation",
    )
