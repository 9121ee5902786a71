"""What scheduling costs a request, in microseconds of one core: 32 in flight, batches of 32, no engine.

python benchmarks/scheduling.py
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from convoynet.server.scheduling.admission import Limiter
from convoynet.server.scheduling.entry import Entry
from convoynet.server.scheduling.response_cache import ResponseCache
from convoynet.server.scheduling.scheduler import Scheduler
from convoynet.server.scheduling.turnstile import Turnstile
from convoynet.server.spec import BatchPolicy
from convoynet.server.types import Tensor, Timings

ROWS = 32
BATCHES = 300
ROUNDS = 7
INPUTS: dict[str, Tensor] = {"x": np.zeros((1, 4), np.float32)}


async def scheduling(deadline: float | None, limited: bool) -> float:
    """Seconds that all batches take."""
    loop = asyncio.get_running_loop()
    scheduler, limiter, turnstile = Scheduler(BatchPolicy(ROWS, 0.0, 1024)), Limiter(1e9, 1024), Turnstile()
    waiting = [
        [Entry(1, 16, loop.create_future(), Timings(), deadline=deadline) for _ in range(ROWS)] for _ in range(BATCHES)
    ]
    began = time.perf_counter()
    for entries in waiting:
        for entry in entries:
            if limited:
                limiter.admit(ROWS, scheduler.predict(1))
            scheduler.admit(entry)
            scheduler.put(entry, INPUTS)
        if limited:
            async with turnstile.turn("model"):
                scheduler.form()
            for _ in entries:
                limiter.observe(ROWS, 0.001, began)
        else:
            scheduler.form()
        scheduler.ran(ROWS, 0.001)
    return time.perf_counter() - began


def cached(shape: tuple[int, ...], count: int) -> float:
    """Seconds that `count` look-ups of an input take, its hash included."""
    cache = ResponseCache(2**20).model("model", "1")
    inputs: dict[str, Tensor] = {"x": np.zeros(shape, np.float32)}
    cache.put(cache.key(inputs), INPUTS)
    began = time.perf_counter()
    for _ in range(count):
        cache.get(cache.key(inputs))
    return time.perf_counter() - began


def main() -> None:
    """Prints the best of some rounds."""
    for name, deadline, limited in (
        ("admit, put, form, ran", None, False),
        ("... with a deadline", 1e12, False),
        ("... with a latency objective and turns as well", 1e12, True),
    ):
        best = min(asyncio.run(scheduling(deadline, limited)) for _ in range(ROUNDS))
        print(f"{name}: {best / ROWS / BATCHES * 1e6:.2f}")
    for shape, count in (((1, 4), 2000), ((1, 3, 224, 224), 20)):
        best = min(cached(shape, count) for _ in range(ROUNDS))
        print(f"response cache, FP32 {list(shape)}: {best / count * 1e6:.1f}")


if __name__ == "__main__":
    main()
