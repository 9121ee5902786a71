"""One request while it waits, and the priority level at which it does."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from convoynet.server.spec import QueuePolicy
from convoynet.server.types import Tensor, Timings


class Level:
    """What waits at one priority level."""

    __slots__ = ("count", "delayed", "delays", "max_queue", "queue", "rows", "timeout")

    def __init__(self, policy: QueuePolicy) -> None:
        self.max_queue = policy.max_queue
        self.timeout = policy.timeout_s or inf
        self.delays = policy.delays
        self.queue: OrderedDict[Entry, None] = OrderedDict()
        self.delayed: OrderedDict[Entry, None] = OrderedDict()
        self.count = 0
        self.rows = 0


@dataclass(eq=False, slots=True)
class Entry:
    """One request on its way to an engine: it owns the place where its answer goes and its own times.

    Attributes:
        rows: Rows along the batch axis; 1 where there is none.
        nbytes: Bytes that its inputs take while they wait, decoded.
        result: Set on the event loop, to the output tensors by name, and only while it is not done: a client that
            went away has it cancelled.
        timings: When it passed each stage.
        outputs: Names of the outputs that it asks for; empty for all.
        priority: Its level, 1 the highest; 0, or one that there is not, for the model's default.
        deadline: The client's own, by the scheduler's clock, or None.
        timeout_s: Its own timeout, counted from admission; 0 for none. Bounds the time to the answer like the deadline,
            or, at a level that delays, how long it keeps its place.
        inputs: Tensors by input name, `rows` rows each; put() sets them.
        finish_by: When it must be answered, by the scheduler's clock; infinity for never. Set by admit().
        expires: When the owner is to answer DeadlineExceeded. While it waits, the time it may wait counts as well; from
            form() on it is finish_by. So a timer that was set for it looks at it again.

    The other attributes are the scheduler's own.
    """

    rows: int
    nbytes: int
    result: asyncio.Future[dict[str, Tensor]]
    timings: Timings
    outputs: frozenset[str] = frozenset()
    priority: int = 0
    deadline: float | None = None
    timeout_s: float = 0.0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    finish_by: float = inf
    expires: float = inf
    delay_at: float = inf
    queued_at: float = 0.0
    shapes: tuple[object, ...] = ()
    level: Level | None = field(default=None, repr=False)
    queue: OrderedDict[Entry, None] | None = field(default=None, repr=False)
