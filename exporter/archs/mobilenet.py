"""MobileNet v1 (A. Howard et al. 2017), v2 (M. Sandler et al. 2018) and v3 (A. Howard et al. 2019).

v1 with width 1.0 is timm's, the others are torchvision's.
"""

from functools import partial

from convoynet.exporter.archs.from_timm import arch_from_timm
from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import register

V1_PAPER = (
    "Howard et al. 2017, MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications,"
    " arXiv:1704.04861"
)
V2_PAPER = "Sandler et al. 2018, MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv:1801.04381"
V3_PAPER = "Howard et al. 2019, Searching for MobileNetV3, arXiv:1905.02244"

register("mobilenetv1_100")(partial(arch_from_timm, "mobilenetv1_100", V1_PAPER, "mobilenetv1_100.ra4_e3600_r224_in1k"))
register("mobilenet_v2")(partial(arch_from_torchvision, "mobilenet_v2", V2_PAPER))
for _name in ("mobilenet_v3_small", "mobilenet_v3_large"):
    register(_name)(partial(arch_from_torchvision, _name, V3_PAPER))
