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
from collections import Counter
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
from convoynet.server.memory.budget import SMALL_BYTES
from convoynet.server.protocol.dispatch import SERVICE, Reply
from convoynet.server.supervision import tasks
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
_INFER = "ModelInfer"
_LOOK_SECONDS = 0.1
_PASSED_ON_SECONDS = 0.5
"""What the last answers of streams may take to come from behind to their clients: nothing tells when they are there."""
_WRITTEN_SECONDS = 0.01
"""How often its last answers are looked at before it stops."""
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_NOT_ITS_OWN = {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}
"""With these it ends no call of its own accord before that was handed over."""


class NativeServer:
    """What aio.Server is to a local front end, on one insecure port.

    Its threads end some calls themselves: of no message, of an encoding that they do not know. Nobody is told of those;
    but it counts all ends of calls by their status, for metrics of its own. What it has counted beyond what was ended
    from here is what it has refused.

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
        self._remote, self._management, self._behind = remote, management, behind
        self._front: NativeGrpcFront
        self._rpcs: list[str] = []
        self._asked: dict[int, int] = {}
        """The number with the core of each call that is not answered."""
        self._folder = ""
        self._over: asyncio.Future[None] | None = None
        """Once it stops: done when every call is answered."""
        self._answered = 0
        """Calls whose answer it took."""
        self._told: Counter[str] = Counter()
        """Of the calls of ModelInfer, how many were refused from here, by status; or were told of."""
        self._ended = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def add_insecure_port(self, address: str) -> int:
        """See aio.Server.

        Raises:
            RuntimeError: It is taken.
        """
        try:
            self._front = NativeGrpcFront(
                address, [], call_details=True, delay_stream_headers=True, metrics=True, **self._settings
            )
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
        # Never cancelled, as that would cancel what its own end waits for.
        tasks.start(self._end_with_the_other(), "the gRPC server behind the native stack")
        self._looking = tasks.keep(self._look, "the look at what the native stack refuses")

    async def wait_for_termination(self) -> None:
        """See aio.Server; also returns where it has ended by itself."""
        await self._ended.wait()

    async def stop(self, limit: float) -> None:
        """See aio.Server."""
        loop = asyncio.get_running_loop()
        end, streamed = loop.time() + limit, self._remote.streams
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
        if streamed:
            await asyncio.sleep(min(_PASSED_ON_SECONDS, end - loop.time()))
        while not self._are_written() and loop.time() < end:
            await asyncio.sleep(_WRITTEN_SECONDS)
        if self._looking is not None:
            self._looking.cancel()
            self._count_refused(self._refused())
        await loop.run_in_executor(None, self._front.close)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: hands over what comes, all that has come at once."""
        try:
            while (events := self._front.recv_batch_details(_TOGETHER)) is not None:
                loop.call_soon_threadsafe(self._taken, events)
        except RuntimeError:  # the loop is closed
            self._front.close()
        finally:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended.set)

    async def _end_with_the_other(self) -> None:
        try:
            await self._behind.wait_for_termination()
        finally:
            self._ended.set()

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
                self._fail(number, self._rpcs[method], grpc.StatusCode.INTERNAL, "internal error")

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
                self._asked[number] = self._remote.ask(rpc, payload, call, partial(self._answer, number, rpc))
            except OverBudget as error:
                reply = self._remote.refusal(error)
                self._refuse(number, rpc, call, reply.code, reply.message)

    def _refuse(self, number: int, rpc: str, call: Call, code: grpc.StatusCode, text: str) -> None:
        call.code = code.name
        self._remote.over(rpc, call)  # before its client can ask for the metrics
        self._fail(number, rpc, code, text)

    def _fail(self, number: int, rpc: str, code: grpc.StatusCode, text: str) -> None:
        if self._front.fail(number, code.value[0], text) and rpc == _INFER:
            self._told[code.name] += 1

    def _answer(self, number: int, rpc: str, reply: Reply) -> None:
        asked, payload = self._asked.get(number, 0), reply.payload
        if reply.code is not grpc.StatusCode.OK:
            self._fail(number, rpc, reply.code, reply.message)
        elif len(payload) < SMALL_BYTES:
            self._answered += self._front.respond(number, payload)
        else:
            try:
                with self._remote.budget.holding(len(payload)):
                    self._remote.written(asked, "OK")
                    self._answered += self._front.respond(number, payload)
            except OverBudget as error:
                refusal = self._remote.refusal(error)
                self._remote.written(asked, refusal.code.name)
                self._fail(number, rpc, refusal.code, refusal.message)
        self._forget(number)

    def _forget(self, number: int) -> None:
        self._asked.pop(number, None)
        if self._over is not None and not self._asked and not self._over.done():
            self._over.set_result(None)

    def _are_written(self) -> bool:
        """Whether its threads have written every answer.

        They count calls as they begin and as they end, one that is answered when all of it is written. One whose client
        goes before that looks as if it were still written, until a moment comes at which no call is under way.
        """
        begun = ended = written = 0
        for counted in self._methods().values():
            counts = {code: status["count"] for code, status in counted["status"].items()}
            begun, ended, written = begun + counted["started"], ended + sum(counts.values()), written + counts.get(0, 0)
        if begun == ended:
            self._answered = written
        return self._answered <= written

    async def _look(self) -> None:
        """Counts what was refused, if it is still so at the next look: what is ended from here is known soon after."""
        before: Counter[str] = Counter()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self._are_written()
            found = self._refused()
            sure = found & before
            self._count_refused(sure)
            before = found - sure

    def _methods(self) -> dict[str, Any]:
        """What its threads have counted of each method that is not served behind."""
        methods: dict[str, Any] = (self._front.metrics() or {"methods": {}})["methods"]
        return methods

    def _refused(self) -> Counter[str]:
        """By status, how many calls of ModelInfer ended that were not ended from here."""
        counted = self._methods().get(f"/{SERVICE.full_name}/{_INFER}", {"status": {}})["status"]
        ended = Counter({_CODES[code]: status["count"] for code, status in counted.items()})
        return Counter({code: count for code, count in (ended - self._told).items() if code not in _NOT_ITS_OWN})

    def _count_refused(self, refused: Counter[str]) -> None:
        self._told += refused
        for code in refused.elements():
            self._remote.over(_INFER, Call("grpc", code=code))
