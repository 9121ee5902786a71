"""One HTTP call at a time with the standard library, off the event loop that the server runs on."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A status, headers with names in lower case, and the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


async def call(
    port: int,
    method: str,
    path: str,
    body: bytes | object = None,
    headers: Mapping[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> Answer:
    """One request on a connection of its own; anything but bytes is sent as JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()

    def run() -> Answer:
        connection: http.client.HTTPConnection
        if context is None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        else:
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)
        try:
            with suppress(ConnectionError):  # it may refuse a body before all of it is sent
                connection.request(method, path, data, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    return await asyncio.to_thread(run)


def sum_request(*rows: float) -> dict[str, Any]:
    """What tests.server.conftest.infer_request is, as JSON: row i adds up to rows[i]."""
    data = [[row, 0, 0, 0] for row in rows]
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), 4], "data": data}]}


async def exchange(port: int, data: bytes) -> bytes:
    """What the server says to raw bytes until it hangs up, or until the client does after sending them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
