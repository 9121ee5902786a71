"""Which batch to run where not everybody can be answered in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, islice
from math import inf

from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.latency import Takes

MOST_PASSED = 256
"""Entries without room in a batch, or not to be helped, that are looked at before no more are."""
_SOONER = 0.8
"""The most of a batch's time that its parts may take so that engines share it."""
_NOTHING = 1e-9
"""Seconds of a batch of which nothing is known."""
_SPARE = 0.15
"""The part of the rows that could be in time that may be lost so that nobody is passed for ever."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Entries that are in time together.

    Attributes:
        batch: The entries.
        rows: Of the batch.
        passed: Whether others would be in time for whom there was no room.
        worth: Rows a second.
    """

    batch: list[Entry]
    rows: int
    passed: bool
    worth: float = 0.0


class Chooser:
    """Chooses a scheduler's batches where deadlines press.

    An entry is hurried when it would be too late after another batch, both of them slow. Only such a one passes others
    of its level, those that have no room in the batch; so nobody else is worse off for it than by one batch.

    Where the batch that begins with who came first is not full, the largest hurried ones may fill a better one. That is
    run, but for a part of the time: for what it gains the first may be served in their turn now and then. So neither a
    large nor a small one is passed for ever, and nearly as many rows are in time as could be.
    """

    __slots__ = ("_slow", "_spare", "_takes")

    def __init__(self, slow: Callable[[float, int], float], takes: Callable[[float, int], Takes]) -> None:
        """Args, both of the time and of rows: what a slow batch takes by whatever is known, and what is known well."""
        self._slow = slow
        self._takes = takes
        self._spare = 0.0

    def choose(self, waiting: Iterable[Entry], now: float, sizes: tuple[int, ...]) -> Choice:
        """The batch that answers the most rows in time for the seconds that it takes, or whose turn it is.

        Args:
            waiting: In their order, those of a queue behind each other; none of them expired.
            now: The time.
            sizes: Where a batch may end, in rows, descending; the first is the most.
        """
        hurried = now + 2 * self._slow(now, sizes[0])
        seen: list[Entry] = []
        first = self._best(_noted(waiting, seen), seen, now, sizes, hurried)
        if first.rows >= sizes[0] or not first.passed:
            return first
        levels = [list(level) for _, level in groupby(seen, key=_queue)]
        by_size = [entry for level in levels for entry in sorted(level, key=partial(_by_size, hurried))]
        packed = self._best(by_size, by_size, now, sizes, hurried)
        above = [_queue(level[0]) for level in levels[:-1]]
        if packed.worth <= first.worth or (above and _rows_at(above, packed) < _rows_at(above, first)):
            return first
        following = now + self._slow(now, first.rows)
        if not too_late([packed.batch], first.batch, following, partial(self._slow, now)):
            return first
        lost = 1 - first.worth / packed.worth
        if lost <= self._spare:
            self._spare -= lost
            return first
        self._spare += _SPARE
        return packed

    def _best(
        self, waiting: Iterable[Entry], seen: list[Entry], now: float, sizes: tuple[int, ...], hurried: float
    ) -> Choice:
        """The best of those that are filled in this order, which is in `seen` when it has been gone through once.

        As long as there are enough for a full batch who would be in time even if it were slow, it is theirs. Where
        there are not, nobody's place is taken by one who may be late: then the median counts, and a smaller batch where
        more are in time for it. A smaller one that was not measured is not believed to take less.
        """
        smaller = (*sizes[1:], 0)
        whole = self._fill(waiting, now, sizes[0], sizes, hurried, partial(self._slow, now))
        if whole.passed and whole.rows > smaller[0]:
            return whole
        best = Choice([], 0, whole.passed)
        for size, less in zip(sizes, smaller, strict=True):
            if self._worth(now, size) > best.worth:  # or it could not be better if it were full
                one = self._fill(seen, now, size, sizes, hurried, lambda rows: self._takes(now, rows).least)
                # One that fits into a smaller size is not too late for so many.
                if one.rows > less and one.worth > best.worth:
                    best = one
        return best

    def _fill(
        self,
        waiting: Iterable[Entry],
        now: float,
        size: int,
        sizes: tuple[int, ...],
        hurried: float,
        seconds: Callable[[int], float],
    ) -> Choice:
        """A batch of at most `size` rows, of those that are in time for one of that size."""
        batch: list[Entry] = []
        rows, passed, whole = 0, 0, seconds(size)
        for entry in waiting:
            slack = entry.finish_by - now
            if slack < whole or (entry.rows > size and slack < seconds(entry.rows)):
                continue
            # Where each request runs alone, one may have more rows than a batch.
            fits = rows + entry.rows <= size or (not batch and size == sizes[0])
            if not fits or (passed and entry.expires > hurried) or (batch and entry.shapes != batch[0].shapes):
                passed += 1
                if not batch or passed > MOST_PASSED:
                    break  # the first that is in time heads it
                continue
            batch.append(entry)
            rows += entry.rows
            if rows >= size:
                passed += 1
                break
        return Choice(batch, rows, passed > 0, self._worth(now, rows))

    def _worth(self, now: float, rows: int) -> float:
        """Rows a second."""
        return rows / max(self._takes(now, rows).most, _NOTHING) if rows else 0.0


def reached(batch: list[Entry], sizes: frozenset[int]) -> int:
    """How many entries of a batch make up the largest of `sizes` that it reaches; 0 where it reaches none."""
    return max((count for count, rows in _ends(batch) if rows in sizes), default=0)


def shared(batch: list[Entry], queued: int, free: int, takes: Callable[[int], Takes]) -> list[Entry]:
    """The part of a batch that leaves as much of the rows that are queued to each engine that is free.

    Clients that wait for their answers send what is next all at once: of two engines that could share it one would
    always idle. A part is tried where nobody knows how long it takes, and run where it is done sooner than the batch.
    """
    part = -(-queued // free)
    count = next((count for count, rows in _ends(batch) if rows >= part), len(batch))
    if count >= len(batch):
        return batch
    known = takes(part)
    later = known.least == known.most > _SOONER * takes(sum(entry.rows for entry in batch)).most
    return batch if later else batch[:count]


def too_late(
    queues: Iterable[Iterable[Entry]], batch: list[Entry], following: float, takes: Callable[[int], float]
) -> list[Entry]:
    """Who else would be too late for a batch that begins at `following`; all where not even a batch was in time.

    The first of each queue are looked at.
    """
    if not batch:
        return [entry for queue in queues for entry in queue]
    chosen = set(batch)
    return [
        entry
        for queue in queues
        for entry in islice(queue, MOST_PASSED + len(batch))
        if entry.finish_by - following < takes(entry.rows) and entry not in chosen
    ]


def _ends(batch: list[Entry]) -> Iterator[tuple[int, int]]:
    """How many entries, and their rows, for each place at which a batch may end."""
    return enumerate(accumulate(entry.rows for entry in batch), 1)


def _noted(waiting: Iterable[Entry], seen: list[Entry]) -> Iterator[Entry]:
    for entry in waiting:
        seen.append(entry)
        yield entry


def _queue(entry: Entry) -> int:
    return id(entry.queue)


def _by_size(hurried: float, entry: Entry) -> float:
    """The largest of the hurried first, then the others as they came."""
    return -entry.rows if entry.expires <= hurried else inf


def _rows_at(queues: list[int], choice: Choice) -> list[int]:
    """Rows of each queue, to be compared from the highest down."""
    rows = Counter[int]()
    for entry in choice.batch:
        rows[_queue(entry)] += entry.rows
    return [rows[queue] for queue in queues]
