"""A synchronous Python client: `from convoynet import Client`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc as rpc
from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client import given
from convoynet.server.client.client_codec import InferOptions, Inputs, arrays_from_response, infer_request
from convoynet.server.client.connection import (
    CHANNEL_OPTIONS,
    DEFAULT_URL,
    ClientError,
    Unreachable,
    client_error,
    target,
)
from convoynet.server.client.results import (
    ClassShare,
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

__all__ = [
    "CHANNEL_OPTIONS",
    "DEFAULT_URL",
    "ClassShare",
    "Client",
    "ClientError",
    "Detection",
    "InferOptions",
    "Prediction",
    "Segmentation",
    "Unreachable",
    "infer_request",
    "target",
    "task_of",
]


_Message = TypeVar("_Message")


class Client:
    """A connection to one server; one client may be shared by any number of threads.

    Args:
        url: HOST:PORT, or a bare HOST for port 8001; also gRPC's own forms such as `unix:/run/convoy.sock`.
        timeout: seconds that a call may take unless the call itself says otherwise; None waits without end.

    Raises:
        ClientError: `url` is not such an address, or `timeout` no time.
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout: float | None = 60.0) -> None:
        self.url = target(url)
        self._timeout = given.seconds("timeout", timeout)
        self._channel = grpc.insecure_channel(self.url, options=CHANNEL_OPTIONS)
        self._stub = rpc.GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that still run fail with CANCELLED."""
        self._channel.close()

    def server_ready(self) -> bool:
        """Whether a server answers at the url and says that it is ready."""
        try:
            answer: pb.ServerReadyResponse = self._call(self._stub.ServerReady, pb.ServerReadyRequest())
        except Unreachable:
            return False
        return answer.ready

    def model_ready(self, model: str, version: str = "") -> bool:
        """Whether the model can be asked now; False too for one that the server does not know."""
        request = pb.ModelReadyRequest(**_named(model, version))
        answer: pb.ModelReadyResponse = self._call(self._stub.ModelReady, request)
        return answer.ready

    def models(self) -> list[str]:
        """Sorted names of the models that are loaded."""
        request = pb.RepositoryIndexRequest(ready=True)
        try:
            answer: pb.RepositoryIndexResponse = self._call(self._stub.RepositoryIndex, request)
        except ClientError as error:
            if error.code is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            return sorted({model.name for model in self.statistics()})
        return sorted({model.name for model in answer.models})

    def server_metadata(self) -> pb.ServerMetadataResponse:
        """The server's name, version and protocol extensions."""
        answer: pb.ServerMetadataResponse = self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest())
        return answer

    def model_metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """Versions, and name, datatype and shape of every input and output (-1: any size)."""
        request = pb.ModelMetadataRequest(**_named(model, version))
        answer: pb.ModelMetadataResponse = self._call(self._stub.ModelMetadata, request)
        return answer

    def model_config(self, model: str, version: str = "") -> ModelConfig:
        """The model's configuration as the server runs it."""
        request = pb.ModelConfigRequest(**_named(model, version))
        answer: pb.ModelConfigResponse = self._call(self._stub.ModelConfig, request)
        return answer.config

    def statistics(self, model: str = "", version: str = "") -> list[pb.ModelStatistics]:
        """Counts and total times since loading, for every model and version that the names select."""
        request = pb.ModelStatisticsRequest(**_named(model or "", version, some=True))
        answer: pb.ModelStatisticsResponse = self._call(self._stub.ModelStatistics, request)
        return list(answer.model_stats)

    def infer(
        self,
        model: str,
        inputs: Inputs | Array,
        *,
        outputs: Sequence[str] | None = None,
        class_count: int | None = None,
        timeout: float | None = None,
        **options: Unpack[InferOptions],
    ) -> dict[str, Array]:
        """Run the model once.

        Args:
            model: its name.
            inputs: by name, an array with the batch axis first, or a list of `bytes` (encoded images), sent
                as a BYTES tensor [n, 1]. Object, bytes and str arrays are BYTES too, in their own shape. What
                numpy.asarray takes for an array, such as a CPU tensor of PyTorch's, is one. Without a name, the
                one input of the model, for which a second call asks.
            outputs: names of the outputs to return; all if None.
            class_count: return the best k classes of each row instead of all values, as BYTES
                "value:index:label" [n, k]; without `outputs` it costs a second call, for their names.
            timeout: seconds, instead of the client's own.
            options: see `InferOptions`.

        Returns:
            Arrays by output name (read-only views); BYTES as object arrays of `bytes`, BF16 as float32.

        Raises:
            ClientError: the request cannot be sent as it is, or failed.
        """
        if not isinstance(inputs, Mapping):
            only = given.array("inputs", inputs)
            inputs = {self._only_input(model, options.get("version", "")): only}
        if class_count is not None and outputs is None:
            metadata = self.model_metadata(model, options.get("version", ""))
            outputs = [output.name for output in metadata.outputs]
        request = infer_request(model, inputs, outputs=outputs, class_count=class_count, options=options)
        return self.send(request, timeout)

    def send(self, request: pb.ModelInferRequest, timeout: float | None = None) -> dict[str, Array]:
        """`infer` with a message that was made before, by `infer_request`."""
        if not isinstance(request, pb.ModelInferRequest):
            raise given.refusal("request", request, "what infer_request() makes")
        answer: pb.ModelInferResponse = self._call(self._stub.ModelInfer, request, timeout)
        return arrays_from_response(answer)

    def classify(
        self,
        model: str,
        images: Iterable[str | Path | bytes],
        *,
        top: int | None = None,
        version: str = "",
        timeout: float | None = None,
    ) -> list[list[Prediction]]:
        """Classify encoded images (JPEG, PNG, ...), which the server decodes as the model wants them.

        Args:
            model: its name.
            images: paths, or the files' bytes; sent in batches of at most what the model takes.
            top: classes to return for each image; all if None.
            version: the model's version; the newest one that is served if empty.
            timeout: seconds for each batch, instead of the client's own.

        Returns:
            For each image its classes, the most probable first; with their bare outputs instead of probabilities
            where the model's config names no activation.

        Raises:
            ClientError: a file cannot be read, or a request failed; nothing is returned then.
        """
        encoded = given.encoded(images)
        top = None if top is None else given.whole("top", top, 1)
        config = self._config(model, version, "classification")
        output = config.output[0]
        classes = int(np.prod(output.dims)) if all(dim > 0 for dim in output.dims) else 100_000
        activation = activation_of(config)
        found: list[list[Prediction]] = []
        # All classes come with their labels in one answer; softmax needs all of them.
        for batch, answer in self._batches(config, encoded, [output.name], timeout, version, class_count=classes):
            rows = answer[output.name].reshape(len(batch), -1)
            found += [predictions(row, activation)[:top] for row in rows]
        return found

    def segment(
        self,
        model: str,
        images: Iterable[str | Path | bytes],
        *,
        version: str = "",
        timeout: float | None = None,
    ) -> list[Segmentation]:
        """The class of every pixel of encoded images; arguments and errors are those of `classify`.

        Returns:
            For each image the classes of its own pixels: resizing, cropping and padding are undone.
        """
        encoded = given.encoded(images)
        config = self._config(model, version, "segmentation")
        labels, image_input = _labels(config), _image_input(config)
        found: list[Segmentation] = []
        for batch, answer in self._batches(config, encoded, ["classes"], timeout, version):
            for image, classes in zip(batch, answer["classes"], strict=True):
                region = _region(image_input, image)
                found.append(segmentation(region.map_in_image(classes), labels))
        return found

    def detect(
        self,
        model: str,
        images: Iterable[str | Path | bytes],
        *,
        min_score: float = 0.5,
        version: str = "",
        timeout: float | None = None,
    ) -> list[list[Detection]]:
        """The objects in encoded images; arguments and errors are those of `classify`.

        Args:
            model: its name.
            images: paths, or the files' bytes.
            min_score: objects with a lower score are left out, 0..1.
            version: the model's version; the newest one that is served if empty.
            timeout: seconds for each batch, instead of the client's own.

        Returns:
            For each image its objects, the highest score first, with boxes in pixels of that image.
        """
        encoded = given.encoded(images)
        min_score = given.share("min_score", min_score)
        config = self._config(model, version, "detection")
        labels, image_input = _labels(config), _image_input(config)
        names = ["boxes", "scores", "labels", "count"]
        found: list[list[Detection]] = []
        for batch, answer in self._batches(config, encoded, names, timeout, version):
            for image, *row in zip(batch, *(answer[name] for name in names), strict=True):
                region = _region(image_input, image)
                boxes, scores, indices, count = row
                real = slice(int(count.item()))
                kept = detections(region.boxes_in_image(boxes[real]), scores[real], indices[real], labels)
                found.append([each for each in kept if each.score >= min_score])
        return found

    def _only_input(self, model: str, version: str) -> str:
        """The name of the input of a model that has one."""
        names = [tensor.name for tensor in self.model_metadata(model, version).inputs]
        if len(names) != 1:
            raise ClientError(
                f"inputs is a single array, and model '{model}' has the inputs {', '.join(names)}: give arrays by name",
                grpc.StatusCode.INVALID_ARGUMENT,
            )
        return names[0]

    def _config(self, model: str, version: str, task: str) -> ModelConfig:
        """The configuration of a model that is made for `task`."""
        config = self.model_config(model, version)
        if not config.input or not config.output:
            raise ClientError(f"model '{model}' has no input or no output", grpc.StatusCode.INVALID_ARGUMENT)
        if task_of(config) != task:
            raise ClientError(
                f"model '{model}' is for {task_of(config)}, not for {task}", grpc.StatusCode.INVALID_ARGUMENT
            )
        return config

    def _batches(
        self,
        config: ModelConfig,
        encoded: Sequence[bytes],
        outputs: Sequence[str],
        timeout: float | None,
        version: str,
        *,
        class_count: int | None = None,
    ) -> Iterator[tuple[Sequence[bytes], dict[str, Array]]]:
        """The images in batches of at most what the model takes, each with its answer."""
        size = max(config.max_batch_size, 1)
        for start in range(0, len(encoded), size):
            batch = encoded[start : start + size]
            shape = (len(batch), 1) if config.max_batch_size > 0 else (1,)
            answer = self.infer(
                config.name,
                {config.input[0].name: given.bytes_array(batch).reshape(shape)},
                outputs=outputs,
                class_count=class_count,
                timeout=timeout,
                version=version,
            )
            yield batch, answer

    def _call(self, method: Callable[..., _Message], request: object, timeout: float | None = None) -> _Message:
        limit = self._timeout if timeout is None else given.seconds("timeout", timeout)
        try:
            return method(request, timeout=limit)
        except grpc.RpcError as error:
            raise client_error(error, self.url) from error
        except ValueError as error:  # gRPC's word for a channel that was closed
            raise ClientError(str(error), grpc.StatusCode.CANCELLED) from error


def _named(model: str, version: str, *, some: bool = False) -> dict[str, str]:
    """The fields that name a model; `some`, whether no name is all of them."""
    return {"name": given.text("model", model, empty=some), "version": given.text("version", version)}


def task_of(config: ModelConfig) -> str:
    """What the model is for: "classification" unless its config says otherwise."""
    return (config.parameters["task"].string_value if "task" in config.parameters else "") or "classification"


def activation_of(config: ModelConfig) -> str:
    """What makes probabilities of a classifier's outputs; "none" unless its config says otherwise."""
    return (config.parameters["activation"].string_value if "activation" in config.parameters else "") or "none"


def _labels(config: ModelConfig) -> list[str]:
    """The names of the classes, as a Convoy server adds them to the configuration; empty if it does not."""
    if "labels" not in config.parameters:
        return []
    try:
        return [str(label) for label in json.loads(config.parameters["labels"].string_value)]
    except (TypeError, ValueError) as error:
        raise ClientError(
            f"parameter 'labels' of model '{config.name}' is no JSON list", grpc.StatusCode.FAILED_PRECONDITION
        ) from error


def _image_input(config: ModelConfig) -> ImageInput:
    if "preprocess" not in config.parameters:
        raise ClientError(
            f"model '{config.name}' takes no image files: its config.pbtxt has no parameter 'preprocess'",
            grpc.StatusCode.INVALID_ARGUMENT,
        )
    try:
        return image_input_from_json(config.parameters["preprocess"].string_value, channels_last=False)
    except InvalidModel as error:
        raise ClientError(f"model '{config.name}': {error}", grpc.StatusCode.FAILED_PRECONDITION) from error


def _region(image_input: ImageInput, image: bytes) -> Region:
    try:
        return image_input.region(*image_size(image))
    except InvalidRequest as error:
        raise ClientError(str(error), grpc.StatusCode.INVALID_ARGUMENT) from error
