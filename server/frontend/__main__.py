"""A front-end process: `python -m convoynet.server.frontend FD FD FD JSON`, started by processes.py alone."""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from convoynet.server.frontend import messages
from convoynet.server.frontend.channel import SHELF_BYTES, Channel
from convoynet.server.frontend.local import LocalFrontEnd, Manner
from convoynet.server.frontend.remote import Remote
from convoynet.server.memory.allocator import keep_large_pieces_apart
from convoynet.server.memory.budget import Budget
from convoynet.server.security.reloading import LOOK_SECONDS, keep_fresh
from convoynet.server.security.tls import Certificates, TlsFiles
from convoynet.server.supervision import tasks

log = logging.getLogger("convoynet.server.frontend")


def _made(settings: dict[str, Any]) -> tuple[Remote, LocalFrontEnd, Certificates | None]:
    """The core as it is seen from here, what takes calls for it, and the certificates that it shows."""
    stated = settings["manner"]
    manner = Manner(**{**stated, "options": tuple(map(tuple, stated["options"]))})
    remote = Remote(Budget(settings["room"]), triton=manner.triton)
    certificates = None
    if (tls := settings["tls"]) is not None:
        certificates = Certificates(TlsFiles(**{name: Path(file) for name, file in tls.items()}))
    front = LocalFrontEnd(remote, manner, budget=remote.budget, certificates=certificates, shared=True)
    return remote, front, certificates


async def run(way: socket.socket, out: mmap.mmap, into: mmap.mmap, settings: dict[str, Any]) -> None:
    """Serves until the core says STOP, or is gone. Ends the process where the server ends by itself."""
    # The core alone decides when to stop: service managers and terminals signal every process of a group.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    loop = asyncio.get_running_loop()
    remote, front, certificates = _made(settings)
    stop: asyncio.Future[float] = loop.create_future()
    states: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    def received(kind: int, number: int, meta: bytes, payload: bytes) -> None:
        if kind == messages.REPLY:  # most are
            remote.received(kind, number, meta, payload)
        elif kind == messages.STATE:
            states.put_nowait((meta.decode(), number))
        elif kind == messages.STOP:
            end(json.loads(meta))
        elif kind == messages.PING:
            channel.send(messages.PING, 0)
        else:
            remote.received(kind, number, meta, payload)

    def end(limit: float) -> None:
        if not stop.done():
            stop.set_result(limit)

    def lost() -> None:
        remote.lost()
        end(0.0)

    async def follow() -> None:
        while True:
            await front.set(*await states.get())

    channel = Channel(out, into, received, lost, SHELF_BYTES)
    channel.on_full = front.hold
    following = [tasks.keep(remote.budget.keep_tidy, "giving memory back")]
    remote.attach(channel)
    await loop.create_unix_connection(lambda: channel, sock=way)
    following.append(tasks.keep(follow, "following what health says"))
    if certificates is not None:
        following.append(tasks.keep(partial(keep_fresh, [certificates], LOOK_SECONDS), "the look at certificates"))
    try:
        await front.start(settings["host"], settings["port"])
    except OSError as error:
        channel.send(messages.FAILED, 0, str(error).encode())
        channel.close()
        await stop
    else:
        channel.send(messages.READY, 0)
        either: list[asyncio.Future[Any]] = [stop, asyncio.ensure_future(front.ended())]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            log.error("front end %d ends, and another starts: its server has ended by itself", os.getpid())
            os._exit(1)
        await front.stop(stop.result())
    for task in following:
        task.cancel()
    channel.close()


if __name__ == "__main__":
    way, out, into = map(int, sys.argv[1:4])
    settings = json.loads(sys.argv[4])
    keep_large_pieces_apart(settings["room"])
    logging.basicConfig(level=settings["log_level"], format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    uvloop.run(run(socket.socket(fileno=way), mmap.mmap(out, 0), mmap.mmap(into, 0), settings))
