"""What the answers of a network lose without each of its channels, one at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter.archs.calls import name_of, read
from convoynet.exporter.compression.channels import Channels, Layer
from convoynet.exporter.compression.labels import FIXED
from convoynet.exporter.compression.losses import distillation
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Progress

# Of the answers that are compared: the one that fine-tuning towards a teacher has by default.
_TEMPERATURE = 4.0
# All runs together, about an hour of a core; where it would be more fewer images are looked at, no fewer than these.
_MOST_MACS, _FEWEST = 2**47, 8
# Of what layers made, which need not be computed again as long as nothing before them changes.
_MOST_BYTES = 2**29
# Of a divergence of answers that are the same.
_ROUNDING = 1e-6

# Of a channel: which of `layers` read it, and where.
_Readers = Mapping[int, Sequence[tuple[int, Tensor]]]


def ablation(module: nn.Module, channels: Channels, batches: Iterable[Tensor], progress: Progress) -> Tensor:
    """The divergence from the whole network's answers when whatever reads a channel reads the channel's mean.

    Units are left out one at a time (B. Zhou, Y. Sun, D. Bau, A. Torralba 2018, "Revisiting the Importance of
    Individual Units in CNNs via Ablation"). The mean stands in their place, not zero: batch statistics that are
    estimated anew make up for a shift, and a bias could. Kullback-Leibler, softened as in distillation: it needs no
    labels, and tells more than the loss of images that the network is sure of.

    Args:
        module: the network; stays as it is.
        channels: of it.
        batches: float32 [n, c, h, w].
        progress: shows the channels.

    Returns:
        float64 [channels.size]; 0 for a channel that nothing reads.

    Raises:
        BadInput: there are no images, the answers are not finite, the layers are no modules, or it would take hours.
    """
    network = deepcopy(module).eval()
    layers = list(channels.layers)
    readers = _readers(channels, layers)
    scores = torch.zeros(channels.size, dtype=torch.float64)
    looks = _affordable(channels, len(readers), batches)
    for images in looks:
        with torch.inference_mode():
            found = _Without(network, layers, images).scores(readers, progress)
        for label, score in found.items():
            scores[label] += score * len(images) / sum(map(len, looks))
    if not bool(scores.isfinite().all()):
        raise BadInput('step prune: method "ablation" found answers that are not finite; use "magnitude"')
    return scores


def _readers(channels: Channels, layers: Sequence[Layer]) -> _Readers:
    found: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for at, layer in enumerate(layers):
        labels = channels.slots.get((layer.weight, 1), torch.tensor([FIXED]))
        for label in sorted(set(labels.tolist()) - {FIXED}):
            found[label].append((at, (labels == label).nonzero().flatten()))
    return dict(sorted(found.items(), key=lambda item: item[1][0][0]))


def _affordable(channels: Channels, units: int, batches: Iterable[Tensor]) -> list[Tensor]:
    """As many of the images as can be looked at in an hour or so."""
    # Half of a run is what comes behind the channel, on average.
    each = units * sum(x.cost * x.inputs * len(channels.slots[x.weight, 0]) for x in channels.layers) // 2
    left = _MOST_MACS // max(1, each)
    if left < _FEWEST:
        raise BadInput(
            f'step prune: method "ablation" would run this network {units * _FEWEST:,} times and more, which takes '
            'hours; use "taylor"'
        )
    found = []
    for batch in batches:
        if left > 0:
            found.append(batch[:left])
            left -= len(batch)
    if not found:
        raise BadInput('step prune: method "ablation" needs images, and there are none; add some, or use "magnitude"')
    return found


class _Without:
    """Runs a network on some images without one channel after another; it is done for afterwards.

    Args:
        network: given hooks and, on the way, known outputs of its layers.
        layers: in their order.
        images: float32 [n, c, h, w].
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer], images: Tensor) -> None:
        self._network = network
        self._images = images.to(memory_format=torch.channels_last)
        self._layers = layers
        self._last = {layer.name: at for at, layer in enumerate(layers)}
        self._means: dict[str, list[Tensor]] = defaultdict(list)
        self._made: dict[str, list[Tensor]] = defaultdict(list)
        self._bytes = 0
        modules = {name: network.get_submodule(name) for name in self._last}
        handles = [
            module.register_forward_hook(self._note(name), with_kwargs=True)
            for name, module in modules.items()
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
        ]
        try:
            self._wanted = network(self._images).double()
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], made: Tensor) -> None:
            channels = read(given, named).movedim(_axis(layer), 0)
            self._means[name].append(channels.flatten(1).mean(1))
            self._bytes += made.nbytes
            if self._bytes <= _MOST_BYTES:
                self._made[name].append(made.clone())  # what comes behind may work in place

        return hook

    def scores(self, readers: _Readers, progress: Progress) -> dict[int, float]:
        """Of each channel, those that are read first coming first."""
        found, at = {}, 0
        known: list[nn.Module] = []
        try:
            for label, places in progress.track(readers.items(), "channels left out", len(readers)):
                for done in range(at, places[0][0]):
                    name = self._layers[done].name
                    runs = len([layer for layer in self._layers if layer.name == name])
                    if self._last[name] == done and len(self._made[name]) == runs:
                        layer = self._network.get_submodule(name)
                        layer.forward = _replay(self._made[name])
                        known.append(layer)
                at = max(at, places[0][0])
                found[label] = self._score(places)
            if known:
                self._require_same()
        finally:
            for layer in known:
                del layer.forward
        return found

    def _require_same(self) -> None:
        """See that with the known outputs in their places the answers are the network's own."""
        answers = self._network(self._images).double()
        if float(distillation(answers, self._wanted, _TEMPERATURE)) > _ROUNDING:
            raise BadInput(
                'step prune: method "ablation" needs a network that answers the same when a part of it is not run '
                'again; use "taylor"'
            )

    def _score(self, places: Sequence[tuple[int, Tensor]]) -> float:
        handles = []
        for at, index in places:
            name = self._layers[at].name
            if not self._means[name]:
                raise BadInput(
                    'step prune: method "ablation" needs networks whose layers are modules, and here '
                    f'{self._layers[at].weight} is read by none; use "taylor"'
                )
            mean = torch.stack(self._means[name]).mean(0)
            layer = self._network.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(_filled(index, mean), with_kwargs=True))
        try:
            return float(distillation(self._network(self._images).double(), self._wanted, _TEMPERATURE))
        finally:
            for handle in handles:
                handle.remove()


def _axis(layer: nn.Module) -> int:
    """Where a layer has the channels that it reads."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _replay(made: Sequence[Tensor]) -> Callable[..., Tensor]:
    outputs = cycle(made)
    return lambda *_, **__: next(outputs).clone()


def _filled(index: Tensor, mean: Tensor) -> Callable[..., Any]:
    """A hook that puts the mean of some channels in their place."""

    def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = read(given, named).clone()
        filled.movedim(_axis(layer), 0)[index] = mean[index].view(-1, *[1] * (filled.ndim - 1))
        return ((filled, *given[1:]), named) if given else ((), {**named, name_of(named): filled})

    return hook
