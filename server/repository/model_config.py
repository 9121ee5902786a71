"""config.pbtxt, or the JSON that replaces it in a load request, to a checked message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.files import read_text
from convoynet.server.repository.layout import CONFIG_FILE, check_name, is_version
from convoynet.server.spec import Step

ENSEMBLE = "ensemble"
_MAX_BYTES = 2**20
_MOST_TENSORS = 4096
_MOST_STEPS = 1024
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class Backend:
    """What the files of one backend look like."""

    platform: str
    file: str


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend("onnxruntime_onnx", "model.onnx"),
    "openvino": Backend("openvino", "model.xml"),
    "tensorrt": Backend("tensorrt_plan", "model.plan"),
    "fake": Backend("fake", "model.json"),
}
"""By the name that config.pbtxt gives; where it gives none, the first whose file is there."""


@dataclass(frozen=True)
class Stated:
    """What somebody wrote: the message, and whether it says `max_batch_size`, since 0 is also the field's default."""

    config: pb.ModelConfig
    batch: bool


def read_config(folder: Path) -> Stated | None:
    """The config.pbtxt of a model's folder, or None where there is none.

    Raises:
        InvalidModel: It cannot be read, parsed or served.
    """
    file = folder / CONFIG_FILE
    try:
        text = read_text(file, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidModel(f"its {CONFIG_FILE} cannot be read: {error.strerror}") from error
    try:
        config = text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise InvalidModel(f"its {CONFIG_FILE} does not parse: {error}") from error
    return Stated(config, bool(config.max_batch_size) or _states_zero(text))


def _states_zero(text: str) -> bool:
    """Whether a text that parses sets max_batch_size to 0: it is found by what it overwrites."""
    return text_format.Merge(text, pb.ModelConfig(max_batch_size=-1)).max_batch_size != -1


def config_from_json(value: Mapping[str, Any]) -> Stated:
    """The config of a load request: the JSON form of ModelConfig, which takes the place of config.pbtxt.

    Raises:
        InvalidModel: It is not a ModelConfig.
    """
    try:
        config = json_format.ParseDict(dict(value), pb.ModelConfig(), max_recursion_depth=32)
    except (json_format.ParseError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidModel(f"the config of the load request is no ModelConfig: {reason}") from error
    batch = value.get("max_batch_size", value.get("maxBatchSize"))
    return Stated(config, batch is not None)


def name_config(config: pb.ModelConfig, name: str) -> None:
    """Gives a config the name of its folder, and the backend that its platform stands for.

    Raises:
        InvalidModel: It has another name, or a backend that is unknown.
    """
    if config.name and config.name != name:
        raise InvalidModel(f"its {CONFIG_FILE} names it {config.name!r}, its folder {name!r}; they must agree")
    config.name = name
    if config.platform == ENSEMBLE or config.HasField("ensemble_scheduling"):
        config.platform = ENSEMBLE
        return
    if not config.backend:
        config.backend = next((b for b, of in BACKENDS.items() if config.platform == of.platform), "")
    if config.backend not in BACKENDS and (config.backend or config.platform):
        raise InvalidModel(
            f"backend {config.backend!r} (platform {config.platform!r}) is not one of {', '.join(BACKENDS)}"
        )
    if config.platform and config.platform != BACKENDS[config.backend].platform:
        raise InvalidModel(
            f"its {CONFIG_FILE} states backend {config.backend!r}, whose platform is "
            f"{BACKENDS[config.backend].platform!r}, and platform {config.platform!r}: remove one of them"
        )


def check_config(config: pb.ModelConfig) -> None:
    """Refuses what this server does not do, instead of serving a model in another way than its config states.

    Raises:
        InvalidModel: The message names the field.
    """
    if config.max_batch_size < 0:
        raise InvalidModel(f"max_batch_size must be at least 0, got {config.max_batch_size}")
    for refused in _refused(config):
        raise InvalidModel(f"{refused} is not supported by this server: remove it from {CONFIG_FILE}")
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if len(tensors) > _MOST_TENSORS:
            raise InvalidModel(f"it states {len(tensors)} {kind}s, {_MOST_TENSORS} are allowed")
        names: set[str] = set()
        for tensor in tensors:
            if len(tensor.name) > _LONGEST_NAME:
                raise InvalidModel(
                    f"the name of the {kind} '{tensor.name[:40]}...' has {len(tensor.name)} characters, "
                    f"{_LONGEST_NAME} are allowed"
                )
            if tensor.name in names:
                raise InvalidModel(f"the {kind} '{tensor.name}' is stated twice")
            names.add(tensor.name)
            if any(d < 1 and d != -1 for d in tensor.dims):
                dims = list(tensor.dims)
                raise InvalidModel(f"dims of {kind} '{tensor.name}' must be at least 1, or -1 for any, got {dims}")


def _refused(config: pb.ModelConfig) -> Iterator[str]:
    """Every field that asks for something that the server does not do."""
    if config.HasField("sequence_batching"):
        yield "sequence_batching"
    if config.model_transaction_policy.decoupled:
        yield "a decoupled model_transaction_policy"
    for field in ("batch_input", "batch_output", "cc_model_filenames"):
        if getattr(config, field):
            yield field
    if config.model_operations.op_library_filename:
        yield "model_operations (a library of custom operators)"
    if config.model_repository_agents.agents:
        yield "model_repository_agents"
    both: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    for tensor in both:
        if tensor.HasField("reshape"):
            yield f"reshape of '{tensor.name}'"
        if tensor.is_shape_tensor:
            yield f"is_shape_tensor of '{tensor.name}'"
    for given in config.input:
        if given.allow_ragged_batch:
            yield f"allow_ragged_batch of input '{given.name}'"


def chosen_versions(folder: Path, config: pb.ModelConfig) -> list[str]:
    """The versions to serve, oldest first: the newest one unless version_policy says otherwise.

    Raises:
        InvalidModel: There is none, or not one that version_policy asks for.
    """
    have = sorted(int(p.name) for p in folder.iterdir() if is_version(p.name) and p.is_dir())
    if not have:
        raise InvalidModel("it has no version folder (1, 2, ..., without leading zeros)")
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            chosen = have
        case "specific":
            chosen = sorted(set(policy.specific.versions).intersection(have))
            if not chosen:
                stated = list(policy.specific.versions[:10])
                raise InvalidModel(f"version_policy asks for versions {stated}; there are {have}")
        case _:
            chosen = have[-max(policy.latest.num_versions, 1) :]
    return [str(v) for v in chosen]


def ensemble_steps(config: pb.ModelConfig) -> tuple[Step, ...]:
    """The models that an ensemble runs; whether they fit together is seen when it is loaded.

    Raises:
        InvalidModel: There is none, or it is stated in a way that this server does not do.
    """
    if not config.ensemble_scheduling.step:
        raise InvalidModel(f"an ensemble needs at least one step of ensemble_scheduling in its {CONFIG_FILE}")
    if (count := len(config.ensemble_scheduling.step)) > _MOST_STEPS:
        raise InvalidModel(f"an ensemble may have {_MOST_STEPS} steps, this one has {count}")
    for step in config.ensemble_scheduling.step:
        check_name(step.model_name)
        if step.model_namespace:
            raise InvalidModel("model_namespace of an ensemble's step is not supported by this server: remove it")
        if step.model_version < 1 and step.model_version not in (-1, 0):
            raise InvalidModel(f"model_version of an ensemble's step must be -1 or a version, got {step.model_version}")
    return tuple(
        Step(
            model=step.model_name,
            version=str(step.model_version) if step.model_version > 0 else "",
            inputs=dict(step.input_map),
            outputs=dict(step.output_map),
        )
        for step in config.ensemble_scheduling.step
    )
