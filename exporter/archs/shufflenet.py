"""ShuffleNet v2: N. Ma, X. Zhang, H.-T. Zheng, J. Sun, "ShuffleNet V2: Practical Guidelines", 2018.

The four widths of Table 5 are torchvision's.
"""

from functools import partial

from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import register

PAPER = "Ma et al. 2018, ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, arXiv:1807.11164"

for _width in ("0_5", "1_0", "1_5", "2_0"):
    register(f"shufflenet_v2_x{_width}")(partial(arch_from_torchvision, f"shufflenet_v2_x{_width}", PAPER))
