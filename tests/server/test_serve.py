"""`convoy serve` as a process: readiness, errors, SIGTERM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server.config import ServeConfig
from tests.server.conftest import fake_model, infer_request, sums
from tests.server.process import free_port


class Served:
    """A running `convoy serve` and what it said."""

    def __init__(self, root: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "convoynet.server.cli", "serve", "--model-repository", str(root)]
        self.process = subprocess.Popen(
            [*command, "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("READY"):
                break
        found = re.search(r"gRPC (\S+), .*metrics (\S+),", self.lines[-1]) if self.lines else None
        self.url, self.metrics_url = found.groups() if found else ("", "")

    def rest(self) -> str:
        """Waits for the end and returns everything that it wrote."""
        _, rest = self.process.communicate(timeout=120)
        return "".join(self.lines) + (rest or "")


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake_model(tmp_path, seconds=0.3, config="max_batch_size: 1\ndynamic_batching { }\n")
    return tmp_path


def test_sigterm_drains_and_exits_with_0(root: Path) -> None:
    """On a machine so slow that the drain is over before the late request is sent, again with a longer one."""
    for seconds in (0.5, 5, 50):
        if drains(root, seconds):
            return
    raise AssertionError("no request could be sent within a drain of 50 s")


def drains(root: Path, seconds: float) -> bool:
    served = Served(root, "--drain-seconds", str(seconds))
    with grpc.insecure_channel(served.url) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        stub.ModelInfer(infer_request(0))  # connected
        calls = [stub.ModelInfer.future(infer_request(i)) for i in range(4)]
        assert sums(calls[0].result()) == [0]  # so the others are there as well
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        signalled = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        late = stub.ModelInfer.future(infer_request(9))  # within --drain-seconds: still answered
        assert [sums(c.result()) for c in calls] == [[0], [1], [2], [3]]
        in_time = late.code() is grpc.StatusCode.OK
        assert in_time or time.monotonic() - signalled > seconds
        assert not in_time or sums(late.result()) == [9]
    rest = served.rest()
    assert served.process.returncode == 0, rest
    assert "Traceback" not in rest
    return in_time


def test_answers_that_outlast_the_drain_timeout_are_cut_and_said(root: Path) -> None:
    served = Served(root, "--drain-timeout-seconds", "0.4")
    with grpc.insecure_channel(served.url) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(infer_request(0))  # connected
        calls = [stub.ModelInfer.future(infer_request(i)) for i in range(30)]  # 9 s of work, and 0.4 s for it
        assert sums(calls[0].result()) == [0]
        served.process.send_signal(signal.SIGTERM)
        codes = [c.code() for c in calls]
    assert served.process.wait(120) == 1
    assert grpc.StatusCode.OK not in codes[20:]
    assert "--drain-timeout-seconds" in served.rest()


def test_metrics_are_served_with_stated_names(root: Path) -> None:
    served = Served(root)
    try:
        with grpc.insecure_channel(served.url) as channel:
            grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(infer_request(1))
        text = urllib.request.urlopen(served.metrics_url, timeout=60).read().decode()
    finally:
        served.process.terminate()
        served.rest()
    of_model = 'model="sum",version="1"'
    assert 'convoy_requests_total{code="OK",model="sum",protocol="grpc",version="1"} 1.0' in text
    for name in (
        "convoy_inferences_total", "convoy_executions_total", "convoy_request_duration_seconds_count",
        "convoy_queue_duration_seconds_count", "convoy_compute_duration_seconds_count", "convoy_batch_size_count",
    ):  # fmt: skip
        assert f"{name}{{{of_model}}} 1.0" in text, name
    for name in ("convoy_queue_depth", "convoy_inflight_requests"):
        assert f"{name}{{{of_model}}} 0.0" in text
    assert 'convoy_model_state{model="sum",state="ready",version="1"} 1.0' in text
    assert re.search(rf"convoy_model_load_duration_seconds{{{of_model}}} \d", text)
    assert 'convoy_build_info{version="' in text
    assert "nv_inference" not in text


def test_a_second_server_on_the_port_is_told_so(root: Path) -> None:
    served = Served(root)
    try:
        port = served.url.rpartition(":")[2]
        second = Served(root, "--grpc-port", port)
        text = second.rest()
        assert second.process.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in text.splitlines()[-1]
        assert "Traceback" not in text
    finally:
        served.process.terminate()
        served.rest()


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda root: root / "absent", 2, "is not a folder; `convoy export` makes one"),
        (lambda root: fake_model(root, "m") or root / "m", 2, "is the folder of one model; give the repository"),
        (lambda root: (root / "empty").mkdir() or root / "empty", 1, "holds no model"),
        (lambda root: fake_model(root / "bad", "m", config="max_batch_size: x") or root / "bad", 1, "does not parse"),
    ],
)
def test_a_repository_that_cannot_be_served_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], code: int, message: str
) -> None:
    served = Served(make(tmp_path))
    text = served.rest()
    assert served.process.returncode == code
    last = text.splitlines()[-1]
    assert last.startswith("convoy serve: ")
    assert message in last
    assert "Traceback" not in text


def test_a_setting_out_of_range_is_one_line(root: Path) -> None:
    served = Served(root, "--max-queue", "0")
    assert served.rest() == "convoy serve: --max-queue must lie in 1 to 1000000, got 0\n"
    assert served.process.returncode == 2


def test_it_listens_and_says_not_serving_while_a_model_loads(tmp_path: Path) -> None:
    """On a machine so slow that the model is loaded before the questions are there, again with a slower model."""
    for seconds in (1, 5, 25):
        if said_while_loading(tmp_path / str(seconds), seconds) == (NOT_SERVING, SERVING, "UNAVAILABLE"):
            return
    raise AssertionError("it never said that it was not serving yet")


def said_while_loading(root: Path, seconds: float) -> tuple[int, int, str]:
    """The health of the server, that of the service itself, and how an inference ends."""
    fake_model(root, seconds=seconds)
    lines: list[str] = []
    command = [sys.executable, "-m", "convoynet.server.cli", "serve", "--model-repository", str(root)]
    port = free_port()  # its line with the ports comes when the model is loaded
    with subprocess.Popen(
        [*command, "--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or []))
        reader.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=120)
                health = health_pb2_grpc.HealthStub(channel)
                status = health.Check(health_pb2.HealthCheckRequest()).status
                alive = health.Check(health_pb2.HealthCheckRequest(service="grpc.health.v1.Health")).status
                asked = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(infer_request(1))
                code = asked.code().name
        finally:
            process.terminate()
            reader.join(120)
    return status, alive, code


def test_the_folder_of_one_model_is_served_under_a_name_of_its_own(tmp_path: Path) -> None:
    fake_model(tmp_path)
    served = Served(tmp_path / "sum", "--model-name", "pets")
    assert served.lines[-1].endswith("models: pets\n")
    with grpc.insecure_channel(served.url) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert sums(stub.ModelInfer(infer_request(3, model="pets"))) == [3]
    served.process.send_signal(signal.SIGTERM)
    rest = served.rest()
    assert served.process.returncode == 0, rest


def test_several_repositories_and_models_that_are_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fake_model(tmp_path / "one", name)
    fake_model(tmp_path / "two", "c")
    flags = ("--model-repository", str(tmp_path / "two"), "--model-control-mode", "explicit")
    served = Served(tmp_path / "one", *flags, "--load-model", "a", "--load-model", "c")
    assert served.lines[-1].endswith("models: a, c\n")
    served.process.send_signal(signal.SIGTERM)
    rest = served.rest()
    assert served.process.returncode == 0, rest


def test_settings_of_the_repository_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--load-model needs --model-control-mode explicit"):
        ServeConfig((str(tmp_path),), load_model=("a",))
    with pytest.raises(ValueError, match=r"'.*absent' is not a folder"):
        ServeConfig((str(tmp_path), str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="--model-name goes with one --model-repository"):
        ServeConfig((str(tmp_path), str(tmp_path)), model_name="a")
    with pytest.raises(ValueError, match="--model-name goes with one --model-repository, which is a local folder"):
        ServeConfig(("s3://bucket/models",), model_name="a")
    with pytest.raises(ValueError, match=r"--repository-poll-secs must lie in 0\.1 to 86400, got 0"):
        ServeConfig((str(tmp_path),), repository_poll_secs=0)


def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    fake_model(tmp_path, seconds=1000, config="max_batch_size: 1\n")
    fake_model(tmp_path, "good")
    served = Served(
        tmp_path, "--drain-timeout-seconds", "1000", "--drain-seconds", "1000", "--start-patience-seconds", "0"
    )
    assert "still loading: sum" in served.lines[-1]
    served.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert served.process.poll() is None
    until = time.monotonic() + 60
    while served.process.poll() is None and time.monotonic() < until:  # two that come at once are one
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    rest = served.rest()
    assert served.process.returncode == 1
    assert "a second signal came: ended at once" in rest


def test_a_start_that_takes_long_says_what_is_served_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    fake_model(tmp_path, "good")
    fake_model(tmp_path, "late", seconds=1000)
    command = [sys.executable, "-m", "convoynet.server.cli", "serve", "--model-repository", str(tmp_path)]
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, *ports], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("PARTLY READY"))
        assert "models: good; still loading: late" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_drain_that_hangs_has_an_end_of_its_own(tmp_path: Path) -> None:
    """Whatever hangs, the event loop included: the last resort does not depend on it."""
    code = """
import asyncio, time
from convoynet.server import serve
serve._END_SECONDS = 0.2
async def main():
    serve.Stop(lambda: 0.1)()
    time.sleep(1000)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "the drain took too long: ended at once" in done.stderr
