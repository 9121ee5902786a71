"""The headers of calls: HPACK (RFC 7541) to what a call is, and how a call ended to HPACK.

gRPC over HTTP/2: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hpack import Decoder
from hpack.exceptions import HPACKError
from hpack.table import HeaderTable

from convoynet.server.http2.frames import Broken, Code

MOST_METADATA = 64 * 2**10
"""Bytes of metadata of one call, names and values and 32 for each pair; more is refused."""
MOST_DECODED = 4 * MOST_METADATA
"""More than that, as it comes or as it is meant, is not even read: the connection ends."""
MOST_MESSAGE = 4096
"""Bytes of a text that says why a call failed, as it is sent: clients take no more than some KB of trailers."""
_KNOWN, _KNOWN_BYTES = 64, 1024
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile("([0-9]{1,8})([HMSmun])")
_OWN = ("te", "content-type", "grpc-encoding", "grpc-accept-encoding", "grpc-timeout")
_PSEUDO = (b":method", b":scheme", b":path", b":authority")
_NAME = re.compile(rb"[!-9;-@\[-~]+")
_VALUE = re.compile(rb"[^\0\r\n]*")
_OF_CONNECTIONS = (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
_CUT = "..."
_GRPC = re.compile(r"application/grpc([+;].*)?", re.IGNORECASE)
_PLAIN = re.compile("[^ -$&-~]")
_BEFORE_CONTINUED = 127


@dataclass(frozen=True, slots=True)
class Head:
    """What the headers of a call say.

    Attributes:
        path: Of the method.
        metadata: Names in lower case with their values; none that are binary, which nothing in the server reads.
        timeout: Seconds that the client gives the call; None for no end.
        encoding: How its messages are compressed where they say that they are.
        status: Of HTTP: 200, or why it is no call of gRPC.
        size: Bytes of it, as MOST_METADATA counts them.
    """

    path: str
    metadata: tuple[tuple[str, str], ...]
    timeout: float | None
    encoding: str
    status: int
    size: int


class Malformed(Exception):
    """Headers that HTTP/2 does not allow: they end their stream."""


class _Table(HeaderTable):
    """The client's table, which tells whether it has changed."""

    changed = False

    def add(self, name: bytes, value: bytes) -> None:
        self.changed = True
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return int(self._maxsize)

    @maxsize.setter
    def maxsize(self, size: int) -> None:
        self.changed = True
        HeaderTable.maxsize.__set__(self, size)  # type: ignore[attr-defined]


class Heads:
    """Reads the headers of one connection.

    Most calls of a client say the same as the one before, in the same bytes. As long as the client's table does not
    change, equal bytes mean the same, and are not read again.
    """

    def __init__(self) -> None:
        self._decoder = Decoder(MOST_DECODED)
        self._table = self._decoder.header_table = _Table()
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """What a block of headers says.

        Raises:
            Broken: It cannot be read, nor can any after it.
            Malformed: It can, and is none that HTTP/2 allows.
        """
        if (head := self._known.get(block)) is not None:
            return head
        self._table.changed = False
        try:
            fields = list(self._decoder.decode(block, raw=True))
        except (HPACKError, IndexError, ValueError) as error:
            raise Broken(Code.COMPRESSION_ERROR, f"headers cannot be read: {error}") from None
        finally:
            if self._table.changed or len(self._known) >= _KNOWN:
                self._known.clear()
        head = _head(fields)
        if not self._table.changed and len(block) <= _KNOWN_BYTES:
            self._known[block] = head
        return head

    def skip(self, block: bytes) -> None:
        """Reads trailers, of which only the client's table matters; raises Broken."""
        try:
            self.read(block)
        except Malformed:
            return


def _head(fields: Iterable[tuple[bytes, bytes]]) -> Head:
    pseudo: dict[bytes, bytes] = {}
    own: dict[str, str] = {}
    metadata: list[tuple[str, str]] = []
    size, regular = 0, False
    for name, value in fields:
        size += len(name) + len(value) + 32
        if _VALUE.fullmatch(value) is None:
            raise Malformed
        if name.startswith(b":"):
            if name in pseudo or name not in _PSEUDO or regular:
                raise Malformed
            pseudo[name] = value
            continue
        regular = True
        if _NAME.fullmatch(name) is None or name in _OF_CONNECTIONS or (name == b"te" and value != b"trailers"):
            raise Malformed
        key, text = name.decode("utf-8", "replace"), value.decode("utf-8", "replace")
        if key in _OWN:
            own[key] = text
        elif not key.endswith("-bin"):
            metadata.append((key, text))
    method = pseudo.get(b":method")
    if method is None or (method != b"CONNECT" and not (pseudo.get(b":path") and b":scheme" in pseudo)):
        raise Malformed
    path = pseudo.get(b":path", b"").decode("utf-8", "replace")
    return Head(path, tuple(metadata), _timeout(own), own.get("grpc-encoding", ""), _status(method, own), size)


def _status(method: bytes, own: dict[str, str]) -> int:
    if method != b"POST":
        return 405
    return 415 if _GRPC.fullmatch(own.get("content-type", "")) is None else 200


def _timeout(own: dict[str, str]) -> float | None:
    found = _TIMEOUT.fullmatch(own.get("grpc-timeout", ""))
    return None if found is None else int(found[1]) * _SECONDS[found[2]]


def _text(text: bytes) -> bytes:
    """A string of HPACK as it is (section 5.2)."""
    size = len(text)
    if size < _BEFORE_CONTINUED:
        return bytes([size]) + text
    size -= _BEFORE_CONTINUED
    written = bytearray([_BEFORE_CONTINUED])
    while size >= 128:
        written.append(size % 128 + 128)
        size //= 128
    written.append(size)
    return bytes(written) + text


def _field(name: str, value: str) -> bytes:
    """A pair that goes into nobody's table (section 6.2.2)."""
    return b"\0" + _text(name.encode()) + _text(value.encode())


NO_TABLE = b"\x20"
"""Before the next headers where the client has made its table smaller (RFC 7541, 4.2): nobody here ever uses it."""
_OK = b"\x88"  # :status 200, of the static table
RESPONSE = _OK + _field("content-type", "application/grpc") + _field("grpc-accept-encoding", "identity,deflate,gzip")
"""Before the first message of an answer."""
GOOD = _field("grpc-status", "0")
"""After the last one."""


def trailers(code: int, text: str, more: Iterable[tuple[str, str]] = (), *, alone: bool) -> bytes:
    """How a call ended.

    Args:
        code: Its status.
        text: Why; its end is left out where that is long.
        more: What goes with it.
        alone: Whether nothing was sent before.
    """
    fields = [_field("grpc-status", str(code))]
    if text:
        fields.append(_field("grpc-message", _message(text)))
    fields += [_field(name, value) for name, value in more]
    return (RESPONSE if alone else b"") + b"".join(fields)


def _message(text: str) -> str:
    """A text as it is sent, of MOST_MESSAGE bytes at most."""
    if len(text) <= MOST_MESSAGE and len(sent := _PLAIN.sub(_percent, text)) <= MOST_MESSAGE:
        return sent
    pieces, room = [], MOST_MESSAGE - len(_CUT)
    for character in text:
        pieces.append(_PLAIN.sub(_percent, character))
        room -= len(pieces[-1])
        if room < 0:
            break
    return "".join(pieces[:-1]) + _CUT


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "replace"))


def refusal(status: int) -> bytes:
    """The whole answer to what is no call of gRPC."""
    return _field(":status", str(status))
