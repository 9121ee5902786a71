"""A client that writes the frames of HTTP/2 that a test wants, and reads what comes of them."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections import defaultdict
from dataclasses import dataclass, field

from hpack import Decoder

from convoynet.server.http2.frames import PREFACE

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
NEVER = 255
SERVICE = "inference.GRPCInferenceService"
FIELDS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": f"/{SERVICE}/ModelInfer",
    ":authority": "test",
    "content-type": "application/grpc",
    "te": "trailers",
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def number(value: int) -> bytes:
    """What resets and updates of windows hold."""
    return struct.pack(">I", value)


def settings(**values: int) -> bytes:
    """A frame of settings: `_4=0` is a window of 0."""
    pairs = (struct.pack(">HI", int(name[1:]), value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, b"".join(pairs))


def message(payload: bytes, *, compressed: int = 0) -> bytes:
    """A message of gRPC."""
    return struct.pack(">BI", compressed, len(payload)) + payload


def block(fields: dict[str, str], **more: str | None) -> bytes:
    """Headers that go into no table, in latin-1; None leaves one out."""
    pairs = {**fields, **{name.replace("_", "-"): value for name, value in more.items()}}
    return b"".join(literal(name, value) for name, value in pairs.items() if value is not None)


def literal(name: str, value: str) -> bytes:
    """One header that goes into no table."""
    return b"\0" + b"".join(_length(len(text)) + text for text in (name.encode("latin-1"), value.encode("latin-1")))


def _length(size: int) -> bytes:
    if size < 127:
        return bytes([size])
    rest, written = size - 127, bytearray([127])
    while rest >= 128:
        written.append(rest % 128 + 128)
        rest //= 128
    return bytes([*written, rest])


def rpc_path(rpc: str) -> dict[str, str]:
    """The headers of a call of one of the protocol's own methods, or of a whole path."""
    return {**FIELDS, ":path": rpc if rpc.startswith("/") else f"/{SERVICE}/{rpc}"}


@dataclass
class Answer:
    """What came on one stream.

    Attributes:
        fields: Headers and trailers together.
        data: Of all frames.
        ended: Whether the server has ended its side.
        reset: The code of a reset; -1 for none.
    """

    fields: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    ended: bool = False
    reset: int = -1

    @property
    def status(self) -> str:
        """Of gRPC."""
        return self.fields.get("grpc-status", "")

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.ended or self.reset >= 0


@dataclass
class Received:
    """What a server has sent, in the order in which it came, and by stream."""

    answers: defaultdict[int, Answer] = field(default_factory=lambda: defaultdict(Answer))
    frames: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    gone: tuple[int, int, str] | None = None
    """The last stream, code, and text of GOAWAY."""
    _decoder: Decoder = field(default_factory=Decoder)
    _rest: bytes = b""

    def feed(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """Takes bytes; the frames that are whole."""
        data, found = self._rest + data, []
        while len(data) >= 9 and len(data) >= 9 + (size := int.from_bytes(data[:3], "big")):
            kind, flags, stream = data[3], data[4], int.from_bytes(data[5:9], "big")
            assert size <= 2**14, "larger than a client takes"
            self._take(kind, flags, stream, data[9 : 9 + size])
            found.append((kind, flags, stream, data[9 : 9 + size]))
            data = data[9 + size :]
        self._rest = data
        self.frames += found
        return found

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (HEADERS, DATA):
            answer = self.answers[stream]
            assert not answer.over, "something after the end"
            if kind == HEADERS:
                assert flags & END_HEADERS
                answer.fields.update({str(name): str(value) for name, value in self._decoder.decode(payload)})
            else:
                assert ":status" in answer.fields, "data before headers"
                answer.data += payload
            answer.ended = bool(flags & END_STREAM)
        elif kind == RST_STREAM:
            self.answers[stream].reset = int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            assert self.gone is None or last <= self.gone[0], "a last stream that grows"
            self.gone = last, code, payload[8:].decode()

    def count(self, kind: int, flags: int = 0) -> int:
        """Frames of a kind with these flags."""
        return sum(found[0] == kind and found[1] & flags == flags for found in self.frames)


class RawClient:
    """A client of one connection; it answers pings, and gives no windows that nobody asked it to.

    Attributes:
        received: What came.
        closed: Whether the server has closed the connection.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.received, self.closed, self._at = Received(), False, 0
        self._sent: defaultdict[int, int] = defaultdict(int)

    @classmethod
    async def connect(
        cls,
        port: int,
        *,
        host: str = "127.0.0.1",
        context: ssl.SSLContext | None = None,
        hello: bytes = PREFACE + frame(SETTINGS, 0, 0),
    ) -> RawClient:
        """Connects and says hello."""
        client = cls(*await asyncio.open_connection(host, port, ssl=context))
        client.send(hello)
        return client

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)

    def call(
        self,
        rpc: str,
        data: bytes = b"",
        *,
        more: dict[str, str] | None = None,
        end: bool = False,
        stream: int = 1,
    ) -> None:
        """Opens a call, with a part of its data, and says where that is all; its texts are sent in latin-1."""
        head = frame(HEADERS, END_HEADERS, stream, block({**rpc_path(rpc), **(more or {})}))
        parts = [data[at : at + 2**14] for at in range(0, len(data), 2**14)] or ([b""] if end else [])
        last = len(parts) - 1
        self.send(head + b"".join(frame(DATA, end and at == last, stream, part) for at, part in enumerate(parts)))

    def allow(self, size: int) -> None:
        """Takes so many bytes more of the connection and of its first call."""
        for stream in (0, 1):
            self.send(frame(WINDOW_UPDATE, 0, stream, number(size)))

    def ping(self) -> None:
        """A ping."""
        self.send(frame(PING, 0, 0, b"12345678"))

    async def more(self) -> list[tuple[int, int, int, bytes]]:
        """The next frames; none at the end of the connection, which ends its other side too."""
        while not self.closed:
            try:
                data = await self._reader.read(2**16)
            except (ConnectionError, ssl.SSLError):
                data = b""
            if not data:
                self.closed = True
                self._writer.close()
            elif found := self.received.feed(data):
                for kind, flags, _, payload in found:
                    if kind == PING and not flags:
                        self.send(frame(PING, ACK, 0, payload))
                return found
        return []

    async def until(self, kind: int, flags: int = 0) -> bytes:
        """The payload of the next frame of a kind with these flags; b"" at the end of the connection.

        A GOAWAY for too many pings is one of every kind.
        """
        while self._at < len(self.received.frames) or await self.more():
            each, had, _, payload = self.received.frames[self._at]
            self._at += 1
            if each == kind and had & flags == flags:
                return payload
            if each == GOAWAY and b"too_many_pings" in payload:
                return payload
        return b""

    async def answer(self, stream: int = 1) -> Answer:
        """How a call has ended; as far as it came where the connection ends before."""
        while not self.received.answers[stream].over and await self.more():
            pass
        return self.received.answers[stream]

    async def gets(self, size: int, stream: int = 1, *, exactly: bool = True) -> None:
        """Waits for so many bytes of data of a call."""
        while len(self.received.answers[stream].data) < size:
            assert self.received.answers[stream].reset < 0
            assert await self.more()
        if exactly:
            await self.alive()
            assert len(self.received.answers[stream].data) == size

    async def end(self) -> tuple[int, int, str] | None:
        """What GOAWAY says, once the server has closed the connection; None where it says nothing."""
        while await self.more():
            pass
        return self.received.gone

    async def upload(self, data: bytes, stream: int = 1, size: int = 2**14) -> None:
        """Sends data of a call as far as the server lets it, in frames of at most that size; it does not end there."""
        while data:
            most = min(size, self._allowed(stream))
            if most:
                part, data = data[:most], data[most:]
                self._sent[stream] += len(part)
                self.send(frame(DATA, 0, stream, part))
            elif self.received.answers[stream].over or not await self.more():
                raise AssertionError("the server takes no more")

    def _allowed(self, stream: int) -> int:
        updates = [payload for kind, _, on, payload in self.received.frames if (kind, on) == (WINDOW_UPDATE, stream)]
        return 2**16 - 1 + sum(int.from_bytes(more, "big") for more in updates) - self._sent[stream]

    async def alive(self) -> bool:
        """Whether the server answers a ping; its answer to all that was sent before has come then."""
        before = self.received.count(PING, ACK)
        self.ping()
        while self.received.count(PING, ACK) == before:
            if not await self.more():
                return False
        return True

    def close(self) -> None:
        """Closes it."""
        self._writer.close()

    def abort(self) -> None:
        """Ends it with nothing."""
        self._writer.transport.abort()
