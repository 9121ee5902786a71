"""Detectors of the user's own: what they return, as the padded boxes that a detector of the zoo returns."""

from typing import Any

from torch import Tensor, nn

from convoynet.exporter.archs import own
from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.archs.returned import parts_of
from convoynet.exporter.errors import BadInput

PARTS = ("boxes", "scores", "labels")
_WANTED = (
    "boxes [N, D, 4] as x1, y1, x2, y2 in pixels, scores [N, D] and labels [N, D], in this order or by these names, "
    "for any number N of images and the same D; rows that are no detection have the score 0"
)


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
        boxes, scores, labels = _parts(self.network(x))
        best, order = scores.float().topk(scores.shape[1], 1)
        real = best > 0
        picked = boxes.float().gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
        return (
            picked * real.unsqueeze(-1),
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
        try:
            made = dry_run(network, input_size, batch)
        except Exception as error:
            told = own.told(error)
            raise BadInput(
                f"--task detection: {name} fails for {batch} images: {told}; it must return {_WANTED} ({own.DEBUG})"
            ) from error
        shapes = [list(part.shape) if isinstance(part, Tensor) else own.article(part) for part in _parts(made)]
        room = shapes[1][1] if room is None and len(shapes) == 3 and len(shapes[1]) == 2 else room
        if shapes != [[batch, room, 4], [batch, room], [batch, room]]:
            raise BadInput(f"--task detection: {name} returns {shapes} for {batch} images; it must return {_WANTED}")


def _parts(made: object) -> list[Any]:
    parts = parts_of(made)
    return [parts[name] for name in PARTS] if parts.keys() >= set(PARTS) else list(parts.values())
