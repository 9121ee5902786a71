"""One connection in virtual time: every wait for a client ends, every buffer is bounded, each request is told once."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable

import pytest

from convoynet.server.http import connection, stream
from convoynet.server.http.connection import Connection, Incoming
from convoynet.server.http.handlers import HttpReply, problem
from convoynet.server.http.parsing import Refused
from tests.server.virtual_time import VirtualTimeLoop, run

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LIMIT = 1_000_000


class Echo:
    """Answers with the body, or with `size` bytes, after `seconds`."""

    def __init__(self, seconds: float = 0, size: int = -1) -> None:
        self.seconds, self.size = seconds, size
        self.asked: list[str] = []
        self.ends: list[int | None] = []
        self.cancelled = 0

    async def answer(self, incoming: Incoming) -> HttpReply:
        self.asked.append(incoming.head.path)
        body = await incoming.read(LIMIT)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return HttpReply(200, (), (bytes(body) if self.size < 0 else bytes(self.size),))

    def ended(self, incoming: Incoming | None, reply: HttpReply | None) -> None:
        self.ends.append(None if reply is None else reply.status)


class Peer:
    """The other side of a connection, on the loop's own clock."""

    def __init__(self, served: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served, self.reader, self.writer = served, reader, writer
        self.loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def heard(self) -> bytes:
        """All that comes until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    async def one(self) -> bytes:
        """One answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head)
        return head + await self.reader.readexactly(int(found[1]) if found else 0)


def with_peer(app: Echo, script: Callable[[Peer], Awaitable[None]]) -> None:
    """Runs a client's script against a connection over a pair of sockets, whose bytes are there at once."""
    loop = VirtualTimeLoop()

    async def main() -> None:
        ours, theirs = socket.socketpair()
        lost = loop.create_future()
        _, served = await loop.connect_accepted_socket(
            lambda: Connection(app, lambda _: True, lambda _: lost.done() or lost.set_result(None)), ours
        )
        reader, writer = await asyncio.open_connection(sock=theirs, limit=2**16)
        try:
            await script(Peer(served, reader, writer))
        finally:
            writer.transport.abort()
            await asyncio.wait_for(lost, 200)

    run(main(), loop)


def statuses(data: bytes) -> list[int]:
    """Those of every answer, interim ones too."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", data)]


def test_a_client_that_says_nothing_is_let_go_and_not_counted() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        assert await peer.heard() == b""
        assert peer.loop.time() == pytest.approx(connection.HEADER_SECONDS, abs=1)

    with_peer(app, script)
    assert app.ends == []


def test_headers_take_so_long_however_they_drip() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        heard = asyncio.ensure_future(peer.heard())
        await asyncio.sleep(20)
        for byte in GET[:-2]:
            if peer.writer.is_closing() or heard.done():
                break
            await peer.send(bytes([byte]))
            await asyncio.sleep(5)
        assert statuses(await heard) == [408]
        assert peer.loop.time() < 20 + connection.HEADER_SECONDS + 3 * stream.LINGER_SECONDS

    with_peer(app, script)
    assert (app.asked, app.ends) == ([], [408])


def test_idle_connections_end() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        for _ in range(3):
            await peer.send(GET)
            assert statuses(await peer.one()) == [200]
            await asyncio.sleep(connection.KEEP_ALIVE_SECONDS - 1)
        assert await peer.heard() == b""
        assert peer.loop.time() == pytest.approx(3 * connection.KEEP_ALIVE_SECONDS, abs=5)

    with_peer(app, script)
    assert app.ends == [200] * 3


@pytest.mark.parametrize(
    ("bytes_a_part", "pause", "status"),
    [(1000, 31, 408), (1, 9, 408), (10_000, 9, 408), (50_000, 9, 200), (100_000, 20, 200)],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_comes_steadily_or_not_at_all(bytes_a_part: int, pause: float, status: int, chunked: bool) -> None:
    app = Echo(size=0)
    size = 500_000

    async def script(peer: Peer) -> None:
        await peer.send(CHUNKED if chunked else POST + b"Content-Length: %d\r\n\r\n" % size)
        heard = asyncio.ensure_future(peer.heard())
        for _ in range(0, size, bytes_a_part):
            part = bytes(bytes_a_part)
            try:
                await peer.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
            except ConnectionError:
                break
            await asyncio.sleep(pause)
            if heard.done() or peer.served.transport.is_closing():
                break
        else:
            await peer.send(b"0\r\n\r\n" if chunked else b"")
        peer.writer.write_eof()
        assert statuses(await heard) == [status]

    with_peer(app, script)
    assert app.ends == [status]


def test_an_answer_that_nobody_reads_ends_the_connection() -> None:
    app = Echo(size=4_000_000)

    async def script(peer: Peer) -> None:
        await peer.send(GET)
        await asyncio.sleep(3 * stream.IDLE_SECONDS)
        assert peer.served.transport.is_closing()

    with_peer(app, script)
    assert app.ends == [None]


@pytest.mark.parametrize(("bytes_a_second", "status"), [(20_000, 200), (1000, None)])
def test_an_answer_is_read_steadily_or_not_at_all(bytes_a_second: int, status: int | None) -> None:
    app = Echo(size=1_000_000)

    async def script(peer: Peer) -> None:
        await peer.send(GET)
        read = 0
        while read < 1_000_000 and not peer.served.transport.is_closing():
            read += len(await peer.reader.read(bytes_a_second))
            await asyncio.sleep(1)
        assert (read >= 1_000_000) is (status == 200)

    with_peer(app, script)
    assert app.ends == [status]


def test_a_refused_client_may_finish_and_then_reads_why() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        body = bytes(8 * LIMIT)
        await peer.send(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        await peer.send(body)
        assert statuses(await peer.heard()) == [413]

    with_peer(app, script)
    assert app.ends == [413]


def test_a_refused_client_does_not_go_on_for_ever() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        await peer.send(POST + b"Content-Length: 99999999999\r\n\r\n")
        try:
            while not peer.served.transport.is_closing():
                await peer.send(bytes(1000))
                await asyncio.sleep(1)
        except ConnectionError:
            pass
        assert peer.loop.time() <= stream.LINGER_SECONDS + 3

    with_peer(app, script)
    assert app.ends == [413]


def test_a_client_that_only_sends_no_more_gets_its_answer() -> None:
    app = Echo(seconds=20)

    async def script(peer: Peer) -> None:
        await peer.send(POST + b"Content-Length: 2\r\n\r\nab")
        peer.writer.write_eof()
        heard = await peer.heard()
        assert statuses(heard)[-1] == 200
        assert set(statuses(heard)[:-1]) == {100}
        assert heard.endswith(b"connection: close\r\n\r\nab")

    with_peer(app, script)
    assert (app.ends, app.cancelled) == ([200], 0)


def test_a_quick_answer_to_a_half_closed_connection_has_nothing_before_it() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(GET * 3)
        peer.writer.write_eof()
        assert statuses(await peer.heard()) == [200] * 3

    with_peer(Echo(), script)


@pytest.mark.parametrize("size", [0, 100, 70_000, 999_999])
@pytest.mark.parametrize("more", [b"", b"GET / HT"])
def test_a_client_that_hangs_up_cancels_its_request_whatever_it_sent(size: int, more: bytes) -> None:
    app = Echo(seconds=1000)

    async def script(peer: Peer) -> None:
        await peer.send(POST + b"Content-Length: %d\r\n\r\n" % size + bytes(size) + more)
        while not app.asked or peer.served.waits_since is not None:
            await asyncio.sleep(0.01)
        peer.writer.close()
        before = peer.loop.time()
        while not app.cancelled:
            await asyncio.sleep(0.01)
        assert peer.loop.time() < before + 2

    with_peer(app, script)
    assert (app.ends, app.cancelled) == ([None], 1)


def test_a_client_that_hangs_up_within_a_body_is_counted_once() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        await peer.send(POST + b"Content-Length: 10\r\n\r\nab")
        while not app.asked:
            await asyncio.sleep(0.01)
        peer.writer.transport.abort()
        while not app.ends:
            await asyncio.sleep(0.01)

    with_peer(app, script)
    assert app.ends in ([400], [None])


ENDLESS = {
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n" * 1000),
    "one trailer": (CHUNKED + b"0\r\nx: ", b"v" * 5000),
    "extensions": (CHUNKED + b"1", b";a=b" * 1000),
    "tiny chunks with extensions": (CHUNKED, (b"1;" + b"a" * 100 + b"\r\nx\r\n") * 50),
    "a size": (CHUNKED, b"0" * 5000),
    "headers": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 1000),
    "one header": (b"GET / HTTP/1.1\r\nHost: ", b"v" * 5000),
    "a first line": (b"GET /", b"v" * 5000),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_refused_and_never_held(what: str) -> None:
    start, more = ENDLESS[what]
    app = Echo()
    held = 0

    async def script(peer: Peer) -> None:
        nonlocal held
        await peer.send(start)
        for _ in range(400):
            try:
                await peer.send(more)
            except ConnectionError:
                break
            held = max(held, len(peer.served.buffer))
            await asyncio.sleep(0)
        peer.writer.write_eof()
        assert statuses(await peer.heard())[0] in (400, 414, 431)

    with_peer(app, script)
    assert held < 2 * connection.HEADER_BYTES + 300_000
    assert len(app.ends) == 1


def test_chunks_of_any_size_are_a_body() -> None:
    async def script(peer: Peer) -> None:
        for size in (1, 7, 1000, 65_536, 400_000):
            parts = [bytes([65 + i]) * size for i in range(3)]
            data = b"".join(b"%X;x=y\r\n%s\r\n" % (len(part), part) for part in parts)
            if 3 * size > LIMIT:
                continue
            await peer.send(CHUNKED + data + b"0\r\nTrailer: t\r\n\r\n")
            assert (await peer.one()).endswith(b"\r\n\r\n" + b"".join(parts))

    with_peer(Echo(), script)


@pytest.mark.parametrize(
    "body",
    [
        b"2\r\nabc\r\n0\r\n\r\n",
        b"4\r\nab\r\n0\r\n\r\n",
        b"2\nab\n0\n\n",
        b"2\r\nab\r\n0\r\n: x\r\n\r\n",
        b"-2\r\nab\r\n0\r\n\r\n",
        b"2\r\nab",
    ],
)
def test_broken_chunks_are_refused_and_nothing_behind_them_is_a_request(body: bytes) -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        await peer.send(CHUNKED + body + GET * (not body.endswith(b"ab")))
        peer.writer.write_eof()
        assert statuses(await peer.heard()) == [400]

    with_peer(app, script)
    assert (app.asked, app.ends) == (["/"], [400])


def test_requests_that_wait_their_turn_take_no_more_than_so_much() -> None:
    app = Echo(seconds=10)
    held = 0

    async def script(peer: Peer) -> None:
        nonlocal held
        sending = asyncio.ensure_future(peer.send(GET * 100_000))
        for _ in range(50):
            await asyncio.sleep(0.1)
            held = max(held, len(peer.served.buffer))
        sending.cancel()

    with_peer(app, script)
    assert len(app.asked) == 1
    assert held <= 64 * 2**10 + 2 * 2**18  # the loop reads 256 KiB at a time


def test_an_offer_of_another_protocol_is_passed_over() -> None:
    offers = (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
              b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n")  # fmt: skip
    inner = b"POST /inner HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    app = Echo()

    async def script(peer: Peer) -> None:
        for offer in offers:
            for apart in (False, True):
                await peer.send(POST + offer + b"Content-Length: %d\r\n\r\n" % len(inner))
                if apart:
                    await asyncio.sleep(1)
                await peer.send(inner)
                assert (await peer.one()).endswith(inner)
                await peer.send(CHUNKED[:-2] + offer + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner))
                assert (await peer.one()).endswith(inner)

    with_peer(app, script)
    assert set(app.asked) == {"/"}


def test_a_client_that_waits_to_be_told_to_send_is_told() -> None:
    app = Echo()

    async def script(peer: Peer) -> None:
        await peer.send(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await peer.reader.readuntil(b"\r\n\r\n") == stream.CONTINUE
        await peer.send(b"ab")
        assert (await peer.one()).endswith(b"ab")
        await peer.send(POST + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n")
        assert statuses(await peer.heard()) == [413]

    with_peer(app, script)
    assert app.ends == [200, 413]


def test_a_port_that_stops_answers_what_it_has_and_refuses_what_has_not_come() -> None:
    for sent, expected in (
        (b"", []),
        (GET, [200]),
        (GET[:10], [503]),
        (POST + b"Content-Length: 2\r\n\r\na", [503]),
    ):
        app = Echo(seconds=5)

        async def script(peer: Peer, sent: bytes = sent, expected: list[int] = expected) -> None:
            await peer.send(sent)
            await asyncio.sleep(1)
            peer.served.end("the server is stopping")
            heard = await peer.heard()
            assert statuses(heard) == expected
            assert (b"connection: close" in heard) is bool(expected)

        with_peer(app, script)
        assert app.ends == expected


def test_what_is_held_is_counted_and_given_back() -> None:
    class Account:
        held = most = 0

        def take(self, count: int, whole: int) -> None:
            if self.held + count > 1000:
                raise Refused(503, "too much at once")
            self.held += count
            self.most = max(self.most, self.held)

        def give(self, count: int) -> None:
            self.held -= count

    account = Account()

    class Budgeted(Echo):
        pass

    app = Budgeted()

    async def script(peer: Peer) -> None:
        peer.served._budget = account  # type: ignore[assignment]
        for size, status in ((400, 200), (600, 503), (2000, 503)):
            await peer.send(POST + b"Content-Length: %d\r\n\r\n" % size + bytes(size))
            assert statuses(await peer.one()) == [status]
            assert account.held == 0
        assert account.most == 800

    with_peer(app, script)


def test_a_bug_is_500_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Echo):
        async def answer(self, incoming: Incoming) -> HttpReply:
            raise KeyError("a bug")

    app = Broken()

    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.send(GET)
            assert statuses(await peer.one()) == [500]

    with_peer(app, script)
    assert "a bug in the server" in caplog.text
    assert app.ends == [500] * 2


def test_answers_say_what_the_client_must_know() -> None:
    class Refusing(Echo):
        async def answer(self, incoming: Incoming) -> HttpReply:
            return problem(404, "no")

    async def script(peer: Peer) -> None:
        # A body that was not asked for and is here is passed over.
        await peer.send(POST + b"Content-Length: 2\r\n\r\nab" + GET)
        for _ in range(2):
            assert b"connection: close" not in await peer.one()
        await peer.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"connection: keep-alive" in await peer.one()
        await peer.send(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        heard = await peer.heard()
        assert heard.startswith(b"HTTP/1.1 404 Not Found\r\n")
        assert b"content-length: 14\r\n" in heard
        assert heard.endswith(b"connection: close\r\n\r\n")

    with_peer(Refusing(), script)
