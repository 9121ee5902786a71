"""A synchronous Python client: `from server.client import Client`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypedDict, TypeVar, Unpack

import grpc
import numpy as np
from numpy.typing import NDArray

from protos.inference import grpc_service_pb2 as pb
from protos.inference import grpc_service_pb2_grpc as rpc
from protos.inference.model_config_pb2 import ModelConfig
from server import datatypes
from server.datatypes import Array

DEFAULT_URL = "127.0.0.1:8001"
# A server that keeps gRPC's defaults calls more than one ping in five minutes abuse and hangs up.
_KEEPALIVE_MS = 300_000
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
)

# How gRPC words that it got no connection; a server's own UNAVAILABLE (loading, draining) reads otherwise.
_NO_CONNECTION = re.compile("failed to connect|errors resolving|DNS resolution failed")
_CAUSE = re.compile("connection refused|no route to host|network is unreachable|domain name not found", re.I)

Parameter = bool | int | float | str
Inputs = Mapping[str, "Array | Sequence[bytes]"]
_Message = TypeVar("_Message")


class ClientError(Exception):
    """A request that failed, in one line; `code` is the gRPC status, also where the client itself refuses."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


class Unreachable(ClientError):
    """No server answered at the url."""


class Prediction(NamedTuple):
    """One class of one image; `probability` is the bare output value where the model names no activation."""

    label: str
    class_index: int
    probability: float


class InferOptions(TypedDict, total=False):
    """Rarely needed arguments of `Client.infer`.

    Attributes:
        version: the model's version; the newest one that is served if left out.
        request_id: comes back in the answer and stands in the server's logs.
        priority: 1 is the most urgent; 0, the default, takes the model's own default.
        parameters: further request parameters, by name.
        datatypes: by input, for what numpy cannot say: {"input": "BF16"} rounds a float array to bfloat16.
    """

    version: str
    request_id: str
    priority: int
    parameters: Mapping[str, Parameter]
    datatypes: Mapping[str, str]


class Client:
    """A connection to one server; one client may be shared by any number of threads.

    Args:
        url: HOST:PORT, or a bare HOST for port 8001; also gRPC's own forms such as `unix:/run/convoy.sock`.
        timeout: seconds that a call may take unless the call itself says otherwise; None waits without end.

    Raises:
        ClientError: `url` is not such an address.
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout: float | None = 60.0) -> None:
        self.url = target(url)
        self._timeout = timeout
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
        request = pb.ModelReadyRequest(name=model, version=version)
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
        request = pb.ModelMetadataRequest(name=model, version=version)
        answer: pb.ModelMetadataResponse = self._call(self._stub.ModelMetadata, request)
        return answer

    def model_config(self, model: str, version: str = "") -> ModelConfig:
        """The model's configuration as the server runs it."""
        request = pb.ModelConfigRequest(name=model, version=version)
        answer: pb.ModelConfigResponse = self._call(self._stub.ModelConfig, request)
        return answer.config

    def statistics(self, model: str = "", version: str = "") -> list[pb.ModelStatistics]:
        """Counts and total times since loading, for every model and version that the names select."""
        request = pb.ModelStatisticsRequest(name=model, version=version)
        answer: pb.ModelStatisticsResponse = self._call(self._stub.ModelStatistics, request)
        return list(answer.model_stats)

    def infer(
        self,
        model: str,
        inputs: Inputs,
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
                as a BYTES tensor [n, 1]. Object, bytes and str arrays are BYTES too, in their own shape.
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
        if class_count is not None and outputs is None:
            metadata = self.model_metadata(model, options.get("version", ""))
            outputs = [output.name for output in metadata.outputs]
        request = infer_request(model, inputs, outputs=outputs, class_count=class_count, options=options)
        return self.send(request, timeout)

    def send(self, request: pb.ModelInferRequest, timeout: float | None = None) -> dict[str, Array]:
        """`infer` with a message that was made before, by `infer_request`."""
        answer: pb.ModelInferResponse = self._call(self._stub.ModelInfer, request, timeout)
        return _arrays(answer)

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
            For each image its classes, the most probable first.

        Raises:
            ClientError: a file cannot be read, or a request failed; nothing is returned then.
        """
        encoded = [image if isinstance(image, bytes) else _read(Path(image)) for image in images]
        config = self.model_config(model, version)
        if not config.input or not config.output:
            raise ClientError(f"model '{model}' has no input or no output", grpc.StatusCode.INVALID_ARGUMENT)
        output = config.output[0]
        classes = int(np.prod(output.dims)) if all(dim > 0 for dim in output.dims) else 100_000
        probabilities = _activation(config)
        predictions: list[list[Prediction]] = []
        size = max(config.max_batch_size, 1)
        for start in range(0, len(encoded), size):
            batch = encoded[start : start + size]
            shape = (len(batch), 1) if config.max_batch_size > 0 else (1,)
            # All classes come with their labels in one answer; softmax needs all of them.
            answer = self.infer(
                model,
                {config.input[0].name: _objects(batch).reshape(shape)},
                outputs=[output.name],
                class_count=classes,
                timeout=timeout,
                version=version,
            )
            rows = answer[output.name].reshape(len(batch), -1)
            predictions += [_predictions(row, probabilities)[:top] for row in rows]
        return predictions

    def _call(self, method: Callable[..., _Message], request: object, timeout: float | None = None) -> _Message:
        try:
            return method(request, timeout=self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise client_error(error, self.url) from error
        except ValueError as error:  # gRPC's word for a channel that was closed
            raise ClientError(str(error), grpc.StatusCode.CANCELLED) from error


def target(url: str) -> str:
    """`url` as gRPC takes it: a bare host gets the port 8001.

    Raises:
        ClientError: it is a web address or has no host.
    """
    if re.match(r"https?://", url):
        raise ClientError(
            f"url '{url}' is a web address, give the gRPC address as HOST:PORT, e.g. {DEFAULT_URL}",
            grpc.StatusCode.INVALID_ARGUMENT,
        )
    bare = url.removeprefix("grpc://").rstrip("/")
    if not bare or bare.startswith(":"):
        raise ClientError(
            f"url '{url}' names no host, give HOST:PORT, e.g. {DEFAULT_URL}", grpc.StatusCode.INVALID_ARGUMENT
        )
    return f"{bare}:8001" if re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", bare) else bare


def infer_request(
    model: str,
    inputs: Inputs,
    *,
    outputs: Sequence[str] | None = None,
    class_count: int | None = None,
    options: InferOptions | None = None,
) -> pb.ModelInferRequest:
    """The message that `Client.infer` sends; the arguments are the same.

    Raises:
        ClientError: an input or a parameter is of a type that the protocol cannot carry.
    """
    options = options or {}
    request = pb.ModelInferRequest(
        model_name=model, model_version=options.get("version", ""), id=options.get("request_id", "")
    )
    wanted = options.get("datatypes", {})
    for name, value in inputs.items():
        array = value if isinstance(value, np.ndarray) else _objects(value).reshape(-1, 1)
        try:
            raw = datatypes.encode(array, wanted.get(name))
        except ValueError as error:
            raise ClientError(f"input '{name}': {error}", grpc.StatusCode.INVALID_ARGUMENT) from error
        datatype = wanted.get(name) or datatypes.datatype(array.dtype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(raw)
    for name in outputs or ():
        requested = request.outputs.add(name=name)
        if class_count is not None:
            requested.parameters["classification"].int64_param = class_count
    if options.get("priority"):
        request.parameters["priority"].uint64_param = options["priority"]
    for name, parameter in options.get("parameters", {}).items():
        _set_parameter(request.parameters[name], parameter)
    return request


def client_error(error: grpc.RpcError, url: str) -> ClientError:
    """One line from a failed call; `Unreachable` where it is the connection that failed, not the server."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and _NO_CONNECTION.match(details):
        known = _CAUSE.search(details)
        return Unreachable(f"no server at {url} ({known[0].lower() if known else details})", code)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and details in ("", "Deadline Exceeded"):
        details = f"no answer from {url} within the timeout"
    return ClientError(details or f"{code.name} from {url}", code)


def _set_parameter(message: pb.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):  # before int: True is one
        message.bool_param = value
    elif isinstance(value, int):
        message.int64_param = value
    elif isinstance(value, float):
        message.double_param = value
    else:
        message.string_param = value


def _objects(elements: Sequence[bytes]) -> NDArray[np.object_]:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read image '{path}': {error.strerror}", grpc.StatusCode.INVALID_ARGUMENT) from error


def _arrays(answer: pb.ModelInferResponse) -> dict[str, Array]:
    if len(answer.raw_output_contents) != len(answer.outputs):
        raise ClientError(
            f"the answer has {len(answer.outputs)} outputs, {len(answer.raw_output_contents)} raw contents",
            grpc.StatusCode.INTERNAL,
        )
    try:
        return {
            output.name: datatypes.decode(output.datatype, output.shape, raw)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
    except ValueError as error:
        raise ClientError(f"the answer cannot be read: {error}", grpc.StatusCode.INTERNAL) from error


def _activation(config: ModelConfig) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    name = config.parameters["activation"].string_value if "activation" in config.parameters else "none"
    known = {"softmax": _softmax, "none": lambda values: values}
    if name not in known:
        raise ClientError(
            f"model '{config.name}' has the activation '{name}', this client knows {', '.join(known)}",
            grpc.StatusCode.UNIMPLEMENTED,
        )
    return known[name]


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(values - values.max())
    result: NDArray[np.float64] = exponentials / exponentials.sum()
    return result


def _predictions(row: Array, activation: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> list[Prediction]:
    """The classes of one row, given as `bytes` "value:index" or "value:index:label", the best first."""
    fields = [element.decode().split(":", 2) for element in row]
    probabilities = activation(np.array([float(field[0]) for field in fields]))
    return [
        Prediction(field[2] if len(field) > 2 else field[1], int(field[1]), float(probability))
        for field, probability in zip(fields, probabilities, strict=True)
    ]
