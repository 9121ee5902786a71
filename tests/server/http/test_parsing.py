"""Heads of requests as bytes: what RFC 9112 allows is read, what could be read in two ways is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoynet.server.http.parsing import HEADER_COUNT, Refused, chunk_size, head_from_bytes, is_hopeless

POST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n"


def test_a_head_is_read() -> None:
    head = head_from_bytes(
        POST + b"Content-Length: 12\r\nX-A:  b c \t\r\nx-a: d\r\nAccept:\r\nConnection: Close\r\n\r\n"
    )
    assert (head.method, head.path, head.query, head.length) == ("POST", "/v2/models/m/infer", "", 12)
    assert (head.headers["x-a"], head.headers["accept"]) == ("b c, d", "")
    assert (head.modern, head.keep_alive, head.waits) == (True, False, False)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/v2?a=b?c", "/v2", "a=b?c"),
        (b"/a%2Fb", "/a%2Fb", ""),
        (b"http://proxy:1/v2?q", "/v2", "q"),
        (b"HTTPS://proxy", "/", ""),
        (b"http://proxy?q", "/", "q"),
        (b"//v2", "//v2", ""),
        ("/v2/models/é".encode(), "/v2/models/é", ""),
    ],
)
def test_forms_of_a_target(target: bytes, path: str, query: str) -> None:
    head = head_from_bytes(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)
    assert (head.path, head.query) == (path, query)
    assert head.headers["host"] == ("x" if target.startswith(b"/") else "proxy:1" if b":1" in target else "proxy")


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Keep-Alive, Upgrade", True),
        (b"1.1", b"upgrade , close", False),
        (b"1.0", b"", False),
        (b"1.0", b"keep-alive", True),
        (b"1.2", b"", True),
    ],
)
def test_who_keeps_the_connection(version: bytes, connection: bytes, keeps: bool) -> None:
    head = head_from_bytes(b"GET / HTTP/%s\r\nHost: x\r\nConnection: %s\r\n\r\n" % (version, connection))
    assert head.keep_alive is keeps
    assert head.modern is (version != b"1.0")


def test_bodies_by_their_headers() -> None:
    for lines, length in (
        (b"", 0),
        (b"Content-Length: 0\r\n", 0),
        (b"Content-Length: 007\r\n", 7),
        (b"Content-Length: " + b"9" * 30 + b"\r\n", 10**18),
        (b"Content-Length: 18446744073709551618\r\n", 10**18),
        (b"Transfer-Encoding: chunked\r\n", None),
        (b"Transfer-Encoding: Chunked\r\n", None),
        (b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n", 5),
    ):
        assert head_from_bytes(POST + lines + b"\r\n").length == length
    assert head_from_bytes(POST + b"Expect: 100-Continue\r\nContent-Length: 1\r\n\r\n").waits


REFUSED = {
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n", 400),
    "two lengths that agree": (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n", 400),
    "a list of lengths": (POST + b"Content-Length: 2, 2\r\n\r\n", 400),
    "a length with a sign": (POST + b"Content-Length: +2\r\n\r\n", 400),
    "a negative length": (POST + b"Content-Length: -2\r\n\r\n", 400),
    "a length in hexadecimal": (POST + b"Content-Length: 0x2\r\n\r\n", 400),
    "an empty length": (POST + b"Content-Length:\r\n\r\n", 400),
    "a length with an underscore": (POST + b"Content-Length: 1_0\r\n\r\n", 400),
    "a length in other digits": (POST + b"Content-Length: \xb2\r\n\r\n", 400),
    "length and chunks": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "chunks in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "two codings": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 501),
    "chunked twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 501),
    "another coding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    "gzip below chunks": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "a coding with a vertical tab": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "a space before the colon": (POST + b"Content-Length : 2\r\n\r\n", 400),
    "no colon": (POST + b"Content-Length\r\n\r\n", 400),
    "no name": (POST + b": 2\r\n\r\n", 400),
    "a folded line": (POST + b"X: a\r\n Content-Length: 2\r\n\r\n", 400),
    "a folded first line": (b"GET / HTTP/1.1\r\n X: a\r\nHost: x\r\n\r\n", 400),
    "a bare line feed": (POST + b"X: a\nContent-Length: 2\r\n\r\n", 400),
    "a bare carriage return": (POST + b"X: a\rContent-Length: 2\r\n\r\n", 400),
    "a null in a value": (POST + b"X: a\0b\r\n\r\n", 400),
    "bytes above ASCII in a name": (POST + b"X\xff: a\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a host with a path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "a host with a user": (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "a version of three parts": (b"GET / HTTP/1.1.1\r\nHost: x\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a space in the target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a target without its slash": (b"GET v2 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a fragment": (b"GET /v2#a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "another scheme": (b"GET ftp://a/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a user in the target": (b"GET http://u@a/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a tunnel": (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "bytes that are not UTF-8": (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a query that is not UTF-8": (b"GET /v2?\xc3 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "another expectation": (POST + b"Expect: 200-ok\r\n\r\n", 417),
    "too many headers": (POST + b"X: a\r\n" * HEADER_COUNT + b"\r\n", 431),
    "nothing": (b"\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(case: str) -> None:
    data, status = REFUSED[case]
    with pytest.raises(Refused) as caught:
        head_from_bytes(data)
    assert caught.value.reply.status == status


@pytest.mark.parametrize(
    ("data", "hopeless"),
    [
        (b"GET / HTTP/1.1\r\nHost: x", False),
        (b"GET / HTTP/1.1\r", False),
        (b"GET / HTTP/1.1\n", True),
        (b"\n", True),
        (b"GET / HTTP/1.1\rX", True),
        (b"\x16\x03\x01\x02\x00", True),
        (b"X: a\tb", False),
    ],
)
def test_a_head_that_can_be_none_is_known_before_its_end(data: bytes, hopeless: bool) -> None:
    assert is_hopeless(data, 0) is hopeless
    looked = [is_hopeless(data[: end + 1], end) for end in range(len(data))]
    assert any(looked) is hopeless


@pytest.mark.parametrize("line", [b"", b"-1", b"+1", b"0x1", b"g", b" 1", b"1;a\nb", b"1 2", b"F" * 16, b"1,1"])
def test_wrong_sizes_of_chunks_are_refused(line: bytes) -> None:
    with pytest.raises(Refused):
        chunk_size(line)


def test_sizes_of_chunks() -> None:
    assert [chunk_size(line) for line in (b"0", b"00", b"fF", b"a ;x", b'1;a="b"')] == [0, 0, 255, 10, 1]


@given(st.lists(st.sampled_from([b"GET", b" ", b"/", b" HTTP/1.1", b"\r\n", b"\n", b":", b"Host: x", b"\0", b"\xff"])))
def test_any_bytes_are_a_head_or_refused(parts: list[bytes]) -> None:
    with contextlib.suppress(Refused):
        assert head_from_bytes(b"".join(parts) + b"\r\n\r\n").path.startswith("/")
