"""Taking the raw tensors out of a payload: what is left and what was taken make the same message, whatever comes."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.protocol import wire


def _message(names: list[str], raw: list[bytes], late: str) -> bytes:
    message = pb.ModelInferRequest(model_name="m", id="x", raw_input_contents=raw)
    for name in names:
        message.inputs.add(name=name, datatype="FP32", shape=[1, 4]).parameters["p"].int64_param = -1
    # A field after the raw ones, as clients that write the fields in an order of their own have it.
    return message.SerializeToString() + pb.ModelInferRequest(model_version=late).SerializeToString()


def _same(payload: bytes) -> bool:
    """Whether both ways of parsing agree; the scan may leave a payload to protobuf."""
    found = wire.split(payload)
    try:
        whole = pb.ModelInferRequest.FromString(payload)
    except DecodeError:
        if found is not None:
            with pytest.raises(DecodeError):
                pb.ModelInferRequest.FromString(found[0])
        return True
    if found is None:
        return True
    message = pb.ModelInferRequest.FromString(found[0])
    message.raw_input_contents.extend(map(bytes, found[1]))
    return message == whole


@given(st.lists(st.text(max_size=9), max_size=3), st.lists(st.binary(max_size=300), max_size=4), st.text(max_size=3))
def test_split_and_joined_is_the_message(names: list[str], raw: list[bytes], late: str) -> None:
    payload = _message(names, raw, late)
    found = wire.split(payload)
    assert found is not None
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


def test_a_number_that_does_not_end_is_left_to_protobuf() -> None:
    assert wire.split(b"\x3a" + b"\xff" * 12) is None
    with pytest.raises(DecodeError):
        wire.parse(b"\x3a" + b"\xff" * wire.APART_FROM)


def test_small_payloads_are_parsed_whole() -> None:
    message, raw = wire.parse(_message(["a"], [b"1"], ""))
    assert (raw, list(message.raw_input_contents)) == ((), [b"1"])


@given(st.lists(st.binary(max_size=400), max_size=4), st.text(max_size=4))
def test_an_answer_with_its_outputs_appended_is_the_same_message(raw: list[bytes], name: str) -> None:
    answer = pb.ModelInferResponse(model_name="m", id=name)
    answer.outputs.add(name="y", shape=[1])
    appended = wire.serialize(answer, [memoryview(each) for each in raw])
    streamed = wire.serialize(answer, raw, streamed=True)
    answer.raw_output_contents.extend(raw)
    assert pb.ModelInferResponse.FromString(appended) == answer
    assert pb.ModelStreamInferResponse.FromString(streamed) == pb.ModelStreamInferResponse(infer_response=answer)
