"""pygrpc-native's HTTP/2 in front of the core, and grpcio behind it for streams, health, reflection and odd methods.

A call is two messages to and from the core and two calls of this module: no task and no coroutine runs for it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from pygrpc_native import EVENT_CANCEL, NativeGrpcFront

from convoynet.server.errors import OverBudget, Oversize
from convoynet.server.frontend.leftovers import PREFIX, SOCKET
from convoynet.server.frontend.remote import Remote
from convoynet.server.protocol.dispatch import SERVICE, Reply
from convoynet.server.types import Call

log = logging.getLogger(__name__)

_SETTINGS = {
    "grpc.keepalive_time_ms": "keepalive_time_ms",
    "grpc.keepalive_timeout_ms": "keepalive_timeout_ms",
    "grpc.keepalive_permit_without_calls": "keepalive_permit_without_calls",
    "grpc.max_concurrent_streams": "max_concurrent_streams",
    "grpc.absolute_max_metadata_size": "max_metadata_size",
    "grpc.so_reuseport": "reuse_port",
}
"""What pygrpc-native calls the channel arguments that it has; the others are for the server behind it."""
_SWITCHES = {"grpc.keepalive_permit_without_calls", "grpc.so_reuseport"}
_TOGETHER = 64
"""Calls that are taken at once."""
_SMALL = 64 * 2**10
"""Answers that are smaller need no room in the budget: the calls of a connection are bounded."""


class NativeServer:
    """What aio.Server is to a local front end, on one insecure port.

    Args:
        options: grpcio's channel arguments.
        remote: Where calls of one request go.
        management: Whether the port takes management calls.
        behind: Serves everything else, behind a Unix socket.
    """

    def __init__(
        self, options: Sequence[tuple[str, int]], remote: Remote, management: bool, behind: aio.Server
    ) -> None:
        given = dict(options)
        self._settings: dict[str, Any] = {
            own: bool(given[name]) if name in _SWITCHES else max(1, given[name])
            for name, own in _SETTINGS.items()
            if name in given
        }
        self._most_in = given.get("grpc.max_receive_message_length", 2**63)
        self._most_out = given.get("grpc.max_send_message_length", 2**63)
        self._remote, self._management, self._behind = remote, management, behind
        self._front: NativeGrpcFront
        self._rpcs: list[str] = []
        self._asked: dict[int, int] = {}
        """The number with the core of each call that is not answered."""
        self._folder = ""
        self._over: asyncio.Future[None] | None = None
        """Once it stops: done when every call is answered."""

    def add_insecure_port(self, address: str) -> int:
        """See aio.Server.

        Raises:
            RuntimeError: It is taken.
        """
        try:
            self._front = NativeGrpcFront(address, [], call_details=True, delay_stream_headers=True, **self._settings)
        except OSError as error:
            raise RuntimeError(f"cannot listen on {address}") from error
        return self._front.bound_port

    async def start(self) -> None:
        """See aio.Server."""
        self._folder = tempfile.mkdtemp(prefix=PREFIX)
        path = str(Path(self._folder, SOCKET))
        self._behind.add_insecure_port(f"unix:{path}")
        await self._behind.start()
        self._front.set_fallback(path)
        self._rpcs = [rpc.name for rpc in SERVICE.methods if not (rpc.client_streaming or rpc.server_streaming)]
        self._front.add_methods([(f"/{SERVICE.full_name}/{name}", False) for name in self._rpcs])
        self._front.start()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._take, args=[loop], name="calls of pygrpc-native", daemon=True).start()

    async def stop(self, limit: float) -> None:
        """See aio.Server."""
        loop = asyncio.get_running_loop()
        self._over = loop.create_future()
        behind = asyncio.ensure_future(self._behind.stop(limit))
        if self._asked:
            with suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._over
        for number in self._asked.values():
            self._remote.withdraw(number)
        self._asked.clear()
        await behind
        await loop.run_in_executor(None, self._front.close)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: hands over what comes, all that has come at once."""
        while (events := self._front.recv_batch_details(_TOGETHER)) is not None:
            try:
                loop.call_soon_threadsafe(self._taken, events)
            except RuntimeError:  # it is closed
                self._front.close()
                return

    def _taken(self, events: Sequence[tuple[Any, ...]]) -> None:
        for kind, number, method, payload, _, details in events:
            try:
                if kind != EVENT_CANCEL:
                    self._begin(number, self._rpcs[method], payload, details)
                elif (asked := self._asked.get(number)) is not None:
                    self._forget(number)
                    self._remote.withdraw(asked)
            except Exception:
                log.exception("a bug in the server")
                self._forget(number)
                self._front.fail(number, grpc.StatusCode.INTERNAL.value[0], "internal error")

    def _begin(
        self, number: int, rpc: str, payload: bytes, details: tuple[tuple[tuple[str, str | bytes], ...], str, float]
    ) -> None:
        metadata, _, remaining = details
        deadline = None if remaining is None else time.monotonic() + remaining
        call = Call("grpc", deadline, metadata, "", self._management)
        if len(payload) > self._most_in:
            call.error = Oversize(f"SERVER: Received message larger than max ({len(payload)} vs. {self._most_in})")
            self._refuse(number, rpc, call, grpc.StatusCode.RESOURCE_EXHAUSTED, str(call.error))
        elif self._over is not None:
            self._refuse(number, rpc, call, grpc.StatusCode.UNAVAILABLE, "Server is shutting down")
        else:
            try:
                self._asked[number] = self._remote.ask(rpc, payload, call, partial(self._answer, number))
            except OverBudget as error:
                reply = self._remote.refusal(error)
                call.error = error
                self._refuse(number, rpc, call, reply.code, reply.message)

    def _refuse(self, number: int, rpc: str, call: Call, code: grpc.StatusCode, text: str) -> None:
        call.code = code.name
        self._remote.over(rpc, call)  # before its client can ask for the metrics
        self._front.fail(number, code.value[0], text)

    def _answer(self, number: int, reply: Reply) -> None:
        payload = reply.payload
        if reply.code is not grpc.StatusCode.OK:
            self._front.fail(number, reply.code.value[0], reply.message)
        elif len(payload) < _SMALL or self._has_room(number, len(payload)):
            self._front.respond(number, payload)
        self._forget(number)

    def _has_room(self, number: int, size: int) -> bool:
        """Whether an answer may be sent; its client is told where not."""
        if size > self._most_out:
            text = f"SERVER: Sent message larger than max ({size} vs. {self._most_out})"
            self._front.fail(number, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], text)
            return False
        try:
            with self._remote.budget.holding(size):
                return True
        except OverBudget as error:
            reply = self._remote.refusal(error)
            self._front.fail(number, reply.code.value[0], reply.message)
            return False

    def _forget(self, number: int) -> None:
        self._asked.pop(number, None)
        if self._over is not None and not self._asked and not self._over.done():
            self._over.set_result(None)
