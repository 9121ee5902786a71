"""HTTP over uvicorn: bounded requests in, answers of api out; also what serves /metrics."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from convoynet.server.errors import NotPermitted, Unauthenticated
from convoynet.server.http.api import Answers, answer
from convoynet.server.http.handlers import HttpReply, HttpRequest, problem
from convoynet.server.security.security import Guard
from convoynet.server.security.tls import identity_from_peer
from convoynet.server.types import Call

log = logging.getLogger(__name__)

HEADER_BYTES = 64 * 2**10
"""The most that the headers of one request may take."""
HEADER_SECONDS = 30.0
"""How long a client may take to send the headers of a request."""
IDLE_SECONDS = 30.0
"""How long a client may take to send the next part of a body."""
MAX_CONNECTIONS = 4096
_SMALL = 64 * 2**10

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Connection(HttpToolsProtocol):
    """uvicorn's connection with bounds on headers; one that is lost cancels its request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock of the first request."""
        super().connection_made(transport)
        self.app_state = {"connection": self}
        self.identity = identity_from_peer(transport.get_extra_info("peercert"))
        self.request: asyncio.Task[Any] | None = None
        self._head_open = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for the answer any more."""
        self._head_open = False
        self._watch_head()
        super().connection_lost(exc)
        if self.request is not None:
            self.request.cancel()

    def data_received(self, data: bytes) -> None:
        """Refuses headers that never end."""
        was_open = self._head_open
        super().data_received(data)
        if was_open and self._head_open:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES:
                self.send_400_response(f"the headers take more than {HEADER_BYTES} bytes")
                self._head_open = False
        self._watch_head()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._head_open, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """The last byte of its headers."""
        self._head_open = False
        super().on_headers_complete()

    def _watch_head(self) -> None:
        if self._head_open and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not self._head_open and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the composition root's."""
        yield


class HttpListener:
    """One port of an ASGI application, on the running event loop."""

    def __init__(self, app: Asgi, context: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=75,
        )
        config.load()
        config.ssl = context
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listens.

        Returns:
            The port, which the system chose where `port` is 0.

        Raises:
            OSError: It is taken, or the host is none of this machine's.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
        self._serving = asyncio.create_task(self._server.serve([listening]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0)
        return int(listening.getsockname()[1])

    async def stop(self, limit_seconds: float) -> bool:
        """Takes no more connections, answers what is under way, and cuts off what outlasts the limit.

        Returns:
            Whether nothing was cut off.
        """
        if self._serving is None:
            return True
        self._server.should_exit = True
        _, late = await asyncio.wait({self._serving}, timeout=limit_seconds)
        if late:
            self._server.force_exit = True
            for task in list(self._server.server_state.tasks):
                task.cancel()
            for connection in list(self._server.server_state.connections):
                connection.transport.close()
            await self._serving
        return not late


class Refused(Exception):
    """A request that is refused before it reaches the dispatcher."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.reply = problem(status, message, (("connection", "close"),))


@dataclass(frozen=True)
class HttpApp:
    """The ASGI application of the protocol.

    Attributes:
        answers: The dispatcher.
        max_bytes: The largest body, before and after decompression.
        management: Whether its listener takes management calls.
    """

    answers: Answers
    max_bytes: int
    management: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request (ASGI)."""
        connection = scope["state"]["connection"]
        connection.request = asyncio.current_task()
        call = _call(scope, self.management)
        try:
            headers = {str(name): str(value) for name, value in call.metadata}
            body = await _read(headers, receive, self.max_bytes)
            request = HttpRequest(
                scope["method"], scope["raw_path"].decode(), scope["query_string"].decode(), headers, body
            )
            reply = await answer(request, call, self.answers)
        except Refused as refused:
            reply = refused.reply
        except asyncio.CancelledError:
            if connection.transport.is_closing():
                return
            reply = problem(503, "the server is stopping", (("connection", "close"),))
        finally:
            connection.request = None
        await _send(reply, send)


@dataclass(frozen=True)
class MetricsApp:
    """The ASGI application of /metrics; rendering takes a thread, not the event loop."""

    registry: CollectorRegistry
    guard: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request (ASGI)."""
        call = _call(scope, False)
        try:
            self.guard.check("Metrics", call)
        except Unauthenticated as error:
            reply = problem(401, str(error), (("www-authenticate", "Bearer"),))
        except NotPermitted as error:
            reply = problem(403, str(error))
        else:
            if scope["path"] not in ("/", "/metrics") or scope["method"] != "GET":
                reply = problem(404, "Not Found: metrics are at GET /metrics")
            else:
                encode, content_type = choose_encoder(call.header("accept"))
                text = await asyncio.to_thread(encode, self.registry)
                reply = HttpReply(200, (("content-type", content_type),), (text,))
        await _send(reply, send)


def _call(scope: Scope, management: bool) -> Call:
    metadata = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
    identity = scope["state"]["connection"].identity
    return Call("http", None, metadata, identity=identity, management=management)


async def _send(reply: HttpReply, send: Send) -> None:
    size = sum(map(len, reply.body))
    length = (b"content-length", str(size).encode())
    # A copy of a small answer costs less than another call.
    parts = reply.body if size > _SMALL else (b"".join(reply.body),)
    headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": [*headers, length]})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})


async def _read(headers: dict[str, str], receive: Receive, limit: int) -> bytes:
    """The body, decompressed, never more than `limit` bytes."""
    length = headers.get("content-length", "0")
    if len(length) > 18 or int(length) > limit:
        raise Refused(413, f"the body has {length[:20]} bytes, {limit} are allowed (--max-message-bytes)")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(IDLE_SECONDS) as idle:
            while True:
                message = await receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise Refused(413, f"the body has more than {limit} bytes (--max-message-bytes)")
                if not message.get("more_body", False):
                    break
                idle.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)
    except TimeoutError:
        raise Refused(408, f"the rest of the body did not come within {IDLE_SECONDS:g} s") from None
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refused(415, f"Content-Encoding '{encoding[:40]}' is not one of gzip, deflate, identity")
    if len(body) <= _SMALL:
        return decompressed(body, limit)
    return await asyncio.to_thread(decompressed, body, limit)


def decompressed(body: bytes, limit: int) -> bytes:
    """A gzip or zlib body, taken no further than `limit` bytes.

    Raises:
        Refused: It is broken, or larger.
    """
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused(400, f"the compressed body is broken: {error}") from None
    if len(data) > limit:
        raise Refused(413, f"the body has more than {limit} bytes when decompressed (--max-message-bytes)")
    if not stream.eof or stream.unused_data:
        raise Refused(400, "the compressed body is broken: it ends early, or something follows it")
    return data
