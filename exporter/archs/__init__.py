"""The zoo: one module per paper or family, found by name through `get` and `names`."""

from convoynet.exporter.archs import (  # noqa: F401  importing registers the networks
    alexnet,
    bninception,
    densenet,
    detection,
    dilated,
    drn,
    efficientnet,
    googlenet,
    inception,
    lenet,
    mnasnet,
    mobilenet,
    nin,
    resnet,
    segmentation,
    shufflenet,
    squeezenet,
    vgg,
    xception,
)
from convoynet.exporter.archs.count import Count, count
from convoynet.exporter.archs.registry import Arch, Task, get, names, register

__all__ = ["Arch", "Count", "Task", "count", "get", "names", "register"]
