"""torchvision's networks for segmentation.

Fully convolutional networks (Long et al. 2015) and DeepLabV3 (Chen et al. 2017) on a ResNet with the strides of its
last two stages replaced by dilations, so that its output has an eighth of the input's resolution: the FCN of the paper
is `fcn8s_vgg16`. LR-ASPP (Howard et al. 2019) on MobileNetV3.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.auxiliary import Auxiliaries, Head, Map
from convoynet.exporter.archs.from_torchvision import damp_residuals, state_dict
from convoynet.exporter.archs.registry import Arch, register
from convoynet.exporter.data.images import Preprocess

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

FCN_PAPER = "Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, arXiv:1411.4038"
DEEPLAB_PAPER = "Chen et al. 2017, Rethinking Atrous Convolution for Semantic Image Segmentation, arXiv:1706.05587"
LRASPP_PAPER = "Howard et al. 2019, Searching for MobileNetV3, arXiv:1905.02244, section 6.4"
# The auxiliary head is for training alone; its weight is that of H. Zhao et al. 2017, PSPNet, section 5.1.
AUXILIARY = "aux_classifier"
AUXILIARY_WEIGHT = 0.4


def voc_labels() -> list[str]:
    """The 21 classes of Pascal VOC, the background first."""
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    return list(FCN_ResNet50_Weights.DEFAULT.meta["categories"])


class Segmenter(nn.Module):
    """A trunk, a head on its last features, and the resize of the head's output to the input's resolution.

    Args:
        name: torchvision's name.
        num_classes: The background included.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        from torchvision.models import get_model

        super().__init__()
        network = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False)
        self.backbone = network.backbone
        damp_residuals(self.backbone)
        self.classifier = network.classifier

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> logits, N x num_classes x H x W."""
        maps = self.classifier(self.backbone(x)["out"])  # N x num_classes x H/8 x W/8
        return F.interpolate(maps, size=x.shape[-2:], mode="bilinear", align_corners=False)


class LiteSegmenter(nn.Module):
    """LR-ASPP on MobileNetV3 Large, whose head reads two maps of the trunk.

    Args:
        num_classes: The background included.
    """

    def __init__(self, num_classes: int) -> None:
        from torchvision.models import get_model

        super().__init__()
        network = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=num_classes)
        self.backbone = network.backbone
        self.classifier = network.classifier

    def forward(self, x: Tensor) -> Tensor:
        """N x 3 x H x W -> logits, N x num_classes x H x W."""
        maps = self.classifier(self.backbone(x))  # N x num_classes x H/8 x W/8
        return F.interpolate(maps, size=x.shape[-2:], mode="bilinear", align_corners=False)


def auxiliary_head(size: Map, num_classes: int) -> nn.Module:
    """A 3x3 convolution to a quarter of the channels, and the classes."""
    from torchvision.models.segmentation.fcn import FCNHead

    head: nn.Module = FCNHead(size[0], num_classes)
    return head


def _lite() -> Arch:
    arch = _arch("lraspp_mobilenet_v3_large", LRASPP_PAPER)
    return replace(arch, build=LiteSegmenter, training_only=(), auxiliaries=None)


def _arch(name: str, paper: str) -> Arch:
    from torchvision.models import get_model_weights

    # The enum's DEFAULT member is an alias that the stubs of Enum do not know.
    weights: WeightsEnum = get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    side = transforms.resize_size[0]
    return Arch(
        name=name,
        paper=paper,
        source="torchvision",
        num_classes=len(weights.meta["categories"]),
        # torchvision resizes and crops nothing; a graph has one input size, so that the rest is padding.
        preprocess=Preprocess(
            size=(side, side),
            resize=side,
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation=transforms.interpolation.value,
            fit="pad",
        ),
        preprocess_source=f"from torchvision's {weights}",
        build=partial(Segmenter, name),
        labels=partial(list, weights.meta["categories"]),
        published=partial(state_dict, weights),
        published_name=f"torchvision {weights}",
        training_only=(f"{AUXILIARY}.",),
        task="segmentation",
        auxiliaries=Auxiliaries({AUXILIARY: Head("backbone.layer3", auxiliary_head)}, AUXILIARY_WEIGHT),
    )


for _depth in (50, 101):
    register(f"fcn_resnet{_depth}")(partial(_arch, f"fcn_resnet{_depth}", FCN_PAPER))
    register(f"deeplabv3_resnet{_depth}")(partial(_arch, f"deeplabv3_resnet{_depth}", DEEPLAB_PAPER))
register("lraspp_mobilenet_v3_large")(_lite)
