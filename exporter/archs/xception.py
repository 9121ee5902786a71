"""Xception: F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2016.

timm has the paper's network (Fig. 5) as `legacy_xception`; its `xception41` and the like are later relatives.
"""

from functools import partial

from convoynet.exporter.archs.from_timm import arch_from_timm
from convoynet.exporter.archs.registry import register

PAPER = "Chollet 2016, Xception: Deep Learning with Depthwise Separable Convolutions, arXiv:1610.02357"

register("xception")(partial(arch_from_timm, "xception", PAPER, "legacy_xception.tf_in1k"))
