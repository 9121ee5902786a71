"""What a client does, without the connection: the same for the one that blocks and the one that awaits.

Each operation is a generator that yields the calls it needs and gets their answers; a failed call is raised in it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference.model_config_pb2 import ModelConfig, ModelInput
from convoynet.server.client import given
from convoynet.server.client.client_codec import InferOptions, Inputs, arrays_from_response, infer_request
from convoynet.server.client.errors import ClientError, Unreachable, invalid
from convoynet.server.client.results import (
    Detection,
    Prediction,
    Segmentation,
    detections,
    predictions,
    segmentation,
)
from convoynet.server.datatypes import Array
from convoynet.server.errors import InvalidModel, InvalidRequest
from convoynet.server.images.images import ImageInput, Region, image_input_from_json, image_size

_Result = TypeVar("_Result")
Images = Iterable[str | Path | bytes]


@dataclass(frozen=True, slots=True)
class Ask:
    """A call that an operation needs; `timeout` is None for the client's own."""

    rpc: str
    request: object
    timeout: float | None = None


Steps = Generator[Ask, Any, _Result]


def server_ready() -> Steps[bool]:
    """`Client.server_ready`."""
    try:
        answer: pb.ServerReadyResponse = yield Ask("ServerReady", pb.ServerReadyRequest())
    except Unreachable:
        return False
    return answer.ready


def model_ready(model: str, version: str) -> Steps[bool]:
    """`Client.model_ready`."""
    answer: pb.ModelReadyResponse = yield Ask("ModelReady", pb.ModelReadyRequest(**_named(model, version)))
    return answer.ready


def models() -> Steps[list[str]]:
    """`Client.models`."""
    try:
        answer: pb.RepositoryIndexResponse = yield Ask("RepositoryIndex", pb.RepositoryIndexRequest(ready=True))
    except ClientError as error:
        if error.code is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        found = yield from statistics("", "")
        return sorted({model.name for model in found})
    return sorted({model.name for model in answer.models})


def server_metadata() -> Steps[pb.ServerMetadataResponse]:
    """`Client.server_metadata`."""
    answer: pb.ServerMetadataResponse = yield Ask("ServerMetadata", pb.ServerMetadataRequest())
    return answer


def model_metadata(model: str, version: str) -> Steps[pb.ModelMetadataResponse]:
    """`Client.model_metadata`."""
    answer: pb.ModelMetadataResponse = yield Ask("ModelMetadata", pb.ModelMetadataRequest(**_named(model, version)))
    return answer


def model_config(model: str, version: str) -> Steps[ModelConfig]:
    """`Client.model_config`."""
    answer: pb.ModelConfigResponse = yield Ask("ModelConfig", pb.ModelConfigRequest(**_named(model, version)))
    return answer.config


def statistics(model: str, version: str) -> Steps[list[pb.ModelStatistics]]:
    """`Client.statistics`."""
    request = pb.ModelStatisticsRequest(**_named(model or "", version, some=True))
    answer: pb.ModelStatisticsResponse = yield Ask("ModelStatistics", request)
    return list(answer.model_stats)


def infer(
    model: str,
    inputs: Inputs | Array,
    outputs: Sequence[str] | None,
    class_count: int | None,
    timeout: float | None,
    options: InferOptions,
) -> Steps[dict[str, Array]]:
    """`Client.infer`."""
    if not isinstance(inputs, Mapping):
        only = given.array("inputs", inputs)
        name = yield from _only_input(model, options.get("version", ""))
        inputs = {name: only}
    if class_count is not None and outputs is None:
        metadata = yield from model_metadata(model, options.get("version", ""))
        outputs = [output.name for output in metadata.outputs]
    request = infer_request(model, inputs, outputs=outputs, class_count=class_count, options=options)
    return (yield from send(request, timeout))


def send(request: pb.ModelInferRequest, timeout: float | None) -> Steps[dict[str, Array]]:
    """`Client.send`."""
    if not isinstance(request, pb.ModelInferRequest):
        raise given.refusal("request", request, "what infer_request() makes")
    answer: pb.ModelInferResponse = yield Ask("ModelInfer", request, timeout)
    return arrays_from_response(answer)


def classify(
    model: str, images: Images, top: int | None, version: str, timeout: float | None
) -> Steps[list[list[Prediction]]]:
    """`Client.classify`."""
    encoded = given.encoded(images)
    top = None if top is None else given.whole("top", top, 1)
    config = yield from _config(model, version, "classification")
    output = config.output[0]
    classes = int(np.prod(output.dims)) if all(dim > 0 for dim in output.dims) else 100_000
    activation = activation_of(config)
    found: list[list[Prediction]] = []
    # All classes come with their labels in one answer; softmax needs all of them.
    for batch, tensor in _batches(config, encoded):
        answer = yield from infer(config.name, tensor, [output.name], classes, timeout, {"version": version})
        rows = answer[output.name].reshape(len(batch), -1)
        found += [predictions(row, activation)[:top] for row in rows]
    return found


def segment(model: str, images: Images, version: str, timeout: float | None) -> Steps[list[Segmentation]]:
    """`Client.segment`."""
    encoded = given.encoded(images)
    config = yield from _config(model, version, "segmentation")
    labels, image_input = labels_of(config), image_input_of(config)
    found: list[Segmentation] = []
    for batch, tensor in _batches(config, encoded):
        answer = yield from infer(config.name, tensor, ["classes"], None, timeout, {"version": version})
        for image, classes in zip(batch, answer["classes"], strict=True):
            region = region_of(image_input, image)
            found.append(segmentation(region.map_in_image(classes), labels))
    return found


def detect(
    model: str, images: Images, min_score: float, version: str, timeout: float | None
) -> Steps[list[list[Detection]]]:
    """`Client.detect`."""
    encoded = given.encoded(images)
    min_score = given.share("min_score", min_score)
    config = yield from _config(model, version, "detection")
    labels, image_input = labels_of(config), image_input_of(config)
    names = ["boxes", "scores", "labels", "count"]
    found: list[list[Detection]] = []
    for batch, tensor in _batches(config, encoded):
        answer = yield from infer(config.name, tensor, names, None, timeout, {"version": version})
        for image, *row in zip(batch, *(answer[name] for name in names), strict=True):
            region = region_of(image_input, image)
            boxes, scores, indices, count = row
            real = slice(int(count.item()))
            kept = detections(region.boxes_in_image(boxes[real]), scores[real], indices[real], labels)
            found.append([each for each in kept if each.score >= min_score])
    return found


def _only_input(model: str, version: str) -> Steps[str]:
    """The name of the input of a model that has one."""
    metadata = yield from model_metadata(model, version)
    names = [tensor.name for tensor in metadata.inputs]
    if len(names) != 1:
        raise invalid(
            f"inputs is a single array, and model '{model}' has the inputs {', '.join(names)}: give arrays by name"
        )
    return names[0]


def _config(model: str, version: str, task: str) -> Steps[ModelConfig]:
    """The configuration of a model that is made for `task`."""
    config = yield from model_config(model, version)
    if not config.input or not config.output:
        raise invalid(f"model '{model}' has no input or no output")
    if task_of(config) != task:
        raise invalid(f"model '{model}' is for {task_of(config)}, not for {task}")
    return config


def _batches(config: ModelConfig, encoded: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], Inputs]]:
    """The images in batches of at most what the model takes, each with the input that holds them."""
    size = max(config.max_batch_size, 1)
    for start in range(0, len(encoded), size):
        batch = encoded[start : start + size]
        shape = (len(batch), 1) if config.max_batch_size > 0 else (1,)
        yield batch, {required_input(config).name: given.bytes_array(batch).reshape(shape)}


def _named(model: str, version: str, *, some: bool = False) -> dict[str, str]:
    """The fields that name a model; `some`, whether no name is all of them."""
    return {"name": given.text("model", model, empty=some), "version": given.text("version", version)}


def task_of(config: ModelConfig) -> str:
    """What the model is for: "classification" unless its config says otherwise."""
    return (config.parameters["task"].string_value if "task" in config.parameters else "") or "classification"


def required_input(config: ModelConfig) -> ModelInput:
    """The first input that a request has to have, which is that of the images where the model takes some."""
    return next((tensor for tensor in config.input if not tensor.optional), config.input[0])


def usual_outputs(config: ModelConfig) -> list[str] | None:
    """The outputs that most requests ask for, where the config names others that few do; None for all."""
    seldom = config.parameters["seldom_outputs"].string_value if "seldom_outputs" in config.parameters else ""
    few = {name.strip() for name in seldom.split(",")}
    return [output.name for output in config.output if output.name not in few] if seldom else None


def activation_of(config: ModelConfig) -> str:
    """What makes probabilities of a classifier's outputs; "none" unless its config says otherwise."""
    return (config.parameters["activation"].string_value if "activation" in config.parameters else "") or "none"


def labels_of(config: ModelConfig) -> list[str]:
    """The names of the classes, as a Convoy server adds them to the configuration; empty if it does not."""
    if "labels" not in config.parameters:
        return []
    try:
        return [str(label) for label in json.loads(config.parameters["labels"].string_value)]
    except (TypeError, ValueError) as error:
        raise ClientError(
            f"parameter 'labels' of model '{config.name}' is no JSON list", grpc.StatusCode.FAILED_PRECONDITION
        ) from error


def image_input_of(config: ModelConfig) -> ImageInput:
    """How a model's config makes inputs of images."""
    if "preprocess" not in config.parameters or not config.input:
        raise invalid(f"model '{config.name}' takes no image files: its config.pbtxt has no parameter 'preprocess'")
    try:
        channels_last = required_input(config).format == ModelInput.FORMAT_NHWC
        return image_input_from_json(config.parameters["preprocess"].string_value, channels_last)
    except InvalidModel as error:
        raise ClientError(f"model '{config.name}': {error}", grpc.StatusCode.FAILED_PRECONDITION) from error


def region_of(image_input: ImageInput, image: bytes) -> Region:
    """Where an encoded image lies in such an input."""
    try:
        return image_input.region(*image_size(image))
    except InvalidRequest as error:
        raise invalid(str(error)) from error
