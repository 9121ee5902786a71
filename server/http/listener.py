"""One HTTP port: its connections, how many there may be, and how they end."""

from __future__ import annotations

import asyncio
import socket
import ssl

from convoynet.server.http.arrivals import Arrivals
from convoynet.server.http.connection import HEADER_SECONDS, Application, Connection
from convoynet.server.memory.budget import Budget
from convoynet.server.supervision import tasks

MAX_CONNECTIONS = 4096
_LAST_WORD_SECONDS = 1.0
_TURNS = 4


class HttpListener:
    """One port of an application, on the running event loop."""

    def __init__(self, app: Application, context: ssl.SSLContext | None = None, budget: Budget | None = None) -> None:
        self._app, self._context, self._budget = app, context, budget
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._stopping = False
        self._empty = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listens.

        Returns:
            The port, which the system chose where `port` is 0.

        Raises:
            OSError: It is taken, or the host is none of this machine's.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
        seconds = HEADER_SECONDS if self._context else None
        arrivals = Arrivals()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._app, self._made, self._lost, self._budget, arrivals),
            sock=listening,
            backlog=2048,
            ssl=self._context,
            ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=seconds,
        )
        return int(listening.getsockname()[1])

    async def stop(self, limit_seconds: float) -> bool:
        """Takes no more connections, answers what is under way, and cuts off what outlasts the limit.

        Returns:
            Whether every answer that was due was given.
        """
        if self._server is None:
            return True
        self._stopping = True
        for _ in range(_TURNS):
            await asyncio.sleep(0)  # who is connected already comes to _made, where asyncio's server is still open
        self._server.close()
        for connection in self._connections:
            connection.end("the server is stopping")
        if await self._emptied(limit_seconds):
            return True
        due = any(connection.waits_since is None for connection in self._connections)
        for connection in self._connections:
            connection.task.cancel()
        if not await self._emptied(_LAST_WORD_SECONDS):
            for connection in self._connections:
                connection.transport.abort()
            await self._emptied(_LAST_WORD_SECONDS)
        return not due

    async def _emptied(self, seconds: float) -> bool:
        """Whether every connection is gone within that time."""
        if not self._connections:
            return True
        self._empty = asyncio.Event()
        return await tasks.happens(self._empty, seconds)

    def _made(self, connection: Connection) -> bool:
        """Lets a connection in: above the limit the one that does least makes room for it."""
        self._connections.add(connection)
        if self._stopping:
            return False
        if len(self._connections) <= MAX_CONNECTIONS:
            return True
        waiting = [c for c in self._connections if c.waits_since is not None and c is not connection]
        if not waiting:
            return False
        least = min(waiting, key=lambda c: (c.begun, c.waits_since))
        least.end("the server has as many connections as it takes; try again")
        return True

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()
