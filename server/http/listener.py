"""One HTTP port: its connections, how many there may be, and how they end."""

from __future__ import annotations

import asyncio
import socket
import ssl

from convoynet.server.http.connection import HEADER_SECONDS, Application, Connection
from convoynet.server.memory.budget import Budget

MAX_CONNECTIONS = 4096


class HttpListener:
    """One port of an application, on the running event loop."""

    def __init__(self, app: Application, context: ssl.SSLContext | None = None, budget: Budget | None = None) -> None:
        self._app, self._context, self._budget = app, context, budget
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._stopping = False

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
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._app, self._made, self._connections.discard, self._budget),
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
            Whether nothing was cut off.
        """
        if self._server is None:
            return True
        self._stopping = True
        self._server.close()
        for connection in self._connections:
            connection.end("the server is stopping")
        tasks = {connection.task for connection in self._connections}
        late = (await asyncio.wait(tasks, timeout=limit_seconds))[1] if tasks else set()
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1.0)
        for connection in list(self._connections):
            connection.transport.abort()
        return not late

    def _made(self, connection: Connection) -> bool:
        """Lets a connection in: above the limit the one that does least makes room for it."""
        if self._stopping:
            return False
        self._connections.add(connection)
        if len(self._connections) <= MAX_CONNECTIONS:
            return True
        waiting = [c for c in self._connections if c.waits_since is not None and c is not connection]
        if not waiting:
            return False
        least = min(waiting, key=lambda c: (c.begun, c.waits_since))
        least.end("the server has as many connections as it takes; try again")
        return True
