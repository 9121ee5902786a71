"""Detectors of the user's own: what they return, as the padded boxes that a detector of the zoo returns."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convoynet.exporter.archs import own
from convoynet.exporter.archs.data_dependent import DataDependent
from convoynet.exporter.archs.dry_run import dry_run, evaluating
from convoynet.exporter.archs.returned import DETECTED, parts_of
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput

_WANTED = (
    "boxes [N, D, 4] as x1, y1, x2, y2 in pixels, scores [N, D] and labels [N, D], in this order or by these names, "
    "for any number N of images and the same D; rows that are no detection have the score 0"
)

_SHARES = "they must be 0 to 1, as logits.sigmoid() is"
_ROUNDING = 1e-3
# A few boxes may end before they begin, of a network that guesses both corners; sizes in their place mostly do.
_MOST_TURNED = 0.25
# Of the shorter side: of a smaller image a box of one pixel says nothing.
_PIXELS = 8


class Detector(nn.Module):
    """A user's network, whose boxes come by falling score, and with zeros where there is none.

    Args:
        network: returns what `require_detector` asks for.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """N x C x H x W -> boxes, scores, labels, and how many there are, [N, 1]."""
        boxes, scores, labels = _parts("the network", self.network(x))
        best, order = scores.float().topk(scores.shape[1], 1)
        real = best > 0
        picked = boxes.float().gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        return (
            # Whatever a row is filled with that is no detection, numbers or none, is gone: a product would keep NaN.
            torch.where(real.unsqueeze(-1), picked, torch.zeros_like(picked)),
            best.clamp(min=0.0),
            labels.long().gather(1, order) * real,
            real.sum(1, keepdim=True),
        )


def require_detector(name: str, network: nn.Module, input_size: tuple[int, int, int]) -> None:
    """See that a network returns padded boxes.

    Args:
        name: for messages.
        network: in float32; stays as it is.
        input_size: (channels, height, width) of an image.

    Raises:
        BadInput: it does not take such images, or returns something else.
    """
    room = None
    for batch in (2, 3, 1):
        made = _made(name, batch, partial(dry_run, network, input_size, batch))
        found = [list(part.shape) if isinstance(part, Tensor) else own.article(part) for part in _parts(name, made)]
        room = found[1][1] if room is None and len(found) == 3 and len(found[1]) == 2 else room
        if not room or found != [[batch, room, 4], [batch, room], [batch, room]]:
            raise BadInput(f"--task detection: {name} returns {found} for {batch} images; it must return {_WANTED}")
    for kind, part in zip(DETECTED[:2], _parts(name, made), strict=False):
        if not part.is_floating_point():  # labels in their place would be taken for them
            raise BadInput(
                f"--task detection: {name} returns {kind} that are {str(part.dtype).removeprefix('torch.')}, as labels "
                f"are; it must return {_WANTED}"
            )
    _require_shares(name, network, input_size)


def _require_shares(name: str, network: nn.Module, input_size: tuple[int, int, int]) -> None:
    """See that scores are none of logits, whatever the weights are: those below 0 would be taken for no detections."""
    channels, height, width = input_size
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return
    pixels = made_images(2, (height, width), channels, 0).transpose(0, 3, 1, 2) / 127.5 - 1
    with evaluating(network), torch.no_grad():
        images = torch.from_numpy(pixels.astype(np.float32)).to(device)
        scores = _parts(name, _made(name, len(images), partial(network, images)))[1].float()
    # A number below 0 that is always the same marks rows that are no detection.
    if scores.max() > 1 + _ROUNDING or len(scores[scores < 0].unique()) > 1:
        raise BadInput(
            f"--task detection: {name} returns scores from {float(scores.min()):.3g} to {float(scores.max()):.3g}: "
            f"{_SHARES}"
        )


def require_plausible(
    name: str, outputs: Sequence[NDArray[np.generic]], classes: int, size: tuple[int, int], checked: str
) -> None:
    """See that the detections in images are what a server and its clients take them for.

    Args:
        name: for messages.
        outputs: boxes, scores, labels and count of some images, as `Detector` has them.
        classes: how many there are names of, with the background.
        size: (height, width) of the images, in pixels.
        checked: which images, for messages.

    Raises:
        BadInput: scores are none of 0 to 1, labels have no name, or boxes are none of corners in pixels.
    """
    boxes, scores, labels = (np.asarray(output) for output in outputs[:3])
    real = scores > 0
    if not real.any():
        return
    found, known = boxes[real], labels[real]
    says = f"--task detection: {name} finds in {checked} "
    if (highest := float(scores.max())) > 1 + _ROUNDING:
        raise BadInput(f"{says}scores of up to {highest:.3g}: {_SHARES}")
    if known.min() < 0 or known.max() >= classes:
        odd = int(known.min() if known.min() < 0 else known.max())
        raise BadInput(
            f"{says}the label {odd}, and there are {classes} names, of 0 to {classes - 1}, the background first: give "
            "as many --labels as it knows classes, or have it count from the first of them"
        )
    if np.mean((found[:, 2] < found[:, 0]) | (found[:, 3] < found[:, 1])) > _MOST_TURNED:
        raise BadInput(
            f"{says}boxes that end before they begin: they must be x1, y1, x2, y2, and not x, y, width, height"
        )
    if min(size) > _PIXELS and np.abs(found).max() <= 1 + _ROUNDING:
        height, width = size
        raise BadInput(
            f"{says}boxes no larger than a pixel, as shares of the image would be: they must be in pixels of its "
            f"{height} x {width}"
        )


def _made(name: str, batch: int, run: Callable[[], object]) -> object:
    """What a network returns, which has as many rows for every image.

    Raises:
        BadInput: it fails, or has an operator whose rows are as many as the image says.
    """
    failed: Exception | None = None
    made: object = None
    with DataDependent() as seen:
        try:
            made = run()
        except Exception as error:  # whatever the network raises
            failed = error
    if seen.found:
        raise BadInput(
            f"--task detection: {name} uses {seen.found[0]}, which returns as many rows as the image says, as "
            "boxes[scores > 0.3] and torchvision.ops.nms do: keep a fixed number with topk, and give those that are no "
            f"detection the score 0; it must return {_WANTED}"
        ) from failed
    if failed is not None:
        told = own.told(failed)
        raise BadInput(
            f"--task detection: {name} fails for {batch} images: {told}; it must return {_WANTED} ({own.DEBUG})"
        ) from failed
    return made


def _parts(name: str, made: object) -> list[Any]:
    """Boxes, scores and labels: by these names, or by their order where what was returned has no names.

    Raises:
        BadInput: it has other names, whose order says nothing.
    """
    parts = parts_of(made)
    if parts.keys() >= set(DETECTED):
        return [parts[part] for part in DETECTED]
    if any(not key.isdigit() for key in parts if key):
        raise BadInput(f"--task detection: {name} returns {', '.join(parts)}; it must return {_WANTED}")
    return list(parts.values())
