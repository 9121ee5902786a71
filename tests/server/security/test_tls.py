"""TLS and mutual TLS with real certificates, over gRPC, HTTP and the metrics port."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from google.protobuf.message import Message
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from convoynet.server.app import App
from convoynet.server.http import stream
from convoynet.server.http.application import HttpApp
from convoynet.server.http.connection import Incoming
from convoynet.server.http.handlers import HttpReply
from convoynet.server.http.listener import HttpListener
from convoynet.server.security.reloading import InvalidFile
from convoynet.server.security.tls import HTTP, Certificates, TlsFiles, identity_from_auth, identity_from_peer
from convoynet.server.types import Call
from tests.server.certificates import Authority, Pair, replace
from tests.server.conftest import config, infer_request, sums
from tests.server.http_calls import call, sum_request

INFER = "/v2/models/sum/infer"


@asynccontextmanager
async def secure(root: Path, pair: Pair, **settings: Any) -> AsyncIterator[App]:
    """A server with TLS over the models in `root`."""
    app = App(config(root, tls_cert=pair.certificate, tls_key=pair.key, **settings))
    try:
        await app.start()
        yield app
    finally:
        await app.stop()


async def ask(app: App, authority: Authority, shows: Pair | None = None, **metadata: str) -> Any:
    """One ModelInfer over a gRPC connection of its own."""
    key, chain = shows.pem if shows else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), key, chain)
    # Without a pool that is shared, a broken connection of an earlier test would be found again.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with aio.secure_channel(f"127.0.0.1:{app.grpc_port}", credentials, options) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return await stub.ModelInfer(infer_request(3), timeout=60, metadata=tuple(metadata.items()))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def refused_everywhere(app: App, authority: Authority, shows: Pair | None = None) -> None:
    """Neither gRPC nor HTTP nor metrics can be reached by that client."""
    with pytest.raises(aio.AioRpcError) as caught:
        await ask(app, authority, shows)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    for port, path in ((app.http_port, "/v2/health/live"), (app.metrics_port, "/metrics")):
        with pytest.raises(OSError):  # noqa: PT011  ssl.SSLError or a reset, by what the client notices first
            await call(port, "GET", path, context=authority.client_context(shows))


async def test_tls_on_every_port(root: Path, authority: Authority) -> None:
    async with secure(root, authority.sign("server")) as app:
        assert sums(await ask(app, authority)) == [3]
        context = authority.client_context()
        answer = await call(app.http_port, "POST", INFER, sum_request(1), context=context)
        assert answer.json["outputs"][0]["data"] == [1]
        assert (await call(app.metrics_port, "GET", "/metrics", context=context)).status == 200
        with pytest.raises(OSError):  # noqa: PT011
            await call(app.http_port, "GET", "/v2/health/live")


async def test_a_server_of_another_authority_is_not_trusted(root: Path, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    async with secure(root, authority.sign("server")) as app:
        await refused_everywhere(app, other)


async def test_an_expired_server_is_not_trusted(root: Path, authority: Authority) -> None:
    async with secure(root, authority.sign("server", expired=True)) as app:
        await refused_everywhere(app, authority)


@pytest.mark.parametrize("frontends", ["1", "2"])
async def test_mutual_tls_takes_clients_of_the_authority_alone(
    root: Path, authority: Authority, tmp_path: Path, frontends: str
) -> None:
    clients = Authority(tmp_path, "clients")
    good = clients.sign("camera", client=True)
    async with secure(root, authority.sign("server"), tls_client_ca=clients.file, frontends=frontends) as app:
        assert sums(await ask(app, authority, good)) == [3]
        answer = await call(app.http_port, "POST", INFER, sum_request(1), context=authority.client_context(good))
        assert answer.status == 200
        context = authority.client_context(good)
        assert (await call(app.metrics_port, "GET", "/metrics", context=context)).status == 200
        for bad in (
            None,
            Authority(tmp_path, "strangers").sign("stranger", client=True),
            clients.sign("late", client=True, expired=True),
        ):
            await refused_everywhere(app, authority, bad)


@pytest.mark.parametrize("mutual", [False, True])
async def test_certificates_are_rotated_under_load_without_a_failed_call(
    root: Path, authority: Authority, tmp_path: Path, mutual: bool
) -> None:
    """Old connections go on, new ones see the new certificate; a new authority for clients counts at once."""
    pair = authority.sign("server")
    next_authority = Authority(tmp_path, "next")
    client = authority.sign("camera", client=True)
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(authority.file.read_bytes())
    settings = {"tls_client_ca": bundle} if mutual else {}
    both = tmp_path / "both.pem"
    both.write_bytes(authority.file.read_bytes() + next_authority.file.read_bytes())
    context = ssl.create_default_context(cafile=str(both))
    context.load_cert_chain(client.certificate, client.key)
    trusted = Trusted(both)
    async with secure(root, pair, **settings) as app:
        done = asyncio.Event()
        counts = [0, 0]

        async def over_grpc() -> None:
            while not done.is_set():
                assert sums(await ask(app, trusted, client)) == [3]  # type: ignore[arg-type]
                counts[0] += 1

        async def over_http() -> None:
            while not done.is_set():
                answer = await call(app.http_port, "POST", INFER, sum_request(1), context=context)
                assert answer.json["outputs"][0]["data"] == [1]
                counts[1] += 1

        load = [asyncio.create_task(work()) for work in (over_grpc, over_http, over_http)]
        await _until(lambda: min(counts) >= 3)
        replace(pair, next_authority.sign("new"))
        await app.reload(app._config)
        seen = list(counts)
        await _until(lambda: all(now >= before + 3 for now, before in zip(counts, seen, strict=True)))
        done.set()
        await asyncio.gather(*load)
        # Who trusts the new authority alone gets in, who trusts the old one alone does not.
        assert sums(await ask(app, next_authority, client)) == [3]
        new = next_authority.client_context(client)
        assert (await call(app.http_port, "GET", "/v2/health/live", context=new)).status == 200
        await refused_everywhere(app, authority, client)
        if mutual:
            bundle.write_bytes(next_authority.file.read_bytes())
            await app.reload(app._config)
            await refused_everywhere(app, next_authority, client)
            newcomer = next_authority.sign("newcomer", client=True)
            assert sums(await ask(app, next_authority, newcomer)) == [3]
            context = next_authority.client_context(newcomer)
            assert (await call(app.http_port, "GET", "/v2/health/live", context=context)).status == 200


class Trusted:
    """A bundle of authorities, where `ask` wants one."""

    def __init__(self, file: Path) -> None:
        self.file = file


async def _until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def test_broken_new_files_keep_the_old_ones_and_log_one_line(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair, other = authority.sign("server"), authority.sign("other")
    certificates = Certificates(TlsFiles(pair.certificate, pair.key))
    first = certificates.value
    assert not certificates.refresh()
    caplog.set_level(logging.INFO)
    for broken in (b"no PEM", other.key.read_bytes()):
        pair.key.write_bytes(broken)
        caplog.clear()
        assert not certificates.refresh()
        assert not certificates.refresh()
        assert certificates.value is first
        assert len(caplog.records) == 1
        assert "the old ones stay in force" in caplog.text
    replace(pair, other)
    assert certificates.refresh()
    assert certificates.value is not first


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "cannot be used"), (b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END", "cannot be used")],
)
def test_bad_keys_are_said_at_the_start(authority: Authority, content: bytes, text: str) -> None:
    pair = authority.sign("server")
    pair.key.write_bytes(content)
    with pytest.raises(InvalidFile, match=text):
        Certificates(TlsFiles(pair.certificate, pair.key))


def test_a_missing_or_empty_authority_is_said_at_the_start(authority: Authority, tmp_path: Path) -> None:
    pair = authority.sign("server")
    with pytest.raises(InvalidFile, match="No such file"):
        Certificates(TlsFiles(pair.certificate, pair.key, tmp_path / "none.pem"))
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(InvalidFile, match="holds no PEM certificates"):
        Certificates(TlsFiles(pair.certificate, pair.key, tmp_path / "empty.pem"))


def test_the_name_of_a_client_is_its_common_name_or_else_its_first_alternative_name() -> None:
    peer = {"subject": ((("commonName", "camera"),),), "subjectAltName": (("URI", "spiffe://a/b"),)}
    assert identity_from_peer(peer) == "camera"
    assert identity_from_peer({"subject": (), "subjectAltName": (("URI", "spiffe://a/b"),)}) == "spiffe://a/b"
    assert identity_from_peer(None) == identity_from_auth({}) == ""
    assert identity_from_auth({"x509_common_name": [b"camera"]}) == "camera"
    alternative = {"x509_common_name": [b""], "x509_subject_alternative_name": [b"spiffe://a/b"]}
    assert identity_from_auth(alternative) == "spiffe://a/b"


class Who:
    """Answers with the name that the client's certificate states."""

    async def message(self, rpc: str, request: Message, caller: Call) -> Message:
        return pb.ServerMetadataResponse(name=caller.identity)

    def refused(self, rpc: str, caller: Call) -> None:
        """Anybody may call anything."""


def test_rotation_and_identities_on_the_loop_that_serves(authority: Authority, tmp_path: Path) -> None:
    """uvloop has a TLS of its own."""
    pair, camera = authority.sign("server"), authority.sign("camera", client=True)
    device = authority.sign("device", client=True, uri="spiffe://house/device")
    newer = Authority(tmp_path, "newer")
    certificates = Certificates(TlsFiles(pair.certificate, pair.key, authority.file))

    async def main() -> None:
        listener = HttpListener(HttpApp(Who(), lambda *_: None, 1000), certificates.context(HTTP))
        port = await listener.start("127.0.0.1", 0)
        for shows, name in ((camera, "camera"), (device, "spiffe://house/device")):
            answer = await call(port, "GET", "/v2", context=authority.client_context(shows))
            assert answer.json["name"] == name
        replace(pair, newer.sign("new"))
        assert certificates.refresh()
        assert (await call(port, "GET", "/v2", context=newer.client_context(camera))).status == 200
        with pytest.raises(ssl.SSLError):
            await call(port, "GET", "/v2", context=authority.client_context(camera))
        assert await listener.stop(5)

    uvloop.run(main())


class Large:
    """Answers with more than any system buffers."""

    def __init__(self) -> None:
        self.ends: list[HttpReply | None] = []

    async def answer(self, incoming: Incoming) -> HttpReply:
        return HttpReply(200, (), (bytes(50_000_000),))

    def ended(self, incoming: Incoming | None, reply: HttpReply | None) -> None:
        self.ends.append(reply)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_an_answer_over_tls_that_nobody_reads_ends_the_connection(
    authority: Authority, runner: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = authority.sign("server")
    monkeypatch.setattr(stream, "IDLE_SECONDS", 0.2)
    app = Large()

    async def main() -> None:
        listener = HttpListener(app, Certificates(TlsFiles(pair.certificate, pair.key, None)).context(HTTP))
        port = await listener.start("127.0.0.1", 0)

        def connect() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", port))
            client = authority.client_context().wrap_socket(plain, server_hostname="127.0.0.1")
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return client

        with await asyncio.to_thread(connect):
            await _until(lambda: bool(app.ends))
        assert app.ends == [None]
        assert await listener.stop(5)

    runner(main())
