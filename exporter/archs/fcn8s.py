"""FCN-8s on VGG-16: J. Long, E. Shelhamer, T. Darrell, "Fully Convolutional Networks for Semantic Segmentation", 2015.

VGG-16 with its fully connected layers as convolutions (section 4.1), whose scores at a stride of 32 are joined with
those of pool4 and pool3 (section 4.2). As in the authors' Caffe network voc-fcn8s, the first convolution is padded by
100 pixels so that images of any size pass, and what that adds is cropped away again. The layers have its names.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.archs.segmentation import voc_labels
from convoynet.exporter.data.images import Preprocess

PAPER = "Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, arXiv:1411.4038, FCN-8s on VGG-16"
# The authors' mean on the 0..255 scale, red first. Images of Pascal VOC have at most 500 pixels a side.
PREPROCESS = Preprocess(
    size=(512, 512),
    resize=512,
    mean=(122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    fit="pad",
)
# Channels of the convolutions of each stage, a pool behind each, and of the two layers that were fully connected.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 4096
_MARGIN = 100
# Where the image begins in the maps that are joined: the authors' Crop layers.
_CROP_POOL4, _CROP_POOL3, _CROP_IMAGE = 5, 9, 31


class FCN8s(nn.Module):
    """The network with its skips.

    Args:
        num_classes: The background included.
        stages: Channels of the convolutions of each of the five stages.
        hidden: Channels of fc6 and fc7.
    """

    def __init__(self, num_classes: int, stages: tuple[tuple[int, ...], ...] = STAGES, hidden: int = HIDDEN) -> None:
        super().__init__()
        channels = 3
        for stage, widths in enumerate(stages, 1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for index, width in enumerate(widths, 1):
                padding = _MARGIN if stage == index == 1 else 1
                layers[f"conv{stage}_{index}"] = nn.Conv2d(channels, width, 3, padding=padding)
                layers[f"relu{stage}_{index}"] = nn.ReLU(inplace=True)
                channels = width
            layers[f"pool{stage}"] = nn.MaxPool2d(2, 2, ceil_mode=True)
            self.add_module(f"stage{stage}", nn.Sequential(layers))
        self.fc6 = nn.Conv2d(channels, hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.dropout = nn.Dropout2d(0.5)
        self.score_fr = nn.Conv2d(hidden, num_classes, 1)
        self.score_pool4 = nn.Conv2d(stages[3][-1], num_classes, 1)
        self.score_pool3 = nn.Conv2d(stages[2][-1], num_classes, 1)
        self.upscore2 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(num_classes, num_classes, 16, stride=8, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # The scores too: with the paper's zeros an untrained network would answer nothing.
                nn.init.kaiming_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d):
                _init_bilinear(module)

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> logits, N x num_classes x H x W."""
        height, width = x.shape[-2:]
        pools = []
        for stage in range(1, 6):
            x = self.get_submodule(f"stage{stage}")(x)
            pools.append(x)
        x = self.dropout(F.relu(self.fc6(x)))
        x = self.upscore2(self.score_fr(self.dropout(F.relu(self.fc7(x)))))
        x = self.upscore_pool4(x + _cropped(self.score_pool4(pools[3]), _CROP_POOL4, x.shape[-2:]))
        x = self.upscore8(x + _cropped(self.score_pool3(pools[2]), _CROP_POOL3, x.shape[-2:]))
        return _cropped(x, _CROP_IMAGE, torch.Size((height, width)))


def _cropped(x: Tensor, first: int, size: torch.Size) -> Tensor:
    return x[:, :, first : first + size[0], first : first + size[1]]


def _init_bilinear(layer: nn.ConvTranspose2d) -> None:
    """Each class is interpolated by itself, where training begins (section 4.2)."""
    side = layer.kernel_size[0]
    ramp = 1 - (torch.arange(side) - (side - 1) / 2).abs() / (side / 2)
    with torch.no_grad():
        layer.weight.zero_()
        for index in range(layer.in_channels):
            layer.weight[index, index] = ramp[:, None] * ramp


@register("fcn8s_vgg16")
def fcn8s_vgg16() -> Arch:
    """The network of the paper for Pascal VOC."""
    return Arch(
        name="fcn8s_vgg16",
        paper=PAPER,
        source="own",
        num_classes=21,
        preprocess=PREPROCESS,
        build=FCN8s,
        labels=voc_labels,
        task="segmentation",
    )
