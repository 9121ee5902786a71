import threading
from collections import defaultdict

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization import taps
from convoynet.exporter.quantization.calibrate import METHODS, calibrate
from convoynet.exporter.quantization.qdq_cpu import place
from convoynet.exporter.quantization.taps import Taps, open_taps
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

ROWS = taps._SEVERAL


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def tensors(model: onnx.ModelProto) -> list[str]:
    return list(place(Graph(model)).tensors)


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps.importlib.util, "find_spec", lambda name: None)


def seen(opened: Taps, *batches: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """All values of each tensor, in rising order: the values, not their places, are counted."""
    found: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    lock = threading.Lock()

    def look(tensor: str, values: np.ndarray) -> None:
        with lock:
            found[tensor].append(values.flatten())

    for batch in batches:
        opened(batch, look)
    return {tensor: np.sort(np.concatenate(parts)) for tensor, parts in found.items()}


def require_alike(found: dict[str, NDArray[np.float32]], wanted: dict[str, NDArray[np.float32]]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.abs(found[name] - values).max() < 1e-4 * np.abs(values).max(), name


def slow(model: onnx.ModelProto, tensors: list[str]) -> Taps:
    return taps._OnnxTaps(model, tensors, 3)


@pytest.mark.parametrize("smallest", [0, 2**40])  # bytes: one image at a time, and several
def test_both_runtimes_compute_the_same(
    model: onnx.ModelProto, tensors: list[str], smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(taps, "_SMALL_BYTES", smallest)
    images = pixels(2 * ROWS + 1)
    opened = open_taps(model, tensors)
    found = seen(opened, images)
    assert isinstance(opened, taps._Checked)
    assert isinstance(opened.chosen, taps._OpenVinoTaps)
    assert opened.chosen.rows == (ROWS if smallest else 1)
    require_alike(found, seen(slow(model, tensors), images))


def test_images_may_come_in_parts_of_any_size(model: onnx.ModelProto, tensors: list[str]) -> None:
    images = pixels(2 * ROWS)
    whole = seen(open_taps(model, tensors), images)
    require_alike(seen(open_taps(model, tensors), images[:3], images[3:3], images[3:]), whole)


def test_two_tensors_of_equal_values_are_both_seen(model: onnx.ModelProto, tensors: list[str]) -> None:
    doubled = onnx.ModelProto()
    doubled.CopyFrom(model)
    nodes = [node for node in doubled.graph.node if node.op_type == "Relu"][:1]
    doubled.graph.node.append(onnx.helper.make_node("Relu", nodes[0].input, ["twin"]))
    found = seen(open_taps(doubled, [nodes[0].output[0], "twin"]), pixels(ROWS))
    np.testing.assert_array_equal(found["twin"], found[nodes[0].output[0]])


def test_a_tensor_without_axes_is_seen(model: onnx.ModelProto) -> None:
    pytest.importorskip("openvino")
    averaged = onnx.ModelProto()
    averaged.CopyFrom(model)
    name = next(node.output[0] for node in averaged.graph.node if node.op_type == "Relu")
    averaged.graph.node.append(onnx.helper.make_node("ReduceMean", [name], ["average"], keepdims=0))
    averaged.graph.output.append(onnx.helper.make_tensor_value_info("average", onnx.TensorProto.FLOAT, []))
    opened = open_taps(averaged, [name, "average"])
    found = seen(opened, pixels(ROWS))
    assert isinstance(opened, taps._Checked)
    assert isinstance(opened.chosen, taps._OpenVinoTaps)
    np.testing.assert_allclose(found["average"].mean(), found[name].mean(), rtol=1e-4)


def test_what_is_raised_over_a_tensor_is_raised(model: onnx.ModelProto, tensors: list[str]) -> None:
    def refuse(tensor: str, values: np.ndarray) -> None:
        raise KeyError(tensor)

    with pytest.raises(KeyError):
        open_taps(model, tensors)(pixels(1), refuse)


@pytest.mark.usefixtures("without_openvino")
def test_without_openvino_onnx_runtime_computes(model: onnx.ModelProto, tensors: list[str]) -> None:
    assert isinstance(open_taps(model, tensors), taps._OnnxTaps)


def test_what_openvino_cannot_read_onnx_runtime_computes(
    model: onnx.ModelProto, tensors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, rows: int) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(taps._OpenVinoTaps, "_compile", refuse)
    assert isinstance(open_taps(model, tensors), taps._OnnxTaps)


@pytest.mark.parametrize("wrong", ["another value", "no value"])
def test_where_openvino_computes_something_else_onnx_runtime_computes(
    model: onnx.ModelProto, tensors: list[str], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from convoynet.exporter.quantization.tap_operator import Viewer

    show = Viewer.show

    def show_wrong(self: Viewer, tensor: str, values: np.ndarray) -> None:
        if tensor != tensors[-1]:
            show(self, tensor, values)
        elif wrong == "another value":
            show(self, tensor, values * np.float32(1.01))

    monkeypatch.setattr(Viewer, "show", show_wrong)
    images = pixels(ROWS + 1)
    opened = open_taps(model, tensors)
    found = seen(opened, images)
    for name, values in seen(slow(model, tensors), images).items():
        np.testing.assert_array_equal(found[name], values)
    assert isinstance(opened, taps._Checked)
    assert isinstance(opened.chosen, taps._OnnxTaps)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_a_plain_pass(
    model: onnx.ModelProto, method: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("openvino")
    images = pixels(19)
    fast = calibrate(model, [images[:8], images[8:16], images[16:]], method)
    request.getfixturevalue("without_openvino")
    plain = calibrate(model, [images], method)
    assert list(fast) == list(plain)
    for name, span in plain.items():
        np.testing.assert_allclose((fast[name].low, fast[name].high), (span.low, span.high), rtol=1e-3, atol=1e-4)


def test_a_tensor_is_looked_at_before_the_next_is_computed(model: onnx.ModelProto) -> None:
    pytest.importorskip("openvino")
    behind = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    chosen = taps._OpenVinoTaps(model, behind, 1)
    order = [
        (int(op.get_rt_info()["execOrder"].astype(str)), op.get_rt_info()["layerType"].astype(str))
        for op in chosen._requests[chosen.rows].get().get_compiled_model().get_runtime_model().get_ops()
    ]
    kinds = "".join({"Convolution": "C", "Reference": "T"}.get(kind, "") for _, kind in sorted(order))
    assert kinds.count("T") == len(behind) > 1
    assert "TC" in kinds
    assert "TT" not in kinds
