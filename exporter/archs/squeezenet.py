"""SqueezeNet: F. Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", 2016.

Both are torchvision's: 1.0 is the paper's, 1.1 the authors' later one with 2.4 times fewer operations.
"""

from functools import partial

from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import register

PAPER = (
    "Iandola et al. 2016, SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size,"
    " arXiv:1602.07360"
)

for _name in ("squeezenet1_0", "squeezenet1_1"):
    register(_name)(partial(arch_from_torchvision, _name, PAPER))
