"""The first tensor that diverges is the one that was made wrong, in either target's graph."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence.divergence import EXACT_DB, THRESHOLD_DB, divergence, first_apart, plot
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.quantization.tensorrt_reading import as_tensorrt_reads
from tests.exporter.onnx_runs import run, signal_to_noise_db
from tests.exporter.small_nets import PREPROCESS, pixels, small_net


@pytest.fixture(scope="module")
def exact() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def ranges(exact: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(exact, [pixels(32)], "minmax")


def test_a_graph_does_not_part_from_itself(exact: onnx.ModelProto) -> None:
    errors = divergence(exact, exact, pixels(2))
    assert {error.sqnr_db for error in errors} == {EXACT_DB}
    assert first_apart(errors) is None
    layers = [node.output[0] for node in Graph(exact) if node.op_type in {"Conv", "Gemm"}]
    assert len(errors) >= len(layers)
    assert {error.layer for error in errors if error.tensor in layers} <= set(layers)
    assert all(error.layer in {"", *layers} for error in errors)
    assert errors[-1].layer


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_quantization_moves_every_tensor_a_little(
    exact: onnx.ModelProto, ranges: dict[str, Range], target: str, tmp_path: Path
) -> None:
    errors = divergence(exact, quantize(exact, ranges, target), pixels(4))
    assert first_apart(errors) is None
    assert THRESHOLD_DB < {error.tensor: error.sqnr_db for error in errors}["logits"] < EXACT_DB
    plot(errors, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_first_tensor_that_diverges_is_the_one_whose_weights_were_broken(exact: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(exact)
    graph = Graph(broken)
    convolutions = [node for node in graph if node.op_type == "Conv"]
    victim = convolutions[len(convolutions) // 2]
    swapped = graph.constant(victim.input[1])[::-1]
    graph.initializers[victim.input[1]].CopyFrom(numpy_helper.from_array(swapped.copy(), victim.input[1]))
    found = first_apart(divergence(exact, broken, pixels(2)))
    assert found is not None
    names = [node.output[0] for node in graph]
    followers = {reader.output[0] for reader in graph.readers(victim.output[0])}
    assert found.tensor in {victim.output[0]} | followers
    assert names.index(found.tensor) >= names.index(victim.output[0])


def test_tensorrt_reads_the_graph_for_gpus_as_it_is_meant(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    graph = quantize(exact, ranges, "gpu")
    meant, read = run(graph, pixels(4)), run(as_tensorrt_reads(graph), pixels(4))
    np.testing.assert_array_equal(meant, read)


def test_tensorrt_reads_uint8_wrongly(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    unsigned = quantize(exact, {name: Range(0.0, max(span.high, 1e-3)) for name, span in ranges.items()}, "cpu")
    meant, read = run(unsigned, pixels(4)), run(as_tensorrt_reads(unsigned), pixels(4))
    assert signal_to_noise_db(meant, read) < THRESHOLD_DB


def test_a_zero_point_has_no_reading(exact: onnx.ModelProto) -> None:
    spans = calibrate(exact, [pixels(4)], "minmax")
    shifted = {name: Range(-1.0, max(span.high, 1.0)) for name, span in spans.items()}
    with pytest.raises(BadInput, match="--target gpu"):
        as_tensorrt_reads(quantize(exact, shifted, "cpu"))
