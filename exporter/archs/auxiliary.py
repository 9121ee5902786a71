"""Auxiliary classifiers: heads on inner layers that a network has while it learns, and that are never deployed.

A network is built without them. Training puts them around it, sharing its layers, and drops them again, so that
nothing behind training knows of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.dry_run import dry_run

# (channels, height, width) of a map.
Map = tuple[int, int, int]


@dataclass(frozen=True)
class Head:
    """One auxiliary classifier.

    Attributes:
        layer: the module that makes what it reads, [N, C, H, W].
        build: from that map's size and the number of classes.
    """

    layer: str
    build: Callable[[Map, int], nn.Module]


@dataclass(frozen=True)
class Auxiliaries:
    """Those of a network.

    Attributes:
        heads: by the names that they have in published weights, such as "aux1".
        weight: of the loss of each, beside the 1 of the network's own.
    """

    heads: Mapping[str, Head]
    weight: float


class WithAuxiliaries(nn.Module):
    """A network and its auxiliary classifiers, whose logits come after the network's own; in training alone.

    Args:
        network: shared, not copied.
        layers: name of each head -> the layer that it reads.
        heads: the heads by name.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, str], heads: nn.ModuleDict) -> None:
        super().__init__()
        self.network = network
        self.heads = heads
        self._layers = dict(layers)

    def forward(self, x: Tensor) -> Any:
        """N x C x H x W -> what the network returns, or in training a tuple that begins with it."""
        if not self.training:
            return self.network(x)
        logits, seen = _seeing(self.network, self._layers.values(), lambda: self.network(x))
        found = [head(seen[self._layers[name]]) for name, head in self.heads.items()]
        if logits.ndim == 4:  # at the image's resolution, as the network's own
            size = logits.shape[2:]
            found = [F.interpolate(maps, size=size, mode="bilinear", align_corners=False) for maps in found]
        return (logits, *found)


def with_auxiliaries(
    network: nn.Module, auxiliaries: Auxiliaries, input_size: Map, classes: int, published: Mapping[str, Tensor]
) -> WithAuxiliaries | None:
    """Put auxiliary classifiers around a network, which is shared.

    Args:
        network: as built, or as pruned: heads fit the channels that its layers have.
        auxiliaries: which ones.
        input_size: (channels, height, width) of an image.
        classes: number of them.
        published: tensors of heads that came with the weights, such as "aux1.fc1.weight"; a head that they do not fit
            stays random.

    Returns:
        None where no head can be had: the layers are not there any more, or too small at this size of image.
    """
    layers = {name: head.layer for name, head in auxiliaries.heads.items() if _has(network, head.layer)}
    _, seen = _seeing(network, layers.values(), lambda: dry_run(network, input_size))
    heads = nn.ModuleDict()
    for name, layer in layers.items():
        _, channels, height, width = seen[layer].shape
        head = auxiliaries.heads[name].build((channels, height, width), classes)
        try:
            dry_run(head, (channels, height, width))
        except RuntimeError:  # its windows are larger than the map
            continue
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in published.items() if key.startswith(f"{name}.")}
        wanted = head.state_dict()
        if own.keys() == wanted.keys() and all(own[key].shape == wanted[key].shape for key in own):
            head.load_state_dict(own)
        heads[name] = head
    return WithAuxiliaries(network, {name: layers[name] for name in heads}, heads) if heads else None


def _has(network: nn.Module, layer: str) -> bool:
    return any(name == layer for name, _ in network.named_modules())


def _seeing(network: nn.Module, layers: Any, run: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """What `run` returns, and what some layers of the network made in it."""
    seen: dict[str, Tensor] = {}

    def keeping(layer: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: object, made: Tensor) -> None:
            seen[layer] = made.clone()  # what comes behind may work in place

        return keep

    # Now and not when it is built: a copy of a network has layers of its own.
    hooks = [network.get_submodule(layer).register_forward_hook(keeping(layer)) for layer in layers]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()
