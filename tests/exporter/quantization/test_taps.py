import numpy as np
import onnx
import pytest

from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization import taps
from convoynet.exporter.quantization.qdq_cpu import place
from convoynet.exporter.quantization.taps import open_taps
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

ROWS = 4


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture
def tensors(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names = place(Graph(model)).tensors
    image_bytes = sum(values.nbytes for values in taps._OnnxTaps(model, names, 1)(pixels(1)))
    monkeypatch.setattr(taps, "_PORTION_BYTES", ROWS * image_bytes)
    return names


def test_both_runtimes_compute_the_same(model: onnx.ModelProto, tensors: list[str]) -> None:
    pytest.importorskip("openvino")
    images = pixels(ROWS)
    opened = open_taps(model, tensors)
    assert opened.rows == ROWS
    expected = taps._OnnxTaps(model, tensors, ROWS)(images)
    made = opened(images)
    assert isinstance(opened, taps._Checked)
    assert isinstance(opened.chosen, taps._OpenVinoTaps)
    for name, found, wanted in zip(tensors, made, expected, strict=True):
        # In whatever order: the values, not their places, are counted.
        difference = np.abs(np.sort(found, axis=None) - np.sort(wanted, axis=None)).max()
        assert difference < 1e-4 * np.abs(wanted).max(), name


def test_a_portion_that_is_not_full_is_computed_too(model: onnx.ModelProto, tensors: list[str]) -> None:
    images = pixels(ROWS)
    opened = open_taps(model, tensors)
    whole = [np.sort(values, axis=None) for values in opened(images)]
    parts = [[values.ravel().copy() for values in opened(some)] for some in (images[:3], images[3:])]
    for index, wanted in enumerate(whole):
        found = np.sort(np.concatenate([values[index] for values in parts]))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_without_openvino_onnx_runtime_computes(
    model: onnx.ModelProto, tensors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps.importlib.util, "find_spec", lambda name: None)
    assert isinstance(open_taps(model, tensors), taps._OnnxTaps)


def test_what_openvino_cannot_read_onnx_runtime_computes(
    model: onnx.ModelProto, tensors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, rows: int) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(taps._OpenVinoTaps, "_request", refuse)
    assert isinstance(open_taps(model, tensors), taps._OnnxTaps)


def test_where_openvino_computes_something_else_onnx_runtime_computes(
    model: onnx.ModelProto, tensors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    run = taps._OpenVinoTaps._run

    def wrong(self: taps._OpenVinoTaps, rows: int, images: np.ndarray) -> list[np.ndarray]:
        *others, last = run(self, rows, images)
        return [*others, last * 1.01]

    monkeypatch.setattr(taps._OpenVinoTaps, "_run", wrong)
    images = pixels(ROWS)
    opened = open_taps(model, tensors)
    expected = taps._OnnxTaps(model, tensors, ROWS)(images)
    for found, wanted in zip(opened(images), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert isinstance(opened, taps._Checked)
    assert isinstance(opened.chosen, taps._OnnxTaps)
