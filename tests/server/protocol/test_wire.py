"""Taking the raw tensors out of a payload: what is left and what was taken make the same message, whatever comes."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.protocol import wire


def _message(names: list[str], raw: list[bytes], late: str) -> bytes:
    message = pb.ModelInferRequest(model_name="m", id="x", raw_input_contents=raw)
    for name in names:
        message.inputs.add(name=name, datatype="FP32", shape=[1, 4]).parameters["p"].int64_param = -1
    # A field after the raw ones, as clients that write the fields in an order of their own have it.
    return message.SerializeToString() + pb.ModelInferRequest(model_version=late).SerializeToString()


def _same(payload: bytes) -> bool:
    """Whether both ways of parsing agree; the scan may refuse a payload that protobuf takes."""
    try:
        found = wire.split(payload)
    except DecodeError:
        return True
    try:
        whole = pb.ModelInferRequest.FromString(payload)
    except DecodeError:
        with pytest.raises(DecodeError):
            pb.ModelInferRequest.FromString(found[0])
        return True
    message = pb.ModelInferRequest.FromString(found[0])
    message.raw_input_contents.extend(map(bytes, found[1]))
    return message == whole


@given(st.lists(st.text(max_size=9), max_size=3), st.lists(st.binary(max_size=300), max_size=4), st.text(max_size=3))
def test_split_and_joined_is_the_message(names: list[str], raw: list[bytes], late: str) -> None:
    payload = _message(names, raw, late)
    found = wire.split(payload)
    assert [bytes(each) for each in found[1]] == raw
    assert _same(payload)


@given(st.data())
def test_damaged_payloads_are_never_read_otherwise(data: st.DataObject) -> None:
    payload = bytearray(_message(["a"], [b"12345678", b""], "1"))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    del payload[data.draw(st.integers(0, len(payload))) :]
    assert _same(bytes(payload))


@given(st.binary(max_size=60))
def test_noise_is_never_read_otherwise(noise: bytes) -> None:
    assert _same(noise)


INFER = pb.ModelInferRequest.DESCRIPTOR


@pytest.mark.parametrize(
    "payload", [b"\x3a" + b"\xff" * 12, b"\x0b\x0c", b"\x3a\x7f"], ids=["number", "group", "short"]
)
def test_what_is_not_plain_protobuf_is_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        wire.split(payload)
    with pytest.raises(DecodeError):
        wire.taken_apart(payload + payload[-1:] * wire.APART_FROM, INFER)


def test_small_payloads_are_left_whole() -> None:
    payload = _message(["a"], [b"1"], "")
    assert wire.taken_apart(payload, INFER) == (payload, ())


def _nested(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + wire.number(len(payload)) + payload


MANY = 4 * wire.FIELDS
BLOWN_UP = {
    "inputs": b"\x2a\x00" * MANY,
    "outputs": b"\x32\x00" * MANY,
    "raw tensors": b"\x3a\x00" * MANY,
    "parameters": b"\x22\x00" * MANY,
    "unknown fields": b"\x78\x01" * MANY,
    "parameters of an input": _nested(5, b"\x22\x00" * MANY),
    "texts of an input": _nested(5, _nested(5, b"\x42\x00" * MANY)),
    "dimensions one by one": _nested(5, b"\x18\x01" * MANY),
    "halves": _nested(5, b"\x22\x00" * (wire.FIELDS // 2)) + b"\x2a\x00" * (wire.FIELDS // 2),
}
"""Payloads of a few bytes a field, each of which protobuf would make an object of."""


@pytest.mark.parametrize("what", BLOWN_UP)
def test_fields_are_counted_before_they_are_objects(what: str) -> None:
    with pytest.raises(InvalidRequest, match=f"more than {wire.FIELDS} fields"):
        wire.taken_apart(BLOWN_UP[what], INFER)


@pytest.mark.parametrize("kind", [pb.RepositoryModelLoadRequest, pb.TraceSettingRequest, pb.ModelReadyRequest])
def test_so_are_those_of_other_calls(kind: Any) -> None:
    with pytest.raises(InvalidRequest, match="fields"):
        wire.taken_apart(b"\x1a\x00" * MANY, kind.DESCRIPTOR)


def test_what_is_not_raw_is_bounded() -> None:
    """Packed numbers are one field, and become eight times their bytes."""
    packed = _nested(5, _nested(5, _nested(2, bytes(wire.PLAIN_BYTES))))
    with pytest.raises(Oversize, match="send tensors as raw_input_contents"):
        wire.taken_apart(packed, INFER)
    assert wire.footprint(packed, packed) == 9 * len(packed)


def test_a_large_file_of_a_load_request_is_no_burden() -> None:
    message = pb.RepositoryModelLoadRequest(model_name="m")
    message.parameters["file:1/model.onnx"].bytes_param = bytes(2 * wire.PLAIN_BYTES)
    payload = message.SerializeToString()
    assert wire.taken_apart(payload, message.DESCRIPTOR) == (payload, ())


@given(st.lists(st.binary(max_size=400), max_size=4), st.text(max_size=4))
def test_an_answer_with_its_outputs_appended_is_the_same_message(raw: list[bytes], name: str) -> None:
    answer = pb.ModelInferResponse(model_name="m", id=name)
    answer.outputs.add(name="y", shape=[1])
    appended = wire.serialize(answer, [memoryview(each) for each in raw])
    streamed = wire.serialize(answer, raw, streamed=True)
    answer.raw_output_contents.extend(raw)
    assert pb.ModelInferResponse.FromString(appended) == answer
    assert pb.ModelStreamInferResponse.FromString(streamed) == pb.ModelStreamInferResponse(infer_response=answer)
