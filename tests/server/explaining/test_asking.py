"""How a server is asked: in order, bounded, slower beside others, until the time is over. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import grpc
import numpy as np
import pytest

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.errors import ClientError
from convoynet.server.explaining.asking import Asker, Explained
from convoynet.server.explaining.masks import Rise
from convoynet.server.explaining.pace import Others, Pace
from convoynet.server.explaining.picture import Picture
from convoynet.server.explaining.subject import Answer, Classifier, Target, Wanted
from tests.server.virtual_time import VirtualTimeLoop, run

SIZE = (6, 6)
COUNT = 100


class Engine:
    """What stands for a server: one engine, a hundredth of a second for a picture, and what others ask of it.

    Behind the first pictures it refuses some, or fails.
    """

    def __init__(
        self,
        others: float = 0,
        others_from: float = 0,
        refusals: int = 0,
        tells: bool = True,
        error: str = "",
        first: int = 3,
    ) -> None:
        self.others, self.others_from = others, others_from
        self.refusals, self.tells, self.error, self.first = refusals, tells, error, first
        self.began = asyncio.get_running_loop().time()
        self.free = asyncio.Lock()
        self.asked: list[tuple[int, int]] = []
        self.cancelled = self.own = self.waiting = self.most_waiting = 0

    async def infer(self, model: str, inputs: dict[str, Any], *, priority: int, **options: Any) -> dict[str, Any]:
        (rows,) = inputs.values()
        if self.refusals and len(self.asked) >= self.first:
            self.refusals -= 1
            raise ClientError("the queue is full", grpc.StatusCode.RESOURCE_EXHAUSTED)
        if self.error and len(self.asked) >= self.first:
            raise ClientError(self.error, grpc.StatusCode.INTERNAL)
        self.asked.append((len(rows), priority))
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            async with self.free:
                await asyncio.sleep(0.01 * len(rows))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        self.own += 1
        return {"logits": rows.reshape(len(rows), -1)[:, :2]}

    async def statistics(self) -> Sequence[pb.ModelStatistics]:
        if not self.tells:
            raise ClientError("no role for that", grpc.StatusCode.PERMISSION_DENIED)
        now = asyncio.get_running_loop().time() - self.began
        counted = pb.ModelStatistics()
        counted.inference_stats.success.count = self.own + int(max(now - self.others_from, 0) * self.others)
        return [counted]


def model_config() -> ModelConfig:
    config = ModelConfig(name="net", max_batch_size=64)
    config.input.add(name="input")
    config.output.add(name="logits")
    config.dynamic_batching.priority_levels = 3
    return config


def a_picture() -> Picture:
    row = np.random.default_rng(0).random((1, *SIZE), np.float32)
    return Picture(row, np.zeros((1, 1, 1), np.float32), channels_last=False)


def explained(
    seconds: float = 1000, count: int = COUNT, share: float | None = None, **engine: Any
) -> tuple[Explained, Engine, list[int], float]:
    """An explanation, the engine, the progress that was told, and the time."""
    told: list[int] = []
    loop = VirtualTimeLoop()

    async def main() -> tuple[Explained, Engine, list[int], float]:
        server = Engine(**engine)
        config = model_config()
        asker = Asker(cast("AsyncClient", server), config, Classifier(config, ()), share=share)
        made = Rise(SIZE, count, 3, 0.5, 0)
        found = await asker.explain(
            a_picture(), Wanted("0"), lambda score, answer: made, seconds, lambda done, of: told.append(done)
        )
        return found, server, told, loop.time()

    return run(main(), loop)


def test_the_masks_are_asked_in_bounded_requests_at_the_lowest_priority() -> None:
    found, server, told, seconds = explained()
    assert (found.done, found.count, told[-1]) == (COUNT, COUNT, COUNT)
    assert sum(rows for rows, _ in server.asked) == COUNT + 1
    assert {priority for _, priority in server.asked} == {3}
    assert server.most_waiting == 2
    assert max(rows for rows, _ in server.asked) <= 5  # of a hundredth of a second each
    assert told == sorted(told)
    assert seconds == pytest.approx(1.01, abs=0.1)  # the engine is never idle


class Nearly(Classifier):
    """Tells of an object another score than the masks' are measured by, as where a better one of its class is near."""

    def target(self, answer: Answer, wanted: Wanted) -> Target:
        return replace(super().target(answer, wanted), score=0.25)


def test_masks_are_measured_from_the_score_that_they_would_have_without_a_mask() -> None:
    picture, given = a_picture(), []

    async def main() -> float:
        config = model_config()
        subject = Nearly(config, ())
        asker = Asker(cast("AsyncClient", Engine()), config, subject, share=None)

        def make(score: float, answer: Answer) -> Rise:
            given.append(score)
            return Rise(SIZE, 2, 3, 0.5, 0)

        await asker.explain(picture, Wanted("0"), make, 1000, lambda done, of: None)
        answer = {"logits": picture.row.reshape(1, -1)[:, :2]}
        return float(subject.scores(answer, subject.target(answer, Wanted("0")))[0])

    assert given == [run(main(), VirtualTimeLoop())]
    assert given != [0.25]


def test_the_map_is_that_of_the_masks() -> None:
    found = explained()[0]
    row = np.random.default_rng(0).random((1, *SIZE), np.float32)
    masks = Rise(SIZE, COUNT, 3, 0.5, 0)
    for index in range(COUNT):
        masks.add(index, float((row * masks.mask(index)).ravel()[0]))
    assert found.evidence == pytest.approx(masks.evidence(), abs=1e-6)
    assert found.target == Target("0", 0, float(row.ravel()[0]))


@pytest.mark.parametrize("engine", [{"tells": False}, {"others": 50}, {"others": 1}])
def test_beside_others_a_quarter_of_the_time_is_used_picture_by_picture(engine: dict[str, Any]) -> None:
    found, server, _, seconds = explained(count=400, share=0.25, **engine)
    assert found.done == 400
    assert {rows for rows, _ in server.asked} == {1}
    assert server.most_waiting == 1
    assert seconds == pytest.approx(4 * 4.01, rel=0.05)


def test_where_nobody_has_asked_for_a_while_there_is_no_need_to_wait() -> None:
    found, server, _, seconds = explained(count=1000, share=0.25)
    sizes = [rows for rows, _ in server.asked]
    assert set(sizes[:250]) == {1}  # a quarter of ten seconds
    assert max(sizes) == 4
    assert seconds == pytest.approx(10 + 7.5, rel=0.05)
    late, *_, longer = explained(count=1000, share=0.25, others=2, others_from=12.0)
    assert found.done == late.done == 1000
    assert longer > seconds + 5


def test_what_is_answered_when_the_time_is_over_counts() -> None:
    found, server, told, seconds = explained(seconds=0.5)
    assert 30 < found.done < 50 < found.count
    assert told[-1] == found.done
    assert seconds == 0.5
    assert server.cancelled == 2
    assert np.isfinite(found.evidence).all()


def test_no_mask_in_time_is_one_line() -> None:
    with pytest.raises(ClientError, match=r"no mask was answered within 0.015 s; give it a longer --time-limit"):
        explained(seconds=0.015)


def test_a_full_server_is_asked_again() -> None:
    found, *_, seconds = explained(refusals=4)
    assert found.done == COUNT
    assert seconds > 0.3
    with pytest.raises(ClientError, match="no mask was answered within 20 s: the queue is full"):
        explained(seconds=20, refusals=10**6, first=1)


def test_an_error_ends_it() -> None:
    with pytest.raises(ClientError, match="the engine failed"):
        explained(error="the engine failed")


def test_the_largest_request_has_so_many_rows_as_the_model_takes() -> None:
    pace = Pace(6, share=0.25)
    assert (pace.rows, pace.in_flight) == (1, 1)
    pace.beside(others=False)
    for _ in range(5):
        assert pace.answered(pace.rows, 0.001) == 0
    assert pace.rows == 6
    pace.answered(6, 1.0)
    assert pace.rows == 3
    pace.beside(others=True)
    assert (pace.rows, pace.in_flight, pace.answered(1, 0.1)) == (1, 1, pytest.approx(0.3))


def test_a_late_count_of_ours_is_nobody_elses() -> None:
    others = Others()
    assert not others.seen(100, 0)
    assert not others.seen(109, 10)  # one of ours is counted later
    assert not others.seen(120, 20)
    assert others.seen(131, 30)
    assert not others.seen(141, 40)
    assert not others.seen(40, 50)  # a model went away, with its count
    assert others.seen(51, 60)


class Queue(Engine):
    """An engine that takes up to eight pictures of what waits at once, the more urgent first; each takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: asyncio.PriorityQueue[tuple[int, int, int, asyncio.Future[None]]] = asyncio.PriorityQueue()
        self.number = 0

    async def work(self) -> None:
        while True:
            batch = [await self.queue.get()]
            while not self.queue.empty() and sum(rows for _, _, rows, _ in batch) < 8:
                batch.append(self.queue.get_nowait())
            await asyncio.sleep(0.01 * sum(rows for _, _, rows, _ in batch))
            self.own += len(batch)
            for *_, answered in batch:
                if not answered.done():
                    answered.set_result(None)

    async def ask(self, priority: int, rows: int) -> None:
        self.number += 1
        answered = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((priority, self.number, rows, answered))
        await answered

    async def infer(self, model: str, inputs: dict[str, Any], *, priority: int, **options: Any) -> dict[str, Any]:
        (rows,) = inputs.values()
        await self.ask(priority, len(rows))
        return {"logits": rows.reshape(len(rows), -1)[:, :2]}


def p99(load: float, requests: int, *, explained: bool) -> tuple[float, int]:
    """The slowest hundredth of requests that come at random, and how many masks were answered beside."""
    loop, taken, told = VirtualTimeLoop(), [], [0]
    arrivals = np.cumsum(np.random.default_rng(0).exponential(0.01 / load, requests))

    async def main() -> None:
        server = Queue()

        async def request(due: float) -> None:
            await asyncio.sleep(due)
            await server.ask(1, 1)
            taken.append(loop.time() - due)

        tasks = [asyncio.create_task(server.work())]
        if explained:
            config = model_config()
            asker = Asker(cast("AsyncClient", server), config, Classifier(config, ()))
            made = Rise(SIZE, 10**5, 3, 0.5, 0)
            work = asker.explain(
                a_picture(), Wanted(), lambda score, answer: made, 1e6, lambda done, of: told.append(done)
            )
            tasks.append(asyncio.create_task(work))  # type: ignore[arg-type]
        await asyncio.gather(*(request(due) for due in arrivals))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main(), loop)
    return float(np.percentile(taken, 99)), told[-1]


@pytest.mark.parametrize(("load", "requests"), [(0.8, 6000), (0.5, 6000), (0.1, 6000), (0.02, 6000)])
def test_the_slowest_requests_of_others_are_at_most_a_tenth_slower(load: float, requests: int) -> None:
    without, _ = p99(load, requests, explained=False)
    beside, masks = p99(load, requests, explained=True)
    assert beside <= 1.1 * without
    assert masks >= 5
