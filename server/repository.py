"""The model repository on disk (Triton's layout) to model specs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format

from protos.inference import model_config_pb2 as pb
from server import datatypes
from server.batch_config import batch_policy
from server.errors import InvalidModel
from server.images import ImageInput, image_input_from_json
from server.spec import EngineOptions, ModelSpec, TensorSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BACKENDS = {
    "onnxruntime": ("onnxruntime_onnx", "model.onnx"),
    "openvino": ("openvino", "model.onnx"),
    "fake": ("fake", "model.json"),
}
_DEVICES = {
    pb.ModelInstanceGroup.KIND_AUTO: "auto",
    pb.ModelInstanceGroup.KIND_GPU: "gpu",
    pb.ModelInstanceGroup.KIND_CPU: "cpu",
}


@dataclass(frozen=True)
class Defaults:
    """What the server decides where config.pbtxt is silent."""

    max_queue: int
    threads: int


@dataclass(frozen=True)
class Found:
    """One version in the repository: a spec and its complete config, or the reason why it can't be served."""

    name: str
    version: str
    spec: ModelSpec | None = None
    config: pb.ModelConfig | None = None
    reason: str = ""


def scan(root: Path, defaults: Defaults) -> list[Found]:
    """Every version that the version policies choose, in order of name and version.

    A folder that cannot be served is in the list with its reason: it never hides the others.
    """
    return [
        found
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for found in _scan_model(folder, defaults)
    ]


def _scan_model(folder: Path, defaults: Defaults) -> Iterator[Found]:
    try:
        config = _read_config(folder)
        versions = _versions(folder, config)
    except InvalidModel as error:
        yield Found(folder.name, "", reason=str(error))
        return
    for version in versions:
        try:
            yield Found(folder.name, version, _spec(folder, version, config, defaults), config)
        except InvalidModel as error:
            yield Found(folder.name, version, reason=str(error))


def _read_config(folder: Path) -> pb.ModelConfig:
    """config.pbtxt, completed with what the server assumes where it is silent."""
    if not _NAME.fullmatch(folder.name):
        raise InvalidModel(f"the name {folder.name!r} may hold letters, digits, '.', '_' and '-' alone, 128 at most")
    try:
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidModel("it has no config.pbtxt; `convoy export` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"its config.pbtxt cannot be read: {error}") from error
    try:
        config = text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise InvalidModel(f"its config.pbtxt does not parse: {error}") from error
    if config.name and config.name != folder.name:
        raise InvalidModel(f"its config.pbtxt names it {config.name!r}, its folder {folder.name!r}; they must agree")
    config.name = folder.name
    if not config.backend:
        config.backend = {"onnxruntime_onnx": "onnxruntime"}.get(config.platform, "")
    if config.backend not in _BACKENDS:
        raise InvalidModel(
            f"backend {config.backend!r} (platform {config.platform!r}) is not one of {', '.join(_BACKENDS)}"
        )
    config.platform = config.platform or _BACKENDS[config.backend][0]
    config.default_model_filename = config.default_model_filename or _BACKENDS[config.backend][1]
    if not config.instance_group:
        config.instance_group.add(count=1)
    _add_labels(folder, config)
    if config.HasField("dynamic_batching") and not config.dynamic_batching.preferred_batch_size:
        config.dynamic_batching.preferred_batch_size.append(config.max_batch_size)
    return config


def _add_labels(folder: Path, config: pb.ModelConfig) -> None:
    """Names the classes of maps and boxes, whose outputs the classification extension cannot label."""
    task = config.parameters["task"].string_value if "task" in config.parameters else "classification"
    labelled = next((output for output in config.output if output.label_filename), None)
    if task != "classification" and labelled is not None and "labels" not in config.parameters:
        config.parameters["labels"].string_value = json.dumps(_labels(folder, labelled), ensure_ascii=False)


def _versions(folder: Path, config: pb.ModelConfig) -> list[str]:
    """The versions to serve, oldest first: the newest one unless version_policy says otherwise."""
    have = sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"[1-9]\d*", p.name))
    if not have:
        raise InvalidModel("it has no version folder (1, 2, ...)")
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            chosen = have
        case "specific":
            chosen = sorted(policy.specific.versions)
            if absent := [v for v in chosen if v not in have]:
                raise InvalidModel(f"version_policy asks for version {absent[0]}; there are {have}")
        case _:
            chosen = have[-max(policy.latest.num_versions, 1) :]
    return [str(v) for v in chosen]


def _spec(folder: Path, version: str, config: pb.ModelConfig, defaults: Defaults) -> ModelSpec:
    file = folder / version / config.default_model_filename
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InvalidModel("default_model_filename leads out of the model's folder")
    if not file.is_file():
        raise InvalidModel(f"version {version} has no file {config.default_model_filename}")
    group = config.instance_group[0]
    if len(config.instance_group) > 1 or group.kind not in _DEVICES:
        raise InvalidModel("instance_group must be one group of KIND_CPU, KIND_GPU or KIND_AUTO")
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    return ModelSpec(
        name=config.name,
        version=version,
        platform=config.platform,
        inputs=tuple(_tensor(t) for t in config.input),
        outputs=tuple(_tensor(t) for t in config.output),
        labels={t.name: _labels(folder, t) for t in config.output if t.label_filename},
        batch=batch_policy(config, defaults.max_queue),
        engine=EngineOptions(
            backend=config.backend,
            file=file,
            device=_DEVICES[group.kind],
            threads=_integer(config, "intra_op_thread_count", defaults.threads),
            tensorrt=any(a.name == "tensorrt" for a in accelerators),
            engine=_choice(config, "engine", ("", "onnxruntime", "openvino")),
            graph_optimization=_choice(config, "graph_optimization", ("all", "basic")),
            precision=_choice(config, "inference_precision", ("f32", "bf16", "f16")),
        ),
        instances=max(group.count, 1),
        warmup=tuple(sorted({max(w.batch_size, 1) for w in config.model_warmup})) or _warmup(config),
        image=_image_input(config),
        response_cache=config.response_cache.enable,
    )


def _tensor(tensor: pb.ModelInput | pb.ModelOutput) -> TensorSpec:
    datatype = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
    if datatype == "INVALID" or not tensor.name:
        raise InvalidModel(f"input or output {tensor.name!r} in config.pbtxt needs a name and a data_type")
    try:
        dtype = datatypes.numpy_dtype(datatype)
    except ValueError as error:
        raise InvalidModel(f"{tensor.name!r} has data_type {datatype}: {error}") from error
    return TensorSpec(tensor.name, datatype, dtype, tuple(tensor.dims))


def _labels(folder: Path, output: pb.ModelOutput) -> list[str]:
    file = folder / output.label_filename
    if not file.resolve().is_relative_to(folder.resolve()):
        raise InvalidModel(f"label_filename of output '{output.name}' leads out of the model's folder")
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"labels of output '{output.name}' cannot be read: {error}") from error


def _image_input(config: pb.ModelConfig) -> ImageInput | None:
    if "preprocess" not in config.parameters:
        return None
    if len(config.input) != 1 or not config.max_batch_size:
        raise InvalidModel("parameter 'preprocess' needs a model with one input and max_batch_size of at least 1")
    channels_last = config.input[0].format == pb.ModelInput.FORMAT_NHWC
    image = image_input_from_json(config.parameters["preprocess"].string_value, channels_last)
    channels = 1 if image.color == "L" else 3
    dims = [*image.size, channels] if channels_last else [channels, *image.size]
    if list(config.input[0].dims) != dims:
        raise InvalidModel(
            f"parameter 'preprocess' makes rows of shape {dims}, but input '{config.input[0].name}' has dims "
            f"{list(config.input[0].dims)}"
        )
    return image


def _integer(config: pb.ModelConfig, parameter: str, default: int) -> int:
    if parameter not in config.parameters:
        return default
    text = config.parameters[parameter].string_value
    if not text.isdecimal() or int(text) < 1:
        raise InvalidModel(f"parameter '{parameter}' must be a number of at least 1, got {text!r}")
    return int(text)


def _choice(config: pb.ModelConfig, parameter: str, allowed: tuple[str, ...]) -> str:
    """The value of a parameter; the first one allowed where it is absent."""
    if parameter not in config.parameters:
        return allowed[0]
    text = config.parameters[parameter].string_value
    if text not in allowed:
        raise InvalidModel(f"parameter '{parameter}' must be {' or '.join(filter(None, allowed))}, got {text!r}")
    return text


def _warmup(config: pb.ModelConfig) -> tuple[int, ...]:
    """Without a model_warmup of its own a model runs its smallest and its largest batch once."""
    return tuple(sorted({1, max(config.max_batch_size, 1)}))
