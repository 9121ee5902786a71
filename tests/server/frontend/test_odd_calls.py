"""Calls of a path or metadata that no client library sends: each ends alone, and the port takes calls as before."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc._cython import cygrpc

from convoynet.server.frontend import grpcio_server, messages
from convoynet.server.types import Call
from tests.server.conftest import Running, Serving, code_of, fake_model, infer_request, sums
from tests.server.frontend.test_long_lived import STACKS
from tests.server.raw_http2 import RawClient

ODD_PATHS = ["Mod\xe9", "\xff", "\xc3\x28", "ModelInfer\xe9", "\xed\xa0\x80"]
ODD_TEXTS = ["a\0b", "\0", "\0\0\0", "\xe9\xff", "a\nb", "\0authorization\0Bearer x"]


async def ends(running: Running, rpc: str, data: bytes, more: dict[str, str] | None = None) -> None:
    """A call of one raw client has an end: its own, or that of its connection."""
    client = await RawClient.connect(running.app.grpc_port)
    client.call(rpc, data, more=more, end=True)
    await client.answer()
    client.close()


@STACKS
async def test_odd_paths_and_metadata_end_one_call(
    serving: Serving, tmp_path: Path, stack: str, frontends: str
) -> None:
    fake_model(tmp_path)
    payload = infer_request(1).SerializeToString()
    message = struct.pack(">BI", 0, len(payload)) + payload
    async with serving(grpc_stack=stack, frontends=frontends) as running:
        front = running.app._listeners._grpc[0]
        before = getattr(front, "pids", [])
        assert sums(await running.stub.ModelInfer(infer_request(2))) == [2]
        for path in ODD_PATHS:
            await ends(running, path, message)
        for text in ODD_TEXTS:
            await ends(running, "ModelInfer", message, {"x-odd": text})
            await ends(running, "Nothing", b"", {"x-odd": text})
        assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]
        assert getattr(front, "pids", []) == before


@pytest.mark.parametrize("stack", ["native", "grpcio"])
async def test_unknown_methods_are_counted_whatever_their_path(serving: Serving, tmp_path: Path, stack: str) -> None:
    fake_model(tmp_path)
    async with serving(grpc_stack=stack) as running:
        for path in ODD_PATHS:
            await ends(running, path, b"")
        code, text = await code_of(running.channel.unary_unary("/no.Such/Method")(b""))
        assert (code, text) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        labels = {"model": "", "version": "", "protocol": "grpc", "code": "UNIMPLEMENTED"}
        assert running.metric("convoy_requests_total", **labels) == len(ODD_PATHS) + 1


@pytest.mark.parametrize("error", [TypeError("other arguments"), AttributeError("no such part")])
async def test_a_grpcio_of_other_inner_parts_serves_all_the_same(
    serving: Serving,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def refuse(*_: object) -> aio.Server:
        raise error

    monkeypatch.setattr(grpcio_server, "_Server", refuse)
    fake_model(tmp_path)
    async with serving(grpc_stack="grpcio") as running:
        assert sums(await running.stub.ModelInfer(infer_request(2))) == [2]
        code, text = await code_of(running.channel.unary_unary("/no.Such/Method")(b""))
        assert (code, text) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert f"is not known here, where a call of an odd path may end the server: {error}" in caplog.text


async def test_grpcio_says_nothing_of_a_client_that_has_left(
    serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_model(tmp_path)
    async with serving(grpc_stack="grpcio"):
        for error in (cygrpc.ExecuteBatchError("to one that is gone"), ValueError("of our own")):
            try:
                raise error
            except Exception:
                logging.getLogger("grpc._cython.cygrpc").exception("raised in core")
    assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info and r.exc_info[1]] == ["of our own"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_metadata_keeps_its_names_on_its_way_to_the_core(text: str) -> None:
    call = Call("grpc", metadata=(("x-odd", text), ("x-bin", b"\0"), ("last", "one")), identity="some\0one")
    rpc, there = messages.call_from_bytes(messages.call_to_bytes("ModelInfer", call))
    assert rpc == "ModelInfer"
    assert there.metadata == (("x-odd", text.replace("\0", " ")), ("last", "one"))
    assert there.identity in ("some one", "some\0one")
