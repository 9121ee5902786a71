"""The zoo: one module per paper, found by name through `get` and `names`."""

from exporter.archs import lenet, resnet  # noqa: F401  importing registers the networks
from exporter.archs.count import Count, count
from exporter.archs.registry import Arch, get, names, register

__all__ = ["Arch", "Count", "count", "get", "names", "register"]
