"""Several front-end processes on one port: started, watched, told what health says, drained."""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from convoynet.server.frontend import messages
from convoynet.server.frontend.channel import Channel, shared_memory
from convoynet.server.frontend.local import NOT_SERVING, Manner, taken
from convoynet.server.frontend.session import Answers, Session
from convoynet.server.host import package_environment
from convoynet.server.security.tls import TlsFiles

log = logging.getLogger(__name__)

_STEADY_SECONDS = 60.0
"""A front end that lived so long is started again at once when it dies; one that died young after a longer pause."""


class FrontEndProcesses:
    """What LocalFrontEnd is, in `count` processes; the kernel spreads the connections over them.

    Args:
        count: How many.
        answers: Where their calls go.
        manner: How the port is served.
        room: The limit of each one's budget, in bytes.
        refused: Told of each call that one of them refused for want of room.
        tls: The files for TLS, which each process reads, and reads again when they change; None for none.
    """

    def __init__(
        self,
        count: int,
        answers: Answers,
        manner: Manner,
        *,
        room: int = 2**63,
        refused: Callable[[], None] = lambda: None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._count = count
        self._answers, self._refused = answers, refused
        self._settings: dict[str, Any] = {
            "manner": asdict(manner),
            "room": room,
            "tls": None if tls is None else {name: str(file) for name, file in vars(tls).items() if file is not None},
            "log_level": logging.getLogger().getEffectiveLevel(),
        }
        self._states: dict[str, int] = {}
        self._final = False
        self._stopping = False
        self._place: socket.socket | None = None
        self._children: list[_Child] = []
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [child.process.pid for child in self._children]

    async def start(self, host: str, port: int) -> int:
        """See LocalFrontEnd.start."""
        self._place = _bind(host, port)
        port = self._place.getsockname()[1]
        self._settings |= {"host": host, "port": port}
        children = [self._spawn() for _ in range(self._count)]
        await asyncio.gather(*(child.start(self._states) for child in children))
        self._keepers = [asyncio.create_task(self._keep(child)) for child in children]
        return port

    async def set(self, service: str, status: int) -> None:
        """See LocalFrontEnd.set."""
        self._states[service] = NOT_SERVING if self._final else status
        for child in self._children:
            child.tell(service, self._states[service])

    async def not_serving(self) -> None:
        """See LocalFrontEnd.not_serving."""
        self._final = True
        for service in self._states:
            await self.set(service, NOT_SERVING)

    async def stop(self, limit: float) -> None:
        """See LocalFrontEnd.stop. A process that does not end by itself soon after the limit is killed."""
        self._stopping = True
        for keeper in self._keepers:
            keeper.cancel()
        children = list(self._children)
        for child in children:
            child.channel.send(messages.STOP, 0, json.dumps(limit).encode())
        if children:
            await asyncio.wait([child.gone for child in children], timeout=limit + 5)
        for child in children:
            await self._bury(child)
        if self._place is not None:
            self._place.close()

    def _spawn(self) -> _Child:
        child = _Child(self._answers, self._refused, self._settings)
        self._children.append(child)
        return child

    async def _bury(self, child: _Child) -> int:
        """Ends what is left of a child; its exit status."""
        self._children.remove(child)
        child.channel.close()
        with suppress(ProcessLookupError):
            child.process.kill()
        return await asyncio.to_thread(child.process.wait)

    async def _keep(self, child: _Child) -> None:
        """Starts another whenever the last one died."""
        pause = 0.0
        while True:
            begun = time.monotonic()
            await asyncio.shield(child.gone)
            status = await self._bury(child)
            log.error("front end %d died (exit status %d); starting another", child.process.pid, status)
            pause = 0.0 if time.monotonic() - begun > _STEADY_SECONDS else min(2 * pause + 0.1, 5.0)
            await asyncio.sleep(pause)
            child = self._spawn()
            try:
                await child.start(self._states)
            except OSError as error:
                log.error("%s", error)


class _Child:
    """One process and the way to it.

    Attributes:
        ready: Done when it listens; OSError where it cannot.
        gone: Done when its end of the channel is closed, however it ended.
    """

    def __init__(self, answers: Answers, refused: Callable[[], None], settings: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.ready: asyncio.Future[None] = loop.create_future()
        self._session = Session(answers, refused)
        self._way, other = socket.socketpair()
        memory = [shared_memory(), shared_memory()]
        descriptors = (other.fileno(), *memory)
        command = [sys.executable, "-m", "convoynet.server.frontend", *map(str, descriptors), json.dumps(settings)]
        self.process = subprocess.Popen(  # noqa: S603 -- this very program
            command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=package_environment()
        )
        other.close()
        into, out = (mmap.mmap(descriptor, 0) for descriptor in memory)
        for descriptor in memory:
            os.close(descriptor)
        self.channel = Channel(out, into, self._received, self._lost)
        self._session.attach(self.channel)

    async def start(self, states: dict[str, int]) -> None:
        """Waits until it listens.

        Raises:
            OSError: It cannot, or it died.
        """
        await asyncio.get_running_loop().create_unix_connection(lambda: self.channel, sock=self._way)
        for service, status in states.items():
            self.tell(service, status)
        await self.ready

    def tell(self, service: str, status: int) -> None:
        """What health says of a service."""
        self.channel.send(messages.STATE, status, service.encode())

    def _received(self, kind: int, number: int, meta: bytes, payload: bytes) -> None:
        if kind == messages.READY:
            self.ready.set_result(None)
        elif kind == messages.FAILED:
            self.ready.set_exception(OSError(meta.decode()))
        else:
            self._session.received(kind, number, meta, payload)

    def _lost(self) -> None:
        self._session.lost()
        if not self.ready.done():
            self.ready.set_exception(OSError("a front-end process ended before it listened; its output says why"))
        self.gone.set_result(None)


def _bind(host: str, port: int) -> socket.socket:
    """Holds the port without listening on it, so that the front ends may and nobody else.

    Raises:
        OSError: It is taken.
    """
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    place = socket.socket(family, socket.SOCK_STREAM)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        place.close()
        raise taken(host, port) from error
    # Only now: with it at the bind, a second server of this user would share the port instead of being told.
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return place
