"""Turns at a device that several models share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from types import TracebackType

_LOOK_SECONDS = 0.25
_LEAST_SECONDS = 1.0
_FACTOR = 10.0
_REMEMBERED = 4096


class _Flow:
    """One key: what it has used, in virtual seconds, and who waits for its turn."""

    __slots__ = ("finish", "running", "typical", "waiting")

    def __init__(self) -> None:
        self.finish = 0.0
        self.running = 0
        self.typical = 0.0
        self.waiting: deque[Turn] = deque()


class Turnstile:
    """Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over slot-seconds of use, on one event loop.

    Each key has a virtual time, which advances by slots * seconds / weight. Free slots go to the waiting key whose
    turn starts earliest in virtual time. The virtual time of the device is the start of the turn that was let through
    last, and a key that comes back starts no earlier: time in which it wanted nothing is no credit. Nobody waits while
    enough slots are free, so that a key alone has all of the device.

    How long a turn takes is known when it ends; until then it is charged with what its key's last turn took, which
    matters where there is more than one slot (as in SFQ(D), Jin, Chase, Kaur 2004).

    A turn that lasts ten times as long as its key's last one, and at least a second, holds nobody up any longer: its
    slots are given to those that wait, while it goes on. Whatever has the turn may never end.
    """

    def __init__(self, slots: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: how much may be in use at once, such as cores, and the clock that measures for how many seconds."""
        self._free = slots
        self._slots = slots
        self._clock = clock
        self._now = 0.0
        self._sequence = 0
        self._flows: dict[Hashable, _Flow] = {}
        self._turns: set[Turn] = set()
        self._lasted: dict[Hashable, float] = {}
        self._look: asyncio.TimerHandle | None = None

    def turn(self, key: Hashable, weight: float = 1.0, size: int = 1) -> Turn:
        """`async with turnstile.turn(key):` waits for slots, and gives them back whatever happens.

        Args:
            key: Whose turn it is; turns of one key are taken in the order in which they were asked for.
            weight: Its share relative to the others'; above 0.
            size: The slots that it takes, all of them at most; 0 for what does not use the device.
        """
        return Turn(self, key, weight, min(size, self._slots))

    async def _enter(self, turn: Turn) -> None:
        flow = self._flows.get(turn.key)
        if flow is None:
            flow = self._flows[turn.key] = _Flow()
        turn.flow = flow
        turn.asked_at = self._now
        if not turn.size or (self._free >= turn.size and not any(one.waiting for one in self._flows.values())):
            self._start(turn)
            return
        self._sequence += 1
        turn.order = self._sequence
        turn.ready = asyncio.get_running_loop().create_future()
        flow.waiting.append(turn)
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._overtake)
        try:
            await turn.ready
        except asyncio.CancelledError:
            if turn.ready.done() and not turn.ready.cancelled():
                self._end(turn)
            else:
                flow.waiting.remove(turn)
            raise

    def _start(self, turn: Turn) -> None:
        flow = turn.flow
        self._free -= turn.size
        start = max(turn.asked_at, flow.finish)
        self._now = max(self._now, start)
        turn.charged = flow.typical / turn.weight
        flow.finish = start + turn.charged
        flow.running += 1
        turn.started_at = self._clock()
        turn.held = turn.size
        self._turns.add(turn)

    def _end(self, turn: Turn) -> None:
        flow = turn.flow
        seconds = self._clock() - turn.started_at
        used = seconds * turn.size
        if len(self._lasted) > _REMEMBERED:
            self._lasted.clear()
        self._lasted[turn.key] = seconds
        flow.finish += used / turn.weight - turn.charged
        flow.typical = used
        flow.running -= 1
        self._turns.discard(turn)
        self._free += turn.held
        self._next()
        # Where nobody wants anything all begin anew, as if each had used what the others have.
        idle = not self._turns
        for key, one in list(self._flows.items()):
            if idle or not (one.running or one.waiting or one.finish > self._now):
                del self._flows[key]

    def _overtake(self) -> None:
        """Takes the slots of turns that last too long; looks again while anybody waits."""
        now = self._clock()
        for turn in self._turns:
            limit = max(_LEAST_SECONDS, _FACTOR * self._lasted.get(turn.key, 0.0))
            if turn.held and now - turn.started_at > limit:
                self._free += turn.held
                turn.held = 0
        self._next()
        waited = any(flow.waiting for flow in self._flows.values())
        self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._overtake) if waited else None

    def _next(self) -> None:
        """Lets through who starts earliest, the one that asked first among equals, as far as slots go."""
        while heads := [flow.waiting[0] for flow in self._flows.values() if flow.waiting]:
            turn = min(heads, key=lambda head: (max(head.asked_at, head.flow.finish), head.order))
            if turn.size > self._free:
                return
            turn.flow.waiting.popleft()
            self._start(turn)
            if turn.ready is None:
                raise AssertionError("only a turn that waits is let through later")
            turn.ready.set_result(None)


class Turn:
    """One turn at a Turnstile; made by Turnstile.turn() and used once."""

    __slots__ = (
        *("_turnstile", "asked_at", "charged", "flow", "held", "key", "order", "ready", "size", "started_at", "weight"),
    )

    def __init__(self, turnstile: Turnstile, key: Hashable, weight: float, size: int) -> None:
        self._turnstile = turnstile
        self.key = key
        self.weight = weight
        self.size = size
        self.flow: _Flow
        self.ready: asyncio.Future[None] | None = None
        self.asked_at = self.started_at = self.charged = 0.0
        self.order = self.held = 0

    async def __aenter__(self) -> None:
        await self._turnstile._enter(self)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turnstile._end(self)
