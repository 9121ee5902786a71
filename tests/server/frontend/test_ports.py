"""Every port takes and refuses the same: one table for gRPC on both stacks, HTTP, metrics and management."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.app import App
from convoynet.server.security.security import digest
from tests.server.certificates import Authority, Pair
from tests.server.conftest import config, fake_model, infer_request
from tests.server.http_calls import call, sum_request

PATH = "/inference.GRPCInferenceService/"
STACKS = ["native", "grpcio"]
LIMIT = 5000
CODES = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
}
Headers = Mapping[str, str]
Ask = Callable[..., Awaitable[str]]


def over_grpc(channel: aio.Channel) -> Ask:
    """A call of gRPC; gives the name of its status."""

    async def ask(rpc: str, payload: bytes, headers: Headers, compression: Any = None) -> str:
        metadata = [(name.lower(), value) for name, value in headers.items()]
        try:
            await channel.unary_unary(PATH + rpc)(payload, metadata=metadata, compression=compression, timeout=60)
        except aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"

    return ask


def over_http(port: int) -> Ask:
    """A call of HTTP; gives the name of the status of gRPC that it stands for."""

    async def ask(method: str, path: str, body: bytes | None, headers: Headers) -> str:
        return CODES[(await call(port, method, path, body, headers)).status]

    return ask


class Ports:
    """The ports of one server by name."""

    def __init__(self, app: App, channels: list[aio.Channel]) -> None:
        self.grpc = {"gRPC": over_grpc(channels[0]), "gRPC management": over_grpc(channels[1])}
        self.http = {"HTTP": over_http(app.http_port), "HTTP management": over_http(app.management_ports[1])}
        self.metrics = over_http(app.metrics_port)

    async def all(self, ask: Callable[[Ask], Awaitable[str]], asked: Callable[[Ask], Awaitable[str]]) -> dict[str, str]:
        """What each port says, asked one way over gRPC and another over HTTP."""
        said = {name: await ask(port) for name, port in self.grpc.items()}
        return said | {name: await asked(port) for name, port in self.http.items()}


@asynccontextmanager
async def ports(folder: Path, stack: str, **settings: Any) -> AsyncIterator[Ports]:
    """A server with every port there is."""
    fake_model(folder)
    app = App(config(folder, grpc_stack=stack, management="0,0", max_message_bytes=LIMIT, **settings))
    await app.start()
    try:
        urls = [f"127.0.0.1:{port}" for port in (app.grpc_port, app.management_ports[0])]
        async with aio.insecure_channel(urls[0]) as first, aio.insecure_channel(urls[1]) as second:
            yield Ports(app, [first, second])
    finally:
        await app.stop()


TOKENS: dict[str, tuple[Headers, str]] = {
    "none": ({}, "UNAUTHENTICATED"),
    "bearer": ({"authorization": "Bearer t-read"}, "OK"),
    "in other letters": ({"Authorization": "bEARER t-read"}, "OK"),
    "with spaces": ({"authorization": "Bearer   t-read"}, "OK"),
    "as a key": ({"x-api-key": "t-read"}, "OK"),
    "of another role": ({"x-api-key": "t-infer"}, "PERMISSION_DENIED"),
    "unknown": ({"authorization": "Bearer t-rea"}, "UNAUTHENTICATED"),
    "longer": ({"x-api-key": "t-read" * 500}, "UNAUTHENTICATED"),
    "empty": ({"authorization": "Bearer "}, "UNAUTHENTICATED"),
    "without a scheme": ({"authorization": "t-read"}, "UNAUTHENTICATED"),
    "of another scheme": ({"authorization": "Basic t-read"}, "UNAUTHENTICATED"),
    "wrong beside a right one": ({"authorization": "Bearer no", "x-api-key": "t-read"}, "UNAUTHENTICATED"),
    "right beside a wrong one": ({"authorization": "Bearer t-read", "x-api-key": "no"}, "OK"),
    "the hash": ({"x-api-key": digest("t-read")}, "UNAUTHENTICATED"),
}


@pytest.mark.parametrize("stack", STACKS)
async def test_tokens(tmp_path: Path, stack: str) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"reader read {digest('t-read')}\ncamera infer {digest('t-infer')}\n")
    root = tmp_path / "models"
    root.mkdir()
    async with ports(root, stack, auth_tokens=tokens) as running:
        for name, (headers, expected) in TOKENS.items():
            # What a caller may not do is not looked at, whatever it is.
            for payload, body in ((b"", None), (b"\xff" * 2000, b"\xff" * 2000)):
                allowed = "INVALID_ARGUMENT" if payload and expected == "OK" else expected
                said = await running.all(
                    lambda ask, sent=payload, given=headers: ask("RepositoryIndex", sent, given),
                    lambda ask, sent=body, given=headers: ask("POST", "/v2/repository/index", sent, given),
                )
                assert set(said.values()) == {allowed}, f"{name}: {said}"
            assert await running.metrics("GET", "/metrics", None, headers) == expected, name


def padded(size: int, payload: bytes) -> bytes:
    """A request of just that many bytes: a field that nobody knows is passed over."""
    left = size - len(payload) - 4
    return payload + b"\xfa\x01" + bytes([left & 0x7F | 0x80, left >> 7]) + bytes(left)


@pytest.mark.parametrize("stack", STACKS)
async def test_sizes(tmp_path: Path, stack: str) -> None:
    message = infer_request(1).SerializeToString()

    document = json.dumps(sum_request(1)).encode()
    async with ports(tmp_path, stack) as running:
        for size, expected in ((LIMIT, "OK"), (LIMIT + 1, "RESOURCE_EXHAUSTED"), (3 * LIMIT, "RESOURCE_EXHAUSTED")):
            sent, body = padded(size, message), document.ljust(size)
            assert (len(sent), len(body)) == (size, size)
            said = await running.all(
                lambda ask, sent=sent: ask("ModelInfer", sent, {}),
                lambda ask, body=body: ask("POST", "/v2/models/sum/infer", body, {}),
            )
            assert set(said.values()) == {expected}, f"{size}: {said}"


@pytest.mark.parametrize("stack", STACKS)
async def test_encodings_and_what_comes_out_of_them(tmp_path: Path, stack: str) -> None:

    document = json.dumps(sum_request(1)).encode()
    message = infer_request(1).SerializeToString()
    encodings = {"gzip": (grpc.Compression.Gzip, gzip.compress), "deflate": (grpc.Compression.Deflate, zlib.compress)}
    async with ports(tmp_path, stack) as running:
        for name, (compression, compress) in encodings.items():
            for size, expected in (
                (LIMIT, "OK"),
                (LIMIT + 1, "RESOURCE_EXHAUSTED"),
                (200 * LIMIT, "RESOURCE_EXHAUSTED"),
            ):
                sent = padded(size, message) if size < 2**14 else message + b"\x3a\x00" * (size // 2)
                body = compress(document.ljust(size))
                assert len(body) < LIMIT
                said = await running.all(
                    lambda ask, sent=sent, how=compression: ask("ModelInfer", sent, {}, how),
                    lambda ask, body=body, how=name: ask(
                        "POST", "/v2/models/sum/infer", body, {"content-encoding": how}
                    ),
                )
                assert set(said.values()) == {expected}, f"{name} of {size}: {said}"


NAMES = {
    ("sum", ""): "OK",
    ("sum", "1"): "OK",
    ("sum", "01"): "NOT_FOUND",
    ("sum", "2"): "NOT_FOUND",
    ("sum", "-1"): "INVALID_ARGUMENT",
    ("sum", "x"): "INVALID_ARGUMENT",
    ("sum", "\u0661"): "INVALID_ARGUMENT",
    ("sum ", ""): "NOT_FOUND",
    ("Sum", ""): "NOT_FOUND",
    ("gr\u00fc\u00dfe \U0001f43a", ""): "NOT_FOUND",
    ("../sum", ""): "NOT_FOUND",
    ("a%2Fb", "1"): "NOT_FOUND",
    ("n" * 1000, ""): "NOT_FOUND",
}


@pytest.mark.parametrize("stack", STACKS)
async def test_names(tmp_path: Path, stack: str) -> None:
    async with ports(tmp_path, stack) as running:
        for (name, version), expected in NAMES.items():
            message = pb.ModelMetadataRequest(name=name, version=version).SerializeToString()
            path = f"/v2/models/{quote(name, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
            said = await running.all(
                lambda ask, sent=message: ask("ModelMetadata", sent, {}),
                lambda ask, path=path: ask("GET", path, None, {}),
            )
            assert set(said.values()) == {expected}, f"{name} {version}: {said}"


async def enters(app: App, authority: Authority, shows: Pair | None) -> dict[str, bool]:
    """Which ports let a client in that trusts this authority and shows that certificate."""
    entered = {}
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), *(shows.pem if shows else (None, None)))
    for name, port in (("gRPC", app.grpc_port), ("gRPC management", app.management_ports[0])):
        async with aio.secure_channel(f"localhost:{port}", credentials) as channel:
            entered[name] = await over_grpc(channel)("ServerLive", b"", {}) == "OK"
    context = authority.client_context(shows)
    for name, port, path in (
        ("HTTP", app.http_port, "/v2/health/live"),
        ("HTTP management", app.management_ports[1], "/v2/health/live"),
        ("metrics", app.metrics_port, "/metrics"),
    ):
        try:
            entered[name] = (await call(port, "GET", path, context=context)).status == 200
        except OSError:
            entered[name] = False
    return entered


async def test_certificates(tmp_path: Path) -> None:
    root = Authority(tmp_path)
    below, other = Authority(tmp_path, "below", above=root), Authority(tmp_path, "other", above=root)
    models = tmp_path / "models"
    models.mkdir()
    fake_model(models)
    server = below.sign("server")
    shown = {
        "a certificate of the root's": root.sign("direct", client=True),
        "one with its intermediate authority": below.sign("indirect", client=True),
        "one of another intermediate authority": other.sign("stranger", client=True),
        "one that has expired": below.sign("late", client=True, expired=True),
        "none": None,
    }
    trusted = {
        "the root": (root, [True, True, True, False, False]),
        "below": (below, [False, True, False, False, False]),
    }
    for what, (authority, expected) in trusted.items():
        files = {"tls_cert": server.certificate, "tls_key": server.key, "tls_client_ca": authority.file}
        app = App(config(models, management="0,0", **files))
        await app.start()
        try:
            for (name, pair), lets_in in zip(shown.items(), expected, strict=True):
                assert set((entered := await enters(app, root, pair)).values()) == {lets_in}, (
                    f"{what}, {name}: {entered}"
                )
        finally:
            await app.stop()
