"""What `convoy predict` asks of a model for each task, and what it shows of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoynet.server.client.client import Client
from convoynet.server.client.operations import image_input_of, region_of
from convoynet.server.client.pictures import detection_picture, explanation_picture, segmentation_picture
from convoynet.server.client.results import BarePrediction, Prediction

_CLASSES = 5
EXPLANATION = "explanation"
"""The output of a model that says where the evidence for its first class lies."""
_ROWS, _COLUMNS = ("upper", "", "lower"), ("left", "", "right")
PROBABILITY, OUTPUT = "probability", "output"


@dataclass(frozen=True)
class Query:
    """What to ask for each image.

    Attributes:
        client, model, version: Whom to ask.
        top: The most entries of an image; None for the task's own number.
        min_score: Objects with a lower score are left out.
        draw: Whether a picture is wanted.
    """

    client: Client
    model: str
    version: str = ""
    top: int | None = None
    min_score: float = 0.5
    draw: bool = False


@dataclass(frozen=True)
class Seen:
    """What one image turned out to show: entries as JSON has them, best first, and the picture of them."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    picture: Image.Image | None = None


@dataclass(frozen=True)
class View:
    """How the answers of one task are asked for and shown.

    Attributes:
        key: The name of the entries in JSON.
        look: Asks for one encoded image.
        columns: Headings of the table, each with the text of an entry below it.
        draws: Whether there are pictures.
    """

    key: str
    look: Callable[[Query, bytes], Seen]
    columns: Mapping[str, Callable[[dict[str, Any]], str]]
    draws: bool = True


def _classify(query: Query, data: bytes) -> Seen:
    found = query.client.classify(query.model, [data], top=query.top or _CLASSES, version=query.version)[0]
    return Seen([{"label": e.label, "index": e.class_index, _kind(e): e.score} for e in found])


def _explain(query: Query, data: bytes) -> Seen:
    """The classes, and where the evidence for the first of them lies."""
    entries = _classify(query, data).entries
    config = query.client.model_config(query.model, query.version)
    image = np.array([data], object).reshape((1, 1) if config.max_batch_size > 0 else (1,))
    inputs = {config.input[0].name: image}
    found = query.client.infer(query.model, inputs, outputs=[EXPLANATION], version=query.version)[EXPLANATION]
    region = region_of(image_input_of(config), data)
    evidence = region.map_in_image(_smooth(found.reshape(found.shape[-2:]), region.input))
    entries[0]["evidence"] = _where(evidence)
    return Seen(entries, explanation_picture(data, evidence) if query.draw else None)


def _smooth(found: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.int32]:
    """A map of a few places as one of the size of the network's input, 0 to 255."""
    shares = np.nan_to_num(found, posinf=0) / max(float(np.nan_to_num(found, posinf=0).max()), 1e-30)
    resized = Image.fromarray(shares.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    values: NDArray[np.int32] = np.rint(255 * np.asarray(resized)).astype(np.int32)
    return values


def _where(evidence: NDArray[np.int32]) -> str:
    """The third of the image's height and width in which most of the evidence lies, with its share."""
    mass = evidence.clip(0).astype(np.int64)
    if not mass.any():
        return "none"
    rows, columns = (np.arange(length) * 3 // length for length in mass.shape)
    cells = np.zeros((3, 3))
    np.add.at(cells, (rows[:, None], columns), mass)
    row, column = divmod(int(cells.argmax()), 3)
    name = f"{_ROWS[row]} {_COLUMNS[column]}".strip() or "centre"
    return f"{name} {cells.max() / mass.sum():.0%}"


def _kind(found: Prediction) -> str:
    """What the score of a class is called."""
    return OUTPUT if isinstance(found, BarePrediction) else PROBABILITY


def _classification(kind: str) -> View:
    return View(
        "predictions",
        _classify,
        {
            "label": lambda entry: entry["label"],
            "class": lambda entry: str(entry["index"]),
            kind: lambda entry: f"{entry[kind]:.4f}",
        },
        draws=False,
    )


def _segment(query: Query, data: bytes) -> Seen:
    found = query.client.segment(query.model, [data], version=query.version)[0]
    entries = [{"label": e.label, "index": e.class_index, "share": e.share} for e in found.shares[: query.top]]
    return Seen(entries, segmentation_picture(data, found) if query.draw else None)


def _detect(query: Query, data: bytes) -> Seen:
    found = query.client.detect(query.model, [data], min_score=query.min_score, version=query.version)[0][: query.top]
    entries = [
        {"label": e.label, "index": e.class_index, "score": e.score, "box": [round(edge, 2) for edge in e.box]}
        for e in found
    ]
    return Seen(entries, detection_picture(data, found) if query.draw else None)


VIEWS: Mapping[str, View] = {
    "classification": _classification(PROBABILITY),
    "segmentation": View(
        "classes",
        _segment,
        {"label": lambda entry: entry["label"], "share": lambda entry: f"{entry['share']:.4f}"},
    ),
    "detection": View(
        "detections",
        _detect,
        {
            "label": lambda entry: entry["label"],
            "score": lambda entry: f"{entry['score']:.2f}",
            "x1 y1 x2 y2": lambda entry: " ".join(f"{edge:.0f}" for edge in entry["box"]),
        },
    ),
}
"""By the task of the model's config."""
_BARE = _classification(OUTPUT)


def explaining(view: View) -> View:
    """The view of a classifier that is asked for its evidence too."""
    columns = {**view.columns, "evidence": lambda entry: entry.get("evidence", "")}
    return replace(view, look=_explain, columns=columns, draws=True)


def view_of(task: str, activation: str) -> View | None:
    """What to show of a model; None for a task that is not known here."""
    return _BARE if (task, activation) == ("classification", "none") else VIEWS.get(task)
