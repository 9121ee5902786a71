"""Headers: what a block says, what none may say, and that what is known of blocks is never stale."""

from __future__ import annotations

import urllib.parse
from typing import Any

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from convoynet.server.http2 import headers
from convoynet.server.http2.frames import Broken, Code
from convoynet.server.http2.headers import Heads, Malformed
from tests.server.raw_http2 import FIELDS, block, literal

NAMES = st.sampled_from(["x-a", "x-a", "x-a", "grpc-timeout", "authorization"])
VALUES = st.one_of(st.sampled_from(["1S", "5m", "a", ""]), st.text("ab", max_size=3), st.just("y" * 1500))
BLOCKS = st.tuples(
    st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=2),
    st.sampled_from([None, None, None, 0, 40, 200, 4096]),
)


def indexed(*values: tuple[str, str]) -> bytes:
    return Encoder().encode([*FIELDS.items(), *values])


@settings(max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=16), st.lists(BLOCKS, min_size=5, max_size=5))
def test_what_is_known_of_blocks_is_never_stale(order: list[int], blocks: list[Any]) -> None:
    """The same few calls again and again, with tables of every size: as one that knows no block reads them."""
    encoder, knowing = Encoder(), Heads()
    plain = Heads()
    for which in order:
        fields, size = blocks[which]
        if size is not None:
            encoder.header_table_size = size
        # What is the same in all is in no table: so the same bytes often mean something else.
        written = encoder.encode([]) + block(FIELDS) + encoder.encode(fields, huffman=bool(which % 2))
        plain._known.clear()
        head = knowing.read(written)
        assert head == plain.read(written)
        assert [(name, value) for name, value in fields if not name.startswith("grpc")] == [
            pair for pair in head.metadata if pair[0] in ("x-a", "authorization")
        ]
        assert knowing._table.dynamic_entries == plain._table.dynamic_entries


def test_equal_bytes_mean_something_else_when_the_table_has_changed() -> None:
    heads = Heads()
    first = indexed(("x-a", "1"))
    heads.read(first)
    same = block(FIELDS) + b"\xbe"  # whatever is the newest of the table
    assert ("x-a", "1") in heads.read(same).metadata
    assert heads.read(same) is heads.read(same)
    heads.read(block(FIELDS) + b"\x40\x03x-a\x012")
    assert heads.read(same).metadata[-1] == ("x-a", "2")


def test_a_smaller_table_is_forgotten_with_what_is_known() -> None:
    heads = Heads()
    heads.read(indexed(("x-a", "1")))
    same = block(FIELDS) + b"\xbe"
    heads.read(same)
    heads.read(b"\x20" + block(FIELDS))
    with pytest.raises(Broken):
        heads.read(same)


def test_no_more_blocks_are_known_than_may_be() -> None:
    heads = Heads()
    for number in range(200):
        heads.read(block(FIELDS, x_a=str(number)))
        assert len(heads._known) <= 64
    heads.read(block(FIELDS, x_a="y" * 2000))
    assert all(len(known) <= 1024 for known in heads._known)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80",  # index 0
        b"\xff\xff\xff\xff\x0f",  # an index that there is not
        b"\xbe",  # of an empty table
        b"\x00\x05ab",  # ends early
        b"\x00\x7f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length without end
        b"\x00\x7f\xff\xff\x7f",
        b"\x00\x81\xff\x81\xff",  # Huffman: more padding than may be ...
        b"\x00\x84\xff\xff\xff\xff\x00",  # ... and its end within
        b"\x3f\xe2\x1f",  # a table of more than 4096 bytes
        b"\x82\x20",  # its size behind a header
        b"\x00",
        b"\x40",
    ],
)
def test_what_cannot_be_read_ends_the_connection(data: bytes) -> None:
    with pytest.raises(Broken) as raised:
        Heads().read(data)
    assert raised.value.code is Code.COMPRESSION_ERROR


def test_bombs_are_not_read() -> None:
    heads = Heads()
    heads.read(block(FIELDS) + b"\x40" + literal("x-a", "y" * 4000)[1:])
    with pytest.raises(Broken):
        heads.read(block(FIELDS) + b"\xbe" * 5000)
    assert len(heads._known) <= 1
    with pytest.raises(Broken):
        Heads().read(b"\x82" * 2**17)


def without(name: str) -> bytes:
    return block({each: value for each, value in FIELDS.items() if each != name})


@pytest.mark.parametrize(
    "data",
    [
        without(":method"),
        without(":path"),
        without(":scheme"),
        block({**FIELDS, ":path": ""}),
        block(FIELDS) + literal(":path", "/twice"),
        block(FIELDS) + literal(":authority", "after others"),
        literal("x-a-bin", "") + block(FIELDS),
        literal(":unknown", "") + block(FIELDS),
        literal(":status", "200") + block(FIELDS),
        *(
            block(FIELDS) + literal(name, "a")
            for name in ("X-A", "", "x a", "x\0", "x:a", "x\x7f", "\xe9", "connection", "keep-alive")
        ),
        *(block(FIELDS) + literal(name, "a") for name in ("transfer-encoding", "upgrade", "proxy-connection", "te")),
        *(block(FIELDS) + literal("x-a", value) for value in ("a\0b", "\0", "a\nb", "a\r", "\r\n")),
    ],
    ids=str,
)
def test_what_http2_does_not_allow_ends_one_call(data: bytes) -> None:
    heads = Heads()
    for _ in range(2):
        with pytest.raises(Malformed):
            heads.read(data)
    assert heads.read(block(FIELDS)).status == 200
    heads.skip(data)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({":authority": None}, 200),
        ({":scheme": "https", "te": None}, 200),
        ({"content-type": "application/grpc+proto"}, 200),
        ({"content-type": "Application/gRPC;charset=utf-8"}, 200),
        ({"content-type": "application/grpc-web"}, 415),
        ({"content-type": "application/json"}, 415),
        ({"content-type": None}, 415),
        ({":method": "GET"}, 405),
        ({":method": "post"}, 405),
        ({":method": "CONNECT", ":path": None, ":scheme": None}, 405),
    ],
)
def test_what_is_no_call_has_a_status_of_http(changes: dict[str, str | None], status: int) -> None:
    assert Heads().read(block({**FIELDS, **changes})).status == status  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1S", 1.0),
        ("0n", 0.0),
        ("99999999H", 99999999 * 3600.0),
        ("2M", 120.0),
        ("3m", 0.003),
        ("4u", 4e-6),
        ("5n", 5e-9),
        *((text, None) for text in ("", "S", "1", "1s", "-1S", "+1S", "1.5S", " 1S", "1S ", "123456789S", "\xb2S")),
    ],
)
def test_timeouts(text: str, seconds: float | None) -> None:
    assert Heads().read(block(FIELDS, grpc_timeout=text)).timeout == (seconds and pytest.approx(seconds))


def test_metadata_is_what_is_not_the_protocols_own_and_not_binary() -> None:
    head = Heads().read(block(FIELDS, x_a="1", x_b_bin="AA", user_agent="me", grpc_encoding="gzip", x_c="\xe9"))
    assert head.metadata == (("x-a", "1"), ("user-agent", "me"), ("x-c", "\N{REPLACEMENT CHARACTER}"))
    assert (head.path, head.encoding) == (FIELDS[":path"], "gzip")
    assert head.size == sum(
        32 + len(name) + len(value)
        for name, value in {**FIELDS, "x-a": "1", "x-b-bin": "AA", "user-agent": "me", "grpc-encoding": "gzip"}.items()
    ) + 32 + len("x-c") + 1  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["plain", "100 % of it", "two\nlines\r\n\0", "é\N{SNOWMAN}\N{PILE OF POO}", "%41", "~ \x7f", "a" * 126, "a" * 300],
)
def test_texts_come_as_they_were(text: str) -> None:
    fields = dict(Decoder().decode(headers.trailers(13, text, (("a", "b"),), alone=True)))
    assert fields[":status"] == "200"
    assert (fields["grpc-status"], fields["a"]) == ("13", "b")
    assert fields["grpc-message"].isascii()
    assert fields["grpc-message"].isprintable()
    assert urllib.parse.unquote(fields["grpc-message"], errors="strict") == text
    assert urllib.parse.unquote(
        dict(Decoder().decode(headers.trailers(2, "\ud800", alone=False)))["grpc-message"]
    ) == "?"  # fmt: skip


@pytest.mark.parametrize("text", ["a" * 10**6, "\N{SNOWMAN}" * 2000, "%" * 4096, "a" * 4095 + "é"])
def test_long_texts_are_cut_between_characters(text: str) -> None:
    written = headers.trailers(13, text, alone=True)
    assert len(written) < 5000
    told = urllib.parse.unquote(dict(Decoder().decode(written))["grpc-message"], errors="strict")
    assert told.endswith("...")
    assert text.startswith(told[:-3])
    assert len(told) > 400
