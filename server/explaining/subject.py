"""What of a model's answer is explained: the score of a class, or of an object that it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from convoynet.protos.inference.model_config_pb2 import DataType, ModelConfig
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.errors import ClientError, invalid
from convoynet.server.client.operations import activation_of, labels_of, required_input, task_of
from convoynet.server.client.results import activated
from convoynet.server.datatypes import Array

Answer = Mapping[str, Array]
Box = tuple[float, float, float, float]
_SHOWN = 5
_MOST_CLASSES = 100_000
_TASKS = ("classification", "detection")
MAP_RANK = 3
"""Axes of a map of features: channels, height, width."""


@dataclass(frozen=True)
class Wanted:
    """What somebody asked to be explained.

    Attributes:
        class_name: a class, by its number or its label; None for the winner.
        object: of a detector's objects, the highest score first, which one: 1 is the first, which None means too.
    """

    class_name: str | None = None
    object: int | None = None


@dataclass(frozen=True)
class Target:
    """What is explained.

    Attributes:
        score: of the whole picture.
        box: x1, y1, x2, y2 of an object, in pixels of the network's input.
    """

    label: str
    class_index: int
    score: float
    box: Box | None = None


class Subject(Protocol):
    """A model of one task.

    Attributes:
        outputs: those that are asked for.
    """

    outputs: Sequence[str]

    def target(self, answer: Answer, wanted: Wanted) -> Target:
        """What is explained of a picture, by the answer to all of it; raises ClientError where that is not there."""
        ...

    def scores(self, answer: Answer, target: Target) -> NDArray[np.float64]:
        """The target's score in each row of an answer."""
        ...


def check(config: ModelConfig) -> None:
    """Whether there is something to explain.

    Raises:
        ClientError: the model is for a task without one score to explain, or has no output.
    """
    task = task_of(config)
    if task not in _TASKS:
        raise invalid(
            f"model '{config.name}' is for {task}: what is explained is one class or one object, of a model for "
            f"{' or '.join(_TASKS)}"
        )
    if not config.output:
        raise invalid(f"model '{config.name}' has no output")


def maps_of(config: ModelConfig, name: str | None) -> str:
    """The output with a map of features: of this name, or the only one.

    Raises:
        ClientError: there is no such output, or there are several.
    """
    batch = int(config.max_batch_size == 0)
    found = [output.name for output in config.output if len(output.dims) - batch == MAP_RANK]
    if name in found or (name is None and len(found) == 1):
        return name or found[0]
    if not found:
        raise invalid(
            f"model '{config.name}' has no output of maps, [channels, height, width], which score-cam weighs: export "
            "it with --outputs logits,maps=LAYER"
        )
    asked = "say --maps with one of them" if name is None else f"--maps {name} is none of them"
    raise invalid(f"model '{config.name}' has maps in {', '.join(found)}: {asked}")


async def subject_of(
    client: AsyncClient, config: ModelConfig, version: str, timeout: float, bare: bool = False
) -> Subject:
    """How a model that was checked is explained; it is asked once, for at most `timeout` seconds.

    Args:
        client: of the server.
        config: the model's.
        version: of the model; "" for the newest.
        timeout: in seconds.
        bare: whether masks are judged by a classifier's bare output, where its config says what makes a probability.

    Raises:
        ClientError: a classifier does not answer what its classes are called.
    """
    if task_of(config) == "detection":
        return Detector(config)
    return Classifier(config, await _class_labels(client, config, version, timeout), bare)


async def _class_labels(client: AsyncClient, config: ModelConfig, version: str, timeout: float) -> Sequence[str]:
    """The names of a classifier's classes, which come with an answer alone."""
    tensor, output = required_input(config), config.output[0].name
    kind = np.uint8 if tensor.data_type == DataType.TYPE_UINT8 else np.float32
    nothing = np.zeros((1, *tensor.dims), kind)
    answer = await client.infer(
        config.name,
        {tensor.name: nothing},
        outputs=[output],
        class_count=_MOST_CLASSES,
        timeout=timeout,
        version=version,
        priority=lowest_priority(config),
    )
    fields = [element.decode().split(":", 2) for element in answer[output].ravel()]
    found = {int(field[1]): field[2] for field in fields if len(field) > 2}
    return [found.get(index, str(index)) for index in range(len(fields))] if found else []


def lowest_priority(config: ModelConfig) -> int:
    """The level of those who can wait; 0 where there are no levels."""
    return config.dynamic_batching.priority_levels


class Classifier:
    """The score of a class: its probability where the config says what makes one, else the bare output.

    Under masks it is the bare output where `bare` says so.
    """

    def __init__(self, config: ModelConfig, labels: Sequence[str], bare: bool = False) -> None:
        self.outputs: Sequence[str] = [config.output[0].name]
        self._name, self._labels, self._bare, self._activation = config.name, labels, bare, activation_of(config)

    def target(self, answer: Answer, wanted: Wanted) -> Target:
        """As `Subject` has it."""
        if wanted.object is not None:
            raise invalid(f"--object {wanted.object} is for a detector; model '{self._name}' has classes: say --class")
        (row,) = activated(self._rows(answer), self._activation)
        index = int(row.argmax())
        if wanted.class_name is not None:
            index = _class(wanted.class_name, self._labels, len(row), self._name)
        return Target(_label(self._labels, index), index, float(row[index]))

    def scores(self, answer: Answer, target: Target) -> NDArray[np.float64]:
        """As `Subject` has it."""
        rows = self._rows(answer)
        return (rows if self._bare else activated(rows, self._activation))[:, target.class_index]

    def _rows(self, answer: Answer) -> NDArray[np.float64]:
        output = answer[self.outputs[0]]
        rows = output.reshape(len(output), -1).astype(np.float64)
        if output.size > len(output) * max(output.shape[1:], default=1):
            raise invalid(
                f"output '{self.outputs[0]}' of model '{self._name}' is {list(output.shape[1:])} for an image, and no "
                "row of classes: what is explained is one class"
            )
        if not rows.size or not np.isfinite(rows).all():
            raise _no_scores(self._name, self.outputs[0])
        return rows


class Detector:
    """The score of an object: of those of its class that are still found, the best score times the overlap with it.

    That is D-RISE (Petsiuk and others 2021, section 3.2) for a detector that tells one class of each object: the
    similarity of the classes' probabilities, which it does not tell, is 1 or 0.
    """

    outputs: Sequence[str] = ("boxes", "scores", "labels", "count")

    def __init__(self, config: ModelConfig) -> None:
        if missing := sorted(set(self.outputs) - {output.name for output in config.output}):
            raise invalid(f"model '{config.name}' is for detection and has no output '{missing[0]}'")
        self._name, self._labels = config.name, labels_of(config)

    def target(self, answer: Answer, wanted: Wanted) -> Target:
        """As `Subject` has it."""
        boxes, scores, indices = self._found(answer, 0)
        order = np.argsort(-scores, kind="stable")
        of_class = ""
        if wanted.class_name is not None:
            # Where there are no labels nothing says how many classes there are: any number may be one.
            known = len(self._labels) or _MOST_CLASSES
            if not self._labels and not wanted.class_name.isdecimal():
                raise invalid(f"--class {wanted.class_name}: model '{self._name}' has no labels; give a number")
            index = _class(wanted.class_name, self._labels, known, self._name)
            order, of_class = order[indices[order] == index], f" of class {_label(self._labels, index)}"
        asked = wanted.object or 1
        if len(order) < asked:
            raise invalid(
                f"--object {asked}: model '{self._name}' finds {len(order) or 'no'} "
                f"object{'' if len(order) == 1 else 's'}{of_class} in it"
            )
        at = order[asked - 1]
        x1, y1, x2, y2 = boxes[at].tolist()
        return Target(_label(self._labels, int(indices[at])), int(indices[at]), float(scores[at]), (x1, y1, x2, y2))

    def scores(self, answer: Answer, target: Target) -> NDArray[np.float64]:
        """As `Subject` has it."""
        assert target.box is not None
        best = []
        for row in range(len(answer["count"])):
            boxes, scores, indices = self._found(answer, row)
            same = indices == target.class_index
            best.append(float((scores[same] * _overlap(boxes[same], target.box)).max(initial=0)))
        return np.array(best)

    def _found(self, answer: Answer, row: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Boxes [n, 4], scores [n] and classes [n] of the objects in a row."""
        real = slice(int(answer["count"][row].item()))
        boxes, scores, indices = (answer[name][row][real] for name in ("boxes", "scores", "labels"))
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise _no_scores(self._name, "boxes' or 'scores")
        there = (scores > 0) & (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
        return boxes[there].astype(np.float64), scores[there].astype(np.float64), indices[there].astype(np.int64)


def _overlap(boxes: NDArray[np.float64], box: Box) -> NDArray[np.float64]:
    """Intersection over union of boxes [n, 4] with one."""
    corner, end = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    both = np.prod(np.maximum(end - corner, 0), axis=1)
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    either = areas + max(box[2] - box[0], 0) * max(box[3] - box[1], 0) - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), 0)


def _class(name: str, labels: Sequence[str], count: int, model: str) -> int:
    """The class that a person means: a number is an index, everything else a label."""
    if name.isascii() and name.isdecimal():
        same = [int(name)] if int(name) < count else []
    else:
        same = [index for index, label in enumerate(labels[:count]) if label == name]
    if len(same) > 1:
        raise invalid(f"--class {name}: {_listed(same)} of model '{model}' have this label; give a number")
    if same:
        return same[0]
    known = f"0 to {count - 1}" + (f", or a label such as '{labels[0]}'" if labels else "; it has no labels")
    raise invalid(f"--class {name}: model '{model}' has the classes {known}")


def _listed(indices: Sequence[int]) -> str:
    more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
    return f"classes {', '.join(map(str, indices[:_SHOWN]))}{more}"


def _label(labels: Sequence[str], index: int) -> str:
    return labels[index] if 0 <= index < len(labels) else str(index)


def _no_scores(model: str, output: str) -> ClientError:
    return invalid(f"model '{model}' answers no finite numbers in '{output}'")
