"""A synchronous Python client: `from convoynet import Client`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc as rpc
from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client import given, operations
from convoynet.server.client.access import Security
from convoynet.server.client.client_codec import InferOptions, Inputs, infer_request
from convoynet.server.client.connection import CHANNEL_OPTIONS, DEFAULT_URL, connect, target
from convoynet.server.client.errors import ClientError, Unreachable
from convoynet.server.client.operations import Ask, Images, Steps, activation_of, task_of
from convoynet.server.client.results import ClassShare, Detection, Prediction, Segmentation
from convoynet.server.client.retries import RETRIES, Attempts, checked
from convoynet.server.datatypes import Array

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
    "activation_of",
    "infer_request",
    "target",
    "task_of",
]

_Result = TypeVar("_Result")


class Client:
    """A connection to one server; one client may be shared by any number of threads.

    Args:
        url: HOST:PORT, or a bare HOST for port 8001; also gRPC's own forms such as `unix:/run/convoy.sock`, and
            grpcs://HOST:PORT for TLS.
        timeout: seconds that a call may take unless the call itself says otherwise; None waits without end.
        retries: how often a call is sent again where the server asks for that (a full queue, a model that loads),
            within the timeout; 0 turns it off.
        security: TLS, certificates and the token: see `access.Security`. What is not given comes from the environment:
            CONVOY_CA, CONVOY_CERT, CONVOY_KEY, CONVOY_TOKEN.

    Raises:
        ClientError: `url` is not such an address, `timeout` no time, or `security` cannot be used.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = 60.0,
        retries: int = RETRIES,
        **security: Unpack[Security],
    ) -> None:
        self.connection = connect(url, security)
        self.url = self.connection.url
        self._timeout, self._retries = given.seconds("timeout", timeout), checked(retries)
        self._channel = self.connection.channel()
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
        return self._run(operations.server_ready())

    def model_ready(self, model: str, version: str = "") -> bool:
        """Whether the model can be asked now; False too for one that the server does not know."""
        return self._run(operations.model_ready(model, version))

    def models(self) -> list[str]:
        """Sorted names of the models that are loaded."""
        return self._run(operations.models())

    def server_metadata(self) -> pb.ServerMetadataResponse:
        """The server's name, version and protocol extensions."""
        return self._run(operations.server_metadata())

    def model_metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """Versions, and name, datatype and shape of every input and output (-1: any size)."""
        return self._run(operations.model_metadata(model, version))

    def model_config(self, model: str, version: str = "") -> ModelConfig:
        """The model's configuration as the server runs it."""
        return self._run(operations.model_config(model, version))

    def statistics(self, model: str = "", version: str = "") -> list[pb.ModelStatistics]:
        """Counts and total times since loading, for every model and version that the names select."""
        return self._run(operations.statistics(model, version))

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
        return self._run(operations.infer(model, inputs, outputs, class_count, timeout, options))

    def send(self, request: pb.ModelInferRequest, timeout: float | None = None) -> dict[str, Array]:
        """`infer` with a message that was made before, by `infer_request`."""
        return self._run(operations.send(request, timeout))

    def classify(
        self,
        model: str,
        images: Images,
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
        return self._run(operations.classify(model, images, top, version, timeout))

    def segment(
        self,
        model: str,
        images: Images,
        *,
        version: str = "",
        timeout: float | None = None,
    ) -> list[Segmentation]:
        """The class of every pixel of encoded images; arguments and errors are those of `classify`.

        Returns:
            For each image the classes of its own pixels: resizing, cropping and padding are undone.
        """
        return self._run(operations.segment(model, images, version, timeout))

    def detect(
        self,
        model: str,
        images: Images,
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
        return self._run(operations.detect(model, images, min_score, version, timeout))

    def _run(self, steps: Steps[_Result]) -> _Result:
        try:
            asked = next(steps)
            while True:
                try:
                    answer = self._call(asked)
                except ClientError as error:
                    asked = steps.throw(error)
                else:
                    asked = steps.send(answer)
        except StopIteration as done:
            result: _Result = done.value
            return result

    def _call(self, asked: Ask) -> Any:
        timeout = self._timeout if asked.timeout is None else given.seconds("timeout", asked.timeout)
        attempts, method = Attempts(timeout, self._retries), getattr(self._stub, asked.rpc)
        while True:
            try:
                return method(asked.request, timeout=attempts.timeout(), metadata=self.connection.metadata)
            except grpc.RpcError as error:
                wait = attempts.wait_s(error)
                if wait is None:
                    raise self.connection.error(error) from error
            except ValueError as error:  # gRPC's word for a channel that was closed
                raise ClientError(str(error), grpc.StatusCode.CANCELLED) from error
            time.sleep(wait)
