"""Which batch to run where not everybody can be answered in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.latency import Takes

_NOTHING = 1e-9
"""Seconds of a batch of which nothing is known."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Entries in their order, without those for which it would be too late.

    Attributes:
        batch: The entries.
        missed: Those before the last of them for which it is too late.
        rows: Of the batch.
        is_full: Whether it ended since no other, or not the next one, had room in it.
    """

    batch: list[Entry]
    missed: list[Entry]
    rows: int
    is_full: bool


def choose(
    waiting: Iterable[Entry],
    now: float,
    sizes: tuple[int, ...],
    slow: Callable[[int], float],
    takes: Callable[[int], Takes],
) -> Choice:
    """The batch that answers the most rows in time for the seconds that it takes.

    As long as there are enough for a full batch who would be in time even if it were slow, it is theirs. Where there
    are not, nobody's place is taken by one who may be late: then the median counts, and a smaller batch where more are
    in time for it. A smaller one that was not measured is not believed to take less.

    Args:
        waiting: In their order, none of them expired.
        now: The time.
        sizes: Where a batch may end, in rows, descending; the first is the most.
        slow: Seconds that a slow batch of so many rows may take, by whatever is known.
        takes: What is known well of batches of so many rows.
    """
    seen: list[Entry] = []
    smaller = (*sizes[1:], 0)
    whole = _fill(_noted(waiting, seen), now, sizes[0], sizes, slow)
    if whole.is_full and whole.rows > smaller[0]:
        return whole
    best, worth = Choice([], seen, 0, False), 0.0
    for size, less in zip(sizes, smaller, strict=True):
        if _worth(size, takes) > worth:  # or it could not be better if it were full
            one = _fill(seen, now, size, sizes, lambda rows: takes(rows).least)
            # One that fits into a smaller size is not too late for so many.
            if one.rows > less and (value := _worth(one.rows, takes)) > worth:
                best, worth = one, value
    return best


def reached(batch: list[Entry], sizes: frozenset[int]) -> int:
    """How many entries of a batch make up the largest of `sizes` that it reaches; 0 where it reaches none."""
    ends = accumulate(entry.rows for entry in batch)
    return max((count for count, rows in enumerate(ends, 1) if rows in sizes), default=0)


def _worth(rows: int, takes: Callable[[int], Takes]) -> float:
    """Rows a second."""
    return rows / max(takes(rows).most, _NOTHING) if rows else 0.0


def _noted(waiting: Iterable[Entry], seen: list[Entry]) -> Iterator[Entry]:
    for entry in waiting:
        seen.append(entry)
        yield entry


def _fill(
    waiting: Iterable[Entry], now: float, size: int, sizes: tuple[int, ...], seconds: Callable[[int], float]
) -> Choice:
    """A batch of at most `size` rows, of those that are in time for one of that size.

    One that is larger, and in time for one of its own size, ends it, or it would be overtaken.
    """
    batch: list[Entry] = []
    missed: list[Entry] = []
    rows, most, whole = 0, sizes[0], seconds(size)
    for entry in waiting:
        slack = entry.finish_by - now
        if slack < whole or (entry.rows > size and slack < seconds(entry.rows)):
            missed.append(entry)
            continue
        # Where each request runs alone, one may have more rows than a batch.
        fits = rows + entry.rows <= size or (not batch and size == most)
        if not fits or (batch and entry.shapes != batch[0].shapes):
            return Choice(batch, missed, rows, True)
        batch.append(entry)
        rows += entry.rows
        if rows >= size:
            return Choice(batch, missed, rows, True)
    return Choice(batch, missed, rows, False)
