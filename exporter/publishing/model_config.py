"""config.pbtxt: what a server needs to know about a model (inference.ModelConfig as text)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import text_format

from convoynet.exporter.archs import Arch, Task
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.engine_options import BuildOptions, to_parameters
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence.engines import Engine, parameters
from convoynet.exporter.outputs_asked import EXPLAIN_CLASS, EXPLANATION, FEATURES, TASKS, WINNER
from convoynet.exporter.publishing.model_folder import GRAPH_FILE, PLAN_FILE, plan_parameters
from convoynet.exporter.publishing.parameters import parameter
from convoynet.exporter.recipe import Fp8
from convoynet.exporter.tensorrt.build import BuiltEngine
from convoynet.protos.inference import model_config_pb2 as pb

if TYPE_CHECKING:
    import onnx

INPUT_NAME = "input"
LABELS_FILE = "labels.txt"
# Class indices fit into a byte up to here, and the map of an image is a quarter as large.
_UINT8_CLASSES = 256
_DETECTIONS = {
    "boxes": pb.TYPE_FP32,
    "scores": pb.TYPE_FP32,
    "labels": pb.TYPE_INT64,
    "count": pb.TYPE_INT64,
}
CONFIG_FILE = "config.pbtxt"


def outputs(task: Task, shapes: Sequence[Sequence[int]], others: Sequence[str] = ()) -> list[pb.ModelOutput]:
    """Describe the outputs of an exported network.

    Args:
        task: the network's.
        shapes: of its PyTorch outputs, without the batch.
        others: names of the outputs behind those of the task.
    """
    if task == "detection":
        boxes, scores, labels, count = (
            pb.ModelOutput(name=name, data_type=data_type, dims=dims)
            for (name, data_type), dims in zip(_DETECTIONS.items(), shapes, strict=True)
        )
        scores.label_filename = LABELS_FILE
        return [boxes, scores, labels, count]
    dims, *more = shapes
    further = [
        pb.ModelOutput(name=name, data_type=pb.TYPE_FP32, dims=size) for name, size in zip(others, more, strict=True)
    ]
    logits = pb.ModelOutput(name="logits", data_type=pb.TYPE_FP32, dims=dims, label_filename=LABELS_FILE)
    if task == "classification":
        return [logits, *further]
    small = dims[0] <= _UINT8_CLASSES
    best = pb.ModelOutput(name="classes", data_type=pb.TYPE_UINT8 if small else pb.TYPE_INT32, dims=dims[1:])
    return [logits, best, *further]


def add_explanation(described: pb.ModelConfig, size: tuple[int, int], classes: int, batch: int | None = None) -> None:
    """Describe what explains a class: the output, and where the engine can be asked so, the input that names another.

    Args:
        described: the model; it is changed.
        size: (height, width) of the map.
        classes: how many there are.
        batch: of a model that states it among the sizes: this one, or -1 for any.
    """
    rows = [] if batch is None else [batch]
    described.output.add(name=EXPLANATION, data_type=pb.TYPE_FP32, dims=[*rows, *size])
    if described.backend == "tensorrt":  # in an engine the default of an input is a constant
        return
    described.input.add(name=EXPLAIN_CLASS, data_type=pb.TYPE_INT64, dims=[*rows, 1], optional=True)
    described.parameters[f"values.{EXPLAIN_CLASS}"].string_value = f"{WINNER} to {classes - 1}"
    seldom = ",".join(filter(None, (parameter(described, "seldom_outputs"), EXPLANATION)))
    described.parameters["seldom_outputs"].string_value = seldom


def add_features(described: pb.ModelConfig, size: int, batch: int | None = None) -> None:
    """Describe the output of features, so many for each image; `batch` is as for an explanation."""
    described.output.add(name=FEATURES, data_type=pb.TYPE_FP32, dims=[*([] if batch is None else [batch]), size])


def model_config(config: ExportConfig, arch: Arch, shapes: Sequence[Sequence[int]]) -> pb.ModelConfig:
    """Describe the exported model to a server; `shapes` are those of its PyTorch outputs without the batch."""
    preprocess, largest = arch.preprocess, config.batch_range(arch.task)[1]
    height, width = preprocess.size
    channels = preprocess.channels
    pixels = config.input == "uint8"
    dims = [height, width, channels] if pixels else [channels, height, width]
    data_type = pb.TYPE_UINT8 if pixels else pb.TYPE_FP32
    described = preprocess.to_json()
    if pixels:  # the graph normalises; a server that did too would do it twice
        described = {key: value for key, value in described.items() if key not in ("mean", "std")}
    engine = config.format == "tensorrt"
    result = pb.ModelConfig(
        name=config.model_name,
        backend="tensorrt" if engine else "onnxruntime",
        platform="tensorrt_plan" if engine else "onnxruntime_onnx",
        max_batch_size=largest,
        input=[
            pb.ModelInput(
                name=INPUT_NAME,
                data_type=data_type,
                format=pb.ModelInput.FORMAT_NHWC if pixels else pb.ModelInput.FORMAT_NCHW,
                dims=dims,
            )
        ],
        output=outputs(arch.task, shapes, arch.outputs),
        dynamic_batching=pb.ModelDynamicBatching(),
        instance_group=[pb.ModelInstanceGroup(kind=_kind(config.target))],
        model_warmup=[
            pb.ModelWarmup(
                name=f"batch {size}",
                batch_size=size,
                inputs={INPUT_NAME: pb.ModelWarmup.Input(data_type=data_type, dims=dims, zero_data=True)},
            )
            for size in warmup_sizes(largest)
        ],
    )
    for key, value in {
        "preprocess": json.dumps(described),
        "task": arch.task,
        "activation": TASKS.get(config.task or "", "none" if arch.task == "detection" else "softmax"),
        "arch": arch.name,
        "precision": config.precision,
        "target": config.target,
        **({"graph_optimization": "basic"} if needs_basic_optimizations(config) and not engine else {}),
    }.items():
        result.parameters[key].string_value = value
    if engine:
        _add_engine(result, config, arch.task)
    return result


def _add_engine(result: pb.ModelConfig, config: ExportConfig, task: Task) -> None:
    """Say which batches the engine takes and, where that is left to the server, how to build it."""
    result.default_model_filename = GRAPH_FILE if config.defer_build else PLAN_FILE
    stated = to_parameters(config.build_options(task)) | ({"tensorrt_build": "deferred"} if config.defer_build else {})
    for key, value in stated.items():
        result.parameters[key].string_value = value


def add_built(described: pb.ModelConfig, options: BuildOptions, built: BuiltEngine) -> None:
    """Say what an engine was built with: a server compares it with what it has, before it loads the file."""
    for key, value in plan_parameters(built, options).items():
        described.parameters[key].string_value = value


def add_verified(described: pb.ModelConfig, measured: Sequence[Engine], version: int) -> None:
    """Say in which engines this version was found to be the named network, and which a server must not take."""
    found = parameters(measured)
    for key, value in {**found, **({"verified_version": str(version)} if found else {})}.items():
        described.parameters[key].string_value = value


def say_activation(described: pb.ModelConfig, task: str | None, graph: onnx.ModelProto) -> None:
    """Let clients make probabilities of logits alone.

    Args:
        described: a model whose outputs are those of `graph`.
        task: what they mean, where the user told it.
        graph: in float.
    """
    from convoynet.exporter.graph.onnx_scores import PROBABILITIES, ending  # needs onnx, which not every user has

    kind = parameter(described, "task")
    if kind not in ("classification", "segmentation"):
        return
    # Of a single output nobody knows what it is; the softmax over it is always 1.
    alone = list(described.output[0].dims) == [1] and task in (None, "classification")
    bare = alone or ending(graph, graph.graph.output[0].name).operator in PROBABILITIES
    described.parameters["activation"].string_value = "none" if bare else TASKS[task or kind]


def require_newest_served(file: Path, described: pb.ModelConfig, output: str) -> None:
    """See that one version is served, the newest, before only that gets an output: a config states those of all.

    Raises:
        BadInput: version_policy says otherwise.
    """
    policy = described.version_policy
    chosen = policy.WhichOneof("policy_choice")
    if chosen in ("all", "specific") or policy.latest.num_versions > 1:
        raise BadInput(
            f"{file} has versions served beside the newest (version_policy: {chosen}), and these would lack the output "
            f"{output!r} that it states: serve the newest alone"
        )


def needs_basic_optimizations(config: ExportConfig) -> bool:
    """Whether ONNX Runtime's further optimisations compute something else (FP8) or refuse the graph (FP16 scales)."""
    return isinstance(config.quantization, Fp8) or bool(config.quantization and config.half)


def warmup_sizes(largest: int) -> list[int]:
    """Return 1, 2, 4 and so on, and `largest`: the batches to run before the first request."""
    sizes = [1]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    return sizes if largest == 1 else [*sizes, largest]


def config_text(config: pb.ModelConfig) -> str:
    """Return the text form, which `text_format.Parse` reads back to an equal message."""
    return text_format.MessageToString(config)


def changes(folder: Path, new: pb.ModelConfig) -> list[str]:
    """Say in what a client would notice that `new` differs from the config that a model's folder holds now."""
    try:
        old = text_format.Parse((folder / CONFIG_FILE).read_text("utf-8"), pb.ModelConfig())
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, text_format.ParseError):
        return [f"the earlier {CONFIG_FILE} could not be read; it is replaced"]
    found = []
    for what, before, after in (
        ("input", _inputs(old), _inputs(new)),
        ("output", _outputs(old), _outputs(new)),
        ("largest batch", str(old.max_batch_size), str(new.max_batch_size)),
        ("network", parameter(old, "arch"), parameter(new, "arch")),
        ("runtime", old.backend, new.backend),
    ):
        if before != after:
            found.append(f"{what} changes from {before or 'nothing'} to {after} against the earlier version")
    return found


def _inputs(config: pb.ModelConfig) -> str:
    return ", ".join(
        f"{tensor.name} {pb.DataType.Name(tensor.data_type).removeprefix('TYPE_')}{list(tensor.dims)}"
        for tensor in config.input
    )


def _outputs(config: pb.ModelConfig) -> str:
    return ", ".join(f"{tensor.name} {'x'.join(str(size) for size in tensor.dims)}" for tensor in config.output)


def _kind(target: str) -> pb.ModelInstanceGroup.Kind:
    return pb.ModelInstanceGroup.KIND_GPU if target == "gpu" else pb.ModelInstanceGroup.KIND_CPU
