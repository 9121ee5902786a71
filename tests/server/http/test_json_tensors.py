"""Tensors as JSON and behind it, to protobuf messages and back."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server import datatypes
from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.http import json_tensors
from convoynet.server.http.json_tensors import Wanted
from convoynet.server.types import Tensor

# The first text that hypothesis draws builds its tables, which takes seconds.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Tensor]:
    """Any datatype, any small shape, any values; text alone for BYTES."""
    datatype = draw(st.sampled_from(datatypes.DATATYPES))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        elements = draw(st.lists(st.text(), min_size=math.prod(shape), max_size=math.prod(shape)))
        array: Tensor = np.empty(len(elements), np.object_)
        array[:] = [e.encode("utf-8", "replace") for e in elements]
        return datatype, array.reshape(shape)
    if datatype == "BF16":
        halves = draw(hnp.arrays(np.float16, shape, elements=st.floats(width=16)))
        # Rounded once, so that it is exact from there on.
        raw = datatypes.encode(halves.astype(np.float32), "BF16")
        return datatype, datatypes.decode("BF16", shape, raw)
    return datatype, draw(hnp.arrays(datatypes.numpy_dtype(datatype), shape))


def nested(flat: list[Any], shape: tuple[int, ...]) -> Any:
    """The same elements as lists in lists."""
    if len(shape) == 1:
        return flat
    size = math.prod(shape[1:])
    return [nested(flat[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def same(left: Tensor, right: Tensor) -> bool:
    """Equal shapes and elements, NaN equal to NaN."""
    if left.dtype.kind == "f":
        return left.shape == right.shape and np.array_equal(left, right, equal_nan=True)
    return left.shape == right.shape and np.array_equal(left, right)


@unhurried
@given(tensors(), st.booleans())
def test_a_tensor_comes_back_from_json(tensor: tuple[str, Tensor], flat: bool) -> None:
    datatype, array = tensor
    text = json_tensors.dumps(json_tensors.json_from_tensor(array, "x"))
    elements = orjson.loads(text)
    shape = tuple(array.shape)
    data = elements if flat or 0 in shape else nested(elements, shape)
    assert same(json_tensors.tensor_from_json(data, datatype, shape), array)


@unhurried
@given(st.lists(tensors(), min_size=1, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4), st.booleans())
def test_inputs_come_back_from_a_body(inputs: list[tuple[str, Tensor]], binary: list[bool], all_json: bool) -> None:
    entries, tail = [], b""
    for i, (datatype, array) in enumerate(inputs):
        entry: dict[str, Any] = {"name": f"x{i}", "datatype": datatype, "shape": list(array.shape)}
        if binary[i] and not all_json:
            raw = datatypes.encode(array, datatype)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            entry["data"] = orjson.loads(json_tensors.dumps(json_tensors.json_from_tensor(array, "x")))
        entries.append(entry)
    head = json.dumps({"inputs": entries}).encode()
    message = pb.ModelInferRequest()
    json_tensors.request_from_body(memoryview(head + tail), None if all_json else len(head), message)
    for i, (datatype, array) in enumerate(inputs):
        got = datatypes.decode(message.inputs[i].datatype, message.inputs[i].shape, message.raw_input_contents[i])
        assert same(got, array)
        assert message.inputs[i].datatype == datatype


@unhurried
@given(st.lists(tensors(), min_size=1, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4), st.booleans())
def test_outputs_come_back_from_an_answer(outputs: list[tuple[str, Tensor]], binary: list[bool], every: bool) -> None:
    response = pb.ModelInferResponse(model_name="m", model_version="1", id="7")
    for i, (datatype, array) in enumerate(outputs):
        response.outputs.add(name=f"y{i}", datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(datatypes.encode(array, datatype))
    wanted = Wanted(every, {f"y{i}": binary[i] for i in range(len(outputs)) if i % 2})
    text, tail = json_tensors.body_from_response(response, wanted)
    document = json.loads(text)
    assert (document["model_name"], document["id"]) == ("m", "7")
    rest = b"".join(tail)
    for i, (datatype, array) in enumerate(outputs):
        shown = document["outputs"][i]
        if (size := shown.get("parameters", {}).get("binary_data_size")) is not None:
            assert binary[i] if i % 2 else every
            got = datatypes.decode(datatype, shown["shape"], rest[:size])
            rest = rest[size:]
        else:
            got = json_tensors.tensor_from_json(shown["data"], datatype, shown["shape"])
        assert same(got, array)
    assert rest == b""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "binary_data_size", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("x") | JSON,
        "datatype": st.sampled_from([*datatypes.DATATYPES, "FP99"]) | JSON,
        "shape": st.lists(st.integers(-2, 5), max_size=3) | st.lists(st.integers(-(2**70), 2**70), max_size=3) | JSON,
        "data": st.lists(st.integers(0, 300), max_size=5) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-5, 50) | JSON}) | JSON,
    },
)
DOCUMENT = st.fixed_dictionaries(
    {}, optional={"id": JSON, "parameters": JSON, "inputs": st.lists(ENTRY, max_size=3) | JSON, "outputs": JSON}
)


@settings(unhurried, max_examples=300)
@given(DOCUMENT | JSON, st.binary(max_size=40), st.integers(0, 3) | st.none(), st.integers(0, 400))
def test_any_body_is_read_or_refused(document: object, tail: bytes, cut: int | None, length: int) -> None:
    """Nothing but InvalidRequest ever comes out, whatever the body and the header say."""
    head = json.dumps(document).encode()
    body = memoryview(head[: len(head) - (cut or 0)] + tail)
    for json_bytes in (None, len(head), length):
        try:
            json_tensors.request_from_body(body, json_bytes, pb.ModelInferRequest())
        except InvalidRequest:
            continue


def entry(**changes: object) -> dict[str, object]:
    """A good input of one number, with changes."""
    return {"name": "x", "datatype": "FP32", "shape": [1], "data": [1], **changes}


WRONG: dict[str, tuple[object, str]] = {
    "not json": (b"{", "failed to parse the request JSON"),
    "a jpeg": (b"\xff\xd8\xff\xe0 JFIF", "it is an image, which is sent with the header Content-Type: image/jpeg"),
    "a png": (b"\x89PNG\r\n", "Content-Type: image/png"),
    "a form": (b"--boundary\r\n", "it is a form; send the file itself"),
    "not an object": ([], "must be an object, got a list"),
    "too deep": (b"[" * 5000 + b"]" * 5000, "failed to parse the request JSON"),
    "id": ({"id": []}, "'id' must be a text, got a list"),
    "inputs": ({"inputs": 3}, "'inputs' must be a list of at most 256 objects"),
    "too many inputs": ({"inputs": [entry()] * 257}, "'inputs' must be a list of at most 256 objects"),
    "parameters": ({"parameters": []}, "'parameters' must be an object"),
    "parameter": ({"parameters": {"p": [1]}}, "parameter 'p' must be a text, a number or a boolean, got a list"),
    "binary_data_output": ({"parameters": {"binary_data_output": 1}}, "'binary_data_output' must be true or false"),
    "binary_data": ({"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "must be true or false"),
    "no name": ({"inputs": [{}]}, "'name' must be a text, got nothing"),
    "no data": ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}, "neither 'data' nor"),
    "both": ({"inputs": [entry(parameters={"binary_data_size": 0})]}, "both 'data' and the parameter"),
    "shape": ({"inputs": [entry(shape=[1.5])]}, "'shape' of input 'x' must be a list of integers"),
    "shape of booleans": ({"inputs": [entry(shape=[True])]}, "must be a list of integers"),
    "huge shape": ({"inputs": [entry(shape=[2**64 - 1])]}, "must be a list of integers"),
    "rank": ({"inputs": [entry(shape=[1] * 65)]}, "has 65 dimensions, 64 are allowed"),
    "negative shape": ({"inputs": [entry(shape=[-1])]}, "needs -1 elements, got 1"),
    "too few": ({"inputs": [entry(shape=[2])]}, "needs 2 elements, got 1"),
    "overflowing shape": ({"inputs": [entry(shape=[2**62] * 64)]}, "elements, got 1"),
    "ragged": ({"inputs": [entry(shape=[3], data=[[1, 2], [3]])]}, "elements, got 2"),
    "ragged with the right count": ({"inputs": [entry(shape=[2], data=[[1, 2], [3]])]}, "of different lengths"),
    "text": ({"inputs": [entry(data=["1"])]}, "FP32 elements are numbers"),
    "float for int": ({"inputs": [entry(datatype="INT8", data=[1.0])]}, "INT8 elements are integers"),
    "boolean for int": ({"inputs": [entry(datatype="INT8", data=[True])]}, "INT8 elements are integers"),
    "range": ({"inputs": [entry(datatype="INT8", data=[128])]}, "values that INT8 cannot"),
    "float range": ({"inputs": [entry(datatype="FP16", data=[1e6])]}, "values that FP16 cannot"),
    "number for boolean": ({"inputs": [entry(datatype="BOOL", data=[2])]}, "BOOL elements are true or false"),
    "number for bytes": ({"inputs": [entry(datatype="BYTES", data=[2])]}, "BYTES elements are JSON texts"),
    "datatype": ({"inputs": [entry(datatype="FP99")]}, "unknown datatype 'FP99'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_bodies_are_refused_with_a_clear_message(case: str) -> None:
    document, text = WRONG[case]
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(InvalidRequest) as caught:
        json_tensors.request_from_body(memoryview(body), None, pb.ModelInferRequest())
    assert text in str(caught.value)
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("size", "tail", "text"),
    [
        (5, b"1234", "must be an integer of 0 to 4, the bytes that are left, got 5"),
        (-1, b"1234", "got -1"),
        (2**70, b"1234", "bytes that are left"),
        ("4", b"1234", "got a text"),
        (True, b"1234", "must be an integer"),
        (4, b"12345", "1 bytes of binary data follow"),
    ],
)
def test_binary_sizes_account_for_every_byte(size: object, tail: bytes, text: str) -> None:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": size}}]
    head = json.dumps({"inputs": inputs}).encode()
    with pytest.raises(InvalidRequest, match=text):
        json_tensors.request_from_body(memoryview(head + tail), len(head), pb.ModelInferRequest())


def test_json_larger_than_the_limit_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_tensors, "JSON_BYTES", 10)
    with pytest.raises(Oversize, match="send tensors as binary data"):
        json_tensors.request_from_body(memoryview(b"{" * 11), None, pb.ModelInferRequest())


def test_one_long_text_among_many_short_ones_takes_no_more_than_itself() -> None:
    """A numpy array of fixed-width text would take their product: 200 GB."""
    data = ["x" * 1_000_000, *["" for _ in range(49_999)]]
    with pytest.raises(ValueError, match="FP32 elements are numbers"):
        json_tensors.tensor_from_json(data, "FP32", [50_000])
    assert json_tensors.tensor_from_json(data, "BYTES", [50_000])[0] == b"x" * 1_000_000


X = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}


@pytest.mark.parametrize(
    "document",
    [
        {"id": None, "inputs": [X]},
        {"parameters": None, "outputs": None, "inputs": [X]},
        {"parameters": {"priority": None, "binary_data_output": None}, "inputs": [X]},
        {"inputs": [{**X, "parameters": None}]},
        {"inputs": [{**X, "parameters": {"binary_data_size": None, "shared_memory_region": None}}]},
        {"inputs": [X], "outputs": [{"name": "y", "parameters": None}]},
        {"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": None, "classification": None}}]},
        {"inputs": [X], "outputs": []},
    ],
)
def test_null_is_as_if_it_were_missing(document: dict[str, Any]) -> None:
    message, plain = pb.ModelInferRequest(), pb.ModelInferRequest()
    wanted = json_tensors.request_from_body(memoryview(json.dumps(document).encode()), None, message)
    bare = {"inputs": [X], "outputs": [{"name": one["name"]} for one in document.get("outputs") or []]}
    assert json_tensors.request_from_body(memoryview(json.dumps(bare).encode()), None, plain) == wanted
    assert message == plain


@pytest.mark.parametrize("member", ["name", "datatype", "shape", "data"])
def test_null_for_what_is_needed_is_refused(member: str) -> None:
    body = json.dumps({"inputs": [{**X, member: None}]}).encode()
    with pytest.raises(InvalidRequest, match=f"'{member}'"):
        json_tensors.request_from_body(memoryview(body), None, pb.ModelInferRequest())


def test_a_byte_order_mark_is_passed_over() -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"inputs": [X]}).encode()
    message = pb.ModelInferRequest()
    json_tensors.request_from_body(memoryview(body), None, message)
    assert message.inputs[0].name == "x"


@pytest.mark.parametrize(
    ("datatype", "number", "value"),
    [
        ("INT64", "1.0", None), ("INT64", "1e3", None), ("INT64", "9223372036854775807", 2**63 - 1),
        ("INT64", "9223372036854775808", None), ("INT64", "-9223372036854775808", -(2**63)),
        ("INT64", "-9223372036854775809", None), ("INT64", "99999999999999999999", None),
        ("UINT64", "18446744073709551615", 2**64 - 1), ("UINT64", "18446744073709551616", None),
        ("UINT64", "-1", None), ("UINT8", "true", None), ("UINT8", "256", None), ("INT8", "-128", -128),
        ("FP32", "1e39", None), ("FP32", "1e3", 1000.0), ("FP32", "7", 7.0), ("FP32", "NaN", None),
        ("FP32", "Infinity", None), ("FP32", '"Infinity"', float("inf")), ("FP32", '"1.5"', None),
        ("FP64", "1e400", None), ("FP64", "0.1", 0.1), ("FP16", "65504", 65504.0), ("FP16", "65520", None),
        ("BOOL", "1", True), ("BOOL", "1.0", None), ("BOOL", "2", None), ("BYTES", "1", None),
        ("BYTES", '"\\ud800"', None),
    ],
)  # fmt: skip
def test_a_number_is_exact_or_refused(datatype: str, number: str, value: object) -> None:
    body = b'{"inputs": [{"name": "x", "datatype": "%s", "shape": [1], "data": [%s]}]}' % (
        datatype.encode(), number.encode(),
    )  # fmt: skip
    message = pb.ModelInferRequest()
    if value is None:
        with pytest.raises(InvalidRequest):
            json_tensors.request_from_body(memoryview(body), None, message)
    else:
        json_tensors.request_from_body(memoryview(body), None, message)
        assert datatypes.decode(datatype, [1], message.raw_input_contents[0])[0] == value


def test_an_output_in_shared_memory_has_its_place_and_no_data() -> None:
    place = {"shared_memory_region": "o", "shared_memory_byte_size": 4}
    body = json.dumps({"inputs": [X], "outputs": [{"name": "y", "parameters": place}, {"name": "z"}]}).encode()
    wanted = json_tensors.request_from_body(memoryview(body), None, pb.ModelInferRequest())
    response = pb.ModelInferResponse(model_name="m", raw_output_contents=[b"", b"\1"])
    response.outputs.add(name="y", datatype="FP32", shape=[1])
    response.outputs.add(name="z", datatype="UINT8", shape=[1])
    for every in (False, True):
        head, tail = json_tensors.body_from_response(response, Wanted(every, regions=wanted.regions))
        y, z = json.loads(head)["outputs"]
        assert y == {"name": "y", "datatype": "FP32", "shape": [1], "parameters": place}
        assert (z["parameters"], tail) == ({"binary_data_size": 1}, [b"\1"]) if every else z["data"] == [1]


def test_parameters_keep_their_types() -> None:
    message = pb.ModelInferRequest()
    body = {"parameters": {"b": True, "i": -1, "u": 2**64 - 1, "d": 1.5, "s": "t"}}
    json_tensors.request_from_body(memoryview(json.dumps(body).encode()), None, message)
    kinds = {name: (p.WhichOneof("parameter_choice")) for name, p in message.parameters.items()}
    assert kinds == {
        "b": "bool_param",
        "i": "int64_param",
        "u": "uint64_param",
        "d": "double_param",
        "s": "string_param",
    }


def test_bytes_that_are_no_text_are_refused_as_json_and_given_as_binary() -> None:
    response = pb.ModelInferResponse()
    response.outputs.add(name="y", datatype="BYTES", shape=[1])
    response.raw_output_contents.append(struct.pack("<I", 1) + b"\xff")
    with pytest.raises(InvalidRequest, match="ask for it as binary_data"):
        json_tensors.body_from_response(response, Wanted())
    assert json_tensors.body_from_response(response, Wanted(every=True))[1] == [struct.pack("<I", 1) + b"\xff"]


def test_numbers_that_are_not_finite_are_texts() -> None:
    array = np.array([1.5, np.nan, np.inf, -np.inf], np.float32)
    text = json_tensors.dumps(json_tensors.json_from_tensor(array, "y"))
    assert json.loads(text) == [1.5, "NaN", "Infinity", "-Infinity"]


def test_messages_show_every_field_and_their_64_bit_integers_as_numbers() -> None:
    statistics = pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(name="m", inference_count=2**60)])
    shown = json_tensors.document_from_message(statistics)["model_stats"][0]
    assert (shown["inference_count"], shown["execution_count"], shown["batch_stats"]) == (2**60, 0, [])
