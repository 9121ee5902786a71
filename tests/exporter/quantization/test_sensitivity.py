import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.quantize import layers, quantize
from convoynet.exporter.quantization.sensitivity import LayerCost, plot, sensitivity
from tests.exporter.onnx_runs import run, signal_to_noise_db
from tests.exporter.quantization.test_quantize import Proposals
from tests.exporter.small_nets import PREPROCESS, SmallNet, pixels, settled, small_net


@pytest.fixture(scope="module")
def exact() -> onnx.ModelProto:
    return onnx_from_torch(small_net(), PREPROCESS, uint8_input=True)


@pytest.fixture(scope="module")
def ranges(exact: onnx.ModelProto) -> dict[str, Range]:
    return calibrate(exact, [pixels(32)], "minmax")


@pytest.mark.parametrize(("target", "number_format"), [("cpu", "int8"), ("gpu", "int8"), ("gpu", "fp8")])
def test_each_layer_is_measured_as_the_target_quantizes_it(
    exact: onnx.ModelProto, ranges: dict[str, Range], target: str, number_format: str
) -> None:
    images = pixels(16)
    costs = sensitivity(exact, ranges, images, target, Quiet(), number_format)
    names = layers(exact, target, number_format)
    assert tuple(cost.layer for cost in costs) == names
    assert {cost.measured_at for cost in costs} == {"logits"}
    assert all(15 < cost.sqnr_db < 80 for cost in costs)
    if number_format == "int8":
        alone = quantize(exact, ranges, target, names[1:])
        assert costs[0].sqnr_db == pytest.approx(signal_to_noise_db(run(exact, images), run(alone, images)), abs=0.05)
    assert costs == sensitivity(exact, ranges, images, target, Quiet(), number_format)


def test_costs_name_the_layers_and_count_their_work(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    costs = {cost.name: cost for cost in sensitivity(exact, ranges, pixels(4), "cpu", Quiet())}
    assert costs["stem.0"].macs == 16 * 27 * 32 * 32
    assert costs["depthwise.0"].macs == 32 * 9 * 16 * 16
    assert (costs["head"].operator, costs["head"].macs, costs["head"].parameters) == ("Gemm", 640, 660)
    assert json.loads(json.dumps(costs["head"].to_json()))["sqnr_db"] == round(costs["head"].sqnr_db, 2)
    assert costs["head"].noise == pytest.approx(10 ** (-costs["head"].sqnr_db / 10))


def test_a_layer_with_a_ruined_range_is_the_worst() -> None:
    torch.manual_seed(0)
    exact = onnx_from_torch(settled(SmallNet(), PREPROCESS.normalize(pixels(16))), PREPROCESS, uint8_input=True)
    ranges = calibrate(exact, [pixels(16)], "minmax")
    name = layers(exact, "gpu")[-2]
    read = next(node.input[0] for node in exact.graph.node if node.output[0] == name)
    ranges[read] = Range(-1000.0, 1000.0)
    worst = min(sensitivity(exact, ranges, pixels(8), "gpu", Quiet()), key=lambda cost: cost.sqnr_db)
    assert worst.layer == name


def test_without_logits_each_layer_is_measured_at_its_own_output() -> None:
    torch.manual_seed(0)
    exact = onnx_from_torch(Proposals().eval(), PREPROCESS, uint8_input=False, task="detection")
    images = PREPROCESS.normalize(pixels(8))
    ranges = calibrate(exact, [images], "minmax")
    costs = sensitivity(exact, ranges, images, "cpu", Quiet())
    assert [cost.name for cost in costs] == ["trunk", "seen"]  # the others are heads, which stay float
    assert all(cost.measured_at == cost.layer and 25 < cost.sqnr_db < 60 for cost in costs)


def test_no_images_and_no_layers(exact: onnx.ModelProto, ranges: dict[str, Range]) -> None:
    with pytest.raises(BadInput, match="needs images"):
        sensitivity(exact, ranges, pixels(4)[:0], "cpu", Quiet())
    tiny = onnx_from_torch(torch.nn.Flatten(), PREPROCESS, uint8_input=False)
    assert sensitivity(tiny, {}, PREPROCESS.normalize(pixels(1)), "cpu", Quiet()) == []


def test_the_plot_of_80_layers_is_legible_and_the_same_each_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    costs = [
        LayerCost(f"t{i}", f"blocks.{i}.conv.pointwise", "Conv", float(rng.uniform(15, 60)), "logits", 10**6, 9)
        for i in range(80)
    ]
    plot(costs, tmp_path / "a.png", "net")
    plot(costs, tmp_path / "b.png", "net")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height / 80 > 12  # pixels for each row: its text has 8
