"""DenseNet: G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, "Densely Connected Convolutional Networks", 2016.

The four networks for ImageNet are torchvision's.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from convoynet.exporter.archs.from_torchvision import arch_from_torchvision
from convoynet.exporter.archs.registry import Arch, register

PAPER = "Huang et al. 2016, Densely Connected Convolutional Networks, arXiv:1608.06993"

# The published files date from when a module's name could hold a dot: "norm.1" is "norm1" now.
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


def with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a published file the names that torchvision's networks have today."""
    return {_OLD_NAME.sub(r"\1", name): tensor for name, tensor in tensors.items()}


def _densenet(name: str) -> Arch:
    arch = arch_from_torchvision(name, PAPER)
    download = arch.published
    assert download is not None
    return replace(arch, published=lambda: with_new_names(download()))


for _depth in (121, 161, 169, 201):
    register(f"densenet{_depth}")(partial(_densenet, f"densenet{_depth}"))
