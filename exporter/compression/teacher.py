"""The network that another one learns from."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.compression.data import Indices, TrainingImages
from convoynet.exporter.compression.losses import outputs_of
from convoynet.exporter.compression.teacher_choice import require_teacher, split
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, reason
from convoynet.exporter.progress import Progress
from convoynet.exporter.recipe import ORIGINAL

# Logits of all images are kept up to this size.
_MOST_LOGITS_BYTES = 2**28


class Teacher:
    """Says what it makes of images; where it would say the same again it need not compute it again.

    Args:
        network: in evaluation mode, and not trained.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._known: Tensor | None = None

    def remember(self, data: TrainingImages, inputs: Any, batch: int, progress: Progress) -> None:
        """Compute the logits of all images once, unless they take too much memory.

        Args:
            data: images, as they will come in training: without augmentation.
            inputs: uint8 NHWC images -> what the network takes.
            batch: images at a time.
            progress: shows it.
        """
        kept: list[Tensor] = []
        starts = range(0, len(data), batch)
        for start in progress.track(starts, "teacher's outputs", len(starts)):
            chosen = np.arange(start, min(start + batch, len(data)))
            kept.append(self.logits(chosen, inputs(data.batch(chosen, None))))
            if kept[0][0].nbytes * len(data) > _MOST_LOGITS_BYTES:
                return
        self._known = torch.cat(kept)

    def logits(self, indices: Indices, inputs: Tensor) -> Tensor:
        """The logits of `inputs`, which are the images `indices` [n] of the data."""
        if self._known is not None:
            return self._known[torch.from_numpy(indices).to(self._known.device)]
        with torch.no_grad():
            return outputs_of(self.network(inputs))[0]


def teacher_from(spec: str, original: nn.Module, preprocess: Preprocess, classes: int) -> nn.Module:
    """The network that a recipe names as the teacher, in evaluation mode.

    Args:
        spec: "original", or "NAME" or "NAME:WEIGHTS" of the zoo, WEIGHTS being a file or "default".
        original: the network as it was before any step; it is copied.
        preprocess: of the student; a teacher that wants its images normalised otherwise gets them so.
        classes: of the student.

    Raises:
        BadInput: no such network, or its classes, channels or image size do not fit, or its weights cannot be had.
    """
    if spec == ORIGINAL:
        return copy.deepcopy(original).eval().requires_grad_(False)
    name, file = split(spec)
    arch = archs.get(name)
    require_teacher(spec, arch, classes, preprocess.channels)
    built = arch.build(classes)
    none = np.empty((0, *preprocess.size, preprocess.channels), np.uint8)
    weights.load(built, arch, file, seed=0, images=none)
    network = arch.deploy(built)
    try:
        dry_run(network, (preprocess.channels, *preprocess.size))
    except RuntimeError as error:
        size = "x".join(map(str, preprocess.size))
        raise BadInput(
            f"teacher {spec!r} does not take images of {size} pixels ({reason(error)}): choose another"
        ) from error
    wanted = arch.preprocess
    if (wanted.mean, wanted.std, wanted.order) != (preprocess.mean, preprocess.std, preprocess.order):
        network = Renormalized(network, preprocess, wanted)
    return network.eval().requires_grad_(False)


class Renormalized(nn.Module):
    """A network that takes images as another network wants them normalised.

    Args:
        network: the network inside.
        given: how the images come.
        wanted: how the network wants them.
    """

    def __init__(self, network: nn.Module, given: Preprocess, wanted: Preprocess) -> None:
        super().__init__()
        self.network = network
        self.turned = given.order != wanted.order
        values = (given.mean[::-1], given.std[::-1]) if self.turned else (given.mean, given.std)
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in values)
        to_mean, to_std = (torch.tensor(value).view(1, -1, 1, 1) for value in (wanted.mean, wanted.std))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", std / to_std)
        self.register_buffer("shift", (mean - to_mean) / to_std)

    def forward(self, x: Tensor) -> Any:
        """N x C x H x W -> what the network makes of it."""
        x = x.flip(1) if self.turned else x
        return self.network(x * self.scale + self.shift)
