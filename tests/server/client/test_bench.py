"""`convoy bench` against a real server: its numbers are held against what the server counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client import load
from convoynet.server.client.bench import bench
from convoynet.server.client.client import Client
from convoynet.server.client.load import Load, LoadResult, make_load, run_load
from convoynet.server.client.operations import usual_outputs
from tests.server import onnx_models


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("bench") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_colors(repository)
    onnx_models.write_slow(repository, size=256, loops=200)
    onnx_models.write_linear(repository, "single", max_batch=0)
    onnx_models.write_segmenter(repository)
    with onnx_models.serve(repository) as server:
        yield server


def load_of(live: onnx_models.LiveServer, model: str, batch: int = 1) -> Load:
    with Client(live.url) as client:
        return make_load(client, model, batch=batch)


def test_a_segmentation_network_is_asked_for_its_class_map_alone(live: onnx_models.LiveServer) -> None:
    request = pb.ModelInferRequest.FromString(load_of(live, "segmenter").payload)
    assert [output.name for output in request.outputs] == ["classes"]
    assert not pb.ModelInferRequest.FromString(load_of(live, "linear").payload).outputs


def test_what_few_ask_for_is_left_out_as_most_requests_do() -> None:
    config = ModelConfig()
    for name in ("logits", "explanation", "features"):
        config.output.add(name=name)
    assert usual_outputs(config) is None
    config.parameters["seldom_outputs"].string_value = "explanation, more"
    assert usual_outputs(config) == ["logits", "features"]


def at_length(run: Callable[[float], LoadResult], agrees: Callable[[LoadResult], bool]) -> LoadResult:
    """What a run for so many seconds gives; a longer one where the machine stood still at its edges."""
    for seconds in (1.0, 4.0, 16.0):
        if agrees(result := run(seconds)):
            return result
    raise AssertionError(f"it never agrees: {result}")


def counted(live: onnx_models.LiveServer, model: str) -> int:
    with Client(live.url) as client:
        return client.statistics(model)[0].inference_stats.success.count


def test_numbers_agree_with_each_other_and_with_the_server(live: onnx_models.LiveServer) -> None:
    load, answered = load_of(live, "linear", batch=4), 0

    def run(seconds: float) -> LoadResult:
        nonlocal answered
        before = counted(live, "linear")
        result = run_load(load, 4, duration_s=seconds, warmup_s=0.2)
        answered = counted(live, "linear") - before
        return result

    def agrees(result: LoadResult) -> bool:
        # Little's law of a closed loop: requests in flight = rate * mean latency.
        inflight = result.requests_per_s * result.mean_ms / 1e3
        # The server also counts the warm-up and what ended after the window, about 0.2 s of the 1.2 s.
        return (
            answered < 2 * result.requests
            and inflight == pytest.approx(4, rel=0.15)
            and result.server is not None
            and result.server.request_ms < result.mean_ms
        )

    result = at_length(run, agrees)
    assert result.errors == {}
    assert 0 < result.requests < answered
    assert result.requests_per_s == pytest.approx(result.requests / result.duration_s)
    assert result.images_per_s == pytest.approx(4 * result.requests_per_s)
    assert 0 < result.p50_ms <= result.p95_ms <= result.p99_ms <= result.max_ms
    assert 0 < result.client_cores < 4
    assert result.server is not None
    assert 4 <= result.server.mean_batch <= 8
    assert 0 < result.server.queue_ms + result.server.compute_infer_ms <= result.server.request_ms


def test_latency_is_the_models(live: onnx_models.LiveServer) -> None:
    # Four workers and an engine that takes one request at a time: each waits for three others.
    load = load_of(live, "slow")

    # Means of not quite the same requests: the server's window begins and ends a request later.
    def waits_for_itself(result: LoadResult) -> bool:
        return result.server is not None and result.mean_ms > 0.8 * result.server.compute_infer_ms

    def waits_for_three(result: LoadResult) -> bool:
        server = result.server
        return (
            server is not None
            and result.mean_ms > 2.5 * server.compute_infer_ms
            and server.queue_ms > server.compute_infer_ms
        )

    at_length(lambda seconds: run_load(load, 1, duration_s=seconds, warmup_s=0.2), waits_for_itself)
    at_length(lambda seconds: run_load(load, 4, duration_s=1.5 * seconds, warmup_s=0.3), waits_for_three)


def test_errors_are_counted_by_code_and_give_no_latency(live: onnx_models.LiveServer) -> None:
    load = load_of(live, "linear")
    broken = Load(load.url, "nothing", load.payload.replace(b"linear", b"absent"))
    result = run_load(broken, 2, duration_s=0.3, warmup_s=0.1)
    assert set(result.errors) == {"NOT_FOUND"}
    # Two workers that pause 10 ms after each error.
    assert 0 < result.errors["NOT_FOUND"] <= 2 * (result.duration_s / 0.009 + 1)
    assert (result.requests, result.images_per_s) == (0, 0)
    assert np.isnan(result.p99_ms)
    assert result.server is None


def test_time_is_bounded_when_nobody_answers(live: onnx_models.LiveServer) -> None:
    load = load_of(live, "linear")
    result = run_load(Load("127.0.0.1:1", load.model, load.payload), 3, duration_s=0.3, warmup_s=0.1, timeout_s=0.5)
    assert result.requests == 0
    assert set(result.errors) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


def test_json(live: onnx_models.LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "linear", "--url", live.url, "--duration", "0.3", "--warmup", "0.1"]
    assert bench([*arguments, "--concurrency", "1,3", "--json"]) == 0
    levels = json.loads(capsys.readouterr().out)
    assert [level["concurrency"] for level in levels] == [1, 3]
    assert all(level["requests"] > 0 for level in levels)
    assert set(levels[0]) == set(LoadResult.__dataclass_fields__)


def test_table_with_encoded_images(
    live: onnx_models.LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.jpg")
    arguments = ["--model", "colors", "--url", live.url, "--duration", "0.3", "--warmup", "0.1"]
    assert bench([*arguments, "--input", str(tmp_path / "red.jpg"), "--batch", "2", "--concurrency", "2"]) == 0
    out = capsys.readouterr().out
    for heading in ("in flight", "req/s", "images/s", "p50", "p95", "p99", "queue", "compute", "batch", "errors"):
        assert heading in out
    assert "2 image(s)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "unknown model: 'nothing' is not found"),
        (["--model", "linear", "--batch", "9"], "batch-size must be <= 8"),
        (["--model", "single", "--batch", "2"], "takes no batches"),
        (["--model", "colors", "--input", "absent.jpg"], "--input absent.jpg: No such file"),
        (["--model", "linear", "--url", "127.0.0.1:1"], "no server at 127.0.0.1:1 (connection refused)"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    live: onnx_models.LiveServer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(["--url", live.url, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--concurrency", "0"], ["--duration", "-1"], ["--batch", "x"]])
def test_bad_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(["--model", "m", *flags])
    assert flags[0] in capsys.readouterr().err


def test_generated_input_fits_the_model(live: onnx_models.LiveServer) -> None:
    load = load_of(live, "colors", batch=3)
    assert load.images == 3
    assert len(load.payload) > 3 * 8 * 8 * 3
    assert load.payload == load_of(live, "colors", batch=3).payload


def test_statistics_of_another_server_are_not_taken_for_this_ones() -> None:
    def totals(requests: int, queue_ns: int) -> pb.ModelStatistics:
        found = pb.ModelStatistics(inference_count=requests, execution_count=requests)
        found.inference_stats.success.count, found.inference_stats.queue.ns = requests, queue_ns
        return found

    one, other = totals(10, 5000), totals(30, 1000)
    share = load._share(one, totals(110, 105_000), 100)
    assert share is not None
    assert (share.queue_ms, share.mean_batch) == (0.001, 1.0)
    assert load._share(one, totals(60, 55_000), 100) is None
    assert load._share(one, other, 20) is None
    assert load._share(other, one, 20) is None
