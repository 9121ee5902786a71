"""The batches that a model's engines run now."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Running:
    """How many batches the engines take at a time, and those that they have taken.

    Attributes:
        instances: Batches at a time.
        rows: Of those that run.
    """

    __slots__ = ("_begun", "instances", "rows")

    def __init__(self, instances: int) -> None:
        self.rows = 0
        self.use_instances(instances)

    @property
    def first_to_end(self) -> tuple[float, int] | None:
        """When the batch that ends first began, and its rows; None while an engine is free."""
        return self._begun[0] if len(self._begun) >= self.instances else None

    @property
    def free(self) -> int:
        """Batches that the engines could take now."""
        return self.instances - len(self._begun)

    def free_after(self, rows: int, now: float, takes: Callable[[int], float]) -> float:
        """When an engine is free once it has taken another batch, of `rows` rows; none where they are 0.

        Args:
            rows: Of that batch.
            now: The time.
            takes: Seconds that a batch of so many rows takes.
        """
        if not rows or self.free > 1:
            return now
        ends = now + takes(rows)
        if self._begun:
            at, running = self._begun[0]
            ends = min(ends, max(at + takes(running), now))
        return ends

    def use_instances(self, count: int) -> None:
        """Tells how many batches the engines take at a time from now on."""
        self.instances = count
        # The oldest of them ends first.
        self._begun: deque[tuple[float, int]] = deque(maxlen=count)

    def begin(self, rows: int, now: float) -> None:
        """A batch of `rows` rows was taken."""
        self.rows += rows
        self._begun.append((now, rows))

    def over(self, rows: int) -> None:
        """A batch of `rows` rows has ended, however."""
        self.rows -= rows
        if self._begun:
            self._begun.popleft()
