"""Every way a call over HTTP can end, as bytes to send: for tests that compare what was told with what was counted."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import dataclass

from tests.server.http_calls import sum_request

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LIMIT = 100_000
"""The --max-message-bytes that these expect; the model is `sum` of tests.server.conftest.fake_model."""


@dataclass(frozen=True)
class End:
    """What is sent, and what comes of it.

    Attributes:
        data: The request.
        status: What HTTP answers; 0 where the client does not wait for it.
        code: What the call is counted as; "" for calls that are not counted.
        model: Which model it counts for; "" for none.
    """

    data: bytes
    status: int
    code: str
    model: str = ""


def post(path: str, body: bytes | object = b"", *headers: str, length: int | None = None) -> bytes:
    """A request with a body, on a connection that ends with it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *headers]
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(data) if length is None else length}")
    return "\r\n".join((*lines, "", "")).encode() + data


INFER = "/v2/models/sum/infer"
_GOOD = sum_request(1)
_BAD, _NONE = "INVALID_ARGUMENT", "NOT_FOUND"
_X = _GOOD["inputs"][0]


def _get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


ENDS: dict[str, End] = {
    "answered": End(post(INFER, _GOOD), 200, "OK", "sum"),
    "answered, in chunks": End(
        post(INFER, b"%x\r\n%s\r\n0\r\n\r\n" % (len(json.dumps(_GOOD)), json.dumps(_GOOD).encode()),
             "Transfer-Encoding: chunked"), 200, "OK", "sum"),
    "broken JSON": End(post(INFER, b'{"inputs": ['), 400, _BAD, "sum"),
    "JSON that is no object": End(post(INFER, []), 400, _BAD, "sum"),
    "a text for a number": End(post(INFER, {"inputs": [{**_X, "data": ["a", 0, 0, 0]}]}), 400, _BAD, "sum"),
    "too few numbers": End(post(INFER, {"inputs": [{**_X, "data": [1]}]}), 400, _BAD, "sum"),
    "a shape that does not fit": End(post(INFER, {"inputs": [{**_X, "shape": [4, 1]}]}), 400, _BAD, "sum"),
    "a header's length beyond the body": End(
        post(INFER, b"{}", "Inference-Header-Content-Length: 99"), 400, _BAD, "sum"),
    "no such output": End(post(INFER, {**_GOOD, "outputs": [{"name": "z"}]}), 400, _BAD, "sum"),
    "no such model": End(post("/v2/models/zz/infer", _GOOD), 404, _NONE),
    "no such model, and broken": End(post("/v2/models/zz/infer", b"{"), 400, _BAD),
    "no such version": End(post("/v2/models/sum/versions/9/infer", _GOOD), 404, _NONE),
    "a version that is none": End(post("/v2/models/sum/versions/x/infer", _GOOD), 400, _BAD),
    "too large": End(post(INFER, b" " * (LIMIT + 1)), 413, _BAD, "sum"),
    "too large, by what it announces": End(post(INFER, b"{", length=10**15), 413, _BAD, "sum"),
    "too large, in chunks": End(
        post(INFER, b"%x\r\n" % (LIMIT + 1), "Transfer-Encoding: chunked"), 413, _BAD, "sum"),
    "too large, inflated": End(
        post(INFER, gzip.compress(b" " * (LIMIT + 1)), "Content-Encoding: gzip"), 413, _BAD, "sum"),
    "broken gzip": End(post(INFER, b"no", "Content-Encoding: gzip"), 400, _BAD, "sum"),
    "another encoding": End(post(INFER, b"no", "Content-Encoding: br"), 415, _BAD, "sum"),
    "broken chunks": End(post(INFER, b"zz\r\n", "Transfer-Encoding: chunked"), 400, _BAD, "sum"),
    "another method": End(_get(INFER), 405, "UNIMPLEMENTED"),
    "no such path": End(_get("/v2/zz"), 404, _NONE),
    "a path that is not UTF-8": End(_get("/v2/models/%ff"), 400, _BAD),
    "a broken escape": End(post("/v2/models/%zz/infer", _GOOD), 400, _BAD),
    "no request": End(b"\x16\x03\x01\x02\x00", 400, _BAD),
    "a folded header": End(b"GET /v2 HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", 400, _BAD),
    "two lengths": End(post(INFER, b"", "Content-Length: 1"), 400, _BAD),
    "another coding": End(post(INFER, b"", "Transfer-Encoding: gzip"), 501, "UNIMPLEMENTED"),
    "another version": End(b"PRI * HTTP/2.0\r\n\r\n", 505, "UNIMPLEMENTED"),
    "another expectation": End(post(INFER, b"", "Expect: x"), 417, _BAD),
    "headers too large": End(b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 70_000, 431, _BAD),
    "a path too long": End(b"GET /" + b"a" * 70_000, 414, _BAD),
    "half a head": End(b"GET /v2 HT", 400, _BAD),
    "half a body": End(post(INFER, b"{", length=9), 400, _BAD, "sum"),
    "health": End(_get("/v2/health/live"), 200, ""),
    "metadata of no model": End(_get("/v2/models/zz"), 404, ""),
}  # fmt: skip


async def status(port: int, data: bytes) -> int:
    """The status that a client gets who sends this, ends its side, and reads to the end, past interim answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        said = await reader.read()
    finally:
        writer.close()
    return int(said.rsplit(CONTINUE, 1)[-1].split(b" ", 2)[1])
