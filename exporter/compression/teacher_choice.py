"""Which network may teach which: what the names alone decide. Imports no PyTorch."""

from pathlib import Path

from convoynet.exporter.archs.facts import Network
from convoynet.exporter.errors import BadInput


def split(spec: str) -> tuple[str, str]:
    """The network and the weights of "NAME" or "NAME:WEIGHTS"; these are a file or "default"."""
    name, _, weights = spec.partition(":")
    return name, weights or "default"


def require_teacher(spec: str, teacher: Network, classes: int, channels: int) -> None:
    """See that a network can teach another one.

    Args:
        spec: how the recipe names the teacher.
        teacher: the network that this names.
        classes: of the student.
        channels: of the student's images.

    Raises:
        BadInput: it is a detector, it knows nothing or other classes, or takes other images; the message names `spec`.
    """
    name, weights = split(spec)
    if teacher.task == "detection" or weights == "random":
        reason = "is a detector" if teacher.task == "detection" else "with random weights knows nothing"
        raise BadInput(f"teacher {spec!r} {reason}: choose a trained classifier or segmentation network")
    if weights == "default" and not teacher.published_weights:
        raise BadInput(
            f"teacher {spec!r}: there are no published weights of it; give your own, {name}:FILE, or another teacher"
        )
    if weights == "default" and teacher.num_classes != classes:
        raise BadInput(
            f"teacher {spec!r}: its published weights know {teacher.num_classes} classes and the network has {classes}"
            f"; give weights of {classes} classes, {name}:FILE, or another teacher"
        )
    if weights != "default" and not Path(weights).is_file():
        raise BadInput(f"teacher {spec!r}: {weights}: no such file; give a checkpoint, or the name alone")
    if teacher.input_size[0] != channels:
        raise BadInput(
            f"teacher {spec!r} takes images of {teacher.input_size[0]} channels, and the network of {channels}: choose "
            "another teacher"
        )
