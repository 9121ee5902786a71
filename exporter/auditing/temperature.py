"""Calibration by a temperature (C. Guo and others 2017, section 4.2): fitted on one half, judged on the other.

Softmax(logits / T) changes no answer. T is where the mean log-likelihood of the right classes is largest, which it is
once: in 1/T it is concave.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.auditing.answers import Classes, Logits, calibration_error, probabilities
from convoynet.exporter.auditing.subjects import logits_name, rows_of
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence.told import file_line, markdown
from convoynet.exporter.graph.onnx_graph import element_types, replace
from convoynet.exporter.graph.onnx_scores import ending
from convoynet.exporter.publishing import model_config
from convoynet.exporter.publishing.model_folder import GRAPH_FILE, PLAN_FILE
from convoynet.exporter.publishing.published import Published
from convoynet.exporter.publishing.repository import staging, writing
from convoynet.exporter.publishing.swap import carry_over
from convoynet.protos.inference import model_config_pb2 as pb

OUTPUT = "probabilities"
# Temperatures that are looked at; beyond them a model says nothing, or nothing but one class.
_LEAST, _MOST = 0.02, 50.0
_STEPS = 60
_SPARE_BYTES = 2**20
# The files that tell of a model, and how the texts among them write a line of ours.
_TEXTS: Mapping[str, Callable[[str], str] | None] = {
    "report.json": None,
    "report.md": markdown,
    "report.html": lambda line: html.escape(line, quote=False),
}


@dataclass(frozen=True)
class Temperature:
    """What was fitted.

    Attributes:
        value: T.
        fitted_on, judged_on: numbers of images.
        before, after: the calibration error of the other half, without and with it.
        bounded: whether T lies at the end of what is looked at.
    """

    value: float
    fitted_on: int
    judged_on: int
    before: float
    after: float
    bounded: bool

    @property
    def notes(self) -> list[str]:
        """What to know before the probabilities are used."""
        said = []
        if self.bounded:
            said.append(
                f"the temperature {self.value:g} is at the end of what is looked at: the answers are too nearly all "
                "right, or all wrong, to fit one"
            )
        if self.after > self.before:
            said.append(
                f"the temperature {self.value:.3g} makes the confidence worse on the half that judges it "
                f"({self.judged_on} images): fit it on more images before its probabilities are used"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "temperature": self.value,
            "fitted_on": self.fitted_on,
            "judged_on": self.judged_on,
            "calibration_error": {"before": self.before, "after": self.after},
        }


def fit(logits: Logits, labels: Classes) -> Temperature:
    """Fit T on every second image of each class, and judge it on the others.

    Raises:
        BadInput: there are too few images for two halves.
    """
    order = np.argsort(labels, kind="stable")
    fitted, judged = order[::2], order[1::2]
    if not len(judged):
        raise BadInput("--fit-temperature needs at least two images: one half fits it, the other judges it")
    value = best(logits[fitted], labels[fitted])
    errors = []
    for temperature in (1.0, value):
        shares = probabilities(logits[judged], temperature)
        errors.append(calibration_error(shares.max(axis=1), shares.argmax(axis=1) == labels[judged]))
    return Temperature(value, len(fitted), len(judged), errors[0], errors[1], value in (_LEAST, _MOST))


def best(logits: Logits, labels: Classes) -> float:
    """The temperature at which the labels are likeliest, by bisection of the slope in 1/T."""
    right = logits[np.arange(len(labels)), labels].astype(np.float64).mean()

    def slope(inverse: float) -> float:
        shares = probabilities(logits, 1 / inverse)
        return float(right - (shares * logits).sum(axis=1).mean())

    low, high = 1 / _MOST, 1 / _LEAST
    if slope(high) >= 0:  # every answer is right: the surer, the better
        return _LEAST
    if slope(low) <= 0:
        return _MOST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 2 / (low + high)


def calibrated(graph: onnx.ModelProto, temperature: float, classes: int) -> onnx.ModelProto:
    """A copy of a graph with the output `probabilities`, softmax(logits / T); one that it has is replaced.

    The logits are the first output, or where that is probabilities itself what they are made of.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    scaled, factor, rows, wide = (f"{OUTPUT}.{of}" for of in ("scaled", "inverse_temperature", "rows", "float32"))
    ours = {OUTPUT, scaled, factor, rows, f"{rows}.size", wide}
    makers = {name: node for node in made.graph.node for name in node.output}
    if OUTPUT in makers and scaled not in makers:
        raise BadInput(f"the graph has an output {OUTPUT} of its own: there is nothing to add")
    replace(made.graph.node, [node for node in made.graph.node if node.output[0] not in ours])
    replace(made.graph.initializer, [tensor for tensor in made.graph.initializer if tensor.name not in ours])
    replace(made.graph.output, [value for value in made.graph.output if value.name not in ours])
    first = logits_name(made)
    last = ending(made, first)
    logits = rows_of(made, last.read if last.operator in ("Softmax", "LogSoftmax") else first, classes, rows)
    if element_types(made).get(logits) != TensorProto.FLOAT:
        made.graph.node.append(helper.make_node("Cast", [logits], [wide], name=wide, to=TensorProto.FLOAT))
        logits = wide
    made.graph.initializer.append(numpy_helper.from_array(np.array(1 / temperature, np.float32), factor))
    made.graph.node.append(helper.make_node("Mul", [logits, factor], [scaled], name=scaled))
    made.graph.node.append(helper.make_node("Softmax", [scaled], [OUTPUT], name=OUTPUT, axis=-1))
    batch = next(value for value in made.graph.output if value.name == first).type.tensor_type.shape.dim[0]
    value = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None, classes])
    value.type.tensor_type.shape.dim[0].CopyFrom(batch)
    made.graph.output.append(value)
    return made


def require_graph_served(published: Published) -> None:
    """See that what is served is the graph.

    Raises:
        BadInput: it is a TensorRT engine, or older versions are served beside it.
    """
    model_config.require_newest_served(published.folder / model_config.CONFIG_FILE, published.config, OUTPUT)
    plan = published.folder / str(published.version) / PLAN_FILE
    if published.config.backend != "onnxruntime" or plan.exists():
        raise BadInput(
            f"--fit-temperature: {published.folder} is served from a TensorRT engine, which has its outputs: export it "
            "with --format onnx, or divide the logits by the temperature before the softmax"
        )


def put_into(published: Published, graph: onnx.ModelProto, found: Temperature) -> None:
    """Give a published model the calibrated output, in place: its graph, config.pbtxt and report.json.

    Raises:
        BadInput: the repository cannot be written; nothing has changed.
    """
    require_graph_served(published)
    folder = published.folder.resolve()
    version = folder / str(published.version)
    content = calibrated(graph, found.value, len(published.labels)).SerializeToString()
    onnx.checker.check_model(content)
    config = pb.ModelConfig()
    config.CopyFrom(published.config)
    others = [output for output in config.output if output.name != OUTPUT]
    del config.output[:]
    config.output.extend(others)
    config.output.append(
        pb.ModelOutput(
            name=OUTPUT,
            data_type=pb.TYPE_FP32,
            dims=[len(published.labels)],
            label_filename=model_config.LABELS_FILE,
        )
    )
    config.parameters["temperature"].string_value = f"{found.value:.9g}"
    updated = _told(published.report, content, found)
    with staging(
        folder.parent, folder.name, published.version, force=True, needed_bytes=2 * len(content) + _SPARE_BYTES
    ) as place:
        with writing(folder.parent):
            for file in version.iterdir():
                if file.is_file() and file.name not in (GRAPH_FILE, *_TEXTS):
                    carry_over(file, place.folder / file.name)
            (place.folder / GRAPH_FILE).write_bytes(content)
            (place.model / model_config.CONFIG_FILE).write_text(text_format.MessageToString(config), encoding="utf-8")
            for source, target in ((version, place.folder), (folder, place.model)):
                _tell(source, target, published.report, updated)
        place.commit()


def _told(report: dict[str, Any], content: bytes, found: Temperature) -> dict[str, Any]:
    """The report with the file as it is now."""
    digest = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    formats = [one | digest if one.get("format") == "onnx" else one for one in report.get("formats", [])]
    return {**report, "formats": formats, "temperature": found.to_json()}


def _tell(source: Path, target: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write a report and its texts for people again, with the lines of the file that changed."""
    for name, written in _TEXTS.items():
        if not (source / name).is_file():
            continue
        if written is None:
            text = json.dumps(after, indent=2, allow_nan=False) + "\n"
        else:
            text = (source / name).read_text(encoding="utf-8")
            for old, new in zip(before.get("formats", []), after.get("formats", []), strict=True):
                text = text.replace(written(file_line(old)), written(file_line(new)))
        (target / name).write_text(text, encoding="utf-8")
