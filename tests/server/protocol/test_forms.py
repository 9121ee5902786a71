"""Requests of a form that is known are answered as those that are parsed: the same bytes, errors and counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.protocol.forms import Forms, Found
from convoynet.server.spec import BatchPolicy, EngineOptions, ModelSpec, TensorSpec
from convoynet.server.types import Call, InferRequest, InferResult, RequestedOutput, Timings
from tests.server.conftest import Running, Serving, fake_model, infer_request, sums
from tests.server.protocol.test_counting import shared_object

F32 = np.dtype(np.float32)
SPEC = ModelSpec(
    "m", "1", "fake", (TensorSpec("x", "FP32", F32, (-1,)),), (TensorSpec("y", "FP32", F32, (2,)),),
    {}, BatchPolicy(8, 0.0, 100), EngineOptions("fake", Path(), "cpu", 1), 1, (), None,
)  # fmt: skip
X = np.arange(4, dtype=np.float32).reshape(2, 2)
REQUEST = InferRequest("m", "", "", {"x": X}, {"x": "FP32"})
ANSWER = InferResult("m", "1", {"y": np.ones((2, 2), np.float32)}, Timings(), 2)


def message(**more: Any) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="m", **more)
    made.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    made.raw_input_contents.append(X.tobytes())
    return made


def learned(*payloads: bytes, request: InferRequest = REQUEST, result: InferResult = ANSWER) -> Forms:
    """Forms that have learned a request and have seen others."""
    forms = Forms()
    for payload in payloads * 2:
        call = Call("grpc")
        assert forms.find(payload, call) is None
    assert call.form
    forms.learn(call.form, dataclasses.replace(request), result, SPEC)
    return forms


def id_of(*texts: bytes) -> bytes:
    return b"".join(b"\x1a" + bytes([len(text)]) + text for text in texts)


def test_what_came_twice_is_known_with_other_pixels_and_another_id() -> None:
    forms = learned(message().SerializeToString())
    for text in ("", "7", "\u00fc" * 100):
        other = message(id=text)
        other.raw_input_contents[0] = (X + 1).tobytes()
        for payload in (other.SerializeToString(), memoryview(other.SerializeToString())):
            for _ in range(2):  # the second time by its length
                found = forms.find(payload, Call("grpc"))
                assert found is not None
                call = Call("grpc", deadline=5.0)
                request = found.form.request(found, call)
                assert (request.id, request.deadline, request.fits) == (text, 5.0, (SPEC, 2))
                np.testing.assert_array_equal(request.inputs["x"], X + 1)
                expected = pb.ModelInferResponse(model_name="m", model_version="1", id=text)
                expected.outputs.add(name="y", datatype="FP32", shape=[2, 2])
                expected.raw_output_contents.append(np.ones((2, 2), np.float32).tobytes())
                assert pb.ModelInferResponse.FromString(found.form.answer(ANSWER, found.id)) == expected


@pytest.mark.parametrize(
    "payload",
    [
        message(model_version="1").SerializeToString(),
        message(parameters={"priority": pb.InferParameter(int64_param=1)}).SerializeToString(),
        message().SerializeToString()[:-1],
        message().SerializeToString() + b"\x3a\x00",
        message().SerializeToString() + b"\x3a\x01",
        message().SerializeToString() + b"\x1a\x01\xff",
        message().SerializeToString() + b"\x3a",
        message().SerializeToString() + id_of(b"\xff", b"2"),
        id_of(b"1") + message().SerializeToString() + id_of(b"2"),
        message().SerializeToString() + b"\x08\x01",
        message().SerializeToString() + b"\x3a" + b"\xff" * 9 + b"\x01",
        message().SerializeToString().replace(b"FP32", b"FP16"),
        b"",
        b"\xff" * 100,
    ],
)
def test_whatever_else_differs_is_parsed(payload: bytes) -> None:
    assert learned(message().SerializeToString()).find(payload, Call("grpc")) is None


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_request_with_other_bytes_is_never_taken_for_one_that_is_known(data: st.DataObject) -> None:
    """What is found says of a payload what protobuf says."""
    whole = message(id=data.draw(st.sampled_from(["", "abc"]))).SerializeToString()
    at = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 3))
    payload = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + cut :]
    found = learned(message().SerializeToString()).find(payload, Call("grpc"))
    if found is not None:
        parsed = pb.ModelInferRequest.FromString(payload)
        assert found.id == parsed.id
        assert [bytes(raw) for raw in found.raw] == list(parsed.raw_input_contents)
        del parsed.raw_input_contents[:]
        parsed.id = ""
        known = message()
        del known.raw_input_contents[:]
        assert parsed == known


@pytest.mark.parametrize(
    ("request_", "spec"),
    [
        (dataclasses.replace(REQUEST, stage_times=True), SPEC),
        (dataclasses.replace(REQUEST, outputs=[RequestedOutput("y", classes=1)]), SPEC),
        (dataclasses.replace(REQUEST, outputs=[RequestedOutput("y", place=object())]), SPEC),  # type: ignore[arg-type]
        (dataclasses.replace(REQUEST, datatypes={"x": "BYTES"}), SPEC),
        (dataclasses.replace(REQUEST, inputs={"x": X[:0]}), SPEC),
        (REQUEST, dataclasses.replace(SPEC, outputs=(TensorSpec("y", "BYTES", np.dtype(object), (2,)),))),
    ],
)
def test_what_is_not_in_the_bytes_of_a_request_is_not_learned(request_: InferRequest, spec: ModelSpec) -> None:
    forms, call, payload = Forms(), Call("grpc"), message().SerializeToString()
    assert [forms.find(payload, call), forms.find(payload, call)] == [None, None]
    assert call.form
    forms.learn(call.form, request_, ANSWER, spec)
    assert forms.find(payload, Call("grpc")) is None


def test_the_number_of_forms_is_bounded_and_the_oldest_goes() -> None:
    forms = Forms()

    def twice(name: str) -> Found | None:
        payload = message(model_version=name).SerializeToString()
        for _ in range(2):
            call = Call("grpc")
            found = forms.find(payload, call)
            if call.form:
                forms.learn(call.form, dataclasses.replace(REQUEST, version=name), ANSWER, SPEC)
        return found

    for number in range(1000):
        twice(str(number))
        assert len(forms._known) <= 256
        assert len(forms._latest) <= 256
    assert forms.find(message(model_version="999").SerializeToString(), Call("grpc")) is not None
    assert forms.find(message(model_version="1").SerializeToString(), Call("grpc")) is None
    long = message(model_version="9" * 2000).SerializeToString()
    call = Call("grpc")
    assert [forms.find(long, call) for _ in range(3)] == [None] * 3
    assert not call.form


@pytest.mark.parametrize("settings_", [{}, {"frontends": "2"}, {"log_requests": True}])
async def test_answers_and_errors_are_the_same_however_often_a_request_comes(
    serving: Serving, tmp_path: Path, settings_: dict[str, Any]
) -> None:
    fake_model(tmp_path, fail_above=500)
    async with serving(**settings_) as running:
        for i in range(6):
            request = infer_request(i, i + 1)
            request.id = f"id {i}"
            answer = await running.stub.ModelInfer(request)
            assert (sums(answer), answer.id, answer.model_version) == ([i, i + 1], f"id {i}", "1")
            assert [tensor.name for tensor in answer.outputs] == ["y"]
        texts = set()
        for _ in range(4):
            request = infer_request(1000, 1)
            request.id = "this one"
            texts.add(await refusal(running, request))
        assert texts == {(grpc.StatusCode.INTERNAL, "model 'sum' failed to run the batch")}
        assert running.metric("convoy_requests_total", model="sum", version="1", protocol="grpc", code="OK") == 6


async def test_a_raw_tensor_too_many_is_refused_whatever_came_before(serving: Serving, tmp_path: Path) -> None:
    """Requests whose other bytes are the same: with one of two inputs in shared memory, and with both raw."""
    fake_model(tmp_path)
    config = tmp_path / "sum" / "config.pbtxt"
    more = 'input { name: "z" data_type: TYPE_FP32 dims: [4] }\noutput {'
    config.write_text(config.read_text().replace("output {", more))
    row = np.ones(4, np.float32).tobytes()
    request = pb.ModelInferRequest(model_name="sum", raw_input_contents=[row])
    for name in ("x", "z"):
        request.inputs.add(name=name, datatype="FP32", shape=[1, 4])
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 16
    with shared_object() as key:
        async with serving(allow_client_shm=True) as running:
            register = pb.SystemSharedMemoryRegisterRequest(name="r", key=key, byte_size=16)
            await running.stub.SystemSharedMemoryRegister(register)
            for _ in range(3):
                assert sums(await running.stub.ModelInfer(request)) == [0]
            request.raw_input_contents.append(row)
            code, text = await refusal(running, request)
            assert (code, "1 too many" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def refusal(running: Running, request: pb.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
    try:
        await running.stub.ModelInfer(request)
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details())
    raise AssertionError("it was answered")


async def test_a_model_that_is_loaded_anew_is_asked_as_it_is_now(serving: Serving, tmp_path: Path) -> None:
    fake_model(tmp_path)
    async with serving(model_control_mode="explicit", load_model=("sum",)) as running:
        for _ in range(4):
            assert sums(await running.stub.ModelInfer(infer_request(3))) == [3]
        stub = running.stub
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="sum"))
        code, text = await refusal(running, infer_request(3))
        assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE), text
        config = tmp_path / "sum" / "config.pbtxt"
        config.write_text(config.read_text().replace("dims: [4]", "dims: [5]").replace("dims: [ 4 ]", "dims: [ 5 ]"))
        assert "5" in config.read_text()
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="sum"))
        code, text = await refusal(running, infer_request(3))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "unexpected shape" in text
