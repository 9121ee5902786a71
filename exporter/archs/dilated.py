"""Dilated convolutions: F. Yu, V. Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", 2016.

VGG-16 without its last two pools, whose strides become dilations (section 4), and the basic context module
(section 3, Table 1). The layers have the names of the authors' Caffe networks.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.archs.segmentation import voc_labels
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput

PAPER = "Yu, Koltun 2016, Multi-Scale Context Aggregation by Dilated Convolutions, arXiv:1511.07122"
# The authors' mean of Pascal VOC on the 0..255 scale, red first. 512 pixels make the 64x64 maps of section 4.
PREPROCESS = Preprocess(
    size=(512, 512),
    resize=512,
    mean=(116.52 / 255, 111.36 / 255, 102.93 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    fit="pad",
)

STRIDE = 8
# What the unpadded convolutions and pools of the front end take off each side of an image, as reflections of it.
MARGIN = 186

# Channels of the convolutions of each block of VGG-16, its dilation, and whether a pool follows.
_BLOCKS = (
    ((64, 64), 1, True),
    ((128, 128), 1, True),
    ((256, 256, 256), 1, True),
    ((512, 512, 512), 1, False),
    ((512, 512, 512), 2, False),
)
# Table 1: the dilations of the 3x3 layers, with the authors' names of them.
_CONTEXT = {"conv1_1": 1, "conv1_2": 1, "conv2_1": 2, "conv3_1": 4, "conv4_1": 8, "conv5_1": 16, "fc1": 1}


def front_end(num_classes: int) -> nn.Sequential:
    """The adapted VGG-16 of section 4: N x 3 x H+372 x W+372 -> N x num_classes x H/8 x W/8."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for block, (widths, dilation, pooled) in enumerate(_BLOCKS, 1):
        for index, width in enumerate(widths, 1):
            layers[f"conv{block}_{index}"] = nn.Conv2d(channels, width, 3, dilation=dilation)
            layers[f"relu{block}_{index}"] = nn.ReLU(inplace=True)
            channels = width
        if pooled:
            layers[f"pool{block}"] = nn.MaxPool2d(2, 2)
    layers["fc6"] = nn.Conv2d(channels, 4096, 7, dilation=4)
    layers["relu6"] = nn.ReLU(inplace=True)
    layers["drop6"] = nn.Dropout()
    layers["fc7"] = nn.Conv2d(4096, 4096, 1)
    layers["relu7"] = nn.ReLU(inplace=True)
    layers["drop7"] = nn.Dropout()
    layers["final"] = nn.Conv2d(4096, num_classes, 1)
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)


def context_module(num_classes: int) -> nn.Sequential:
    """The basic module of Table 1: N x num_classes x H x W to the same shape, each output seeing 67x67 inputs."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, dilation in _CONTEXT.items():
        layers[f"ctx_{name}"] = nn.Conv2d(num_classes, num_classes, 3, padding=dilation, dilation=dilation)
        layers[f"ctx_{name}_relu"] = nn.ReLU(inplace=True)
    layers["ctx_final"] = nn.Conv2d(num_classes, num_classes, 1)
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d):
            _init_identity(layer)
    return nn.Sequential(layers)


def _init_identity(layer: nn.Conv2d) -> None:
    """Equation 4: each filter passes its own map on, so that the module starts as its input."""
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.zero_()
        centre = layer.kernel_size[0] // 2
        layer.weight[:, :, centre, centre].fill_diagonal_(1.0)
        layer.bias.zero_()


class DilatedVGG16(nn.Module):
    """The front end, alone or followed by the context module, at the resolution of the image.

    Args:
        num_classes: The background included.
        context: Whether the context module follows.
    """

    def __init__(self, num_classes: int, *, context: bool) -> None:
        super().__init__()
        self.front_end = front_end(num_classes)
        self.context = context_module(num_classes) if context else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> logits, N x num_classes x H x W; H and W are multiples of 8, and at least 192."""
        height, width = x.shape[-2:]
        if height % STRIDE or width % STRIDE or min(height, width) <= MARGIN:
            raise BadInput(f"an input of {height}x{width}: this network needs multiples of {STRIDE}, at least 192")
        x = F.pad(x, (MARGIN, MARGIN, MARGIN, MARGIN), mode="reflect")
        x = self.context(self.front_end(x))  # N x num_classes x H/8 x W/8
        return F.interpolate(x, scale_factor=STRIDE, mode="bilinear", align_corners=False)


def _arch(name: str, *, context: bool) -> Arch:
    return Arch(
        name=name,
        paper=PAPER,
        source="own",
        num_classes=21,
        preprocess=PREPROCESS,
        build=partial(DilatedVGG16, context=context),
        labels=voc_labels,
        task="segmentation",
    )


register("dilated_vgg16")(partial(_arch, "dilated_vgg16", context=False))
register("dilated_vgg16_context")(partial(_arch, "dilated_vgg16_context", context=True))
