"""Learned rounding: a layer's integers chosen by what they do to its output, and not each by itself.

M. Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound), sections 3.2 and 3.3:
the error of a layer's output is a quadratic form of the error of its weights, whose matrix is the second moment of the
layer's inputs. As in its section 3.4 the inputs are those of the quantized network and the wanted output is the float
network's, so that a layer also repairs what the earlier ones did. Where the paper relaxes the choice between rounding
up and down and descends by Adam, we solve the quadratic problem by exact steps along one coordinate at a time, in
which an integer may move farther than its neighbours, as in I. Hubara et al. 2020, "Improving Post Training Neural
Quantization: Layer-wise Calibration and Integer Programming" (AdaQuant): no learning rate, no seed, minutes less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper

from convoynet.exporter.graph.onnx_graph import Graph, attribute
from convoynet.exporter.quantization.layer_data import BATCH, probed, run
from convoynet.exporter.quantization.qdq_placement import output_axis
from convoynet.exporter.quantization.quantize import weight_scales

# Places of the layer's output that are looked at, over all images.
ROWS = 16_384
# The second moments of a layer with more inputs would take over 200 MB, and solving needs some copies of them.
MAX_INPUTS = 5_120
# The least that holds weights at their values, as a share of the inputs' mean variance: images say nothing about some.
_RIDGE = 1e-6
_LIMIT = 127
_SWEEPS = 12
_BLOCK = 128


@dataclass
class Moments:
    """Sums over places of a layer's output, for each of its groups.

    Attributes:
        count: of the places.
        inputs: of what the layer reads there, float64 [groups, inputs].
        outputs: of what the float layer computes there, float64 [groups, outputs].
        squares: of products of two inputs, float64 [groups, inputs, inputs].
        products: of inputs and outputs, float64 [groups, outputs, inputs].
        powers: of squared outputs, float64 [groups, outputs].
    """

    count: int
    inputs: np.ndarray
    outputs: np.ndarray
    squares: np.ndarray
    products: np.ndarray
    powers: np.ndarray

    @classmethod
    def none(cls, groups: int, inputs: int, outputs: int) -> "Moments":
        """Of no place yet."""
        square, product = (groups, inputs, inputs), (groups, outputs, inputs)
        shapes = ((groups, inputs), (groups, outputs), square, product, (groups, outputs))
        return cls(0, *(np.zeros(shape) for shape in shapes))

    def add(self, read: np.ndarray, computed: np.ndarray) -> None:
        """Take more places in: what the layer reads, [places, channels, ...], and computes, [places, channels]."""
        groups = len(self.inputs)
        x, y = (
            np.moveaxis(values.reshape(len(values), groups, -1).astype(np.float64), 1, 0) for values in (read, computed)
        )
        self.count += len(read)
        self.inputs += x.sum(axis=1)
        self.outputs += y.sum(axis=1)
        self.squares += x.transpose(0, 2, 1) @ x
        self.products += y.transpose(0, 2, 1) @ x
        self.powers += np.square(y).sum(axis=1)

    def centred(self) -> tuple[np.ndarray, np.ndarray]:
        """Covariances of the inputs, and of outputs and inputs: the bias takes care of the means."""
        x, y = self.inputs / self.count, self.outputs / self.count
        return (
            self.squares / self.count - x[:, :, None] * x[:, None, :],
            self.products / self.count - y[:, :, None] * x[:, None, :],
        )

    def pulls(self, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """How strongly each group's weights are to be held: float64 [groups].

        What the float weights leave of the outputs is noise, and a weight is believed to move by about one step of its
        scale; this is then the ridge of the most likely weights (A. Hoerl, R. Kennard 1970, "Ridge Regression").
        Where there are few places, it keeps the layer from learning their noise by heart.
        """
        covariance, wanted = self.centred()
        variance = self.powers / self.count - np.square(self.outputs / self.count)
        noise = variance + ((weights @ covariance - 2 * wanted) * weights).sum(axis=2)
        pulls: np.ndarray = np.maximum(noise / np.square(scales), 0).mean(axis=1) / self.count
        pulls += _RIDGE * np.trace(covariance, axis1=1, axis2=2) / covariance.shape[1]
        return pulls


def fan_in(model: onnx.ModelProto, layer: str) -> int:
    """How many inputs one output of a Conv or Gemm depends on."""
    graph = Graph(model)
    node = graph.producers[layer]
    return int(np.prod(graph.initializers[node.input[1]].dims)) // graph.constant(node.input[2]).size


def learn_rounding(
    model: onnx.ModelProto, quantized: onnx.ModelProto, layer: str, images: np.ndarray, wanted: onnx.ModelProto
) -> onnx.ModelProto:
    """Choose one layer's integers and bias for the least squared error of its output.

    Args:
        model: the float graph; it is not changed.
        quantized: what `quantize` made of it.
        layer: first output of a Conv or Gemm with a bias, one of `quantized_layers`, of at most MAX_INPUTS inputs.
        images: what the graph's input takes, [n, ...].
        wanted: the float graph whose output of the same layer is to be met.

    Returns:
        The float graph with weights that `quantize` rounds to the chosen integers: multiples of their channel's scale,
        the largest of each channel left as it is, so that the scale is found again.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(made)
    node = graph.producers[layer]
    axis = output_axis(node)
    stored = graph.constant(node.input[1])
    rows = np.moveaxis(stored, axis, 0)
    groups = int(attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    weights = rows.reshape(groups, rows.shape[0] // groups, -1).astype(np.float64)
    scales = weight_scales(rows).astype(np.float64).reshape(groups, -1)
    moments = Moments.none(groups, weights.shape[2], weights.shape[1])
    _measure(node, moments, quantized, wanted, images)
    problems = zip(weights, scales, *moments.centred(), moments.pulls(weights, scales), strict=True)
    chosen = np.stack([least_error(*problem) for problem in problems]) * scales[:, :, None]
    means = moments.inputs / moments.count
    bias = moments.outputs / moments.count - (chosen @ means[:, :, None])[:, :, 0]
    array = np.moveaxis(chosen.reshape(rows.shape), 0, axis)
    for name, value in ((node.input[1], array), (node.input[2], bias.reshape(graph.constant(node.input[2]).shape))):
        value32 = np.ascontiguousarray(value, np.float32)
        graph.initializers[name].CopyFrom(numpy_helper.from_array(value32, name))
    return made


def least_error(
    weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray, wanted: np.ndarray, pull: float
) -> np.ndarray:
    """Integers whose outputs come nearest to the wanted ones, never farther from them than the nearest integers'.

    Minimises trace((W - V) C (W - V)') for W = scales * integers, where V C = wanted, plus `pull` times the squared
    distance from `weights`.

    Args:
        weights: float64 [outputs, inputs].
        scales: float64 [outputs].
        covariance: of the inputs, C: float64 [inputs, inputs].
        wanted: covariance of the wanted outputs and the inputs: float64 [outputs, inputs].
        pull: zero or more.

    Returns:
        float64 [outputs, inputs], whole numbers from -127 to 127.
    """
    step = scales[:, None]
    nearest: np.ndarray = np.clip(np.rint(weights / step), -_LIMIT, _LIMIT)
    if not covariance.any():  # nothing ever reaches the layer
        return nearest
    matrix = covariance + pull * np.eye(len(covariance))
    target = wanted + pull * weights
    # The largest weight of a channel makes its scale.
    fixed = np.zeros(weights.shape, bool)
    np.put_along_axis(fixed, np.abs(weights).argmax(axis=1)[:, None], True, axis=1)
    solved = np.clip(np.rint(np.linalg.solve(matrix, target.T).T / step), -_LIMIT, _LIMIT)
    best: np.ndarray
    best, least = nearest, _error(nearest * step, matrix, target)
    for start in (nearest, np.where(fixed, nearest, solved)):
        found = _descend(start.copy(), step, matrix, target, fixed)
        error = _error(found * step, matrix, target)
        best = np.where((error < least)[:, None], found, best)
        least = np.minimum(error, least)
    return best


def _error(weights: np.ndarray, matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The quadratic form for each output, up to a constant."""
    errors: np.ndarray = ((weights @ matrix - 2 * target) * weights).sum(axis=1)
    return errors


def _descend(
    integers: np.ndarray, step: np.ndarray, matrix: np.ndarray, target: np.ndarray, fixed: np.ndarray
) -> np.ndarray:
    """Move one input's integers at a time, of all outputs at once, to where the error is least; in place."""
    for _ in range(_SWEEPS):
        moved = False
        for start in range(0, len(matrix), _BLOCK):
            columns = slice(start, start + _BLOCK)
            slope = (integers * step) @ matrix[:, columns] - target[:, columns]
            for index in range(slope.shape[1]):
                at = start + index
                to = np.rint(integers[:, at] - slope[:, index] / (matrix[at, at] * step[:, 0]))
                to = np.where(fixed[:, at], integers[:, at], np.clip(to, -_LIMIT, _LIMIT))
                change = to - integers[:, at]
                if change.any():
                    moved = True
                    slope += (change * step[:, 0])[:, None] * matrix[at, columns]
                    integers[:, at] = to
        if not moved:
            break
    return integers


def _measure(
    node: onnx.NodeProto, moments: Moments, quantized: onnx.ModelProto, wanted: onnx.ModelProto, images: np.ndarray
) -> None:
    """Run both networks up to a layer, and take in what it reads in the one and computes in the other."""
    layer = node.output[0]
    graph, reads, _ = probed(quantized, layer)
    kernel = tuple(Graph(wanted).initializers[Graph(wanted).producers[layer].input[1]].dims[2:])
    most = -(-ROWS // len(images))
    pairs = zip(run(graph, [reads], images), run(wanted, [layer], images), strict=True)
    for number, ((values,), (results,)) in enumerate(pairs):
        places = _places(node, kernel, values, results, most, number * BATCH)
        read, computed = (np.concatenate(side) for side in zip(*places, strict=True))
        moments.add(read, computed)


def _places(
    node: onnx.NodeProto, kernel: tuple[int, ...], values: np.ndarray, results: np.ndarray, most: int, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a layer reads, [places, channels, ...kernel], and computes, [places, outputs], at places of each image.

    Args:
        node: the layer.
        kernel: its size.
        values: what it reads, [images, channels, ...].
        results: what it computes, [images, outputs, ...].
        most: places of an image.
        first: number of the first image: the places are evenly spread, and elsewhere in each image.
    """
    if node.op_type == "Gemm":
        yield values, results
        return
    spatial = len(kernel)
    strides, dilations = (attribute(node, name, [1] * spatial) for name in ("strides", "dilations"))
    pads = attribute(node, "pads", [0] * 2 * spatial)
    around = [(0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)]
    spans = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    taken = tuple(slice(None, None, stride) for stride in (1, *strides, *dilations))
    for number, (value, result) in enumerate(zip(values, results, strict=True)):
        windows = sliding_window_view(np.pad(value, around), spans, axis=tuple(range(1, spatial + 1)))[taken]
        total = int(np.prod(result.shape[1:]))
        chosen = (np.arange(min(most, total)) * total // min(most, total) + first + number) % total
        at: tuple[Any, ...] = (slice(None), *np.unravel_index(chosen, result.shape[1:]))
        yield np.moveaxis(windows[at], 1, 0), np.moveaxis(result[at], 1, 0)
