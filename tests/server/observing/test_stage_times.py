"""Times of the stages in the reply, on request."""

from __future__ import annotations

from pathlib import Path

import grpc

from convoynet.server.observing import stage_times
from convoynet.server.types import Timings
from tests.server.conftest import Serving, code_of, fake_model, infer_request

NAMES = {f"convoy_{stage}_us" for stage in ("decode", "queue", "compute_input", "compute_infer", "compute_output")}


def test_the_stages_cover_the_request_without_gaps() -> None:
    timings = Timings(arrived=100, queued=150, started=400, input_ready=410, infer_done=900)
    assert stage_times.stages(timings, 1000) == {
        "decode": 50, "queue": 250, "compute_input": 10, "compute_infer": 490, "compute_output": 100
    }  # fmt: skip


async def test_a_reply_tells_them_when_asked(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=0.02)
    async with serving() as running:
        request = infer_request(1)
        assert not (await running.stub.ModelInfer(request)).parameters
        request.parameters["convoy_timings"].bool_param = True
        told = {name: value.int64_param for name, value in (await running.stub.ModelInfer(request)).parameters.items()}
        assert set(told) == NAMES
        assert told["convoy_compute_infer_us"] >= 19_000
        assert all(value >= 0 for value in told.values())
        request.parameters["convoy_timings"].bool_param = False
        assert not (await running.stub.ModelInfer(request)).parameters
        request.parameters["convoy_timings"].int64_param = 1
        code, text = await code_of(running.stub.ModelInfer(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "invalid value type for 'convoy_timings' parameter, expected bool_param" in text
