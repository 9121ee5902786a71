"""What training minimises: labels, a teacher's outputs, a teacher's features.

Logits are [n, classes], or [n, classes, h, w] for a segmentation, where every place counts as an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convoynet.exporter.archs.calls import read
from convoynet.exporter.archs.dry_run import evaluating
from convoynet.exporter.archs.returned import parts_of
from convoynet.exporter.compression.data import Indices
from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Finetune

# (the student's logits, the teacher's or None, labels int64 [n] or None) -> a scalar
Loss = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]

# Of each auxiliary classifier, beside the 1 of the last one, unless its network says otherwise: C. Szegedy et al. 2014,
# GoogLeNet, section 5.
AUXILIARY_WEIGHT = 0.3
_HINT_WEIGHT = 1.0
# Of attention, over the places of a map and the images of a batch: S. Zagoruyko, N. Komodakis 2017, section 4.1.1.
_ATTENTION_WEIGHT = 1e3
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened outputs, times T^2: G. Hinton et al. 2015, section 2.

    The factor keeps the size of the gradients whatever the temperature.
    """
    wanted = F.log_softmax(teacher / temperature, dim=1)
    found = F.log_softmax(student / temperature, dim=1)
    per_place = (wanted.exp() * (wanted - found)).sum(dim=1)
    return per_place.mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error as a share of the teacher's power: the reciprocal of the signal-to-noise ratio."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def of_step(step: Finetune) -> Loss:
    """The loss that a recipe's step asks for: of the teacher, of the labels, or a mixture of both."""

    def loss(student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        if teacher is None or not step.distill:
            if labels is None:
                raise BadInput("there are neither labels nor a teacher to learn from: use distill = true")
            return F.cross_entropy(student, labels)
        soft = distillation(student, teacher, step.temperature)
        if labels is None:
            return soft
        return (1 - step.label_weight) * soft + step.label_weight * F.cross_entropy(student, labels)

    return loss


def outputs_of(made: Any) -> list[Tensor]:
    """The logits that a network returned, and after them those of the auxiliary classifiers that it has in training."""
    if isinstance(made, Tensor):
        return [made]
    return [tensor for part in parts_of(made).values() for tensor in outputs_of(part)]


def with_auxiliaries(
    loss: Loss, outputs: list[Tensor], teacher: Tensor | None, labels: Tensor | None, weight: float = AUXILIARY_WEIGHT
) -> Tensor:
    """The loss of the last classifier and, with less weight, of each auxiliary one."""
    total = loss(outputs[0], teacher, labels)
    for output in outputs[1:]:
        total = total + weight * loss(output, teacher, labels)
    return total


@dataclass(frozen=True)
class _Place:
    """Where in a network its features are: what the `call`-th run of a module returns, or is given."""

    module: str
    call: int
    is_input: bool
    shape: tuple[int, ...]


class _Tap:
    """Keeps the features that a network's latest run made, [n, c, h, w] or [n, c]."""

    def __init__(self, network: nn.Module, place: _Place) -> None:
        self._place = place
        self._calls = 0
        self._kept: Tensor | None = None
        module = network.get_submodule(place.module)
        if place.is_input:
            handle = module.register_forward_pre_hook(
                lambda _, given, named: self._see(read(given, named)), with_kwargs=True
            )
        else:
            handle = module.register_forward_hook(lambda _, __, made: self._see(made))
        self._handles = network.register_forward_pre_hook(lambda _, __: self._begin()), handle

    def _begin(self) -> None:
        self._kept, self._calls = None, 0

    def _see(self, tensor: Tensor) -> None:
        if self._calls == self._place.call:
            self._kept = tensor
        self._calls += 1

    def take(self) -> Tensor:
        """The features, which are forgotten here."""
        if self._kept is None:
            raise BadInput(
                "the network does not compute the features that it computed before: use hints = false and "
                "attention = false"
            )
        kept, self._kept = self._kept, None
        return kept

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class Hints(nn.Module):
    """Matches the student's features before the classifier to the teacher's: A. Romero et al. 2015, FitNets.

    Those features are the last map before the classifier where both networks have one of the same height and width,
    otherwise what the classifier is given, averaged over the places. Where the student has fewer or more channels, a
    1x1 convolution that is learned on the way translates (section 2.2); it is no part of the result.

    Args:
        student: in any mode; gets a hook, as the teacher does, until `close`.
        teacher: the network to be like.
        example: float32 [n, C, H, W] that both run once for their shapes.

    Raises:
        BadInput: a network has no layers to be seen, being a program for example.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, example: Tensor) -> None:
        super().__init__()
        theirs, ours = _places(teacher, example), _places(student, example)
        maps = theirs[0] is not None and ours[0] is not None and theirs[0].shape[2:] == ours[0].shape[2:]
        want, have = (theirs[0], ours[0]) if maps else (theirs[1], ours[1])
        if want is None or have is None:
            raise BadInput("hints need networks whose layers are modules, and one here has none: use hints = false")
        self.is_map = maps
        channels = have.shape[1], want.shape[1]
        self.regressor: nn.Module = nn.Identity() if channels[0] == channels[1] else nn.Conv2d(*channels, 1)
        self._taps = _Tap(student, have), _Tap(teacher, want)

    def forward(self) -> Tensor:
        """How far the features of the latest runs of both networks are from each other: a scalar."""
        found, wanted = (self._pooled(tap.take()) for tap in self._taps)
        return _HINT_WEIGHT * relative_error(self.regressor(found), wanted.detach())

    def _pooled(self, features: Tensor) -> Tensor:
        if self.is_map:
            return features
        return features.reshape(*features.shape[:2], -1).mean(dim=2)[:, :, None, None]

    def close(self) -> None:
        """Take the hooks out of both networks."""
        for tap in self._taps:
            tap.close()


class Attention(nn.Module):
    """Matches where the student looks to where the teacher does: S. Zagoruyko, N. Komodakis 2017.

    The attention of a map is the sum of its squared channels, as a vector of length 1 ("Paying More Attention to
    Attention", section 3.1); what is minimised is half of the squared distance for each size of maps that both networks
    have, at the last map of that size (equation 2). No map has to have as many channels as the other.

    Args:
        student: in any mode; gets hooks, as the teacher does, until `close`.
        teacher: the network to be like.
        example: float32 [n, C, H, W] that both run once for their shapes.

    Raises:
        BadInput: they have no maps of one size.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, example: Tensor) -> None:
        super().__init__()
        ours, theirs = ({place.shape[2:]: place for place in _maps(one, example)[0]} for one in (student, teacher))
        self._taps = [
            (_Tap(student, place), _Tap(teacher, theirs[size])) for size, place in ours.items() if size in theirs
        ]
        if not self._taps:
            raise BadInput(
                "attention needs networks with maps of one height and width, and these have none: use attention = false"
            )

    def forward(self) -> Tensor:
        """How far the attention of the latest runs of both networks is apart: a scalar."""
        apart = [
            (_attention(tap.take()) - _attention(other.take()).detach()).square().mean() for tap, other in self._taps
        ]
        return _ATTENTION_WEIGHT / 2 * torch.stack(apart).sum()

    def close(self) -> None:
        """Take the hooks out of both networks."""
        for pair in self._taps:
            for tap in pair:
                tap.close()


def _attention(maps: Tensor) -> Tensor:
    return F.normalize(maps.square().sum(1).flatten(1), dim=1)


class Features(nn.Module):
    """What a recipe's step matches beside the outputs: hints, attention or both.

    Args:
        step: asks for them.
        student, teacher, example: as for `Hints`.
    """

    def __init__(self, step: Finetune, student: nn.Module, teacher: nn.Module, example: Tensor) -> None:
        super().__init__()
        kinds: list[type[Hints] | type[Attention]] = [Hints] if step.hints else []
        kinds += [Attention] if step.attention else []
        self._parts: list[Hints | Attention] = []
        try:
            for kind in kinds:
                self._parts.append(kind(student, teacher, example))
        except BadInput:
            self.close()
            raise
        self.parts = nn.ModuleList(self._parts)

    def forward(self) -> Tensor:
        """How far the features of the latest runs of both networks are from each other: a scalar."""
        return torch.stack([part() for part in self._parts]).sum()

    def close(self) -> None:
        """Take the hooks out of both networks."""
        for part in self._parts:
            part.close()


def _places(network: nn.Module, example: Tensor) -> tuple[_Place | None, _Place | None]:
    """The last map before the last layer with weights, and the input of that layer."""
    return _maps(network, example)[1]


def _maps(network: nn.Module, example: Tensor) -> tuple[list[_Place], tuple[_Place | None, _Place | None]]:
    """All maps of more than one place in their order, and what `_places` says."""
    maps: list[_Place] = []
    calls: dict[str, int] = {}
    found: tuple[_Place | None, _Place | None] = (None, None)
    handles = []

    def saw_input(name: str, tensor: Tensor) -> None:
        nonlocal found
        place = _Place(name, calls.get(name, 0), True, tuple(tensor.shape))
        found = (maps[-1] if maps else None, place)

    def saw_output(name: str, made: object) -> None:
        call = calls.get(name, 0)
        calls[name] = call + 1
        if isinstance(made, Tensor) and made.ndim == 4 and made.shape[2] * made.shape[3] > 1:
            maps.append(_Place(name, call, False, tuple(made.shape)))

    for name, module in network.named_modules():
        if not name:
            continue
        if isinstance(module, _WEIGHTED):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, given, named, name=name: saw_input(name, read(given, named)), with_kwargs=True
                )
            )
        handles.append(module.register_forward_hook(lambda _, __, made, name=name: saw_output(name, made)))
    try:
        with evaluating(network), torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return maps, found


def labels_tensor(labels: Indices | None, device: torch.device) -> Tensor | None:
    """Labels on the device, where there are any."""
    return None if labels is None else torch.from_numpy(labels).to(device)
