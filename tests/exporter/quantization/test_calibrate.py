import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization import calibrate as calibration
from convoynet.exporter.quantization import taps
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import BINS, Histogram, Range, _divergences
from convoynet.exporter.quantization.output_error import joint_errors, output_errors
from convoynet.exporter.quantization.quantize import quantize
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


@pytest.mark.parametrize(
    ("sizes", "most_bytes", "wanted"),
    [
        ([40] * 9, 2**25, [160, 160, 40]),
        ([5, 0, 140, 1], 2**25, [145, 1]),
        ([100], 2**25, [100]),
        ([1, 1, 1], 8, [2, 1]),
        ([0], 2**25, [0]),
        ([], 2**25, []),
    ],
)
def test_batches_are_counted_in_groups_of_bounded_size(
    sizes: list[int], most_bytes: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_GROUP_BYTES", most_bytes)
    images = np.arange(sum(sizes), dtype=np.float32)
    groups = list(calibration._grouped(iter(np.split(images, np.cumsum(sizes)[:-1]) if sizes else [])))
    assert [len(group) for group in groups] == wanted
    if groups:
        np.testing.assert_array_equal(np.concatenate(groups), images)


def test_one_calibration_serves_both_targets(graph: onnx.ModelProto, images: NDArray[np.uint8]) -> None:
    ranges = calibrate(graph, iter([images]), "minmax")
    for target in ("cpu", "gpu"):
        quantize(graph, ranges, target)


def test_activations_are_computed_in_bounded_portions(
    graph: onnx.ModelProto, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrate(graph, [images], "percentile")
    monkeypatch.setattr(taps, "_PORTION_BYTES", 1)
    monkeypatch.setattr(taps, "_SMALL_BYTES", 0)
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
@settings(max_examples=200)
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
    span = histogram.percentile(99.99)
    bin_width = 2.0**histogram.exponent
    assert abs(span.low - np.percentile(values, 0.01)) <= 2 * bin_width
    assert abs(span.high - np.percentile(values, 99.99)) <= 2 * bin_width
    assert BINS / 2 <= (values.max() - values.min()) / bin_width <= BINS


@pytest.mark.parametrize("value", [0.0, 7.5, -1e-40, 3e38])
def test_a_histogram_of_one_value_has_its_range(value: float) -> None:
    histogram = Histogram()
    histogram.add(np.full(5, value, np.float32))
    exact = float(np.float32(value))
    assert histogram.percentile(99.99) == Range(exact, exact)


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
    with pytest.raises(BadInput, match="'guess': use minmax, percentile, entropy, mse or auto"):
        calibrate(graph, [], "guess")


def counted(*parts: Sequence[float] | NDArray[np.generic]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


BELL = np.random.default_rng(0).normal(0, 1, 1_000_000)
EVEN = np.random.default_rng(1).uniform(0, 1, 200_000)
# What clips where least is lost.
SEARCHES = pytest.mark.parametrize("search", [Histogram.entropy, Histogram.mse])


@SEARCHES
@pytest.mark.parametrize("sides", [1, 2])
def test_a_lonely_outlier_is_clipped_and_minmax_keeps_it(search: Callable[[Histogram], Range], sides: int) -> None:
    bell = BELL if sides == 2 else np.maximum(BELL, 0)
    histogram = counted(bell, [20.0])
    span = search(histogram)
    assert 3 < span.high < 8
    # What is behind a ReLU starts at 0, and nothing is below it to be clipped.
    assert span.low == 0 if sides == 1 else -8 < span.low < -3
    assert histogram.minmax() == Range(float(np.float32(bell.min())), 20.0)


@SEARCHES
@pytest.mark.parametrize("shift", [0.0, -0.5, -1.0, 3.0])
def test_evenly_spread_values_are_not_clipped(search: Callable[[Histogram], Range], shift: float) -> None:
    histogram = counted(EVEN + shift)
    span = search(histogram)
    assert span.low == pytest.approx(histogram.low, abs=0.02)
    assert span.high == pytest.approx(histogram.high, abs=0.02)


@SEARCHES
@pytest.mark.parametrize(
    "values", [[0.0] * 5, [7.5] * 5, [-2.0], [0.0, 1.0], [-1.0, 3.0], [-3.0, -1.0], [2.0, 2.001], [-1e-40], [3e38]]
)
def test_one_or_two_values_are_kept(search: Callable[[Histogram], Range], values: list[float]) -> None:
    span = search(counted(values))
    exact = np.asarray(values, np.float32)
    largest = float(np.abs(exact).max())
    np.testing.assert_allclose((span.low, span.high), (exact.min(), exact.max()), rtol=0, atol=largest / 500)


@SEARCHES
def test_a_search_does_not_depend_on_how_the_values_came(search: Callable[[Histogram], Range]) -> None:
    assert search(counted(BELL)) == search(counted(BELL[70_000:], BELL[:5], [], BELL[5:70_000]))


def test_mse_is_the_least_error_that_trying_ranges_on_the_values_finds() -> None:
    values = np.append(BELL[:200_000] - 0.3, [9.0, -4.0, 0.0]).astype(np.float32)
    found = counted(values).mse()

    def error(limit: float) -> float:
        step = limit / 127
        return float(np.square(values - np.clip(np.rint(values / step), -127, 127) * step).mean())

    assert error(max(-found.low, found.high)) < 1.01 * min(error(limit) for limit in np.linspace(0.5, 9, 86))
    assert found.high < 8


@pytest.mark.parametrize("high", [1.0, 2.0, 4.0])
def test_the_error_of_a_range_is_what_rounding_and_clipping_make(high: float) -> None:
    values = np.maximum(BELL, -0.5).astype(np.float32)
    step = high / 127
    rounded = np.rint(np.clip(values, -0.25, high) / step) * step
    exact = float(np.square(values - np.clip(rounded, -0.25, high)).mean())
    assert counted(values).squared_error(Range(-0.25, high)) == pytest.approx(exact, rel=0.02)


def test_the_divergence_is_that_of_the_distributions_written_out() -> None:
    counts = np.random.default_rng(2).poisson(200 * np.exp(-np.arange(300) / 40))
    sizes = np.array([128, 150, 256, 299, 300])
    for size, found in zip(sizes, _divergences(counts, sizes), strict=True):
        p = counts[:size].astype(np.float64)
        p[-1] += counts[size:].sum()
        q = np.zeros(size)
        for level in range(128):
            inside = [j for j in range(size) if j * 128 // size == level and p[j] > 0]
            q[inside] = sum(counts[j] for j in inside) / max(len(inside), 1)
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        expected = np.inf if (q[used] == 0).any() else float((p[used] * np.log(p[used] / q[used])).sum())
        assert found == pytest.approx(expected, abs=1e-9)


@given(portions, portions)
@settings(max_examples=100)
def test_merged_histograms_are_one_of_all_values(some: list[Floats], others: list[Floats]) -> None:
    merged, other, at_once = counted(*some), counted(*others), counted(*some, *others)
    merged.merge(other)
    np.testing.assert_array_equal(merged.counts, at_once.counts)
    for name in ("exponent", "first", "low", "high", "zeros"):
        assert getattr(merged, name) == getattr(at_once, name) or not len(at_once.counts)


def test_a_hundred_tensors_take_seconds_at_most() -> None:
    histogram = counted(BELL)
    began = time.process_time()
    for _ in range(10):
        histogram.entropy()
        histogram.mse()
    assert time.process_time() - began < 2


def clipped_conv(bound: float, output: str) -> onnx.ModelProto:
    """x -> 1x1 Conv that adds the channels -> at most `bound`."""
    model = conv_graph([])
    model.graph.node[0].input[0] = "x"
    model.graph.node.append(helper.make_node("Min", ["y", "bound"], [output]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(bound, np.float32), "bound"))
    model.graph.output[0].name = output
    return model


def heavy_tails(images: int) -> Floats:
    """Values from 0 to 1, and one fifty times as large in each of the first two images; the second is held out."""
    values = np.random.default_rng(3).uniform(0, 1, (images, 2, 4, 4)).astype(np.float32)
    values[:2, 0, 0, 0] = 50
    return values


def test_auto_finds_out_what_the_logits_need() -> None:
    """The same values; whether the large ones may be cut off depends on what the network makes of them."""
    values = heavy_tails(800)
    plain, clipped = (calibrate(clipped_conv(bound, "logits"), [values], "auto")["x"] for bound in (1e9, 1.0))
    assert plain.high == pytest.approx(50, rel=0.02)
    assert (clipped.method, clipped.high) == ("percentile", pytest.approx(1, rel=0.1))
    # Without logits the values themselves decide.
    assert calibrate(clipped_conv(1.0, "scores"), [values], "auto")["x"].high == pytest.approx(50, rel=0.02)


def test_auto_takes_one_method_for_all_where_the_choices_together_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    def misled(_: object, output: str, batches: object, candidates: dict[str, list[Range]]) -> dict[str, list[float]]:
        return {name: [float(span.method != "percentile") for span in spans] for name, spans in candidates.items()}

    monkeypatch.setattr(calibration, "output_errors", misled)
    assert calibrate(clipped_conv(1e9, "logits"), [heavy_tails(800)], "auto")["x"].high == pytest.approx(50, rel=0.02)
    clipped = calibrate(clipped_conv(1.0, "logits"), [heavy_tails(800)], "auto")["x"]
    assert clipped.method == "percentile"


def test_the_joint_error_is_that_of_both_targets_graphs(graph: onnx.ModelProto, images: NDArray[np.uint8]) -> None:
    good = calibrate(graph, [images], "minmax")
    bad = {name: Range(span.low / 4, span.high / 4) for name, span in good.items()}
    (output,) = [value.name for value in graph.graph.output]
    errors = joint_errors(graph, output, [images[:8], images[8:]], [good, bad])
    assert errors[0] < errors[1]
    of_targets = [np.square(run(quantize(graph, good, t), images) - run(graph, images)).sum() for t in ("cpu", "gpu")]
    assert errors[0] == pytest.approx(math.sqrt(math.prod(of_targets)), rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("output", ["logits", "scores"])
def test_auto_does_with_few_images_and_the_range_is_made_from_all(count: int, output: str) -> None:
    values = heavy_tails(count)
    values[-1, 1, 1, 1] = 64
    model = clipped_conv(1e9, output)
    span = calibrate(model, [values], "auto")["x"]
    assert span == calibrate(model, [values], span.method)["x"]
    assert span == calibrate(model, [values[:1], values[1:]], "auto")["x"]


def test_auto_keeps_a_bounded_sample_that_is_evenly_spread() -> None:
    sample = calibration._Sample(4)
    list(sample.watch(np.split(np.arange(120.0).reshape(-1, 1), 10)))
    kept = [float(image[0]) for image in sample.images]
    assert kept == [1, 33, 65, 97]


@pytest.mark.parametrize("method", calibration.METHODS)
def test_a_range_says_what_chose_it(graph: onnx.ModelProto, images: NDArray[np.uint8], method: str) -> None:
    chosen = {span.method for span in calibrate(graph, [images], method).values()}
    assert chosen <= set(calibration.METHODS[:-1]) if method == "auto" else chosen == {method}


def test_the_error_of_an_output_is_that_of_the_graph_with_one_tensor_quantized() -> None:
    values = np.random.default_rng(4).uniform(0, 1, (3, 2, 4, 4)).astype(np.float32)
    spans = [Range(0, 1), Range(0, 0.5)]
    errors = output_errors(clipped_conv(1e9, "logits"), "logits", [values[:2], values[2:]], {"x": spans})
    for span, found in zip(spans, errors["x"], strict=True):
        step = np.float32(span.high / 255)
        moved = np.clip(np.rint(values / step), 0, 255) * step - values
        # Each of the two logits is the sum of both channels.
        assert found == pytest.approx(2 * float(np.square(moved.sum(axis=1)).sum()), rel=1e-3)
