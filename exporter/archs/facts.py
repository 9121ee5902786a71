"""What is recorded of the zoo: enough to list it, to find a network's module, and to say what a name alone decides.

`python -m convoynet.exporter.archs.table` records it from the networks themselves, and tests compare both. Imports
neither PyTorch nor the networks, so that a slip in a command is told at once.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from convoynet.exporter import assets
from convoynet.exporter.errors import BadInput


class Network(Protocol):
    """What decides whether flags suit a network: of one of the zoo it is recorded, of any other an `Arch` has it."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def task(self) -> str:
        """As `Arch` has it."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""

    @property
    def num_classes(self) -> int:
        """Of the published weights."""

    @property
    def fixed_classes(self) -> str:
        """Why there can be no other number of classes; empty where there can."""

    @property
    def published_weights(self) -> bool:
        """Whether there are any."""


@dataclass(frozen=True)
class Facts:
    """One network of the zoo as it is recorded.

    Attributes:
        name: as `convoy archs` lists it.
        module: that registers it, in `convoynet.exporter.archs`.
        paper: authors, year, title and where to find it.
        source: who defines the layers: "own", "torchvision" or "timm".
        task: what the outputs mean: "classification", "segmentation" or "detection".
        parameters: their number.
        macs: multiply-adds of one image.
        input_size: (channels, height, width) of one image.
        num_classes: of the published weights.
        fixed_classes: why there can be no other number of classes, and the way out; empty where there can.
        published_weights: whether there are any.
    """

    name: str
    module: str
    paper: str
    source: str
    task: str
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    num_classes: int
    fixed_classes: str
    published_weights: bool


_WEIGHTS = (".pt", ".pth", ".th", ".ckpt", ".safetensors")


@cache
def recorded() -> Mapping[str, Facts]:
    """Every network of the zoo by its name, sorted."""
    rows = json.loads(assets.ZOO.read_text(encoding="utf-8"))
    return {row["name"]: Facts(**{**row, "input_size": tuple(row["input_size"])}) for row in rows}


def unknown(name: str, known: Iterable[str]) -> BadInput:
    """What to raise where no network has this name; it tells the close matches among those that are known."""
    if Path(name).suffix in _WEIGHTS:
        return BadInput(
            f"--arch {name}: a file of weights is no network: --arch NAME --weights {name}, where NAME is the network "
            "that they belong to"
        )
    close = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return BadInput(f"unknown architecture {name!r}: {hint}`convoy archs` lists them all")
