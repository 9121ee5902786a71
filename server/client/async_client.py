"""The client for programs with an event loop: `from convoynet import AsyncClient`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc as rpc
from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client import given, operations
from convoynet.server.client.access import Security
from convoynet.server.client.client_codec import InferOptions, Inputs
from convoynet.server.client.connection import DEFAULT_URL, connect
from convoynet.server.client.errors import ClientError
from convoynet.server.client.operations import Ask, Images, Steps
from convoynet.server.client.results import Detection, Prediction, Segmentation
from convoynet.server.client.retries import RETRIES, Attempts, checked
from convoynet.server.datatypes import Array

_Result = TypeVar("_Result")


class AsyncClient:
    """`Client` with methods that are awaited; any number of tasks of one event loop may share it.

    It connects at the first call, so that it may be made before there is a loop. A task that is cancelled cancels its
    call, and the server drops the request. Files that `classify` and its like are given by their paths are read on
    the loop: where they are large or far away, give their bytes.

    Args:
        url: as of `Client`, like all that follow.
        timeout: seconds that a call may take unless the call itself says otherwise; None waits without end.
        retries: how often a call is sent again where the server asks for that; 0 turns it off.
        security: TLS, certificates and the token: see `access.Security`.

    Raises:
        ClientError: `url` is no address, `timeout` no time, or `security` cannot be used.
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
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run fail with CANCELLED."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def server_ready(self) -> bool:
        """As `Client.server_ready`."""
        return await self._run(operations.server_ready())

    async def model_ready(self, model: str, version: str = "") -> bool:
        """As `Client.model_ready`."""
        return await self._run(operations.model_ready(model, version))

    async def models(self) -> list[str]:
        """As `Client.models`."""
        return await self._run(operations.models())

    async def server_metadata(self) -> pb.ServerMetadataResponse:
        """As `Client.server_metadata`."""
        return await self._run(operations.server_metadata())

    async def model_metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """As `Client.model_metadata`."""
        return await self._run(operations.model_metadata(model, version))

    async def model_config(self, model: str, version: str = "") -> ModelConfig:
        """As `Client.model_config`."""
        return await self._run(operations.model_config(model, version))

    async def statistics(self, model: str = "", version: str = "") -> list[pb.ModelStatistics]:
        """As `Client.statistics`."""
        return await self._run(operations.statistics(model, version))

    async def infer(
        self,
        model: str,
        inputs: Inputs | Array,
        *,
        outputs: Sequence[str] | None = None,
        class_count: int | None = None,
        timeout: float | None = None,
        **options: Unpack[InferOptions],
    ) -> dict[str, Array]:
        """As `Client.infer`."""
        return await self._run(operations.infer(model, inputs, outputs, class_count, timeout, options))

    async def send(self, request: pb.ModelInferRequest, timeout: float | None = None) -> dict[str, Array]:
        """As `Client.send`."""
        return await self._run(operations.send(request, timeout))

    async def classify(
        self,
        model: str,
        images: Images,
        *,
        top: int | None = None,
        version: str = "",
        timeout: float | None = None,
    ) -> list[list[Prediction]]:
        """As `Client.classify`."""
        return await self._run(operations.classify(model, images, top, version, timeout))

    async def segment(
        self, model: str, images: Images, *, version: str = "", timeout: float | None = None
    ) -> list[Segmentation]:
        """As `Client.segment`."""
        return await self._run(operations.segment(model, images, version, timeout))

    async def detect(
        self,
        model: str,
        images: Images,
        *,
        min_score: float = 0.5,
        version: str = "",
        timeout: float | None = None,
    ) -> list[list[Detection]]:
        """As `Client.detect`."""
        return await self._run(operations.detect(model, images, min_score, version, timeout))

    async def _run(self, steps: Steps[_Result]) -> _Result:
        try:
            asked = next(steps)
            while True:
                try:
                    answer = await self._call(asked)
                except ClientError as error:
                    asked = steps.throw(error)
                else:
                    asked = steps.send(answer)
        except StopIteration as done:
            result: _Result = done.value
            return result

    async def _call(self, asked: Ask) -> Any:
        timeout = self._timeout if asked.timeout is None else given.seconds("timeout", asked.timeout)
        attempts, method = Attempts(timeout, self._retries), getattr(self._connected(), asked.rpc)
        while True:
            try:
                return await method(asked.request, timeout=attempts.timeout(), metadata=self.connection.metadata)
            except grpc.RpcError as error:
                wait = attempts.wait_s(error)
                if wait is None:
                    # In a thread: to find the cause, it may take a look at the server.
                    raise await asyncio.to_thread(self.connection.error, error) from error
            except (asyncio.CancelledError, grpc.aio.UsageError) as error:
                task = asyncio.current_task()
                if not self._closed or (task is not None and task.cancelling()):
                    raise
                raise _closed() from error
            await asyncio.sleep(wait)

    def _connected(self) -> Any:
        """The stub of the channel, which belongs to the loop of the first call."""
        if self._closed:
            raise _closed()
        if self._stub is None:
            self._channel = self.connection.aio_channel()
            self._stub = rpc.GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        return self._stub


def _closed() -> ClientError:
    return ClientError("the client is closed", grpc.StatusCode.CANCELLED)
