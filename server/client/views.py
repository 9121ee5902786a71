"""What `convoy predict` asks of a model for each task, and what it shows of the answer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoynet.server.client.client import Client
from convoynet.server.client.errors import ClientError
from convoynet.server.client.operations import image_input_of, region_of, required_input
from convoynet.server.client.pictures import (
    classification_picture,
    detection_picture,
    explanation_picture,
    segmentation_picture,
)
from convoynet.server.client.results import BarePrediction, Prediction, predictions
from convoynet.server.datatypes import numpy_dtype

_CLASSES, _EVERY = 5, 2**31
EXPLANATION, EXPLAIN_CLASS = "explanation", "explain_class"
"""The output of a model that says where the evidence for a class lies, and the input that may name another than the
first."""
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
        explained: The class whose evidence is wanted; None for the first one of each image.
    """

    client: Client
    model: str
    version: str = ""
    top: int | None = None
    min_score: float = 0.5
    draw: bool = False
    explained: int | None = None


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
        draws: Whether there are pictures; of the others there are where a folder for them is named.
    """

    key: str
    look: Callable[[Query, bytes], Seen]
    columns: Mapping[str, Callable[[dict[str, Any]], str]]
    draws: bool = True


def _classes(query: Query, data: bytes) -> Sequence[Prediction]:
    return query.client.classify(query.model, [data], top=query.top or _CLASSES, version=query.version)[0]


def _entries(found: Sequence[Prediction]) -> list[dict[str, Any]]:
    return [{"label": e.label, "index": e.class_index, _kind(e): e.score} for e in found]


def _classify(query: Query, data: bytes) -> Seen:
    found = _classes(query, data)
    return Seen(_entries(found), classification_picture(data, found) if query.draw else None)


def _explain(query: Query, data: bytes) -> Seen:
    """The classes, and where the evidence for the first of them, or for the one that is asked for, lies."""
    every = _entries(_classes(replace(query, top=_EVERY), data))
    chosen = next(entry for entry in every if query.explained in (None, entry["index"]))
    entries = every[: query.top or _CLASSES]
    if chosen not in entries:
        entries.append(chosen)
    config = query.client.model_config(query.model, query.version)
    image = np.array([data], object).reshape((1, 1) if config.max_batch_size > 0 else (1,))
    inputs: dict[str, NDArray[Any]] = {required_input(config).name: image}
    if query.explained is not None:
        inputs[EXPLAIN_CLASS] = np.array([[query.explained]])
    found = query.client.infer(query.model, inputs, outputs=[EXPLANATION], version=query.version)[EXPLANATION]
    region = region_of(image_input_of(config), data)
    evidence = region.map_in_image(_smooth(found.reshape(found.shape[-2:]), region.input))
    chosen["evidence"] = where_most(evidence)
    return Seen(entries, explanation_picture(data, evidence) if query.draw else None)


def _smooth(found: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.int32]:
    """A map of a few places as one of the size of the network's input, 0 to 255."""
    shares = np.nan_to_num(found, posinf=0) / max(float(np.nan_to_num(found, posinf=0).max()), 1e-30)
    resized = Image.fromarray(shares.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    values: NDArray[np.int32] = np.rint(255 * np.asarray(resized)).astype(np.int32)
    return values


def where_most(evidence: NDArray[np.int32]) -> str:
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


def class_of(client: Client, model: str, version: str, text: str) -> int:
    """The class of a model that a person means: a number is an index, everything else a label.

    Labels come with answers alone, so that one is asked for: of zeros.

    Raises:
        ClientError: There is none, or several, or the model explains its first class alone.
    """
    asked, config = f"--class {text}", client.model_config(model, version)
    if EXPLAIN_CLASS not in {tensor.name for tensor in config.input}:
        raise _wrong(
            f"{asked}: model '{model}' explains its first class alone: it has no input '{EXPLAIN_CLASS}', as those of "
            "ONNX files have that `convoy export --explain` makes"
        )
    output = config.output[0]
    count = math.prod(output.dims)
    if text.isascii() and text.isdecimal():
        if int(text) >= count:
            raise _wrong(f"{asked}: model '{model}' has the classes 0 to {count - 1}")
        return int(text)
    image = client.model_metadata(model, version).inputs[0]
    zeros = np.zeros((1, *image.shape[1:]), numpy_dtype(image.datatype))
    answer = client.infer(model, {image.name: zeros}, outputs=[output.name], class_count=count, version=version)
    every = predictions(answer[output.name].ravel(), "none")
    found = sorted(one.class_index for one in every if one.label == text)
    if len(found) > 1:
        raise _wrong(f"{asked}: the classes {', '.join(map(str, found))} are called so: name one by its number")
    if not found:
        near = difflib.get_close_matches(text, [one.label for one in every], 3)
        hint = f"; it has {', '.join(near)}" if near else ""
        raise _wrong(f"{asked}: model '{model}' has no class of that label{hint}, and numbers from 0 to {count - 1}")
    return found[0]


def _wrong(message: str) -> ClientError:
    return ClientError(message, grpc.StatusCode.INVALID_ARGUMENT)


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
