"""HTTP/1.1 as bytes, without a connection: what a head says, strictly by RFC 9112, and how long its body is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from convoynet.server.http.handlers import HttpReply, problem

HEADER_BYTES = 64 * 2**10
"""The most that the headers of one request may take."""
HEADER_COUNT = 100
"""The most headers of one request."""
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # noqa: S105  a grammar's name
_REQUEST_LINE = re.compile(rf"({_TOKEN}{{1,32}}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rf"({_TOKEN}+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_ABSOLUTE = re.compile(r"https?://([^/?#@]+)(/[^?]*)?(\?.*)?", re.IGNORECASE)
_HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[a-z0-9\-._~%!$&'()*+;=]*)(?::[0-9]*)?", re.IGNORECASE)
# A line feed without its carriage return, or the other way round, and control characters: proxies differ over them.
_NEVER = re.compile(rb"(?<!\r)\n|\r[^\n]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class Refused(Exception):
    """A request that is refused before it reaches the dispatcher; what comes behind it is not read."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.reply: HttpReply = problem(status, message)


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before the body of a request.

    Attributes:
        method: As it came; HEAD too.
        path: Still percent-encoded.
        query: The same, without its question mark.
        headers: Names in lower case; the values of those that came more than once are joined by commas.
        modern: Whether it speaks HTTP/1.1, and so understands interim answers.
        keep_alive: Whether the connection stays open after the answer.
        length: Bytes of the body; None for one in chunks.
        waits: Whether the client waits for 100 Continue before it sends the body.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    modern: bool
    keep_alive: bool
    length: int | None
    waits: bool


def is_hopeless(begun: bytes | bytearray, start: int) -> bool:
    """Whether a head that has not ended can be none, whatever follows; what stands before `start` was looked at."""
    return _NEVER.search(begun, max(0, start - 1)) is not None


def head_from_bytes(data: bytes | bytearray) -> Head:
    """The head of a request, with the empty line that ends it.

    Raises:
        Refused: It is not what RFC 9112 says, or its body could be read in two ways.
    """
    first, *lines = data.decode("latin-1").removeprefix("\r\n").removesuffix("\r\n\r\n").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise Refused(400, f"not a request of HTTP/1.1: {_shown(first)}")
    method, target, major, minor = line.groups()
    if major != "1":
        raise Refused(505, f"this port speaks HTTP/1.1, not HTTP/{major}")
    if len(lines) > HEADER_COUNT:
        raise Refused(431, f"the request has {len(lines)} headers, {HEADER_COUNT} are allowed")
    headers: dict[str, str] = {}
    for each in lines:
        field = _FIELD.fullmatch(each)
        if field is None:
            raise Refused(400, f"not a header of the form NAME: VALUE on one line: {_shown(each)}")
        name, value = field[1].lower(), field[2].rstrip(" \t")
        headers[name] = value if name not in headers else f"{headers[name]}, {value}"
    modern = minor != "0"
    path, query = _path_and_query(method, target, headers)
    _check_host(headers, modern)
    length = _length(headers, modern)
    options = headers.get("connection", "").lower()
    named = {option.strip() for option in options.split(",")} if options else ()
    keep_alive = "close" not in named and (modern or "keep-alive" in named)
    expected = headers.get("expect", "").lower()
    if expected and expected != "100-continue":
        raise Refused(417, f"'Expect' may be 100-continue alone, got {_shown(expected)}")
    return Head(method, path, query, headers, modern, keep_alive, length, modern and bool(expected) and length != 0)


def _path_and_query(method: str, target: str, headers: dict[str, str]) -> tuple[str, str]:
    """Both as they came; the name of a server in the target takes the place of the header's."""
    if not target.startswith("/") and (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        headers["host"] = absolute[1]
        target = (absolute[2] or "/") + (absolute[3] or "")
    elif not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        raise Refused(400, f"the target of a request is a path from '/' on, got {_shown(target)}")
    if "#" in target:
        raise Refused(400, f"the target of a request has no fragment ('#...'), got {_shown(target)}")
    if not target.isascii():
        try:
            target = target.encode("latin-1").decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(400, "the target of the request holds bytes that are not UTF-8") from None
    path, _, query = target.partition("?")
    return path, query


def _check_host(headers: dict[str, str], modern: bool) -> None:
    host = headers.get("host")
    if host is None:
        if modern:
            raise Refused(400, "a request of HTTP/1.1 needs the header Host")
    elif not _HOST.fullmatch(host):
        raise Refused(400, f"'Host' must be one name or address with or without a port, got {_shown(host)}")


def _length(headers: dict[str, str], modern: bool) -> int | None:
    """Bytes of the body; None for chunks. Two statements of it are refused, whether they agree or not."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or not modern:
            raise Refused(400, "'Transfer-Encoding' stands neither beside 'Content-Length' nor in HTTP/1.0")
        if coding.lower() != "chunked":
            raise Refused(501, f"'Transfer-Encoding' may be chunked alone, got {_shown(coding)}")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdecimal()):
        raise Refused(400, f"'Content-Length' must be one number of bytes, got {_shown(length)}")
    return int(length[-18:]) if not length[:-18].strip("0") else 10**18


def chunk_size(line: bytes) -> int:
    """Bytes of the chunk that this line, without its end, is before; extensions are passed over.

    Raises:
        Refused: It is no such line.
    """
    found = _CHUNK.fullmatch(line)
    if found is None:
        raise Refused(400, f"not the size of a chunk: {_shown(line.decode('latin-1'))}")
    return int(found[1], 16)


def check_trailer(line: bytes) -> None:
    """Passes over a header behind the last chunk.

    Raises:
        Refused: It is none.
    """
    if _FIELD.fullmatch(line.decode("latin-1")) is None:
        raise Refused(400, f"not a trailer of the form NAME: VALUE on one line: {_shown(line.decode('latin-1'))}")


def _shown(text: str) -> str:
    return ascii(text[:60])
