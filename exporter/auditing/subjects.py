"""The two models that an audit compares, each as a graph that ONNX Runtime runs: what was made, and what from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, short_reason
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import element_types, replace, shapes
from convoynet.exporter.graph.onnx_read import read_model
from convoynet.exporter.graph.onnx_scores import ending
from convoynet.exporter.publishing.parameters import parameter
from convoynet.exporter.publishing.published import Published, is_published, other_classes, read_published

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Images, Session

BATCH = 32
SCORES = "audited_scores"
_ROW, _IMAGES = 2, 4
# Of a sum of 16-bit probabilities.
_ROUNDING = 1e-2
_INPUTS = (TensorProto.FLOAT, TensorProto.UINT8)
_UNCLASSED = ("regression", "labels", "embedding", "one value")
_WAYS = "a model's folder, an ONNX file, or NAME[:WEIGHTS] of `convoy archs`"


@dataclass(frozen=True)
class Subject:
    """One side.

    Attributes:
        name: as it was named.
        graph: with the logits as its first output, also where what was exported has probabilities there.
        preprocess: how a picture becomes what the graph takes.
        labels: the class names.
        batch: how many images it takes at a time.
        basic: whether it must run without ONNX Runtime's further optimisations.
    """

    name: str
    graph: onnx.ModelProto
    preprocess: Preprocess
    labels: list[str]
    batch: int = BATCH
    basic: bool = False

    @property
    def takes_pixels(self) -> bool:
        """Whether the graph takes uint8 NHWC and normalises itself."""
        return bool(_signature(self.graph).elem_type == TensorProto.UINT8)

    def session(self, threads: int) -> Session:
        """The graph in ONNX Runtime.

        Raises:
            BadInput: it does not take it.
        """
        from convoynet.exporter.running.runtime import Session

        try:
            return Session(
                self.graph.SerializeToString(),
                self.preprocess,
                task="classification",
                target="cpu",
                threads=threads,
                optimized=not self.basic,
            )
        except Exception as error:  # ONNX Runtime's own types, which have no common one
            raise BadInput(f"{self.name}: ONNX Runtime does not take its graph: {short_reason(error)}") from error

    def logits(self, session: Session, images: Images) -> np.ndarray:
        """[n, classes], float32.

        Raises:
            BadInput: it does not run, or what it returns is not finite, or not one number for each class.
        """
        parts = []
        for at in range(0, len(images), self.batch):
            try:
                made = session(session.prepare(images[at : at + self.batch]))[0]
            except Exception as error:  # as above
                raise BadInput(f"{self.name} does not run in ONNX Runtime: {short_reason(error)}") from error
            parts.append(np.asarray(made, np.float32))
        found = np.concatenate(parts)
        if found.ndim != 2 or found.shape[1] != len(self.labels):
            raise BadInput(f"{self.name} returns {list(found.shape[1:])} for an image, not {len(self.labels)} logits")
        if not np.isfinite(found).all():
            raise BadInput(f"{self.name} returns logits that are not finite: there is nothing to audit")
        if found.shape[1] > 1 and (found >= 0).all() and (np.abs(found.sum(axis=1) - 1) < _ROUNDING).all():
            raise BadInput(
                f"{self.name} returns numbers that add up to 1 for each image: probabilities, of "
                "which no Softmax says what they are made of: export the network without them, or with a Softmax"
            )
        return found


def audited(folder: Path) -> tuple[Subject, Published]:
    """The model that is audited.

    Raises:
        BadInput: it is no published classifier.
    """
    if not is_published(folder):
        raise BadInput(f"{folder} is no model that `convoy export` published: it has no config.pbtxt{_of(folder)}")
    found = read_published(folder)
    return _of_published(found), found


def _of(folder: Path) -> str:
    """Where a version is named, that its model is what is wanted."""
    return f"; it is a version of the model {folder.parent}" if is_published(folder.parent) else ""


def reference(spec: str | None, model: Subject, published: Published) -> Subject:
    """What the model is compared with.

    Args:
        spec: a published model's folder, an ONNX file, or "NAME" or "NAME:WEIGHTS" of the zoo; None for the network
            that the model was made from, with its published weights.
        model: the one that is audited.
        published: its files.

    Raises:
        BadInput: there is no such thing, it has other classes, or takes other pictures.
    """
    if spec is None:
        found = _origin(model, published)
    elif is_published(Path(spec)):
        found = _of_published(read_published(Path(spec)))
    elif spec.endswith(".onnx"):
        found = _of_file(Path(spec), model, published)
    else:
        name, _, file = spec.partition(":")
        if name not in archs.names():
            raise BadInput(f"--against {spec}: no such thing{_of(Path(spec))}; give {_WAYS}")
        found = _of_zoo(spec, name, file or "default", model, published)
    _require_same(found, model)
    return found


def _origin(model: Subject, published: Published) -> Subject:
    """The network that the report names, where its weights can be had again."""
    arch, stated = str(published.report.get("arch", "")), published.report.get("weights") or {}
    told = f"{model.name} was made from {arch} with weights {stated.get('source', 'of unknown origin')}"
    if arch not in archs.names():
        raise BadInput(f"{told}: say what to compare it with, --against: {_WAYS}")
    # A file's weights are not looked for among the published ones, which may be a download.
    if not archs.get(arch).published_weights or str(stated.get("source", "")).startswith("file "):
        raise BadInput(f"{told}: give them again, --against {arch}:FILE, or another model's folder")
    return _of_zoo(arch, arch, "default", model, published, digest=stated.get("sha256"))


def _of_zoo(
    spec: str, name: str, file: str, model: Subject, published: Published, digest: str | None = None
) -> Subject:
    import torch

    arch = archs.get(name)
    if arch.task != "classification":
        raise BadInput(f"--against {spec}: {arch.task} is not audited; give a classifier")
    same = published.report.get("arch") == name
    # What the export compared itself with took the pictures that its report states.
    stated = published.report["input"].get("preprocess") if same else None
    preprocess = Preprocess.from_json(stated) if stated else arch.preprocess
    none = np.empty((0, *preprocess.size, preprocess.channels), np.uint8)
    if file == "random":
        from convoynet.exporter.data.images import made_images

        none = made_images(8, preprocess.size, preprocess.channels, 0)
    torch.manual_seed(0)
    module = arch.build(len(model.labels))
    loaded = weights.load(module, arch, file, seed=0, images=none)
    if digest not in (None, loaded.sha256):
        raise BadInput(
            f"{model.name} was made from {name} with other weights ({published.report['weights'].get('source')}) than "
            f"the published ones: give them again, --against {name}:FILE, or another model's folder"
        )
    graph = onnx_from_torch(arch.deploy(module), preprocess, uint8_input=False)
    return Subject(spec, scored(graph, spec, len(model.labels)), preprocess, model.labels)


def _of_published(found: Published) -> Subject:
    name = str(found.folder)
    if found.task != "classification":
        raise BadInput(f"{name}: {found.task} is not audited; give a classifier")
    if found.kind in _UNCLASSED:
        raise BadInput(f"{name}: class folders say nothing about outputs that are no classes ({found.kind})")
    graph = read_model(found.graph, name=f"{name}: its model.onnx")
    _signature(graph)
    basic = parameter(found.config, "graph_optimization") == "basic"
    batch = min(BATCH, max(found.config.max_batch_size, 1))
    return Subject(name, scored(graph, name, len(found.labels)), found.preprocess, found.labels, batch, basic)


def _of_file(path: Path, model: Subject, published: Published) -> Subject:
    graph = read_model(path)
    kind = _signature(graph, str(path))
    preprocess = model.preprocess
    if kind.elem_type == TensorProto.FLOAT and model.takes_pixels:
        preprocess = Preprocess.from_json(published.report["input"]["preprocess"])
    first = kind.shape.dim[0]
    batch = min(BATCH, first.dim_value) if first.HasField("dim_value") else BATCH
    return Subject(str(path), scored(graph, str(path), len(model.labels)), preprocess, model.labels, max(batch, 1))


def _signature(graph: onnx.ModelProto, name: str = "the model") -> Any:
    """The type of the one input.

    Raises:
        BadInput: the graph takes no images.
    """
    stored = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value.type.tensor_type for value in graph.graph.input if value.name not in stored]
    if len(inputs) != 1 or inputs[0].elem_type not in _INPUTS or len(inputs[0].shape.dim) != _IMAGES:
        taken = ", ".join(
            f"{TensorProto.DataType.Name(one.elem_type).lower()}, rank {len(one.shape.dim)}" for one in inputs
        )
        raise BadInput(f"{name} takes {taken or 'nothing'}: an audit is for one input of float32 NCHW or uint8 NHWC")
    return inputs[0]


def scored(graph: onnx.ModelProto, name: str, classes: int) -> onnx.ModelProto:
    """The graph, or where its first output is probabilities a copy whose first output is the scores that they are of.

    Raises:
        BadInput: they are made of each score alone, so that they are no shares of one answer.
    """
    output = logits_name(graph)
    last = ending(graph, output)
    if last.operator in ("Sigmoid", "HardSigmoid"):
        raise BadInput(
            f"{name}: each number of its output {output} is a probability of its own ({last.operator}), not a share of "
            "one answer: an audit is for classes that exclude each other"
        )
    if last.operator not in ("Softmax", "LogSoftmax"):
        return graph
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    scores = rows_of(made, last.read, classes, SCORES)
    kind = element_types(made).get(scores, TensorProto.FLOAT)
    others = [value for value in made.graph.output if value.name != scores]
    replace(made.graph.output, [helper.make_tensor_value_info(scores, kind, [None, classes]), *others])
    return made


def rows_of(model: onnx.ModelProto, tensor: str, classes: int, name: str) -> str:
    """A tensor of a graph as [batch, classes], by a node that is added where it has other axes, of one; its name."""
    if len(shapes(model).get(tensor, ())) == _ROW:
        return tensor
    size = f"{name}.size"
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, classes]), size))
    model.graph.node.append(helper.make_node("Reshape", [tensor, size], [name], name=name))
    return name


def _require_same(found: Subject, model: Subject) -> None:
    """See that both sides answer the same question about the same pictures."""
    if found.labels != model.labels:
        told = other_classes(found.labels, model.labels)
        raise BadInput(f"{found.name} and {model.name} have {told}: nothing can be compared")
    ours, theirs = (_pixels(one.preprocess) for one in (found, model))
    if ours != theirs:
        raise BadInput(
            f"{found.name} and {model.name} take other pictures ({found.preprocess.line}; {model.preprocess.line}): "
            "what is compared sees the same"
        )


def _pixels(preprocess: Preprocess) -> tuple[object, ...]:
    """How a picture becomes pixels; how these are normalised is each model's own."""
    return preprocess.size, preprocess.resize, preprocess.interpolation, preprocess.fit, preprocess.color


def logits_name(graph: onnx.ModelProto) -> str:
    """The output that an audit looks at: the first."""
    return str(graph.graph.output[0].name)
