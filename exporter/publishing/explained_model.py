"""Gives a model that is published, or an ONNX file, the output that explains its answers."""

import hashlib
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf import text_format

from convoynet.exporter.archs.onnx_network import session_of
from convoynet.exporter.errors import BadInput, Refused, short_reason
from convoynet.exporter.evidence.told import file_line, markdown
from convoynet.exporter.explaining.embedding import features_size, last_layer_of, with_features
from convoynet.exporter.explaining.feature_map import head_of
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.graph.onnx_given import plain
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.graph.onnx_read import read_model, reading
from convoynet.exporter.outputs_asked import EXPLANATION, WITHOUT_CLASSES
from convoynet.exporter.publishing import model_config
from convoynet.exporter.publishing.model_folder import GRAPH_FILE
from convoynet.exporter.publishing.parameters import parameter
from convoynet.exporter.publishing.repository import staging, versions, writing
from convoynet.exporter.publishing.swap import carry_over
from convoynet.exporter.running import openvino
from convoynet.protos.inference import model_config_pb2 as pb

Array = npt.NDArray[Any]
_REPORT_FILE = "report.json"
_TEXTS: Mapping[str, Callable[[str], str]] = {
    "report.md": markdown,
    "report.html": lambda line: html.escape(line, quote=False),
}
_IMAGES, _ROOM = 3, 2
# Of the largest answer. An engine fuses other layers where the features are read twice, and adds up in another order:
# the last bits of float32. A number that is rounded to another level of INT8 is far above.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Explained:
    """A graph with its explanation.

    Attributes:
        file: that has it.
        features: the tensor that it is of.
        size: (height, width) of the map.
        classes: how many there are.
        embedding: the tensor of the output "features", and how many numbers it has for an image; None without one.
    """

    file: Path
    features: str
    size: tuple[int, int]
    classes: int
    embedding: tuple[str, int] | None = None


def explain_file(source: Path, output: str = "", *, features: bool = False) -> tuple[onnx.ModelProto, Explained]:
    """The graph of an ONNX file with an explanation of its first output, or of the one that is named.

    Args:
        source: the file.
        output: its output of scores; "" for the first.
        features: whether it gets the output "features" too.

    Raises:
        BadInput: the file is none, or its graph has no map of features, or no features.
        Refused: a runtime gives other answers with the output than without.
    """
    model = read_model(source)
    with reading(str(source), model):
        _require_one_input(source, model)
        model = plain(model)
        named = output or model.graph.output[0].name
        head = head_of(model, named)
        made, embedding = explained(model, named), None
        if features:
            last = last_layer_of(model, named)
            made, embedding = with_features(made, named), (last.features, features_size(last))
    _require_same(model, made, named)
    return made, Explained(source, head.features, head.size, head.classes, embedding)


def explain_model(model: Path, *, features: bool = False) -> Explained:
    """Publish the newest version of a model again, as the next version, with an explanation.

    Args:
        model: its folder.
        features: whether it gets the output "features" too.

    Raises:
        BadInput: no such model, or one that has no class to explain, no map of features or an explanation already.
        Refused: as for a file.
    """
    model = model.resolve()
    found = versions(model)
    if not found:
        raise BadInput(f"{model}: no model's folder: it has no version, such as {model / '1' / GRAPH_FILE}")
    folder = model / str(found[-1])
    config = _read_config(model)
    _require_classes(folder)
    graph, told = explain_file(folder / GRAPH_FILE, config.output[0].name, features=features)
    content = graph.SerializeToString()
    with staging(model.parent, model.name, None, force=False, needed_bytes=_ROOM * len(content)) as place:
        batch = None
        if not config.max_batch_size:  # such a config states the batch among the sizes
            (shape,) = (value.type.tensor_type.shape for value in graph.graph.output if value.name == EXPLANATION)
            batch = shape.dim[0].dim_value or -1
        model_config.add_explanation(config, told.size, told.classes, batch)
        if told.embedding is not None:
            model_config.add_features(config, told.embedding[1], batch)
        if "verified_version" in config.parameters:  # what was verified are the answers, which are the same
            config.parameters["verified_version"].string_value = str(place.version)
        with writing(model.parent):
            for file in folder.iterdir():
                if file.is_file() and file.name not in (GRAPH_FILE, _REPORT_FILE, *_TEXTS):
                    carry_over(file, place.folder / file.name)
            (place.folder / GRAPH_FILE).write_bytes(content)
            text = text_format.MessageToString(config)
            (place.model / model_config.CONFIG_FILE).write_text(text, encoding="utf-8")
            for source, target in ((folder, place.folder), (model, place.model)):
                _report(source, target, place.version, content, told)
        published = place.commit()
    return replace(told, file=published / GRAPH_FILE)


def _read_config(model: Path) -> pb.ModelConfig:
    file = model / model_config.CONFIG_FILE
    try:
        config = text_format.Parse(file.read_text(encoding="utf-8"), pb.ModelConfig())
    except FileNotFoundError as error:
        raise BadInput(f"{model} has no {file.name}: name its ONNX file and --output instead") from error
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    task = parameter(config, "task")
    if task not in ("", "classification"):
        raise BadInput(f"{model.name} is for {task}, and an explanation is of the one class of an image")
    if config.backend == "tensorrt" or config.platform == "tensorrt_plan":
        raise BadInput(f"{model.name} is a TensorRT engine: export it again with --explain --format tensorrt")
    if config.backend not in ("", "onnxruntime") or config.platform not in ("", "onnxruntime_onnx"):
        raise BadInput(f"{model.name} is served as {config.platform or config.backend}, not as an ONNX graph")
    if config.default_model_filename not in ("", GRAPH_FILE):
        raise BadInput(f"{file} names {config.default_model_filename}, and what is explained is {GRAPH_FILE}")
    model_config.require_newest_served(file, config, EXPLANATION)
    if not config.output:
        raise BadInput(f"{file} names no output, and the first one is the one that is explained")
    if EXPLANATION in {output.name for output in config.output}:
        raise BadInput(f"{model.name} has an output {EXPLANATION!r} already")
    if optional := [given.name for given in config.input if given.optional]:
        raise BadInput(
            f"{model.name} has an optional input {optional[0]!r}, and what is explained takes images alone: publish it "
            "without that input"
        )
    return config


def _require_classes(folder: Path) -> None:
    """See that the report, where there is one, calls the outputs no numbers that are no classes."""
    try:
        report = json.loads((folder / _REPORT_FILE).read_text(encoding="utf-8"))
        kind = (report["parity"]["spread"] or {})["kind"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if kind in WITHOUT_CLASSES:
        raise BadInput(
            f"{folder}: its outputs are no classes ({kind}), and an explanation is of the one class of an image"
        )


def _require_one_input(source: Path, model: onnx.ModelProto) -> None:
    inputs = Graph(model).inputs
    if len(inputs) != 1:
        raise BadInput(f"{source} has {len(inputs)} inputs ({', '.join(inputs) or 'none'}), and an image is one")


def _require_same(before: onnx.ModelProto, after: onnx.ModelProto, output: str) -> None:
    """See that the answers of every runtime that may serve the graph are, but for rounding, the same with the output.

    Raises:
        BadInput: ONNX Runtime does not take it.
        Refused: they are not.
    """
    (value,) = before.graph.input
    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else _IMAGES for dim in kind.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, shape) if dtype.kind in "iu" else random.standard_normal(shape)
    given = {value.name: images.astype(dtype)}
    for name, run in (("ONNX Runtime", _in_onnxruntime), ("OpenVINO", _in_openvino)):
        if name == "OpenVINO" and not openvino.may_serve():
            continue
        try:
            wanted = run(before, given, output)
        except Exception as error:  # the runtimes' own types, which have no common one
            if name == "OpenVINO":  # it does not serve the model as it is either
                continue
            raise BadInput(f"{name} does not run the graph: {short_reason(error)}") from error
        if not np.isfinite(wanted).any():
            raise BadInput(f"the graph's {output} are no numbers in {name}: there is nothing to explain")
        try:
            found = run(after, given, output)
        except Exception as error:  # as above
            raise Refused(f"{name} does not run the graph with the explanation: {short_reason(error)}") from error
        most = _ROUNDING * float(np.max(np.abs(wanted), initial=0, where=np.isfinite(wanted)))
        if not np.allclose(found, wanted, rtol=0, atol=most, equal_nan=True):
            raise Refused(f"{name} gives other {output} with the explanation than without; nothing was written")


def _in_onnxruntime(model: onnx.ModelProto, given: Mapping[str, Array], output: str) -> Array:
    (made,) = session_of(model, optimized=True).run([output], dict(given))
    return np.asarray(made)


def _in_openvino(model: onnx.ModelProto, given: Mapping[str, Array], output: str) -> Array:
    core = openvino.core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", dict(openvino.properties(1)))
    return np.array(compiled(dict(given))[output])


def _report(source: Path, target: Path, version: int, content: bytes, told: Explained) -> None:
    """Copy the report of a folder, where it has one, with the facts of the new file."""
    if not (source / _REPORT_FILE).is_file():
        return
    try:
        report = json.loads((source / _REPORT_FILE).read_text(encoding="utf-8"))
        (before,) = report["formats"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{source / _REPORT_FILE} is no report of an ONNX file: mend or remove it") from error
    digest = hashlib.sha256(content).hexdigest()
    after = {**before, "file": f"{version}/{GRAPH_FILE}", "sha256": digest, "bytes": len(content)}
    explanation = {
        "features": told.features, "size": list(told.size), "classes": told.classes, "max_rel_error": None,
    }  # fmt: skip
    report |= {"version": version, "formats": [after], "explanation": explanation}
    if told.embedding is not None:
        report["features"] = {"tensor": told.embedding[0], "size": told.embedding[1]}
    (target / _REPORT_FILE).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for name, written in _TEXTS.items():
        if (source / name).is_file():
            text = (source / name).read_text(encoding="utf-8")
            (target / name).write_text(text.replace(written(file_line(before)), written(file_line(after))), "utf-8")
