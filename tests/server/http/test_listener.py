"""HTTP over real sockets: bounds, compression, broken clients, draining, metrics."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.http import listener
from convoynet.server.http.listener import decompressed
from tests.server.conftest import Serving, fake_model
from tests.server.http_calls import call, exchange, sum_request

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
    except listener.Refused as refused:
        assert refused.reply.status == (413 if len(data) > limit and not cut else refused.reply.status)  # noqa: PT017
        assert cut or len(data) > limit


async def test_headers_that_do_not_end_are_refused(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_model(tmp_path)
    async with serving() as running:
        port = running.app.http_port
        endless = b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 1_000_000
        assert b"200 OK" not in await asyncio.wait_for(exchange_open(port, endless), 20)
        monkeypatch.setattr(listener, "HEADER_SECONDS", 0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v2 HTTP/1.1\r\n")
        assert await reader.read() == b""
        writer.close()
        monkeypatch.setattr(listener, "IDLE_SECONDS", 0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in await reader.read()
        writer.close()


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
            assert b"HTTP/1.1 5" not in await asyncio.wait_for(exchange(port, data), 20), data
        assert (await call(port, "POST", INFER, sum_request(1))).status == 200
