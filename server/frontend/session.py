"""The core's side of one front-end process: its calls, answered by the Dispatcher."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

import grpc

from convoynet.server.errors import DeadlineExceeded, OverBudget, Oversize
from convoynet.server.frontend import messages
from convoynet.server.frontend.channel import Channel
from convoynet.server.frontend.streams import Inbox
from convoynet.server.memory.budget import SMALL_BYTES
from convoynet.server.protocol.dispatch import Reply
from convoynet.server.types import Call

log = logging.getLogger(__name__)

_BUG = messages.reply_to_bytes(
    Reply(grpc.StatusCode.INTERNAL, message="internal error; the server's log has the details")
)


class Answers(Protocol):
    """What a front end hands its calls to: the Dispatcher, or a Remote that leads to it."""

    def refused(self, rpc: str, call: Call) -> Reply | None:
        """The refusal of a call whose request has not been read; None where nothing is known against it."""
        ...

    def refusal(self, error: Exception) -> Reply:
        """What a client is told of an error."""
        ...

    def over(self, rpc: str, call: Call) -> None:
        """Counts a call that is over, as `call` says; does nothing where it was counted."""
        ...

    async def unary(self, rpc: str, payload: bytes | memoryview, call: Call) -> Reply:
        """Answers a call of one message with one."""
        ...

    def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        """Answers a stream; a reply that is not OK ends it."""
        ...


class Session:
    """Runs a task for each call until it is answered, cancelled, or its front end is gone."""

    def __init__(self, answers: Answers, refused: Callable[[], None] = lambda: None) -> None:
        """Args: where calls go, and what is told of each that the front end refused for want of room."""
        self._answers, self._refused = answers, refused
        self._channel: Channel | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, Inbox[bytes]] = {}
        self._written: dict[int, asyncio.Future[str]] = {}
        """Of calls with large answers: the status that their front end ended them with."""

    def attach(self, channel: Channel) -> None:
        """The way back."""
        self._channel = channel

    def received(self, kind: int, number: int, meta: bytes, payload: bytes) -> None:
        """Takes what a front end says of a call."""
        channel = self._channel
        if channel is None:
            return
        if kind == messages.UNARY:
            rpc, call = messages.call_from_bytes(meta)
            self._run(number, self._unary(channel, number, rpc, payload, call))
        elif kind == messages.REFUSED:
            self._refused()
        elif kind == messages.CANCEL:
            if (task := self._tasks.get(number)) is not None:
                self._cancel(task)
        elif kind in (messages.WRITTEN, messages.OVER):
            self._ended(kind, number, meta, payload)
        elif kind == messages.OPEN:
            rpc, call = messages.call_from_bytes(meta)
            inbox: Inbox[bytes] = Inbox(lambda: channel.send(messages.TAKEN, number))
            self._streams[number] = inbox
            self._run(number, self._stream(channel, number, rpc, inbox, call))
        elif number in self._streams:
            stream = self._streams[number]
            if kind == messages.MESSAGE:
                stream.put(payload)
            elif kind == messages.HALF_CLOSE:
                stream.end()
            elif kind == messages.TAKEN:
                stream.window.release()

    def _ended(self, kind: int, number: int, meta: bytes, payload: bytes) -> None:
        if kind == messages.OVER:
            rpc, call = messages.call_from_bytes(meta)
            call.code = payload.decode()
            if number:
                call.error = Oversize("its message is too large")
            elif call.code == "DEADLINE_EXCEEDED":
                call.error = DeadlineExceeded("it has not come in time")
            self._answers.over(rpc, call)
        elif (written := self._written.get(number)) is not None and not written.done():
            written.set_result(meta.decode())

    def lost(self) -> None:
        """The front end is gone, and with it everyone who waited."""
        for task in self._tasks.values():
            self._cancel(task)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        """Not before it has begun: who begins also counts."""
        self._loop.call_soon(task.cancel)

    async def _unary(self, channel: Channel, number: int, rpc: str, payload: bytes, call: Call) -> None:
        try:
            reply = await self._answers.unary(rpc, payload, call)
            channel.send(messages.REPLY, number, messages.reply_to_bytes(reply), reply.payload)
            if (size := len(reply.payload)) >= SMALL_BYTES:
                del reply, payload
                await self._hear(number, call, size)
        except Exception:
            log.exception("a bug in the server")
            channel.send(messages.REPLY, number, _BUG)  # dropped where it has its answer
        finally:
            del self._tasks[number]
            self._answers.over(rpc, call)

    async def _hear(self, number: int, call: Call, size: int) -> None:
        """Waits until the front end has said how a call ended whose answer it may have had no room for.

        Without a word nobody got it: the client or the front end is gone.
        """
        written = self._written[number] = self._loop.create_future()
        call.code = "CANCELLED"
        try:
            call.code = await written
        finally:
            del self._written[number]
        if call.code != "OK":
            call.error = OverBudget(size, 0, 0)

    async def _stream(self, channel: Channel, number: int, rpc: str, inbox: Inbox[bytes], call: Call) -> None:
        try:
            async with aclosing(self._answers.stream(rpc, aiter(inbox), call)) as replies:
                async for reply in replies:
                    await inbox.window.acquire()
                    channel.send(messages.REPLY, number, messages.reply_to_bytes(reply), reply.payload)
        except Exception:
            log.exception("a bug in the server")
            channel.send(messages.REPLY, number, _BUG)
        finally:
            del self._streams[number], self._tasks[number]
            channel.send(messages.END, number)

    def _run(self, number: int, answering: Coroutine[Any, Any, None]) -> None:
        self._tasks[number] = self._loop.create_task(answering)
