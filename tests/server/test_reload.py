"""SIGHUP to a real `convoy serve`: what changes, what needs a restart, what a faulty file does."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import grpc
import pytest

from convoynet.protos.inference import grpc_service_pb2_grpc
from tests.server.conftest import fake_model, infer_request
from tests.server.test_serve import Served


class Log:
    """A server's lines after READY, as they come. As a context it ends the server, which has to exit with 0."""

    def __init__(self, served: Served) -> None:
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._process = served.process
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Log:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._reader.join(120)
        assert self._process.stderr is not None
        self._process.stderr.close()
        assert self._process.wait(120) == 0

    def _read(self) -> None:
        for line in self._process.stderr or ():
            with self._more:
                self._lines.append(line)
                self._more.notify_all()

    def wait_for(self, text: str) -> str:
        """The first line that has this text, once it is there."""
        with self._more:
            assert self._more.wait_for(lambda: any(text in line for line in self._lines), 60), self._lines
            return next(line for line in self._lines if text in line)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake_model(tmp_path / "models")
    return tmp_path


def test_sighup_takes_over_what_can_change_and_names_the_rest(root: Path) -> None:
    file = root / "server.toml"
    file.write_text("drain-seconds = 0.0\n")
    served = Served(root / "models", "--config", str(file))
    with Log(served) as log, grpc.insecure_channel(served.url) as channel:
        infer = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        infer(infer_request(1))
        file.write_text("log_format = 'json'\nlog_requests = true\nmax_queue = 7\ngrpc_port = 5\n")
        served.process.send_signal(signal.SIGHUP)
        # The flag --grpc-port still wins over the file, so that it has not changed.
        warning = json.loads(log.wait_for("restart"))
        assert warning["message"] == "a restart is needed for the new values of max_queue"
        assert json.loads(log.wait_for("reloaded"))["message"] == "reloaded: log_format, log_requests"
        infer(infer_request(2))
        assert json.loads(log.wait_for("server.requests"))["rpc"] == "ModelInfer"
        file.write_text("log_formt = 'text'\n")
        served.process.send_signal(signal.SIGHUP)
        error = json.loads(log.wait_for("nothing was reloaded"))
        assert "did you mean 'log_format'?" in error["message"]
        infer(infer_request(3))


def test_without_a_file_sighup_changes_nothing(root: Path) -> None:
    served = Served(root / "models")
    with Log(served) as log:
        served.process.send_signal(signal.SIGHUP)
        log.wait_for("reloaded: no setting has changed")
