"""Interruptions that wait for a good moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM wait for the end of the block, so that what is inside is done whole.

    The second is not waited for. Signals that have no handler in Python, and other threads, are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append((number, frame))
        if len(received) > 1:
            previous[number](number, frame)

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        if callable(handler := signal.getsignal(number)):
            previous[number] = handler
            signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        first, frame = received[0]
        previous[first](first, frame)
