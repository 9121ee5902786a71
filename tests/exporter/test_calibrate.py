import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from exporter import calibrate as calibration
from exporter.calibrate import BINS, Histogram, Range, calibrate
from exporter.errors import BadInput
from exporter.onnx_from_torch import onnx_from_torch
from exporter.quantize import quantize
from tests.exporter.onnx_runs import run
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return pixels(13)


def conv_graph(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """x [batch, 2, 4, 4] -> `nodes` -> "made" -> 1x1 Conv -> y; "made" is what gets quantized."""
    kernel = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "kernel")
    shape = ["batch", 2, 4, 4]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Conv", ["made", "kernel"], ["y"])],
        "conv",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [kernel],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_minmax_is_the_extremes_of_what_the_graph_computes(graph: onnx.ModelProto, images: NDArray[np.uint8]) -> None:
    ranges = calibrate(graph, [images[:8], images[8:]], "minmax")
    for name, span in ranges.items():
        probe = onnx.ModelProto()
        probe.CopyFrom(graph)
        probe.graph.output.insert(0, helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        values = run(probe, images)
        np.testing.assert_allclose((span.low, span.high), (values.min(), values.max()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", calibration.METHODS)
def test_batches_may_be_ragged_and_the_result_is_the_same(
    graph: onnx.ModelProto, images: NDArray[np.uint8], method: str
) -> None:
    together = calibrate(graph, [images], method)
    ragged = calibrate(graph, [images[:5], images[5:5], images[5:10], images[10:]], method)
    assert list(ragged) == list(together)
    for name, span in together.items():
        # The runtime sums in another order for another batch size; the counting itself is exact.
        np.testing.assert_allclose((ragged[name].low, ragged[name].high), (span.low, span.high), rtol=1e-3, atol=1e-4)
    assert calibrate(graph, [images], method) == together


def test_one_calibration_serves_both_targets(graph: onnx.ModelProto, images: NDArray[np.uint8]) -> None:
    ranges = calibrate(graph, iter([images]), "minmax")
    for target in ("cpu", "gpu"):
        quantize(graph, ranges, target)


def test_activations_are_computed_in_bounded_portions(
    graph: onnx.ModelProto, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrate(graph, [images], "percentile")
    monkeypatch.setattr(calibration, "_MAX_BYTES", 1)
    portions: list[int] = []
    add = Histogram.add

    def counted(self: Histogram, values: Floats) -> None:
        portions.append(len(values))
        add(self, values)

    monkeypatch.setattr(Histogram, "add", counted)
    one_by_one = calibrate(graph, [images], "percentile")
    assert set(portions) == {1}
    for name, span in expected.items():
        np.testing.assert_allclose(
            (one_by_one[name].low, one_by_one[name].high), (span.low, span.high), rtol=1e-3, atol=1e-4
        )


def test_percentile_leaves_rare_extremes_out_and_stays_inside_minmax(graph: onnx.ModelProto) -> None:
    images = pixels(24)
    wide, narrow = (calibrate(graph, [images], method) for method in ("minmax", "percentile"))
    assert all(wide[name].low <= span.low <= span.high <= wide[name].high for name, span in narrow.items())
    assert any(span.high < 0.95 * wide[name].high for name, span in narrow.items())


# Values of many magnitudes, and so many bins to merge.
portions = st.lists(
    npst.arrays(np.float32, st.integers(0, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    min_size=1,
    max_size=6,
)


@given(portions)
@settings(max_examples=200, deadline=None)
def test_a_grown_histogram_equals_one_that_knew_all_values(parts: list[Floats]) -> None:
    grown, at_once = Histogram(), Histogram()
    for part in parts:
        grown.add(part)
    at_once.add(np.concatenate(parts))
    assert len(grown.counts) <= BINS
    assert (grown.exponent, grown.first, grown.low, grown.high) == (
        at_once.exponent,
        at_once.first,
        at_once.low,
        at_once.high,
    )
    np.testing.assert_array_equal(grown.counts, at_once.counts)
    assert grown.counts.sum() == sum(map(len, parts))


@pytest.mark.parametrize("draw", [np.random.default_rng(0).normal, np.random.default_rng(1).laplace])
def test_percentiles_of_a_histogram_are_numpys(draw: Callable[..., NDArray[np.float64]]) -> None:
    values = draw(2.0, 3.0, 200_000).astype(np.float32)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    span = histogram.range(99.99)
    bin_width = 2.0**histogram.exponent
    assert abs(span.low - np.percentile(values, 0.01)) <= 2 * bin_width
    assert abs(span.high - np.percentile(values, 99.99)) <= 2 * bin_width
    assert BINS / 2 <= (values.max() - values.min()) / bin_width <= BINS


@pytest.mark.parametrize("value", [0.0, 7.5, -1e-40, 3e38])
def test_a_histogram_of_one_value_has_its_range(value: float) -> None:
    histogram = Histogram()
    histogram.add(np.full(5, value, np.float32))
    exact = float(np.float32(value))
    assert histogram.range(99.99) == Range(exact, exact)


@pytest.mark.parametrize("method", calibration.METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_activation_that_is_not_finite_is_named(method: str, bad: float) -> None:
    model = conv_graph([helper.make_node("Identity", ["x"], ["made"])])
    batch = np.zeros((3, 2, 4, 4), np.float32)
    batch[1, 1, 2, 3] = bad  # in the middle: a NaN there is lost in ONNX Runtime's ReduceMin
    with pytest.raises(BadInput, match="'made' is not finite"):
        calibrate(model, [batch], method)


@pytest.mark.parametrize("batches", [[], [np.zeros((0, 2, 4, 4), np.float32)]])
def test_no_images_is_an_error(batches: list[Floats]) -> None:
    model = conv_graph([helper.make_node("Identity", ["x"], ["made"])])
    with pytest.raises(BadInput, match="no calibration images"):
        calibrate(model, batches, "minmax")


@pytest.mark.parametrize(
    "batch", [np.zeros((1, 2, 4, 4)), np.zeros((1, 2, 4, 5), np.float32), np.zeros((), np.float32)]
)
def test_a_batch_that_does_not_fit_the_input_is_an_error(batch: NDArray[np.generic]) -> None:
    model = conv_graph([helper.make_node("Identity", ["x"], ["made"])])
    with pytest.raises(BadInput, match="input 'x' takes float32"):
        calibrate(model, [batch], "minmax")


def test_an_unknown_method_lists_the_known(graph: onnx.ModelProto) -> None:
    with pytest.raises(BadInput, match="'guess': use minmax or percentile"):
        calibrate(graph, [], "guess")
