"""EfficientNet: M. Tan, Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019.

B0 to B7 are torchvision's, each with the input size of its published weights.
"""

from functools import partial

from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import register

PAPER = "Tan, Le 2019, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, arXiv:1905.11946"

for _scale in range(8):
    register(f"efficientnet_b{_scale}")(partial(arch_from_torchvision, f"efficientnet_b{_scale}", PAPER, damped=True))
