"""Lines of the log: their form, what they tell of a request, how often they repeat."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.observing import logs
from convoynet.server.observing.observer import Finished
from convoynet.server.types import Call
from tests.server.conftest import Serving, code_of, fake_model, infer_request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # configure() closes the handlers that it finds, and pytest's own must stay open.
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)


def written(form: str, level: int = logging.INFO, **extra: object) -> str:
    """What a log line looks like."""
    stream = io.StringIO()
    logs.configure("info", form, stream)
    logging.getLogger("some.part").log(level, "batch of %d", 3, extra=extra)
    return stream.getvalue()


def test_json_lines_have_the_stated_fields() -> None:
    line = written("json", request_id='a"b\nc', version="", rows=3)
    assert line.count("\n") == 1
    record = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "info", "logger": "some.part", "message": "batch of 3", "request_id": 'a"b\nc', "rows": 3
    }  # fmt: skip


def test_text_lines_quote_what_a_client_chose() -> None:
    line = written("text", request_id="a\nFAKE line")
    assert line.endswith(' INFO batch of 3 request_id="a\\nFAKE line"\n')
    assert line.count("\n") == 1


def test_an_exception_stays_in_its_json_line() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("x").exception("it broke")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: why")


def test_level_and_form_can_change() -> None:
    stream = io.StringIO()
    logs.configure("error", "text", stream)
    logging.getLogger("x").warning("unseen")
    logs.configure("warning", "json", stream)
    logging.getLogger("x").warning("seen")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["seen"]


def test_repeated_warnings_are_bounded_and_counted() -> None:
    now = [0.0]
    repeat = logs.RepeatFilter(burst=2, period_s=10, clock=lambda: now[0])

    def passes(message: str, level: int = logging.WARNING) -> logging.LogRecord | None:
        record = logging.LogRecord("x", level, "", 0, message, ("arg",), None)
        return record if repeat.filter(record) else None

    assert [passes("a %s") is not None for _ in range(5)] == [True, True, False, False, False]
    assert passes("b %s") is not None
    assert all(passes("a %s", logging.INFO) for _ in range(5))
    now[0] = 10.0
    record = passes("a %s")
    assert record is not None
    assert record.__dict__["left_out"] == 3
    for number in range(3000):
        passes(f"{number}")
    assert len(repeat._seen) <= 1000


@pytest.mark.parametrize(
    ("message", "metadata", "wanted"),
    [
        (pb.ModelInferRequest(id="mine"), (("x-request-id", "theirs"),), "mine"),
        (pb.ModelInferRequest(), (("x-request-id", "theirs"),), "theirs"),
        (pb.ServerLiveRequest(), (("x-request-id", "theirs"),), "theirs"),
        (pb.ModelInferRequest(id="x" * 1000), (), "x" * 128),
        (pb.ModelInferRequest(), (), "[0-9a-f]{32}"),
    ],
)
def test_request_ids(message: Message, metadata: tuple[tuple[str, str], ...], wanted: str) -> None:
    finished = Finished("ModelInfer", Call("grpc", metadata=metadata), message)
    assert re.fullmatch(wanted, finished.id)
    assert finished.id == finished.id  # a generated one stays


@pytest.mark.parametrize(
    ("header", "wanted"), [(f"00-{TRACE}-00f067aa0ba902b7-01", TRACE), ("00-zz-1-1", ""), ("", "")]
)
def test_trace_ids_are_the_clients(header: str, wanted: str) -> None:
    call = Call("grpc", metadata=(("traceparent", header),))
    assert Finished("ModelInfer", call, pb.ModelInferRequest()).trace_id == wanted


async def test_every_request_is_a_line_when_asked_for(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    stream = io.StringIO()
    async with serving(log_requests=True) as running:
        logs.configure("info", "json", stream)
        request = infer_request(1, 2)
        request.id = "seven"
        await running.stub.ModelInfer(request, metadata=(("traceparent", f"00-{TRACE}-00f067aa0ba902b7-00"),))
        await code_of(running.stub.ModelInfer(infer_request(1, model="absent")))
        await running.stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines() if "server.requests" in line]
    assert [(e["message"], e["model"]) for e in lines] == [
        ("ModelInfer OK", "sum"), ("ModelInfer NOT_FOUND", "absent"), ("ModelMetadata OK", "sum")
    ]  # fmt: skip
    answered, failed, _ = lines
    assert (answered["request_id"], answered["trace_id"], answered["version"]) == ("seven", TRACE, "1")
    assert answered["rows"] == 2
    stages = ("decode_ms", "queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms")
    assert all(answered[stage] >= 0 for stage in stages)
    assert sum(answered[stage] for stage in stages) <= answered["duration_ms"] + 0.01
    assert "rows" not in failed


async def test_no_request_is_logged_by_default(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    stream = io.StringIO()
    async with serving() as running:
        logs.configure("debug", "json", stream)
        await running.stub.ModelInfer(infer_request(1))
    assert "server.requests" not in stream.getvalue()
