"""Several front-end processes on one port: started, watched, told what health says, drained."""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from convoynet.server.frontend import messages
from convoynet.server.frontend.channel import SHELF_BYTES, Channel, shared_memory
from convoynet.server.frontend.local import NOT_SERVING, Manner, taken
from convoynet.server.frontend.session import Answers, Session
from convoynet.server.security.tls import TlsFiles
from convoynet.server.supervision import ending, processes, tasks

log = logging.getLogger(__name__)

_STEADY_SECONDS = 60.0
"""A front end that lived so long is started again at once when it dies; one that died young after a longer pause."""
_LONGEST_PAUSE_SECONDS = 2.0
"""With what it takes to see that one stands still, and to start another, less than 10 s without it."""
_START_SECONDS = 60.0
"""What a front end may take until it listens."""
_TICK_SECONDS = 0.5
_PING_TICKS, _DEAD_TICKS = 2, 10
"""A front end is asked so often whether it is there, and ended when it has not answered for so long. Ticks are counted,
not seconds: a machine that stands still for a while stands still for all."""


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
    def up(self) -> int:
        """How many of them listen."""
        return sum(child.listens for child in self._children)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [child.process.pid for child in self._children]

    async def start(self, host: str, port: int) -> int:
        """See LocalFrontEnd.start."""
        self._place = _bind(host, port)
        port = self._place.getsockname()[1]
        self._settings |= {"host": host, "port": port}
        children: list[_Child] = []
        try:
            children += [self._spawn() for _ in range(self._count)]
            await asyncio.gather(*(child.start(self._states) for child in children))
        except BaseException:
            for child in self._children[:]:
                await self._bury(child)
            self._place.close()
            raise
        self._keepers = [tasks.start(self._keep(child), "the watch over a front end") for child in children]
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
        await asyncio.gather(*(self._bury(child) for child in children))
        if self._place is not None:
            self._place.close()

    def _spawn(self) -> _Child:
        child = _Child(self._answers, self._refused, self._settings)
        self._children.append(child)
        return child

    async def _bury(self, child: _Child) -> int | None:
        """Ends what is left of a child; its exit status, None where it cannot be ended."""
        child.close()
        status = await ending.end(child.process)
        # Only now: until then stop() has to wait for it where who began this was cancelled.
        with suppress(ValueError):
            self._children.remove(child)
        return status

    async def _keep(self, child: _Child) -> None:
        """Starts another whenever the last one died."""
        loop, pauses = asyncio.get_running_loop(), tasks.Pauses(0.1, _LONGEST_PAUSE_SECONDS)
        while True:
            begun = loop.time()
            await asyncio.shield(child.gone)
            log.error("front end %d died; starting another", child.process.pid)
            try:
                log.error("front end %d: exit status %s", child.process.pid, await self._bury(child))
            except Exception:
                log.exception("front end %d: what is left of it stays", child.process.pid)
            if loop.time() - begun > _STEADY_SECONDS:
                pauses.reset()
            else:
                await asyncio.sleep(pauses.next())
            child = await self._another(pauses)

    async def _another(self, pauses: tasks.Pauses) -> _Child:
        """A front end that listens, or died while it tried; whatever else goes wrong is tried again."""
        while True:
            try:
                child = self._spawn()
            except Exception as error:  # no descriptor, no memory, no process
                pause = pauses.next()
                log.error("no front end can be started: %s: %s; next in %.1f s", type(error).__name__, error, pause)
                await asyncio.sleep(pause)
                continue
            try:
                await child.start(self._states)
            except Exception as error:
                log.error("a front end does not start: %s", error)
                child.give_up()
            return child


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
        self.listens = self._connected = False
        self._session = Session(answers, refused)
        self._silent = 0
        with ExitStack() as undo, ExitStack() as theirs:
            self._way, other = socket.socketpair()
            undo.callback(self._way.close)
            theirs.callback(other.close)
            memory = []
            for shelf in (SHELF_BYTES, 0):
                memory.append(shared_memory(shelf))
                theirs.callback(os.close, memory[-1])
            into, out = (mmap.mmap(descriptor, 0) for descriptor in memory)
            descriptors = (other.fileno(), *memory)
            self.process = processes.spawn(
                "convoynet.server.frontend", *map(str, descriptors), json.dumps(settings), descriptors=descriptors
            )
            undo.pop_all()
        self.channel = Channel(out, into, self._received, self._lost)
        self._session.attach(self.channel)
        self._clock = loop.call_later(_TICK_SECONDS, self._tick)

    async def start(self, states: dict[str, int]) -> None:
        """Waits until it listens.

        Raises:
            OSError: It cannot, or it died, or it does not say so in time.
        """
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.get_running_loop().create_unix_connection(lambda: self.channel, sock=self._way)
                self._connected = True
                for service, status in states.items():
                    self.tell(service, status)
                await self.ready
        except TimeoutError:
            raise OSError(f"a front end did not listen within {_START_SECONDS:g} s") from None
        self.listens, self._silent = True, 0

    def give_up(self) -> None:
        """It is of no use: it is ended, and `gone` is done."""
        self.close()
        with suppress(OSError):
            self.process.kill()
        if not self.gone.done():
            self.gone.set_result(None)

    def close(self) -> None:
        """Nothing more is said to it or heard of it."""
        self.listens = False
        self._clock.cancel()
        self.channel.close()
        if not self._connected:
            self._way.close()

    def _tick(self) -> None:
        self._clock = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)
        if not self.listens:
            self._look_at_start()
            return
        self._silent += 1
        if self._silent >= _DEAD_TICKS:
            log.error("front end %d has not answered for %g s: it is ended", self.process.pid, self._silent / 2)
            self._session.lost()
            self.give_up()
        elif self._silent % _PING_TICKS == 0:
            self.channel.send(messages.PING, 0)

    def _look_at_start(self) -> None:
        """Gives up a process that was stopped while it should be starting."""
        self._silent = self._silent + 1 if processes.is_stopped(self.process.pid) else 0
        if self._silent >= _DEAD_TICKS and not self.ready.done():
            self.ready.set_exception(OSError(f"a signal has stopped it for {self._silent / 2:g} s"))

    def tell(self, service: str, status: int) -> None:
        """What health says of a service."""
        self.channel.send(messages.STATE, status, service.encode())

    def _received(self, kind: int, number: int, meta: bytes, payload: bytes) -> None:
        self._silent = 0
        if kind == messages.UNARY:  # most are
            self._session.received(kind, number, meta, payload)
        elif kind == messages.PING:
            return
        elif kind == messages.READY and not self.ready.done():
            self.ready.set_result(None)
        elif kind == messages.FAILED and not self.ready.done():
            self.ready.set_exception(OSError(meta.decode()))
        else:
            self._session.received(kind, number, meta, payload)

    def _lost(self) -> None:
        self.listens = False
        self._session.lost()
        if not self.ready.done():
            self.ready.set_exception(OSError("a front-end process ended before it listened; its output says why"))
        if not self.gone.done():
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
