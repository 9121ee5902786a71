"""A port: who is let in, how long connections and calls may take, the end of it, and TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import grpc
import pytest
from grpc import aio

from convoynet.server.frontend.local import LocalFrontEnd, Manner
from convoynet.server.http2 import listener
from convoynet.server.http2.frames import Code
from convoynet.server.http2.listener import Limits
from convoynet.server.memory.budget import Budget
from convoynet.server.security.tls import HTTP2, Certificates, TlsFiles
from tests.server.certificates import Authority
from tests.server.conftest import code_of
from tests.server.http2.conftest import OVER_BUDGET, Echo, Port, listening, until
from tests.server.http2.test_calls import answered, data, head
from tests.server.raw_http2 import GOAWAY, PING, SERVICE, RawClient, message, settings

METHOD = f"/{SERVICE}/ModelInfer"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at connections comes soon."""
    monkeypatch.setattr(listener, "_TICK", 0.02)
    monkeypatch.setattr(listener, "_PARTING_SECONDS", 0.1)
    monkeypatch.setattr(listener, "_CLOSING_SECONDS", 0.2)


def grown_old(port: Port) -> None:
    """Every connection reaches its age now."""
    for connection in port.connections:
        port.listener._connections[connection] = connection.loop.time()


async def gone(client: RawClient) -> None:
    async with asyncio.timeout(60):
        await client.end()


@pytest.mark.parametrize("hello", [b"", b"PRI * HTTP/2.0\r\n\r\nSM"])
async def test_who_does_not_say_hello_is_cut_off(port: Port, monkeypatch: pytest.MonkeyPatch, hello: bytes) -> None:
    client = await port.client()
    assert await client.alive()
    monkeypatch.setattr(listener, "GREETING_SECONDS", 0.1)
    await gone(await port.client(hello=hello))
    assert await client.alive()
    client.close()


async def test_clients_are_asked_whether_they_are_there() -> None:
    async with listening(limits=Limits(keepalive=0.05, keepalive_timeout=3600.0)) as port:
        silent = await port.client()
        await until(lambda: port.connections and port.connections[0].pinged)
        client = await port.client()
        for _ in range(3):
            assert await client.until(PING) == bytes(8)
        port.connections[0].pinged -= 3600.0
        await until(lambda: len(port.connections) == 1)  # who does not answer is cut off
        assert await silent.end() is None
        assert await client.until(PING) == bytes(8)
        client.close()


async def test_clients_without_calls_are_not_asked_where_that_is_not_wanted() -> None:
    async with listening(limits=Limits(keepalive=0.02, keepalive_timeout=3600.0, permit_without_calls=False)) as port:
        idle, busy = await port.client(), await port.client()
        busy.send(head())
        assert await busy.until(PING) == bytes(8)
        assert await idle.alive()
        assert not [found for found in idle.received.frames if found[:2] == (PING, 0)]
        idle.close()
        busy.close()


async def test_old_connections_end_with_their_calls_answered() -> None:
    async with listening(limits=Limits(age=3600.0)) as port:
        client, idle = await port.client(), await port.client()
        client.send(head() + data(message(b"wait")))
        await until(lambda: port.echo.running)
        grown_old(port)
        assert await idle.end() == (0, 0, "max_age")
        await client.until(GOAWAY)
        port.echo.go.set()
        answered(await client.answer(), b"wait")
        assert await client.end() == (1, 0, "max_age")


async def test_calls_that_outlast_the_grace_of_their_connection_are_cut_off() -> None:
    async with listening(limits=Limits(age=3600.0, age_grace=0.05)) as port:
        client = await port.client()
        client.send(head() + data(message(b"wait")))
        await until(lambda: port.echo.running)
        grown_old(port)
        # A busy machine may see both ages at once, or the second before the client has said that it heard the first.
        assert await client.end() in ((1, 0, "max_age"), (2**31 - 1, 0, "max_age"), None)
        assert not client.received.answers[1].over
        assert await port.settled(1) == [("ModelInfer", "CANCELLED")]


async def test_the_one_that_was_idle_longest_makes_room(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 3)
    busy = await port.client()
    busy.send(head() + data(message(b"wait")))
    used = await port.client()
    used.send(head() + data(message(b"x")))
    await used.answer()
    idle = await port.client()
    await idle.alive()
    new = await port.client()
    ended = await idle.end()
    assert ended is not None
    assert ended[1] == Code.ENHANCE_YOUR_CALM
    assert await new.alive()
    new.send(head() + data(message(b"wait")))
    await new.alive()
    newer = await port.client()
    assert (await used.end() or ())[1:2] == (Code.ENHANCE_YOUR_CALM,)
    newer.send(head() + data(message(b"wait")))
    await until(lambda: port.echo.running == 3)
    last = await port.client()
    assert (await last.end() or ())[1:2] == (Code.ENHANCE_YOUR_CALM,), "nobody is idle"
    port.echo.go.set()
    for client in (busy, new, newer):
        answered(await client.answer(), b"wait")
        client.close()


async def test_nothing_waits_to_be_sent_together_with_more(port: Port) -> None:
    client = await port.client()
    await client.alive()
    sending = port.connections[0].transport.get_extra_info("socket")
    assert sending.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    client.close()


# Time.


@pytest.mark.parametrize(
    ("rpc", "sent", "told"),
    [
        ("ModelInfer", b"", "4"),
        ("ModelInfer", b"\0\0", "4"),
        ("ModelInfer", message(b"wait"), "4"),
        ("ModelStreamInfer", b"", "4"),
        ("ModelStreamInfer", message(b"wait"), "4"),
        ("ModelStreamInfer", message(b"large 1000"), ""),
    ],
)
async def test_calls_end_with_their_deadlines(
    port: Port, monkeypatch: pytest.MonkeyPatch, rpc: str, sent: bytes, told: str
) -> None:
    """Whatever they wait for: their request, their answer, or their client's window."""
    monkeypatch.setattr(listener, "_LATE_SECONDS", 0.0)
    client = await port.client()
    client.send(settings(_4=100))
    client.send(head(rpc=rpc, grpc_timeout="1H") + data(sent, end=False))
    await client.alive()
    (stream,) = port.connections[0].streams.values()
    await until(lambda: port.echo.running or not sent.endswith(b"wait"))
    await until(lambda: stream.pending or told)
    stream.begun -= 3600.0
    answer = await client.answer()
    assert answer.status == told
    if not told:
        assert answer.reset == Code.CANCEL
    await port.settled()
    client.send(head(3, grpc_timeout="99999999H") + data(message(b"x"), stream=3))
    answered(await client.answer(3), b"x")
    client.close()


async def test_requests_that_do_not_come_whole_end(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "WHOLE_SECONDS", 0.1)
    client = await port.client()
    part = message(b"hello")[:-1]
    client.send(head(1) + head(3) + data(part, stream=3, end=False))
    client.send(head(5, rpc="ModelStreamInfer") + head(7, rpc="ModelStreamInfer") + data(part, stream=7, end=False))
    for stream in (1, 3, 7):
        answer = await client.answer(stream)
        assert answer.status == "4"
        assert "did not come whole" in answer.fields["grpc-message"]
    assert not client.received.answers[5].over, "the next of a stream may be waited for without end"
    client.send(data(b"", stream=5))
    assert (await client.answer(5)).status == "0"
    assert [how for _, how in await port.settled(3)] == ["DEADLINE_EXCEEDED"] * 3
    client.close()


async def test_answers_that_nobody_takes_end(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of a call that only took long: its client has the whole time from when the answer is there."""
    client = await port.client()
    client.send(settings(_4=100) + head(1) + data(message(b"wait")))
    client.send(head(3, rpc="ModelStreamInfer") + data(message(b"x"), stream=3, end=False))
    await until(lambda: port.echo.running == 2)
    (connection,) = port.connections
    for stream in connection.streams.values():
        stream.begun = stream.moved = stream.begun - 1000
    connection.heard -= 1000
    port.echo.go.set()
    answered(await client.answer(1), b"wait")
    client.send(head(5) + data(message(b"large 90000"), stream=5))
    await client.gets(100, 5)
    await asyncio.sleep(0.1)
    assert not client.received.answers[5].over
    assert port.budget.held == 90_000
    monkeypatch.setattr(listener, "READ_SECONDS", 0.05)
    assert (await client.answer(5)).reset == Code.CANCEL
    client.send(data(b"", stream=3))
    assert (await client.answer(3)).status == "0"
    await port.settled()
    client.close()


# The end.


async def test_the_end_answers_what_came_and_takes_nothing_new() -> None:
    """A client that goes on sending does not lose its answers."""
    async with listening() as port:
        client, idle = await port.client(), await port.client()
        for stream in (1, 3, 5):
            client.send(head(stream) + data(message(b"wait"), stream=stream))
        client.send(head(7))
        await until(lambda: port.echo.running == 3)
        port.calls.end()
        stopping = asyncio.create_task(port.listener.stop(3600.0))
        assert await idle.end() == (0, 0, "")
        assert (await client.answer(7)).status == "14"
        while client.received.count(GOAWAY) < 2:
            assert await client.more()
        client.send(b"".join(head(at) + data(message(bytes(2000)), stream=at) for at in range(9, 209, 2)))
        await client.alive()
        port.echo.go.set()
        client.send(b"".join(head(at) + data(message(bytes(2000)), stream=at) for at in range(209, 409, 2)))
        for stream in (1, 3, 5):
            answered(await client.answer(stream), b"wait")
        assert await client.end() == (7, 0, "")
        await stopping
        with pytest.raises(OSError, match="onnect"):
            await port.client()
        counted = sorted(how for _, how in await port.settled(4))
        assert counted == ["OK", "OK", "OK", "UNAVAILABLE"]


async def test_a_call_that_comes_as_the_server_stops_is_answered() -> None:
    """What comes after its client has heard is left for the next server: by GOAWAY, and not by a status."""
    echo = Echo(Budget(OVER_BUDGET))
    front = LocalFrontEnd(echo, Manner(), budget=echo.budget)
    client = await RawClient.connect(await front.start("127.0.0.1", 0))
    client.send(head(1) + data(message(b"wait")))
    await until(lambda: echo.running)
    stopping = asyncio.create_task(front.stop(3600.0))
    await asyncio.sleep(0)
    client.send(head(3) + data(message(b"x"), stream=3))
    await client.until(GOAWAY)
    await client.until(GOAWAY)
    client.send(head(5) + data(message(b"x"), stream=5))
    await client.alive()
    echo.go.set()
    answered(await client.answer(1), b"wait")
    answered(await client.answer(3), b"x")
    assert await client.end() == (3, 0, "")
    assert 5 not in client.received.answers
    await stopping
    assert [how for _, how in echo.counted] == ["OK", "OK"]


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
async def test_no_call_is_lost_where_a_server_stops_and_another_begins(tmp_path: Path, secured: bool) -> None:
    """Clients of grpcio that never pause see no error: what no server has looked at they send to the next."""
    authority, certificates = secure(tmp_path)
    echo = Echo(Budget(OVER_BUDGET))
    asked, going = 0, True

    async def serves() -> LocalFrontEnd:
        certified = certificates if secured else None
        front = LocalFrontEnd(echo, Manner(), budget=echo.budget, certificates=certified, shared=True)
        await front.start("127.0.0.1", number)
        return front

    async def asks(channel: aio.Channel) -> None:
        nonlocal asked
        call = channel.unary_unary(METHOD)
        while going:
            assert await call(b"x", timeout=60, wait_for_ready=True) == b"x"
            asked += 1

    async def asks_more() -> None:
        wanted = asked + 200
        await until(lambda: asked > wanted)

    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
    with socket.socket() as held:  # nobody else takes the port between two servers
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        number = held.getsockname()[1]
        front = await serves()
        if secured:
            trusted = grpc.ssl_channel_credentials(authority.file.read_bytes())
            channel = aio.secure_channel(f"127.0.0.1:{number}", trusted, options=options)
        else:
            channel = aio.insecure_channel(f"127.0.0.1:{number}", options=options)
        async with channel, asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(asks(channel))
            for _ in range(3):
                await asks_more()
                await front.stop(3600.0)
                front = await serves()
            await asks_more()
            going = False
        await front.stop(0.0)
    assert echo.counted == [("ModelInfer", "OK")] * asked


async def test_the_end_waits_for_its_limit_only() -> None:
    async with listening() as port:
        client, deaf = await port.client(), await port.client()
        client.send(head() + data(message(b"wait")))
        deaf.send(head(rpc="ModelStreamInfer"))
        await until(lambda: port.echo.running == 2)
        await port.listener.stop(0.1)
        assert not port.connections
        assert await client.end() == (1, 0, "the server is stopping")
        assert ("ModelInfer", "CANCELLED") in await port.settled(1)
        deaf.close()


async def test_ipv6_and_ipv4_on_one_port() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    async with listening(host="::") as port:
        for host in ("::1", "127.0.0.1"):
            client = await port.client(host=host)
            client.send(head() + data(message(b"x")))
            answered(await client.answer(), b"x")
            client.close()


# TLS.


def secure(folder: Path, *, mutual: bool = False) -> tuple[Authority, Certificates]:
    authority = Authority(folder)
    server = authority.sign("server")
    files = TlsFiles(server.certificate, server.key, authority.file if mutual else None)
    return authority, Certificates(files)


def trusting(authority: Authority, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the client says of protocols; a large answer comes whole; the newest certificates are shown."""
    authority, certificates = secure(tmp_path)
    async with listening(context=certificates.context(HTTP2)) as port:
        clients = []
        for protocols in (("h2",), ("http/1.1", "h2"), ("http/1.1",), ()):
            client = await port.client(context=trusting(authority, *protocols))
            client.send(settings(_4=2**20) + head() + data(message(b"large 60000")))
            answered(await client.answer(), bytes(60_000))
            clients.append(client)
        plain = await port.client()
        other = Authority(tmp_path, "other")
        renewed = other.sign("server")
        assert renewed.certificate == certificates.files.certificate
        assert certificates.refresh()
        with pytest.raises(ssl.SSLError):
            await port.client(context=trusting(authority))
        client = await port.client(context=trusting(other, "h2"))
        assert await client.alive()
        clients[0].send(head(3) + data(message(b"x"), stream=3))
        answered(await clients[0].answer(3), b"x")
        broken = await port.client(context=trusting(other, "h2"), hello=b"GET / HTTP/1.1\r\n\r\n")
        assert (await broken.end() or ())[1:2] == (Code.PROTOCOL_ERROR,)
        assert (await plain.end()) is None
        for each in (*clients, client):
            each.close()


async def test_mutual_tls_names_the_client(tmp_path: Path) -> None:
    authority, certificates = secure(tmp_path, mutual=True)
    async with listening(context=certificates.context(HTTP2)) as port:
        pair = authority.sign("alice", client=True)
        context = trusting(authority, "h2")
        context.load_cert_chain(pair.certificate, pair.key)
        client = await port.client(context=context)
        client.send(head() + data(message(b"x")))
        answered(await client.answer(), b"x")
        assert [call.identity for call in port.echo.asked] == ["alice"]
        nobody = RawClient(*await asyncio.open_connection("127.0.0.1", port.number, ssl=trusting(authority, "h2")))
        nobody.send(head())
        assert await nobody.end() is None
        client.close()


# Public clients.


@pytest.mark.parametrize(
    "compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]
)
async def test_clients_of_grpcio(port: Port, compression: grpc.Compression) -> None:
    options = [
        ("grpc.keepalive_time_ms", 10),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.lookahead_bytes", 1),
        ("grpc.http2.hpack_table_size.decoder", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_metadata_size", 65_536),
    ]
    async with aio.insecure_channel(f"127.0.0.1:{port.number}", options=options, compression=compression) as channel:
        ask = channel.unary_unary(METHOD)
        payloads = [b"", b"x", bytes(100_000), bytes(1_000_000)]
        for payload in payloads:
            assert await ask(payload, metadata=(("x-a", "y" * 5000), ("x-b-bin", b"\0")), timeout=60) == payload
        assert await asyncio.gather(*(ask(str(at).encode()) for at in range(200))) == [
            str(at).encode() for at in range(200)
        ]
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(payloads))
        assert [payload async for payload in stream] == payloads
        code, text = await code_of(ask(bytes(2**20 + 1)))
        assert (code, "Received message" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        for rpc in ("wait", "large 2000000"):
            call = ask(rpc.encode(), timeout=60)
            await asyncio.sleep(0.01)
            call.cancel()
        late = await code_of(ask(b"wait", timeout=0.05))
        assert late[0] is grpc.StatusCode.DEADLINE_EXCEEDED
