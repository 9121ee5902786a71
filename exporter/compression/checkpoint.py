"""Checkpoints of a training: written whole or not at all, and resumed only by the training that wrote them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convoynet.exporter import atomic_file
from convoynet.exporter.errors import BadInput

_FORMAT = "convoy training 1"


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training.

    Attributes:
        path: of the file; its folder exists.
        identity: what the training is of (recipe, data, seed, network, ...), each as a text that tells it from others.
    """

    path: Path
    identity: Mapping[str, str]

    def write(self, state: dict[str, Any]) -> None:
        """Put `state` (tensors, numbers, texts, lists and dicts of them) into the file; an interruption leaves the old.

        Raises:
            BadInput: the file cannot be written.
        """
        try:
            with atomic_file.writing(self.path) as file:
                torch.save({"format": _FORMAT, "identity": dict(self.identity), "state": state}, file)
        # torch.save says RuntimeError where the disk is full.
        except (OSError, RuntimeError) as error:
            raise BadInput(f"checkpoint {self.path} cannot be written: {error}; choose another folder") from error

    def read(self) -> dict[str, Any] | None:
        """The state of an earlier run, or None where there is no file.

        Raises:
            BadInput: the file is damaged, or of another training; the message says what differs.
        """
        if not self.path.exists():
            return None
        way_out = "move it away to begin anew"
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        # A damaged archive or pickle stream can fail in almost any way inside torch.load.
        except Exception as error:
            raise BadInput(f"checkpoint {self.path} cannot be read or is damaged; {way_out}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise BadInput(f"{self.path} is no checkpoint of a training here; {way_out}")
        theirs = content["identity"]
        different = [name for name in self.identity if theirs.get(name) != self.identity[name]]
        if different:
            stated = [f"{name} ({_short(theirs.get(name))} there, {_short(self.identity[name])} here)"
                      for name in different]  # fmt: skip
            raise BadInput(
                f"checkpoint {self.path} is another training's: it differs in {', '.join(stated)}; {way_out}"
            )
        state: dict[str, Any] = content["state"]
        return state


def _short(value: str | None) -> str:
    """A hash is told by its beginning."""
    if value is None:
        return "none"
    return value if len(value) < 40 or " " in value else value[:12]
