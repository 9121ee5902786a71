"""One port of HTTP/2: its connections, how many there may be, what is asked of them, and how they end."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass

from convoynet.server.errors import DeadlineExceeded
from convoynet.server.http2.application import Application
from convoynet.server.http2.connection import Connection
from convoynet.server.http2.frames import Code
from convoynet.server.supervision import tasks

MAX_CONNECTIONS = 4096
GREETING_SECONDS = 30.0
"""How long a client may take for its side of TLS, and to say that it speaks HTTP/2."""
HEADERS_SECONDS = 30.0
"""What headers of more than 16 KB may take to come whole."""
WHOLE_SECONDS = 600.0
"""What a message may take to come whole; the next of a stream may be waited for without end."""
READ_SECONDS = 600.0
"""What a client may take to read the next part of an answer."""
_PARTING_SECONDS, _CLOSING_SECONDS = 1.0, 5.0
"""What a client may take to close a connection that has ended, and what is left after that to be sent."""
_LATE_SECONDS = 0.5
"""How long after its deadline a call is ended from here; most end by themselves before."""
_GUEST_SECONDS = 2.0
"""How long a message may come into memory that others want as well."""
_LEAST_TICK, _TICK = 0.02, 1.0
_JITTER = 0.1
_TURNS = 4


@dataclass(frozen=True)
class Limits:
    """What is asked of connections, in seconds; 0 for nothing.

    Attributes:
        keepalive: A client that was not heard of for so long is asked whether it is there ...
        keepalive_timeout: ... and has so long to answer.
        permit_without_calls: Whether it is asked while it has no calls.
        least_seconds: Pings of a client that come sooner after one another are strikes.
        strikes: How many it may have between two answers; 0 for any number.
        age: After about so long a connection takes no more calls ...
        age_grace: ... and has so long to end those that it has; 0 for no end.
    """

    keepalive: float = 7200.0
    keepalive_timeout: float = 20.0
    permit_without_calls: bool = True
    least_seconds: float = 0.0
    strikes: int = 0
    age: float = 0.0
    age_grace: float = 0.0


class Listener:
    """One port of an application, on the running event loop."""

    def __init__(self, application: Application, limits: Limits, context: ssl.SSLContext | None = None) -> None:
        self._application, self._limits, self._context = application, limits, context
        self._connections: dict[Connection, float] = {}
        """With when each is too old, on the loop's clock."""
        self._closing: dict[Connection, float] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._stopping = self._held = False
        self._empty = asyncio.Event()
        self._ended = asyncio.Event()

    async def wait_for_termination(self) -> None:
        """Waits until it was stopped."""
        await self._ended.wait()

    async def start(self, host: str, port: int, *, shared: bool = False) -> int:
        """Listens.

        Args:
            host: The address.
            port: 0 lets the system choose.
            shared: Whether other processes listen there too.

        Returns:
            The port.

        Raises:
            OSError: It is taken, or the host is none of this machine's.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        listening = socket.create_server(
            (host, port), family=family, backlog=2048, reuse_port=shared, dualstack_ipv6=both
        )
        # Connections have it from here: asyncio sets it only on sockets that say themselves that they are of TCP.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = GREETING_SECONDS if self._context else None
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._application, self._limits, self._made, self._lost),
            sock=listening,
            backlog=2048,
            ssl=self._context,
            ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=_CLOSING_SECONDS if self._context else None,
        )
        self._sweeper = tasks.keep(self._sweep, "the look at connections")
        return int(listening.getsockname()[1])

    def hold(self, held: bool) -> None:
        """Reads from no connection while `held`."""
        self._held = held
        for connection in self._connections:
            connection.hold(held)

    async def leave(self, limit_seconds: float) -> None:
        """Has clients open no more calls, and takes those that are on their way, for FAREWELL_SECONDS at most."""
        if self._server is None or self._stopping:
            return
        self._stopping = True
        for _ in range(_TURNS):
            await asyncio.sleep(0)  # who is connected already comes to _made, where asyncio's server is still open
        self._server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                for connection in connections:
                    await connection.shut.wait()

    async def stop(self, limit_seconds: float) -> None:
        """Takes no more calls, answers those under way, and cuts off what outlasts the limit."""
        self._ended.set()
        if self._server is None:
            return
        begun = time.monotonic()
        await self.leave(limit_seconds)
        limit_seconds -= time.monotonic() - begun
        if not await self._emptied(limit_seconds):
            for connection in list(self._connections):
                connection.abandon(Code.NO_ERROR, "the server is stopping")
            if not await self._emptied(1.0):
                for connection in list(self._connections):
                    connection.transport.abort()
                await self._emptied(1.0)
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _emptied(self, seconds: float) -> bool:
        """Whether every connection is gone within that time."""
        if not self._connections:
            return True
        self._empty = asyncio.Event()
        return await tasks.happens(self._empty, seconds)

    def _made(self, connection: Connection) -> None:
        """Lets a connection in: above the limit the one that was idle longest makes room for it."""
        age = self._limits.age * random.uniform(1 - _JITTER, 1 + _JITTER) if self._limits.age else float("inf")
        self._connections[connection] = connection.begun + age
        if self._held:  # again in a moment: uvloop begins to read after this, asyncio under TLS at once
            connection.hold(True)
            connection.loop.call_soon(lambda: connection.hold(self._held))
        if self._stopping:
            connection.leave()
        elif len(self._connections) > MAX_CONNECTIONS:
            idle = [c for c in self._connections if not (c.streams or c.leaving or c is connection)]
            least = min(idle, key=lambda other: (other.used, other.heard), default=connection)
            least.leave(Code.ENHANCE_YOUR_CALM, "the server has as many connections as it takes; try again")

    def _lost(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        self._closing.pop(connection, None)
        if not self._connections:
            self._empty.set()

    async def _sweep(self) -> None:
        """Looks at every connection now and then, as often as the shortest limit asks for."""
        limits, loop = self._limits, asyncio.get_running_loop()
        asked = [
            seconds for seconds in (limits.keepalive, limits.keepalive_timeout, limits.age, limits.age_grace) if seconds
        ]
        tick = max(_LEAST_TICK, min([_TICK, *(seconds / 4 for seconds in asked)]))
        while True:
            await asyncio.sleep(tick)
            now = loop.time()
            for connection, until in list(self._connections.items()):
                self._look(connection, until, now)

    def _look(self, connection: Connection, until: float, now: float) -> None:
        limits = self._limits
        if connection.parted or connection.transport.is_closing():
            since = now - self._closing.setdefault(connection, now)
            if since > _CLOSING_SECONDS:
                connection.transport.abort()
            elif since > _PARTING_SECONDS:
                connection.transport.close()
            return
        if not connection.greeted:
            if now - connection.begun > GREETING_SECONDS:
                connection.transport.abort()
            return
        if connection.headers_since and not connection.held and now - connection.headers_since > HEADERS_SECONDS:
            connection.abandon(Code.ENHANCE_YOUR_CALM, f"headers did not come whole within {HEADERS_SECONDS:g} s")
            return
        if now > until:
            connection.leave(text="max_age")
            if limits.age_grace and now > until + limits.age_grace:
                connection.transport.abort()
                return
        if connection.held:
            connection.pinged = 0.0  # nobody would hear it answer
        elif connection.pinged:
            if now - connection.pinged > limits.keepalive_timeout:
                connection.transport.abort()
                return
        elif 0 < limits.keepalive < now - connection.heard and (connection.streams or limits.permit_without_calls):
            connection.ping()
        self._look_at_calls(connection, now)

    def _look_at_calls(self, connection: Connection, now: float) -> None:
        for stream in list(connection.streams.values()):
            if stream.pending and now - stream.moved > READ_SECONDS:
                connection.reset(stream, Code.CANCEL)
            elif stream.head.timeout is not None and now - stream.begun > stream.head.timeout + _LATE_SECONDS:
                self._application.late(stream)
            elif now - stream.since > WHOLE_SECONDS and self._application.awaits(stream):
                late = DeadlineExceeded(f"the request did not come whole within {WHOLE_SECONDS:g} s")
                self._application.refuse(stream, late)
            elif stream.guest and now - stream.since > _GUEST_SECONDS:
                stream.move_out()
