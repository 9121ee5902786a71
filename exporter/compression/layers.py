"""The convolutions and fully connected layers of a network, with what one image makes them do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from convoynet.exporter.archs.calls import read
from convoynet.exporter.archs.counting import Count
from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.errors import BadInput, reason


@dataclass(frozen=True)
class Ran:
    """A layer that ran on one image.

    Attributes:
        name: of the module.
        layer: an nn.Conv2d or nn.Linear, no class derived from them: what these do besides is not known here.
        input_shape: of its input, the batch of one first.
        macs: its multiply-adds.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    input_shape: tuple[int, ...]
    macs: int

    @property
    def parameters(self) -> int:
        """Elements of its weight and bias."""
        return sum(tensor.numel() for tensor in self.layer.parameters())


def layers_of(module: nn.Module, example: Tensor) -> list[Ran]:
    """Find the layers, in the order in which they run; one that runs twice is left out.

    Args:
        module: stays as it is.
        example: images [n, c, h, w]; their size counts alone.

    Raises:
        BadInput: the network does not take such images.
    """
    ran: dict[str, Ran] = {}
    twice: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            twice.update({name} & ran.keys())
            inside = layer.weight[0].numel()
            ran[name] = Ran(name, layer, tuple(read(given, named).shape), output.numel() * inside)

        return hook

    def clear() -> None:
        ran.clear()
        twice.clear()

    hooks = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in _plain(module)]
    try:
        dry_run(module, image_size(example), before=clear)
    except Exception as error:
        channels, height, width = image_size(example)
        raise BadInput(f"the network does not take images of {channels}x{height}x{width}: {reason(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return [layer for name, layer in ran.items() if name not in twice]


def _plain(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        if type(layer) in (nn.Conv2d, nn.Linear) and name:
            yield name, layer


def require_runs(module: nn.Module, example: Tensor, kind: str) -> None:
    """See that a network still runs after layers of it were replaced.

    Raises:
        BadInput: naming the step of `kind`.
    """
    try:
        dry_run(module, image_size(example), 2)
    except Exception as error:
        raise BadInput(
            f"step {kind}: the network's code reads the layers that were replaced: {reason(error)}"
        ) from error


def image_size(example: Tensor) -> tuple[int, int, int]:
    """(channels, height, width) of images [n, c, h, w]."""
    _, channels, height, width = example.shape
    return int(channels), int(height), int(width)


def is_spatial(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of one group with a kernel larger than 1x1."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and prod(layer.kernel_size) > 1


def change(before: Count, after: Count) -> dict[str, dict[str, int]]:
    """What a step did to a network, for the report: "macs" and "parameters", each "before" and "after"."""
    return {
        "macs": {"before": before.macs, "after": after.macs},
        "parameters": {"before": before.parameters, "after": after.parameters},
    }
