"""The queue by itself: nothing is lost, doubled, reordered or too large, whatever goes away meanwhile."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Draining, QueueFull
from server.queue import BatchQueue, Entry
from server.spec import BatchPolicy
from server.types import Timings


def entry(rows: int, width: int = 4) -> Entry:
    """An entry of `rows` rows."""
    result: asyncio.Future[object] = asyncio.Future(loop=LOOP)
    return Entry({"x": np.zeros((rows, width), np.float32)}, rows, result, Timings())


LOOP = asyncio.new_event_loop()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from([4, 5]), st.sampled_from(["waits", "cancelled", "discarded"]))
    ),
    st.integers(8, 20),
)
def test_every_entry_that_waits_is_given_out_once_in_order(plan: list[tuple[int, int, str]], max_rows: int) -> None:
    queue = BatchQueue(BatchPolicy(max_rows, 0.0, len(plan) + 1))
    entries = []
    for rows, width, fate in plan:
        queue.reserve()
        entries.append((entry(rows, width), fate))
        queue.put(entries[-1][0])
    for one, fate in entries:
        if fate == "cancelled":
            one.result.cancel()
        elif fate == "discarded":
            queue.discard(one)
    queue.close()
    batches = []
    while (batch := queue.take()) is not None:
        batches.append(batch)
    assert [e for batch in batches for e in batch] == [e for e, fate in entries if fate == "waits"]
    for batch in batches:
        assert sum(e.rows for e in batch) <= max_rows
        assert len({e.shapes for e in batch}) == 1
    assert len(queue) == 0


def test_places_are_bounded_and_given_back() -> None:
    queue = BatchQueue(BatchPolicy(8, 0.0, 2))
    queue.reserve()
    queue.reserve()
    with pytest.raises(QueueFull):
        queue.reserve()
    queue.release()
    queue.reserve()
    one = entry(1)
    queue.put(one)
    with pytest.raises(QueueFull):
        queue.reserve()
    queue.discard(one)
    queue.reserve()


def test_a_closed_queue_still_gives_out_what_it_admitted() -> None:
    queue = BatchQueue(BatchPolicy(8, 10.0, 4))
    queue.reserve()
    queue.close()
    with pytest.raises(Draining):
        queue.reserve()
    late = entry(1)  # admitted before the close, its image was decoded meanwhile
    queue.put(late)
    assert queue.take() == [late]
    assert queue.take() is None
