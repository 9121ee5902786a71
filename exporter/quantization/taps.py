"""The inner values of a graph on images, from the fastest runtime that is installed: for what counts all of them.

Both runtimes compute float32 as float32; they add in different orders, so that their values differ by rounding.
"""

import contextlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnx

from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.running.openvino import core
from convoynet.exporter.running.runtime import inner_session

# Values that leave the runtime at a time: what stays in a processor's caches is counted faster.
_PORTION_BYTES = 2**25
_IMAGE_RANK = 4
# Of the largest value: far more than rounding makes, far less than a wrong kernel does.
_DIFFERENCE, _LEAST = 1e-3, 1e-30


class Taps(Protocol):
    """Computes tensors of a graph on images."""

    rows: int

    def __call__(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Compute the tensors on up to `rows` images.

        Returns:
            One array for each tensor, of its values in no certain order; good until the next call.
        """
        ...


def open_taps(model: onnx.ModelProto, tensors: Sequence[str]) -> Taps:
    """Prepare a graph with one input to compute some of its tensors, OpenVINO where it is installed and can."""
    known = shapes(model)
    image_bytes = 4 * sum(math.prod(size or 1 for size in known.get(name, ())) for name in tensors)
    rows = max(1, _PORTION_BYTES // max(image_bytes, 1))
    static = all(name in known and None not in known[name][1:] for name in tensors)
    if static and tensors and importlib.util.find_spec("openvino") is not None:
        # What OpenVINO cannot read or compile, it says with one of these.
        with contextlib.suppress(RuntimeError, KeyError):
            return _Checked(_OpenVinoTaps(model, tensors, rows), model, tensors)
    return _OnnxTaps(model, tensors, rows)


class _Checked:
    """OpenVINO's, if the first image has in it the values that it has in ONNX Runtime; else ONNX Runtime's.

    OpenVINO 2026.4 answers some networks with response normalisations (LRN) with numbers near 1e38.
    """

    def __init__(self, fast: "_OpenVinoTaps", model: onnx.ModelProto, tensors: Sequence[str]) -> None:
        self.rows = fast.rows
        self.chosen: Taps = fast
        self._other: tuple[onnx.ModelProto, Sequence[str]] | None = (model, tensors)

    def __call__(self, images: np.ndarray) -> Sequence[np.ndarray]:
        if self._other is not None and len(images):
            slow = _OnnxTaps(*self._other, self.rows)
            self._other = None
            pairs = zip(self.chosen(images[:1]), slow(images[:1]), strict=True)
            if not all(_alike(found, wanted) for found, wanted in pairs):
                self.chosen = slow
        return self.chosen(images)


def _alike(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether the values are the same in whatever order, as far as their extremes and moments tell."""
    if found.size != wanted.size or not wanted.size:
        return found.size == wanted.size
    tolerance = _DIFFERENCE * max(float(np.abs(wanted).max()), _LEAST)
    first, second = _facts(found), _facts(wanted)
    # What is not finite here is so there: it is for who counts to find.
    return bool(np.allclose(first, second, rtol=0, atol=tolerance, equal_nan=True))


def _facts(values: np.ndarray) -> list[float]:
    with np.errstate(over="ignore", invalid="ignore"):
        mean, square = values.mean(dtype=np.float64), np.mean(np.square(values))
        return [float(values.min()), float(values.max()), float(mean), float(np.sqrt(square))]


class _OnnxTaps:
    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str], rows: int) -> None:
        self.rows = rows
        self._tensors = list(tensors)
        self._session = inner_session(model, tensors)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> Sequence[np.ndarray]:
        if not self._tensors:  # ONNX Runtime wants at least one
            return []
        found: list[np.ndarray] = self._session.run(self._tensors, {self._input: images})
        return found


class _OpenVinoTaps:
    """For `rows` images at a time, and for one: with its shapes known OpenVINO leaves out the reordering of outputs."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str], rows: int) -> None:
        self.rows = rows
        self._content = model.SerializeToString()
        self._shape = [dim.dim_value for dim in _input_of(model).type.tensor_type.shape.dim][1:]
        self._tensors = tensors
        self._requests = {rows: self._request(rows)}

    def __call__(self, images: np.ndarray) -> Sequence[np.ndarray]:
        if len(images) in self._requests:
            return self._run(len(images), images)
        if 1 not in self._requests:
            self._requests[1] = self._request(1)
        alone = [[np.array(values) for values in self._run(1, images[at : at + 1])] for at in range(len(images))]
        return [np.concatenate(values, axis=None) for values in zip(*alone, strict=True)]

    def _run(self, rows: int, images: np.ndarray) -> list[np.ndarray]:
        request = self._requests[rows]
        request.infer([images], share_inputs=True)
        first = len(request.model_outputs) - len(self._tensors)
        return [request.get_output_tensor(first + index).data for index in range(len(self._tensors))]

    def _request(self, rows: int) -> Any:
        """A compiled graph whose last outputs are the tensors, maps with their channels last, as OpenVINO has them."""
        from openvino import opset13

        network = core().read_model(self._content)
        network.reshape([rows, *self._shape])
        made = {name: output for op in network.get_ops() for output in op.outputs() for name in output.get_names()}
        results = []
        for name in self._tensors:
            output = made[name]
            if output.get_partial_shape().rank.get_length() == _IMAGE_RANK:
                output = opset13.transpose(output, np.array([0, 2, 3, 1], np.int64)).output(0)
            results.append(opset13.result(output))
        network.add_results(results)
        return core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()


def _input_of(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    (name,) = Graph(model).inputs
    return next(value for value in model.graph.input if value.name == name)
