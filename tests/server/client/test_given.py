"""What people hand to the client by mistake ends in one line that says what to give, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoynet.server.client import operations
from convoynet.server.client.client import Client, ClientError
from tests.server import onnx_models
from tests.server.client.conftest import png

torch = pytest.importorskip("torch")

ROWS = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)
EXPECTED = ROWS @ onnx_models.LINEAR_WEIGHTS


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("given") / "models"
    onnx_models.write_linear(repository)
    onnx_models.write_colors(repository)
    with onnx_models.serve(repository) as server:
        yield server


@pytest.mark.parametrize(
    "array",
    [
        ROWS,
        torch.from_numpy(ROWS),
        torch.from_numpy(ROWS.T.copy()).T,
        np.asfortranarray(ROWS),
        np.repeat(ROWS, 2, axis=0)[::2],
        ROWS[:, ::-1].copy()[:, ::-1],
        ROWS.astype(">f4"),
    ],
    ids=["numpy", "torch", "torch, transposed", "columns first", "every second row", "backwards", "big-endian"],
)
def test_an_array_of_any_layout_is_the_same_array_with_a_name_and_without(client: Client, array: Any) -> None:
    for inputs in (array, {"input": array}):
        np.testing.assert_allclose(client.infer("linear", inputs)["logits"], EXPECTED, rtol=1e-6)


def test_encoded_images_need_no_name_either(client: Client) -> None:
    answer = client.infer("colors", [png("blue"), png("red")])["logits"]
    assert answer.argmax(axis=1).tolist() == [2, 0]


def test_numbers_of_numpy_are_numbers(client: Client) -> None:
    options = {"parameters": {"note": np.int64(3), "ratio": np.float32(0.5), "flag": np.True_}}
    answer = client.infer("linear", ROWS, timeout=np.float64(20), class_count=np.int64(1), **options)
    assert answer["logits"].shape == (2, 1)
    assert client.infer("linear", ROWS, version=None, request_id=None)["logits"].shape == (2, 3)


Call = Callable[[Client], object]
WRONG_INPUTS: dict[str, tuple[object, str]] = {
    "nothing": (None, r"input 'input' is None \(NoneType\): give an array"),
    "a number": (3.5, r"input 'input' is 3.5 \(float\): give an array"),
    "a path": ("cat.jpg", r"input 'input' is 'cat.jpg' \(str\): give an array, or a list of encoded images: \[data\]"),
    "a path's object": (Path("cat.jpg"), "input 'input' is of the type .*Path: give an array"),
    "one image": (b"\x89PNG" * 100, r"input 'input' is of the type bytes: .*\[data\], also for one image"),
    "a list of numbers": ([[1.0, 2.0]], r"of the type list: give numpy.asarray\(values, numpy.float32\)"),
    "a list of arrays": ([ROWS[0], ROWS[1]], r"give numpy.asarray\(values, numpy.float32\)"),
    "part of a training": (torch.ones(1, 4, requires_grad=True), "of the type Tensor: .*requires grad"),
    "bfloat16": (torch.ones(1, 4, dtype=torch.bfloat16), "of the type Tensor: .*BFloat16"),
    "on no device": (torch.ones(1, 4, device="meta"), "of the type Tensor: .*meta"),
    "a mask": (np.ma.masked_less(ROWS, 2), "an array without a mask"),
    "an object": (np.array([[object()]]), "a BYTES element has to be bytes or str, got object"),
    "half a letter": (np.array([["\ud800"]]), "input 'input': .*surrogates"),
    "no dimension": (np.float32(3), r"unexpected shape|batch|shape"),
    "doubles": (ROWS.astype(np.float64), "'FP64', but model 'linear' expects 'FP32'"),
    "complex numbers": (ROWS.astype(np.complex64), "numpy dtype 'complex64'"),
    "names within names": ({"input": ROWS}, "input 'input' is of the type dict: give an array"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_what_is_no_input_is_one_line(client: Client, case: str) -> None:
    value, words = WRONG_INPUTS[case]
    refused(client, lambda c: c.infer("linear", {"input": value}), words)
    if not isinstance(value, dict):
        refused(client, lambda c: c.infer("linear", value), words.replace("input 'input' is", "inputs is"))


WRONG_CALLS: dict[str, tuple[Call, str]] = {
    "a wrong name": (lambda c: c.infer("linear", {"x": ROWS}), "x"),
    "a number for a name": (lambda c: c.infer("linear", {0: ROWS}), r"a name in inputs is 0 \(int\)"),
    "no model": (lambda c: c.infer(None, ROWS), r"model is None \(NoneType\): give a text"),
    "an empty model": (lambda c: c.infer("", {"input": ROWS}), r"model is '' \(str\): give a text"),
    "half a letter": (lambda c: c.infer("\ud800", {"input": ROWS}), "a text that UTF-8 can hold"),
    "a version": (lambda c: c.infer("linear", ROWS, version=1), r"version is 1 \(int\): give a text, '1'"),
    "an unknown option": (lambda c: c.infer("linear", ROWS, prio=1), "unknown option 'prio', expected one of version"),
    "an output": (lambda c: c.infer("linear", ROWS, outputs="logits"), r"give a list of names, \['logits'\]"),
    "outputs": (lambda c: c.infer("linear", ROWS, outputs=[0]), r"outputs\[0\] is 0 \(int\)"),
    "classes as text": (lambda c: c.infer("linear", ROWS, class_count="3"), r"class_count is '3' \(str\)"),
    "no classes": (lambda c: c.infer("linear", ROWS, class_count=0), "a whole number from 1 on"),
    "very many classes": (lambda c: c.infer("linear", ROWS, class_count=2**63), "a whole number from 1 on"),
    "a timeout as text": (lambda c: c.infer("linear", ROWS, timeout="5"), r"timeout is '5' \(str\): give seconds"),
    "a timeout before now": (lambda c: c.infer("linear", ROWS, timeout=-1), "timeout is -1"),
    "no time": (lambda c: c.infer("linear", ROWS, timeout=math.nan), "timeout is nan"),
    "endless": (lambda c: c.infer("linear", ROWS, timeout=math.inf), "timeout is inf .*: give seconds, or None"),
    "beyond numbers": (lambda c: c.infer("linear", ROWS, timeout=10**400), "timeout is of the type int"),
    "a priority": (lambda c: c.infer("linear", ROWS, priority=-1), "priority is -1"),
    "parameters": (lambda c: c.infer("linear", ROWS, parameters=["a"]), "parameters is of the type list"),
    "a parameter": (lambda c: c.infer("linear", ROWS, parameters={"a": None}), "parameter 'a' is None"),
    "a large one": (lambda c: c.infer("linear", ROWS, parameters={"a": 2**63}), "parameter 'a' is 9223372036854775808"),
    "datatypes": (lambda c: c.infer("linear", ROWS, datatypes="FP32"), "datatypes is 'FP32'"),
    "a datatype": (lambda c: c.infer("linear", ROWS, datatypes={"input": 5}), "array is FP32, but 5 was asked for"),
    "no input's": (
        lambda c: c.infer("linear", ROWS, datatypes={"x": "BF16"}),
        "datatypes names 'x', which is no input",
    ),
    "no request": (lambda c: c.send({"input": ROWS}), "request is of the type dict: give what infer_request"),
    "ready": (lambda c: c.model_ready(3), "model is 3"),
    "metadata": (lambda c: c.model_metadata(None), "model is None"),
    "config": (lambda c: c.model_config("linear", 1), "version is 1"),
    "statistics": (lambda c: c.statistics(3), "model is 3"),
    "one image": (lambda c: c.classify("colors", "cat.jpg"), r"images is 'cat.jpg' \(str\): give a list"),
    "one path": (lambda c: c.segment("colors", Path("cat.jpg")), r"of the type .*Path: give a list"),
    "one file": (lambda c: c.detect("colors", b"\x89PNG"), "give a list"),
    "no images": (lambda c: c.classify("colors", None), "images is None"),
    "pixels": (
        lambda c: c.classify("colors", [np.zeros((3, 3))]),
        r"images\[0\] .* pixels as an array go through infer",
    ),
    "a NUL": (lambda c: c.classify("colors", ["a\0b"]), "cannot read image"),
    "no top": (lambda c: c.classify("colors", [png("red")], top=0), "top is 0"),
    "the last but one": (lambda c: c.classify("colors", [png("red")], top=-1), "top is -1"),
    "a score as text": (lambda c: c.detect("colors", [png("red")], min_score="0.5"), "min_score is '0.5'"),
    "no score": (lambda c: c.detect("colors", [png("red")], min_score=math.nan), "a number from 0 to 1"),
    "no url": (lambda c: Client(None), "url is None, give HOST:PORT"),
    "a client's timeout": (lambda c: Client(timeout="5"), r"timeout is '5' \(str\)"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_argument_is_one_line(client: Client, case: str) -> None:
    call, words = WRONG_CALLS[case]
    refused(client, call, words)


def test_an_array_for_a_model_with_two_inputs_needs_names(client: Client) -> None:
    metadata = client.model_metadata("linear")
    metadata.inputs.add(name="mask", datatype="FP32", shape=[-1, 4])
    steps = operations.infer("linear", ROWS, None, None, None, {})
    assert next(steps).rpc == "ModelMetadata"
    with pytest.raises(ClientError, match="has the inputs input, mask: give arrays by name"):
        steps.send(metadata)


def refused(client: Client, call: Call, words: str) -> None:
    with pytest.raises(ClientError, match=words) as caught:
        call(client)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in str(caught.value)
