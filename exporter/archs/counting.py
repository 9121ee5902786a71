"""Parameters and multiply-adds of a network, counted by running it on the meta device."""

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from convoynet.exporter.archs.calls import read
from convoynet.exporter.archs.dry_run import dry_run

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


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


@runtime_checkable
class CountsConnections(Protocol):
    """A layer whose connections are not its multiply-adds and additions of a bias."""

    def connections(self, output: Tensor) -> int:
        """As the layer's paper counts those that made `output`, a whole batch."""


def count(model: nn.Module, input_size: tuple[int, int, int]) -> Count:
    """Count a network's parameters and multiply-adds, without computing anything where `dry_run` can do without.

    Args:
        model: Stays as it is, also its training mode.
        input_size: (channels, height, width) of one image.
    """
    layers = [
        module for module in model.modules() if isinstance(module, _Conv | _Transposed | nn.Linear | CountsItself)
    ]
    amounts: list[int] = []

    def add(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        amounts.append(_multiply_adds(module, read(given, named), output))

    hooks = [layer.register_forward_hook(add, with_kwargs=True) for layer in layers]
    try:
        dry_run(model, input_size, before=amounts.clear)
    finally:
        for hook in hooks:
            hook.remove()
    return Count(parameters=sum(tensor.numel() for tensor in model.parameters()), macs=sum(amounts))


def _multiply_adds(module: nn.Module, given: Tensor, output: Tensor) -> int:
    if isinstance(module, CountsItself):
        return module.multiply_adds(output)
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, _Conv):
        return output.numel() * (module.in_channels // module.groups) * prod(module.kernel_size)
    if isinstance(module, _Transposed):
        return given.numel() * (module.out_channels // module.groups) * prod(module.kernel_size)
    raise TypeError(f"{type(module).__name__} is not counted")
