"""What front ends and decoders do for requests, done beside engines while those are measured.

`python -m convoynet.server.models.service_load FD BYTES [JSON]`, started by `Beside` alone, does it in a process.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from subprocess import Popen
from typing import Any

import numpy as np

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.images.images import ImageInput
from convoynet.server.supervision import ending, processes, tasks

_START_SECONDS = 20.0
"""What a process may take until it is ready."""
_ROWS_SECONDS = 20.0
"""What the work for one batch may take."""
_CHUNK = 2**15
_TIMES = 3
"""How often a row's message is passed on. Measured, for tensors of 4 to 600 KB: once takes a third of what a request
costs in front end and core."""
_IMAGE = 500, 375
"""Width and height of the photograph that is decoded again and again."""


class BesideFailed(Exception):
    """The processes do not start, or do not go on."""


class Beside:
    """Processes that work for every row which an engine answers: so much of the CPU is not the engine's in service."""

    def __init__(self) -> None:
        self._ways: list[socket.socket] = []
        self._locks: list[asyncio.Lock] = []
        self._processes: list[Popen[bytes]] = []
        self._turn = itertools.count()

    @classmethod
    async def start(cls, count: int, row_bytes: int, image: ImageInput | None = None) -> Beside:
        """Starts them.

        Args:
            count: How many: one for each front end or decoder.
            row_bytes: What a request of one row brings.
            image: How the model takes encoded images, which are decoded then.

        Raises:
            BesideFailed: They do not start.
        """
        beside = cls()
        arguments = [str(max(row_bytes, 1))] + ([] if image is None else [_to_json(image)])
        try:
            for _ in range(count):
                beside._spawn(arguments)
            async with asyncio.timeout(_START_SECONDS):
                await tasks.together(*(_done(way) for way in beside._ways))
        except BaseException as error:
            await beside.close()
            if isinstance(error, OSError):
                raise BesideFailed(str(error) or f"it is not ready within {_START_SECONDS:g} s") from None
            raise
        return beside

    def _spawn(self, arguments: Sequence[str]) -> None:
        with ExitStack() as undo:
            way, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(way.close)
            with other:
                module, descriptor = "convoynet.server.models.service_load", other.fileno()
                self._processes.append(processes.spawn(module, str(descriptor), *arguments, descriptors=(descriptor,)))
            undo.pop_all()
        way.setblocking(False)
        self._ways.append(way)
        self._locks.append(asyncio.Lock())

    async def serve(self, rows: int) -> None:
        """Has the work for so many rows done, each process its part.

        Raises:
            BesideFailed: A process has died, or takes too long.
        """
        first, count = next(self._turn), len(self._ways)
        parts = [(rows + (first + at) % count) // count for at in range(count)]
        try:
            async with asyncio.timeout(_ROWS_SECONDS):
                await tasks.together(*(self._ask(at, part) for at, part in enumerate(parts) if part))
        except OSError as error:
            raise BesideFailed(str(error) or f"{rows} rows take more than {_ROWS_SECONDS:g} s") from None

    async def _ask(self, at: int, rows: int) -> None:
        async with self._locks[at]:
            await asyncio.get_running_loop().sock_sendall(self._ways[at], rows.to_bytes(4, "big"))
            await _done(self._ways[at])

    async def close(self) -> None:
        """Ends them; nobody may be waiting for them."""
        for way in self._ways:
            way.close()
        await asyncio.gather(*(ending.end(process) for process in self._processes))


async def _done(way: socket.socket) -> None:
    """Waits until a process says that it is ready."""
    if not await asyncio.get_running_loop().sock_recv(way, 1):
        raise OSError("it has died")


class Work:
    """What a request of one row takes, from the socket to its place in a batch, and its answer's way back."""

    def __init__(self, row_bytes: int, image: ImageInput | None) -> None:
        self._image = image
        asked = pb.ModelInferRequest(model_name="model")
        asked.inputs.add(name="input", datatype="UINT8", shape=[1, row_bytes])
        asked.raw_input_contents.append(bytes(row_bytes) if image is None else _photograph())
        self._asked = memoryview(asked.SerializeToString())
        self._into = memoryview(bytearray(max(len(self._asked), 4096)))
        self._batch = np.zeros(len(asked.raw_input_contents[0]), np.uint8)
        self._client, self._server = socket.socketpair()

    def row(self) -> None:
        """Does it for one request."""
        for _ in range(_TIMES):
            asked = self._passed_on()
        if self._image is not None:
            self._image.decode(asked, _IMAGE[0] * _IMAGE[1])

    def close(self) -> None:
        """Closes its sockets."""
        self._client.close()
        self._server.close()

    def _passed_on(self) -> bytes:
        request = pb.ModelInferRequest.FromString(bytes(self._through(self._asked)))
        self._batch[:] = np.frombuffer(request.raw_input_contents[0], np.uint8)
        answer = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        answer.outputs.add(name="output", datatype="FP32", shape=[1, 250])
        answer.raw_output_contents.append(bytes(1000))
        self._through(memoryview(answer.SerializeToString()))
        return request.raw_input_contents[0]

    def _through(self, data: memoryview) -> memoryview:
        """Bytes that come out of a socket, piece by piece."""
        for at in range(0, len(data), _CHUNK):
            piece = data[at : at + _CHUNK]
            self._client.sendall(piece)
            end = at + len(piece)
            while at < end:
                at += self._server.recv_into(self._into[at:end])  # noqa: PLW2901
        return self._into[: len(data)]


def _to_json(image: ImageInput) -> str:
    """What decoding an image takes; the numbers that it is scaled with do not matter."""
    stated = {name: getattr(image, name) for name in ("color", "resize", "size", "interpolation", "fill")}
    return json.dumps({**stated, "channels_last": image.channels_last, "scaled": image.scale is not None})


def _from_json(text: str) -> ImageInput:
    stated: dict[str, Any] = json.loads(text)
    scaled, color = stated.pop("scaled"), stated["color"]
    numbers = np.ones(1 if color == "L" else 3, np.float32) if scaled else None
    stated |= {name: tuple(value) for name, value in stated.items() if isinstance(value, list)}
    return ImageInput(**stated, scale=numbers, shift=numbers)


def _photograph() -> bytes:
    """A JPEG with large and small shapes, as photographs have."""
    from PIL import Image

    numbers, found = np.random.default_rng(0), io.BytesIO()
    coarse = Image.fromarray(numbers.integers(0, 256, (12, 16, 3), np.uint8)).resize(_IMAGE, Image.Resampling.BICUBIC)
    fine = numbers.integers(-12, 13, (*_IMAGE[::-1], 3))
    Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)).save(found, "JPEG", quality=85)
    return found.getvalue()


def main() -> None:
    """Does the work for as many rows as it is told to, until the other side is gone."""
    # The server alone ends it: terminals and service managers signal every process of a group.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    way = socket.socket(fileno=int(sys.argv[1]))
    work = Work(int(sys.argv[2]), _from_json(sys.argv[3]) if len(sys.argv) > 3 else None)
    work.row()
    way.send(b"\0")
    while asked := way.recv(4):
        for _ in range(int.from_bytes(asked, "big")):
            work.row()
        way.send(b"\0")


if __name__ == "__main__":
    main()
