"""What answers the requests of a port: the protocol, or /metrics. Both know no connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from convoynet.server.errors import NotPermitted, Oversize, Unauthenticated
from convoynet.server.http import api
from convoynet.server.http.api import Answers, Route
from convoynet.server.http.connection import Incoming
from convoynet.server.http.handlers import HttpReply, HttpRequest, problem
from convoynet.server.http.parsing import Refused
from convoynet.server.http.routes import Path
from convoynet.server.memory.inflating import Broken, TooLarge, inflated
from convoynet.server.security.browsers import foreign_page
from convoynet.server.security.security import Guard, changes
from convoynet.server.types import Call

_SMALL = 64 * 2**10
_COPIES = 2
"""How many more times a body is held: as a field of a message, and as that field's value."""

Counted = Callable[[Call, str, str], None]
"""Counts a call that is over: how it came and ended, and the model and version that it named."""


@dataclass(slots=True)
class _Asked:
    """One request: how it came and where it went, once that is known."""

    call: Call
    route: Route | None = None


@dataclass(frozen=True)
class HttpApp:
    """The protocol.

    Attributes:
        answers: The dispatcher.
        counted: Told of every inference when its client has the answer, and of every request that was none.
        max_bytes: The largest body, before and after decompression.
        management: Whether its listener takes management calls.
        paths: What there is.
    """

    answers: Answers
    counted: Counted
    max_bytes: int
    management: bool = True
    paths: Sequence[Path] = api.PROTOCOL

    async def answer(self, incoming: Incoming) -> HttpReply:
        """Answers one request (convoynet.server.http.connection.Application)."""
        head = incoming.head
        call = Call("http", None, tuple(head.headers.items()), identity=incoming.identity, management=self.management)
        asked = incoming.note = _Asked(call)
        route = api.route(head.method, head.path, self.paths)
        if isinstance(route, HttpReply):
            return route
        asked.route = route
        rpc = route.endpoint.rpc
        if head.method == "POST" and changes(rpc) and (why := foreign_page(head.headers)):
            return problem(403, why)
        # Whoever may not call has no body read.
        if (reply := self.answers.refused(rpc, call)) is not None:
            return api.refused(reply)
        body = await self._decoded(incoming, await incoming.read(self.max_bytes))
        incoming.hold(_COPIES * len(body))
        request = HttpRequest(head.method, head.path, head.query, head.headers, body, incoming.hold)
        return await api.answer(request, route, call, self.answers)

    def ended(self, incoming: Incoming | None, reply: HttpReply | None) -> None:
        """Counts it (convoynet.server.http.connection.Application)."""
        asked = None if incoming is None else incoming.note
        if asked is None:
            asked = _Asked(Call("http"))
        call: Call = asked.call
        call.code = "CANCELLED" if reply is None else reply.code
        if reply is not None and reply.status == 413 and call.error is None:
            call.error = Oversize("its body is too large")
        route: Route | None = asked.route
        if route is None:
            self.counted(call, "", "")
        elif route.endpoint.rpc == "ModelInfer":
            self.counted(call, route.names["model"], route.names["version"])

    async def _decoded(self, incoming: Incoming, body: bytes | bytearray) -> bytes | bytearray:
        encoding = incoming.head.headers.get("content-encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return body
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise Refused(415, f"Content-Encoding '{encoding[:40]}' is not one of gzip, deflate, identity")
        if len(body) <= _SMALL:
            return decompressed(body, self.max_bytes, incoming.hold)
        return await asyncio.to_thread(decompressed, body, self.max_bytes, incoming.hold)


@dataclass(frozen=True)
class MetricsApp:
    """GET /metrics; rendering takes a thread, not the event loop."""

    registry: CollectorRegistry
    guard: Guard
    _paths: frozenset[str] = field(default=frozenset({"/", "/metrics"}), init=False)

    async def answer(self, incoming: Incoming) -> HttpReply:
        """Answers one request (convoynet.server.http.connection.Application)."""
        head = incoming.head
        call = Call("http", None, tuple(head.headers.items()), identity=incoming.identity, management=False)
        try:
            self.guard.check("Metrics", call)
        except Unauthenticated as error:
            return problem(401, str(error), (("www-authenticate", "Bearer"),))
        except NotPermitted as error:
            return problem(403, str(error))
        if head.path not in self._paths:
            return problem(404, "Not Found: metrics are at GET /metrics")
        if head.method not in ("GET", "HEAD"):
            return problem(405, "Method Not Allowed: metrics are at GET /metrics", (("allow", "GET, HEAD"),))
        encode, content_type = choose_encoder(call.header("accept"))
        text = await asyncio.to_thread(encode, self.registry)
        return HttpReply(200, (("content-type", content_type),), (text,))

    def ended(self, incoming: Incoming | None, reply: HttpReply | None) -> None:
        """Scrapes are not counted (convoynet.server.http.connection.Application)."""


def decompressed(body: bytes | bytearray, limit: int, hold: Callable[[int], None] = lambda size: None) -> bytes:
    """A gzip or zlib body as it was; see inflated(). Raises Refused."""
    try:
        return inflated(body, limit, hold)
    except TooLarge as error:
        raise Refused(413, f"the body {error}") from None
    except Broken as error:
        raise Refused(400, f"the compressed body {error}") from None
