"""Inception v3 (C. Szegedy et al. 2015), v4 and Inception-ResNet v2 (C. Szegedy et al. 2016).

v3 is torchvision's; its auxiliary classifier (section 4 of the paper) is treated as GoogLeNet's are. The other two
are timm's.
"""

from dataclasses import replace
from functools import partial

from torch import nn

from convoynet.exporter.archs.auxiliary import Auxiliaries, Head, Map
from convoynet.exporter.archs.from_timm import arch_from_timm
from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.googlenet import arch_with_inception_input
from convoynet.exporter.archs.registry import Arch, register

V3_PAPER = "Szegedy et al. 2015, Rethinking the Inception Architecture for Computer Vision, arXiv:1512.00567"
V4_PAPER = (
    "Szegedy et al. 2016, Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning,"
    " arXiv:1602.07261"
)
# That of the authors' own code, TF-Slim's inception_v3; the paper has no figure.
AUXILIARY_WEIGHT = 0.4


def _head(size: Map, num_classes: int) -> nn.Module:
    from torchvision.models.inception import InceptionAux

    head: nn.Module = InceptionAux(size[0], num_classes)
    return head


@register("inception_v3")
def inception_v3() -> Arch:
    """The network of torchvision without the auxiliary classifier."""
    arch = arch_from_torchvision("inception_v3", V3_PAPER, aux_logits=False, init_weights=True)
    return replace(
        arch_with_inception_input(arch),
        training_only=("AuxLogits.",),
        auxiliaries=Auxiliaries({"AuxLogits": Head("Mixed_6e", _head)}, AUXILIARY_WEIGHT),
    )


for _name in ("inception_v4", "inception_resnet_v2"):
    register(_name)(partial(arch_from_timm, _name, V4_PAPER, f"{_name}.tf_in1k"))
