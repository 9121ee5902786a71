"""HTTP over real sockets: bounds, compression, broken clients, draining, metrics."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.http import listener
from convoynet.server.http.application import decompressed
from convoynet.server.http.parsing import Refused
from convoynet.server.memory import inflating
from tests.server.conftest import Running, Serving, fake_model
from tests.server.http_calls import call, exchange, sum_request
from tests.server.http_ends import ENDS, LIMIT, status

INFER = "/v2/models/sum/infer"


async def test_a_request_is_answered_and_counted_as_http(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        answer = await call(running.app.http_port, "POST", INFER, sum_request(1, 2))
        assert (answer.status, answer.json["outputs"][0]["data"]) == (200, [1, 2])
        assert running.metric("convoy_requests_total", model="sum", version="1", protocol="http", code="OK") == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_bodies(serving: Serving, tmp_path: Path, encoding: str) -> None:
    fake_model(tmp_path)
    plain = json.dumps(sum_request(7)).encode() + b" " * 300_000
    body = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    async with serving() as running:
        answer = await call(running.app.http_port, "POST", INFER, body, {"Content-Encoding": encoding})
        assert answer.json["outputs"][0]["data"] == [7]


async def test_bounds_of_bodies(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    bomb = gzip.compress(b" " * 2_000_000)
    async with serving(max_message_bytes=1_000_000) as running:
        port = running.app.http_port
        for body, headers, status, text in (
            (b" " * 1_000_001, {}, 413, "1000000 are allowed"),
            (bomb, {"Content-Encoding": "gzip"}, 413, "when decompressed"),
            (b"no gzip", {"Content-Encoding": "gzip"}, 400, "broken"),
            (bomb[:-9], {"Content-Encoding": "gzip"}, 413, "when decompressed"),
            (gzip.compress(b"{}")[:-2], {"Content-Encoding": "gzip"}, 400, "ends early"),
            (b"{}", {"Content-Encoding": "br"}, 415, "'br' is not one of gzip, deflate"),
        ):
            answer = await call(port, "POST", INFER, body, headers)
            assert (answer.status, text in answer.json["error"]) == (status, True), text
        # Without a length, the limit is found while the body comes.
        chunk = b"30000\r\n" + b" " * 0x30000 + b"\r\n"
        head = b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 413 " in await exchange_open(port, head + chunk * 5 + b"5000\r\n" + b" " * 0x5000)
        assert (await call(port, "POST", INFER, sum_request(1))).status == 200


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 100))
def test_decompression_gives_the_bytes_or_refuses(data: bytes, cut: int, limit: int) -> None:
    body = zlib.compress(data)
    broken = body[: max(0, len(body) - cut)]
    try:
        assert decompressed(broken, limit) == data
        assert cut == 0
        assert len(data) <= limit
    except Refused as refused:
        assert refused.reply.status == (413 if len(data) > limit and not cut else refused.reply.status)  # noqa: PT017
        assert cut or len(data) > limit


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_a_gzip_body_may_have_several_members(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    body = b"".join(map(gzip.compress, parts))
    assert decompressed(body, len(whole)) == whole
    for broken in (body[:-1], body + b"\0", body + b"\x1f\x8b"):
        with pytest.raises(Refused, match="broken"):
            decompressed(broken, len(whole))
    if whole:
        with pytest.raises(Refused, match="when decompressed"):
            decompressed(body, len(whole) - 1)


def test_many_empty_members_are_refused() -> None:
    assert decompressed(gzip.compress(b"") * inflating.MAX_MEMBERS, 10) == b""
    with pytest.raises(Refused, match="more than 4096 members"):
        decompressed(gzip.compress(b"") * (inflating.MAX_MEMBERS + 1), 10)


def counts(running: Running) -> dict[tuple[str, str], float]:
    """Calls over HTTP that were counted, by model and code."""
    (family,) = [f for f in running.app._metrics.registry.collect() if f.name == "convoy_requests"]
    found = [s for s in family.samples if s.name.endswith("_total") and s.labels["protocol"] == "http" and s.value]
    return {(s.labels["model"], s.labels["code"]): s.value for s in found}


async def test_every_call_is_counted_once_as_its_client_saw_it(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    expected: dict[tuple[str, str], float] = {}
    async with serving(max_message_bytes=LIMIT) as running:
        for name, end in ENDS.items():
            assert await status(running.app.http_port, end.data) == end.status, name
            if end.code:
                expected[end.model, end.code] = expected.get((end.model, end.code), 0) + 1
            assert counts(running) == expected, name


async def test_calls_without_a_right_are_counted(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    tokens = tmp_path.parent / f"{tmp_path.name}-tokens"
    tokens.write_text("reader read sha256:" + hashlib.sha256(b"r").hexdigest() + "\n")
    async with serving(auth_tokens=tokens) as running:
        for body in (sum_request(1), b" " * 200_000):
            assert (await call(running.app.http_port, "POST", INFER, body)).status == 401
            known = {"Authorization": "Bearer r"}
            assert (await call(running.app.http_port, "POST", INFER, body, known)).status == 403
        assert counts(running) == {("sum", "UNAUTHENTICATED"): 2, ("sum", "PERMISSION_DENIED"): 2}


async def test_who_may_not_call_has_no_large_body_read(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    tokens = tmp_path.parent / f"{tmp_path.name}-tokens"
    tokens.write_text("reader read sha256:" + hashlib.sha256(b"r").hexdigest() + "\n")
    async with serving(auth_tokens=tokens) as running:
        head = (
            b"POST "
            + INFER.encode()
            + b" HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 900000\r\n\r\n"
        )
        assert (await exchange_open(running.app.http_port, head)).startswith(b"HTTP/1.1 401 ")


async def test_head_has_the_headers_and_no_body(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        paths = [(running.app.http_port, f"/v2/{p}") for p in ("health/live", "health/ready", "models/sum/ready")]
        for port, path in (*paths, (running.app.http_port, "/v2"), (running.app.metrics_port, "/metrics")):
            head, get = await call(port, "HEAD", path), await call(port, "GET", path)
            assert (head.status, head.body) == (200, b"")
            assert head.headers["content-type"] == get.headers["content-type"]


async def test_a_body_is_never_a_request_of_its_own(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    inner = b"POST /v2/repository/models/sum/unload HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    head = b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\n"
    length = b"Content-Length: %d\r\n" % len(inner)
    offers = {
        "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n" + length,
        "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" + length,
        "nothing": length,
        "two lengths": b"Content-Length: 0\r\n" + length,
        "length and chunks": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "an unknown coding": b"Transfer-Encoding: identity\r\n",
        "a folded line": b"X: y\r\n Content-Length: 0\r\n" + length,
        "a bare line feed": b"X: y\nContent-Length: 0\r\n" + length,
    }
    async with serving(model_control_mode="explicit", load_model=("sum",)) as running:
        for what, lines in offers.items():
            body = (b"0\r\n\r\n" if what == "length and chunks" else b"") + inner
            said = await exchange(running.app.http_port, head + lines + b"\r\n" + body)
            assert said.count(b"HTTP/1.1 ") == 1, what
            assert (await call(running.app.http_port, "GET", "/v2/models/sum/ready")).status == 200, what


async def test_a_new_connection_takes_the_place_of_one_that_does_nothing(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path, seconds=0.2)
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 3)
    async with serving() as running:
        port = running.app.http_port
        half, idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        half[1].write(b"POST /v2 HTTP/1.1\r\n")
        answers = [asyncio.create_task(call(port, "POST", INFER, sum_request(i))) for i in range(2)]
        assert await idle[0].read() == b""
        assert [(await answer).status for answer in answers] == [200, 200]
        half[1].write(b"Host: x\r\n\r\n")
        assert (await half[0].readline()).startswith(b"HTTP/1.1 405 ")
        for _, writer in (half, idle):
            writer.close()


async def test_connections_that_are_all_at_work_refuse_another(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path, seconds=0.5)
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 1)
    async with serving() as running:
        first = asyncio.create_task(call(running.app.http_port, "POST", INFER, sum_request(1)))
        await running.until(lambda model: model.inflight)
        refused = await exchange_open(running.app.http_port, b"")
        assert b" 503 " in refused
        assert b"as many connections as it takes" in refused
        assert (await first).status == 200


async def test_a_client_that_goes_away_cancels_its_request(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    body = json.dumps(sum_request(1)).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with serving() as running:
        with running.held():
            first = asyncio.create_task(call(running.app.http_port, "POST", INFER, sum_request(1)))
            await running.until(lambda model: model.inflight == 1)
            _, writer = await asyncio.open_connection("127.0.0.1", running.app.http_port)
            writer.write(head + body)
            await running.until(lambda model: model.inflight == 2)
            writer.close()
            await running.until(lambda model: model.inflight == 1)
        assert (await first).status == 200
        assert running.metric("convoy_requests_total", model="sum", version="1", protocol="http", code="CANCELLED") == 1
        assert running.metric("convoy_rejected_total", model="sum", version="1", reason="cancelled") == 1


async def test_pipelined_requests_are_answered_in_order(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        one = b"GET /v2/models/sum/ready HTTP/1.1\r\nHost: x\r\n\r\n"
        two = b"GET /v2/models/zz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        said = await exchange_open(running.app.http_port, one + two)
        assert said.index(b"200 OK") < said.index(b"404 Not Found")


async def exchange_open(port: int, data: bytes) -> bytes:
    """What the server says until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_due_answers_are_given_before_the_end_and_late_ones_are_cut(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path, config="max_batch_size: 1\ndynamic_batching { }\n")
    async with serving() as running:
        with running.held():
            calls = [asyncio.create_task(call(running.app.http_port, "POST", INFER, sum_request(i))) for i in range(2)]
            await running.until(lambda model: model.inflight == 2)
            stopped = asyncio.create_task(running.app.stop())
            while running.app.core.ready:
                await asyncio.sleep(0)
        assert await stopped
        assert [(await c).status for c in calls] == [200, 200]
    async with serving(drain_timeout_seconds=0.1) as running:
        with running.held():
            late = asyncio.create_task(call(running.app.http_port, "POST", INFER, sum_request(1)))
            await running.until(lambda model: model.inflight == 1)
            stopped = asyncio.create_task(running.app.stop())
            (cut,) = await asyncio.gather(late, return_exceptions=True)
            assert isinstance(cut, Exception) or cut.status == 503
        assert not await stopped


async def test_no_http_port_is_opened_with_minus_one(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(http_port=-1) as running:
        assert running.app.http_port == -1
        assert (await call(running.app.metrics_port, "GET", "/metrics")).status == 200


async def test_metrics_in_both_formats(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        port = running.app.metrics_port
        plain = await call(port, "GET", "/metrics")
        assert plain.headers["content-type"].startswith("text/plain")
        assert b"convoy_build_info" in plain.body
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        openmetrics = await call(port, "GET", "/metrics", headers=accept)
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.body.endswith(b"# EOF\n")
        assert (await call(port, "GET", "/other")).status == 404


async def test_a_port_that_is_taken_is_said(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{running.app.http_port} for HTTP"):
            async with serving(http_port=running.app.http_port):
                pass


PIECES = [
    *(b"GET ", b"POST ", b"/v2", b"/v2/models/sum/infer", b"/%zz", b" HTTP/1.1\r\n", b" HTTP/9\r\n", b"Host: x\r\n"),
    *(b"Content-Length: 2\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffff\r\n", b"\r\n", b"\r\n\r\n", b"{}"),
    *(b"Content-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n"),
    *(b"Inference-Header-Content-Length: 1\r\n", b"Content-Type: image/png\r\n", b"\xff\x00", b"\x16\x03\x01"),
]
START = b"POST /v2/models/sum/infer HTTP/1.1\r\nHost: x\r\n"


async def test_no_bytes_are_a_500_or_a_hang(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    chance = random.Random(5)
    async with serving() as running:
        port = running.app.http_port
        for _ in range(300):
            data = START * chance.randint(0, 1) + b"".join(chance.choices(PIECES, k=chance.randint(0, 8)))
            assert b"HTTP/1.1 5" not in await asyncio.wait_for(exchange(port, data), 60), data
        assert (await call(port, "POST", INFER, sum_request(1))).status == 200
