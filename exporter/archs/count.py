"""Parameters and multiply-adds of a network, counted by running it on the meta device."""

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Count:
    """The size of a network.

    Attributes:
        parameters: Elements of all nn.Parameters, batch normalisation's scale and shift included.
        macs: Multiply-adds of one image through the convolutions, the linear layers and the layers that
            count themselves. One multiplication by a weight with its addition is one; biases, activations,
            normalisation and plain pooling are none.
    """

    parameters: int
    macs: int


@runtime_checkable
class CountsItself(Protocol):
    """A layer that is neither a convolution nor linear but multiplies by weights."""

    def multiply_adds(self, output: Tensor) -> int:
        """Multiply-adds that made `output`, a whole batch."""


def count(model: nn.Module, input_size: tuple[int, int, int]) -> Count:
    """Count a network's parameters and multiply-adds without computing anything.

    Args:
        model: Stays as it is, also its training mode.
        input_size: (channels, height, width) of one image.
    """
    macs = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal macs
        macs += _multiply_adds(module, output)

    training = {module: module.training for module in model.modules()}
    counted = [module for module in training if isinstance(module, _Conv | nn.Linear | CountsItself)]
    hooks = [module.register_forward_hook(add) for module in counted]
    tensors = {name: tensor.detach().to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    try:
        model.eval()
        with torch.no_grad(), torch.device("meta"):
            torch.func.functional_call(model, tensors, (torch.empty(1, *input_size),))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return Count(parameters=sum(tensor.numel() for tensor in model.parameters()), macs=macs)


def _multiply_adds(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, CountsItself):
        return module.multiply_adds(output)
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, _Conv):
        return output.numel() * (module.in_channels // module.groups) * prod(module.kernel_size)
    raise TypeError(f"{type(module).__name__} is not counted")
