"""Batches form, answers reach the right client, and no client's fate touches another's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoynet.server.engines.place import BatchResult
from convoynet.server.engines.process import EngineProcess
from convoynet.server.types import Tensor
from tests.server.conftest import Serving, code_of, fake_model, infer_request, sums

OK = grpc.StatusCode.OK


async def test_requests_share_batches_and_each_gets_its_own_rows(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        asked = [[float(i), i + 0.5] if i % 3 else [float(i)] for i in range(64)]
        with running.held():
            calls = [running.stub.ModelInfer(infer_request(*rows)) for rows in asked]
            await running.until(lambda m: m.inflight == len(asked))
        assert [sums(await call) for call in calls] == asked
        of_model = {"model": "sum", "version": "1"}
        batches = running.metric("convoy_executions_total", **of_model)
        rows = sum(map(len, asked))
        assert running.metric("convoy_inferences_total", **of_model) == rows
        assert rows / 8 <= batches < len(asked) / 2
        assert running.metric("convoy_batch_size_sum", **of_model) == rows


@pytest.mark.parametrize(
    ("asked", "computed"),
    [
        ([("y",), ("y",), ("y",)], {"y"}),
        ([("z",), ("y",), ("z",)], {"y", "z"}),
        ([("z", "y"), (), ("mask",)], set()),
        ([("mask", "y"), ("mask",), ("y",)], {"mask", "y"}),
    ],
)
async def test_a_batch_computes_what_its_requests_ask_for_and_each_gets_its_own(
    serving: Serving,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[str, ...]],
    computed: set[str],
) -> None:
    fake_model(
        tmp_path,
        config='output { name: "z" data_type: TYPE_INT64 dims: [2, 1] }\n'
        'output { name: "mask" data_type: TYPE_UINT8 dims: [4, 3] }\n'
        "max_batch_size: 6\nmodel_warmup { batch_size: 1 }\n"
        "dynamic_batching { max_queue_delay_microseconds: 1000000000 }\n",  # until it is full
    )
    runs: list[set[str]] = []
    run = EngineProcess.run

    async def recorded(
        engine: EngineProcess, requests: Sequence[Mapping[str, Tensor]], outputs: Collection[str] = (), pad_to: int = 0
    ) -> BatchResult:
        runs.append(set(outputs))
        return await run(engine, requests, outputs, pad_to)

    monkeypatch.setattr(EngineProcess, "run", recorded)
    types = {"y": ("FP32", [2, 1], "<f4"), "z": ("INT64", [2, 2, 1], "<i8"), "mask": ("UINT8", [2, 4, 3], "u1")}
    async with serving() as running:
        requests = [infer_request(number, number + 10) for number in range(3)]
        for request, names in zip(requests, asked, strict=True):
            for name in names:
                request.outputs.add(name=name)
        answers = await asyncio.gather(*(running.stub.ModelInfer(request) for request in requests))
    assert runs == [computed]  # one batch for all three
    for number, (names, answer) in enumerate(zip(asked, answers, strict=True)):
        assert [output.name for output in answer.outputs] == list(names or ("y", "z", "mask"))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            datatype, shape, dtype = types[output.name]
            assert (output.datatype, list(output.shape)) == (datatype, shape)
            values = np.frombuffer(raw, dtype).reshape(shape)
            assert (values[0] == number).all()
            assert (values[1] == number + 10).all()


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_cancelling_one_of_a_running_batch_harms_no_other(
    serving: Serving, tmp_path: Path, position: int
) -> None:
    delay = "max_batch_size: 3\ndynamic_batching { max_queue_delay_microseconds: 100000000 }\n"
    fake_model(tmp_path, config=delay)
    async with serving() as running:
        with running.held():
            calls = [running.stub.ModelInfer(infer_request(i)) for i in range(3)]
            await running.until(lambda m: m.inflight == 3 and not m.queued)  # that full batch is running
            calls[position].cancel()
            await running.until(lambda m: m.inflight == 2)
        others = [c for i, c in enumerate(calls) if i != position]
        assert [sums(await c) for c in others] == [[float(i)] for i in range(3) if i != position]
        assert running.metric("convoy_executions_total", model="sum", version="1") == 1
        assert running.metric("convoy_rejected_total", model="sum", version="1", reason="cancelled") == 1
        assert sums(await running.stub.ModelInfer(infer_request(7, 8, 9))) == [7, 8, 9]


async def test_a_request_cancelled_in_the_queue_never_runs(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        with running.held():
            blocker = running.stub.ModelInfer(infer_request(1))
            await running.until(lambda m: m.inflight == 1 and not m.queued)
            waiting = running.stub.ModelInfer(infer_request(2))
            await running.until(lambda m: m.queued == 1)
            assert running.metric("convoy_queue_depth", model="sum", version="1") == 1
            waiting.cancel()
            await running.until(lambda m: m.inflight == 1)
            assert running.metric("convoy_queue_depth", model="sum", version="1") == 0
        await blocker
        assert running.metric("convoy_inferences_total", model="sum", version="1") == 1


@pytest.mark.parametrize("busy", [True, False])
async def test_an_expired_timeout_is_answered_when_it_expires(serving: Serving, tmp_path: Path, busy: bool) -> None:
    """Both while the request waits behind a running batch and while it is in the running batch itself."""
    fake_model(tmp_path)
    async with serving() as running:
        with running.held():  # no answer can wait for the batch that is running
            if busy:
                blocker = running.stub.ModelInfer(infer_request(1))
                await running.until(lambda m: m.inflight == 1 and not m.queued)
            code, message = await code_of(running.stub.ModelInfer(infer_request(2, timeout=100_000)))
            assert (code, message) == (grpc.StatusCode.DEADLINE_EXCEEDED, "Request timeout expired")
        rejected = partial(running.metric, "convoy_rejected_total", model="sum", version="1", reason="deadline")
        await running.until(lambda _: rejected() == 1)
        if busy:
            await blocker
            assert running.metric("convoy_inferences_total", model="sum", version="1") == 1


async def test_the_clients_own_deadline_counts_as_deadline(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        with running.held():
            code = await running.late(lambda seconds: running.stub.ModelInfer(infer_request(2), timeout=seconds))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            await running.until(lambda m: m.inflight == 0)
        assert running.metric("convoy_rejected_total", model="sum", version="1", reason="deadline") == 1
        code_label = {"protocol": "grpc", "code": "DEADLINE_EXCEEDED"}
        assert running.metric("convoy_requests_total", model="sum", version="1", **code_label) == 1


async def test_what_autoscaling_reads(serving: Serving, tmp_path: Path) -> None:
    """Rows in flight, running ones included, and the rows that the engines take at once."""
    fake_model(tmp_path, config="max_batch_size: 4\ndynamic_batching { }\ninstance_group { count: 2 }\n")
    async with serving(max_queue=9) as running:

        def gauge(name: str) -> float:
            return running.metric(name, model="sum", version="1")

        assert (gauge("convoy_engine_rows"), gauge("convoy_queue_limit")) == (8, 9)
        with running.held():
            calls = [running.stub.ModelInfer(infer_request(*range(rows))) for rows in (4, 3, 2)]
            await running.until(lambda m: m.inflight == 3 and m.queued == 1)
            assert (gauge("convoy_inflight_requests"), gauge("convoy_inflight_rows")) == (3, 9)
        await asyncio.gather(*calls)
        assert (gauge("convoy_inflight_requests"), gauge("convoy_inflight_rows")) == (0, 0)


async def test_a_full_queue_refuses_at_once_and_is_counted(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    async with serving(max_queue=2) as running:
        with running.held():  # refused before there is room, not when its turn has come
            calls = [running.stub.ModelInfer(infer_request(0))]
            await running.until(lambda m: m.inflight == 1 and m.queued == 0)  # or the third may find two before it
            calls += [running.stub.ModelInfer(infer_request(i)) for i in (1, 2)]
            await running.until(lambda m: m.inflight == 3 and m.queued == 2)
            code, message = await code_of(running.stub.ModelInfer(infer_request(9)))
        assert (code, message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "Exceeds maximum queue size")
        assert running.metric("convoy_rejected_total", model="sum", version="1", reason="queue_full") == 1
        code_label = {"protocol": "grpc", "code": "RESOURCE_EXHAUSTED"}
        assert running.metric("convoy_requests_total", model="sum", version="1", **code_label) == 1
        assert [sums(await c) for c in calls] == [[0], [1], [2]]


async def test_a_failing_batch_is_an_internal_error_and_the_next_one_runs(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, fail_above=100)
    async with serving() as running:
        code, message = await code_of(running.stub.ModelInfer(infer_request(1000)))
        assert (code, message) == (grpc.StatusCode.INTERNAL, "model 'sum' failed to run the batch")
        assert sums(await running.stub.ModelInfer(infer_request(1))) == [1]


async def test_a_queue_delay_collects_a_batch_on_an_idle_engine(serving: Serving, tmp_path: Path) -> None:
    for name, microseconds in (("sum", 1_000_000_000), ("soon", 500_000)):
        delay = f"max_batch_size: 4\ndynamic_batching {{ max_queue_delay_microseconds: {microseconds} }}\n"
        fake_model(tmp_path, name, config=delay)
    async with serving() as running:
        # Full: it does not wait for the delay, or the test would run out of its time.
        await asyncio.gather(*(running.stub.ModelInfer(infer_request(i)) for i in range(4)))
        assert running.metric("convoy_executions_total", model="sum", version="1") == 1
        began = time.monotonic()
        await running.stub.ModelInfer(infer_request(1, model="soon"))
        assert time.monotonic() - began > 0.5  # alone: it waits for the delay


async def test_stopping_answers_everything_that_was_admitted(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    async with serving() as running:
        with running.held():
            calls = [running.stub.ModelInfer(infer_request(i)) for i in range(5)]
            await running.until(lambda m: m.inflight == 5)
            stopped = asyncio.ensure_future(running.app.stop())
            while running.app.core.ready:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)  # until gRPC refuses calls
            code, _ = await code_of(running.stub.ModelInfer(infer_request(9)))
            assert code is grpc.StatusCode.UNAVAILABLE
        assert [sums(await c) for c in calls] == [[float(i)] for i in range(5)]
        assert await stopped
