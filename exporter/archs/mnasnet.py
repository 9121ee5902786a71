"""MNASNet: M. Tan et al., "MnasNet: Platform-Aware Neural Architecture Search for Mobile", 2018.

The variant B1, the one without squeeze and excitation, in four widths is torchvision's.
"""

from functools import partial

from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import register

PAPER = "Tan et al. 2018, MnasNet: Platform-Aware Neural Architecture Search for Mobile, arXiv:1807.11626"

for _width in ("0_5", "0_75", "1_0", "1_3"):
    register(f"mnasnet{_width}")(partial(arch_from_torchvision, f"mnasnet{_width}", PAPER))
