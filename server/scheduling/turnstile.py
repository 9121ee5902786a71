"""Turns at a device that several models share."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from math import inf
from types import TracebackType

_LOOK_SECONDS = 0.25
_LEAST_SECONDS = 1.0
_FACTOR = 10.0
_REMEMBERED = 4096
_GAPS = 8
"""Pauses of a key that are remembered."""
_SOON, _SOON_TURNS = 0.01, 4.0
"""The longest usual pause of a key that is waited for: so many seconds, or times as long as its turn."""
_PATIENCE = 2.0
"""How many times as long as its usual pause, or as its turn, a key is waited for; _SOON at least."""
_TICK = 0.0005
"""The shortest timer: one may come early by the resolution of its clock."""


class _Habit:
    """What is known of a key: how long its last turn took, and after what pauses it wants the next."""

    __slots__ = ("gaps", "lasted", "left_at")

    def __init__(self) -> None:
        self.lasted = 0.0
        self.gaps: deque[float] = deque(maxlen=_GAPS)
        self.left_at = inf

    @property
    def gap(self) -> float:
        """The longest usual pause; 0 where it is not known, infinite where it is too long to be waited for."""
        gap = sorted(self.gaps)[-2] if len(self.gaps) > 1 else 0.0
        return gap if gap <= max(_SOON, _SOON_TURNS * self.lasted) else inf


class _Flow:
    """One key: what it has used, in virtual seconds, and who waits for its turn."""

    __slots__ = ("awaited_at", "finish", "habit", "running", "share", "size", "typical", "waiting")

    def __init__(self, habit: _Habit) -> None:
        self.habit = habit
        self.finish = 0.0
        self.running = self.size = 0
        self.typical = self.share = 0.0
        self.awaited_at = inf
        self.waiting: deque[Turn] = deque()


class Turnstile:
    """Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over slot-seconds of use, on one event loop.

    Each key has a virtual time, which advances by slots * seconds / weight. Free slots go to the waiting key whose
    turn starts earliest in virtual time. The virtual time of the device is the start of the turn that was let through
    last, and a key that comes back starts no earlier: time in which it wanted nothing is no credit. While nobody wants
    anything it goes on with the clock. A key alone has all of the device.

    A client that sends its next request when it has the answer leaves its model without any for a moment after each
    turn. If another model's long turn began in each such moment, one turn of the first would go with each of these,
    however short it is. So the slots are kept for a key that is behind the next one, if it is used to come back soon
    (as in anticipatory scheduling of disks, Iyer and Druschel, SOSP 2001): its pauses are at most four times as long as
    its turns, and short enough for the other's turn to more than double the time between its own. It is waited for at
    most twice as long as usual, and the wait is charged to it: so each key has its share of the time, in which it does
    what it would do alone.

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
        self._habits: dict[Hashable, _Habit] = {}
        self._look: asyncio.TimerHandle | None = None
        self._wait: asyncio.TimerHandle | None = None
        self._idle_at = inf

    def turn(self, key: Hashable, weight: float = 1.0, size: int = 1) -> Turn:
        """`async with turnstile.turn(key):` waits for slots, and gives them back whatever happens.

        Args:
            key: Whose turn it is; turns of one key are taken in the order in which they were asked for.
            weight: Its share relative to the others'; above 0.
            size: The slots that it takes, all of them at most; 0 for what does not use the device.
        """
        return Turn(self, key, weight, min(size, self._slots))

    async def _enter(self, turn: Turn) -> None:
        if self._idle_at < inf:
            # What nobody used anybody could have: so much of what one was ahead by is forgotten.
            self._now += (self._clock() - self._idle_at) * self._slots
            self._idle_at = inf
            self._forget()
        flow = turn.flow = self._came(turn.key)
        turn.asked_at = self._now
        self._sequence += 1
        turn.order = self._sequence
        if not turn.size or (
            self._free >= turn.size
            and not any(one.waiting for one in self._flows.values())
            and not self._is_kept_from(turn)
        ):
            self._start(turn)
            return
        turn.ready = asyncio.get_running_loop().create_future()
        flow.waiting.append(turn)
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._overtake)
        self._next()  # the slots may be free, and kept for it
        try:
            await turn.ready
        except asyncio.CancelledError:
            if turn.ready.done() and not turn.ready.cancelled():
                self._end(turn)
            else:
                flow.waiting.remove(turn)
                self._settle(self._clock())
            raise

    def _came(self, key: Hashable) -> _Flow:
        """The flow of a key that wants a turn now: the pause before is noted, and paid for if it was waited for."""
        flow = self._flows.get(key)
        if flow is None:
            if len(self._habits) > _REMEMBERED:
                self._habits.clear()
            flow = self._flows[key] = _Flow(self._habits.setdefault(key, _Habit()))
        habit, now = flow.habit, self._clock()
        if habit.left_at < inf:
            habit.gaps.append(now - habit.left_at)
            habit.left_at = inf
        self._charge(flow, now)
        return flow

    def _charge(self, flow: _Flow, now: float) -> None:
        """Ends the wait for a key, which pays for it."""
        flow.finish += max(now - flow.awaited_at, 0.0) * flow.share
        flow.awaited_at = inf

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
        now = self._clock()
        seconds = now - turn.started_at
        used = seconds * turn.size
        flow.habit.lasted = seconds
        flow.finish += used / turn.weight - turn.charged
        flow.typical = used
        flow.size, flow.share = turn.size, turn.size / turn.weight
        flow.running -= 1
        if not (flow.running or flow.waiting):
            flow.habit.left_at = now
        self._turns.discard(turn)
        self._free += turn.held
        self._settle(now)

    def _settle(self, now: float) -> None:
        """After anybody has left: lets others through, and forgets who wants nothing and is not ahead of the others."""
        self._next()
        if not (self._turns or any(one.waiting for one in self._flows.values())):
            self._idle_at = now
        self._forget()

    def _forget(self) -> None:
        for key, one in list(self._flows.items()):
            if not (one.running or one.waiting or one.finish > self._now):
                del self._flows[key]

    def _overtake(self) -> None:
        """Takes the slots of turns that last too long; looks again while anybody waits."""
        now = self._clock()
        for turn in self._turns:
            limit = max(_LEAST_SECONDS, _FACTOR * turn.flow.habit.lasted)
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
            if turn.size > self._free or self._is_kept_from(turn):
                return
            turn.flow.waiting.popleft()
            self._start(turn)
            if turn.ready is None:
                raise AssertionError("only a turn that waits is let through later")
            turn.ready.set_result(None)

    def _is_kept_from(self, turn: Turn) -> bool:
        """Whether the slots are kept for a key that comes back soon; then it is looked at again."""
        now = self._clock()
        start, lasts = max(turn.asked_at, turn.flow.finish), turn.flow.habit.lasted
        for flow in self._flows.values():
            habit = flow.habit
            if habit.left_at == inf or flow.size <= self._free - turn.size:
                continue
            gap = habit.gap
            left = habit.left_at + max(_PATIENCE * max(gap, habit.lasted), _SOON) - now
            returns = max(flow.finish, self._now) + gap * flow.share
            if left > 0 and returns < start and lasts > habit.lasted + 2 * gap:
                flow.awaited_at = min(flow.awaited_at, now)
                if self._wait is not None:
                    self._wait.cancel()
                self._wait = asyncio.get_running_loop().call_later(max(left, _TICK), self._next)
                return True
            self._charge(flow, now)
        return False


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
