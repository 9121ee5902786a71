"""A front end's side: what looks like the Dispatcher there, and is in another process."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import grpc

from convoynet.server.errors import OverBudget, Oversize, ServerError
from convoynet.server.frontend import messages
from convoynet.server.frontend.channel import Channel
from convoynet.server.frontend.streams import Inbox
from convoynet.server.memory.budget import SMALL_BYTES, Budget
from convoynet.server.protocol.dispatch import Reply
from convoynet.server.status import code_of
from convoynet.server.types import Call

_GONE = Reply(grpc.StatusCode.UNAVAILABLE, message="the server stopped before it answered")


class Remote:
    """Sends every call to the core process. Answers as Dispatcher does; attach() comes first.

    Attributes:
        budget: What requests count for until they are answered.

    Args:
        budget: The same; every refusal of it is told to the core, which counts.
        triton: Whether statuses are Triton's where they differ.
    """

    def __init__(self, budget: Budget, *, triton: bool = False) -> None:
        self.budget, self._triton = budget, triton
        budget.refused = self._count_refusal
        self._channel: Channel | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[Callable[[Reply], None], int]] = {}
        """What is told the answer to each call of one message, and what the call counts for."""
        self._streams: dict[int, Inbox[Reply]] = {}
        self._sent: dict[int, deque[int]] = {}
        """Of each stream, the sizes of the messages that the core has not taken yet."""

    def attach(self, channel: Channel) -> None:
        """The way to the core."""
        self._channel = channel

    def received(self, kind: int, number: int, meta: bytes, payload: bytes) -> None:
        """Takes REPLY, END, and TAKEN; what belongs to a call that is over is dropped."""
        asked = self._asked.pop(number, None)
        if asked is not None:
            self.budget.give(asked[1])
            asked[0](messages.reply_from_bytes(meta, payload))
            return
        stream = self._streams.get(number)
        if stream is None:
            return
        if kind == messages.REPLY:
            stream.put(messages.reply_from_bytes(meta, payload))
        elif kind == messages.TAKEN:
            self.budget.give(self._sent[number].popleft())
            stream.window.release()
        elif kind == messages.END:
            stream.end()

    def lost(self) -> None:
        """The core is gone: every call that waits ends."""
        asked, self._asked = self._asked, {}
        for told, size in asked.values():
            self.budget.give(size)
            told(_GONE)
        for stream in self._streams.values():
            stream.put(_GONE)
            stream.end()

    def _count_refusal(self) -> None:
        """Tells the core, which counts, of a call that was refused here."""
        self._way().send(messages.REFUSED, 0)

    def refused(self, rpc: str, call: Call) -> Reply | None:
        """See Dispatcher.refused: only the core knows who may call."""
        return None

    def refusal(self, error: Exception) -> Reply:
        """What a client is told of an error that arose here."""
        return Reply(code_of(error, triton=self._triton), message=str(error))

    def over(self, rpc: str, call: Call) -> None:
        """See Dispatcher.over: the core counts what it was asked; it is told of what was not."""
        if call.counted:
            return
        call.counted = True
        if call.number:
            self.written(call.number, call.code)
        else:
            too_large = isinstance(call.error, Oversize)
            self._way().send(messages.OVER, int(too_large), messages.call_to_bytes(rpc, call), call.code.encode())

    def place(self, size: int) -> memoryview | None:
        """Memory that the core reads too, for the message of a call that has begun to come; None where it is full."""
        return self._way().place(size)

    def ask(self, rpc: str, payload: bytes | memoryview, call: Call, told: Callable[[Reply], None]) -> int:
        """Sends a call of one message, which `told` is called with the answer of, later; its number, for withdraw().

        Raises:
            OverBudget: There is no room for it; it was not sent.
        """
        size = len(payload)
        self.budget.take(size)
        number = next(self._numbers)
        self._asked[number] = told, size
        call.counted = True
        self._way().send(messages.UNARY, number, messages.call_to_bytes(rpc, call), payload)
        return number

    def withdraw(self, number: int) -> None:
        """Nobody waits for the answer to a call any more, or for the end of one that the core has answered.

        What it counts for is given back when the request is no longer here.
        """
        _, size = self._asked.pop(number, (None, 0))
        self._way().send(messages.CANCEL, number, left=partial(self.budget.give, size) if size else None)

    def written(self, number: int, code: str) -> None:
        """Tells the core, which waits for it where an answer is not small, how the call ended that it has answered."""
        self._way().send(messages.WRITTEN, number, code.encode())

    async def unary(self, rpc: str, payload: bytes | memoryview, call: Call) -> Reply:
        """See Dispatcher.unary."""
        waiting: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        try:
            number = self.ask(rpc, payload, call, partial(_set, waiting))
        except OverBudget as error:
            reply = self.refusal(error)
            call.code = reply.code.name  # not the error, whose frames hold the request
            return reply
        try:
            reply = await waiting
        except asyncio.CancelledError:
            self.withdraw(number)
            raise
        if len(reply.payload) >= SMALL_BYTES:
            # The core waits for over() to say whether there was room for it.
            call.counted, call.number, call.code = False, number, "OK"
        return reply

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        """See Dispatcher.stream."""
        channel, number = self._way(), next(self._numbers)
        inbox: Inbox[Reply] = Inbox(lambda: channel.send(messages.TAKEN, number))
        self._streams[number] = inbox
        sent = self._sent[number] = deque()
        channel.send(messages.OPEN, number, messages.call_to_bytes(rpc, call))

        failed: list[Reply] = []

        async def feed() -> None:
            try:
                async for payload in payloads:
                    await inbox.window.acquire()
                    self.budget.take(len(payload))
                    sent.append(len(payload))
                    channel.send(messages.MESSAGE, number, payload=payload)
                channel.send(messages.HALF_CLOSE, number)
            except ServerError as error:
                reply = self.refusal(error)
                self.over("ModelInfer", replace(call, code=reply.code.name, error=error))
                failed.append(reply)
                channel.send(messages.HALF_CLOSE, number)  # what has come is answered before

        feeder = asyncio.ensure_future(feed())
        try:
            async for reply in inbox:
                yield reply
            for reply in failed:
                yield reply
        finally:
            feeder.cancel()
            del self._streams[number], self._sent[number]
            channel.send(messages.CANCEL, number, left=partial(self.budget.give, sum(sent)))

    def _way(self) -> Channel:
        if self._channel is None:
            raise AssertionError("attach() comes before the first call")
        return self._channel


def _set(waiting: asyncio.Future[Reply], reply: Reply) -> None:
    if not waiting.done():
        waiting.set_result(reply)
