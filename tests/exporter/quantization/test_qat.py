import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs.state_dicts import read
from convoynet.exporter.compression.data import TrainingImages, images_from_array
from convoynet.exporter.compression.train import Settings
from convoynet.exporter.data.images import load_images, made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.histogram import Range
from convoynet.exporter.quantization.qat import Calibrated, FakeQuantized, fine_tune, weight_scales
from convoynet.exporter.quantization.quantize import activation_scale, quantize
from convoynet.exporter.quantization.quantize import weight_scales as exact_weight_scales
from convoynet.exporter.recipe import Int8
from tests.exporter.onnx_runs import run, signal_to_noise_db
from tests.exporter.small_nets import PREPROCESS, pixels, small_net

DATA = Path(__file__).parents[4] / "shared" / "data"
TARGETS = ("cpu", "gpu")
STEP = Int8(qat_epochs=3, qat_lr=1e-3)


@cache
def graph_and_ranges(uint8_input: bool = False) -> tuple[onnx.ModelProto, dict[str, Range]]:
    graph = onnx_from_torch(small_net(), PREPROCESS, uint8_input=uint8_input)
    images = pixels(32)
    return graph, calibrate(graph, [images if uint8_input else PREPROCESS.normalize(images)], "minmax")


def training() -> TrainingImages:
    return images_from_array(made_images(64, PREPROCESS.size, 3, 5), PREPROCESS, "64 made images")


def held_out() -> TrainingImages:
    return images_from_array(made_images(32, PREPROCESS.size, 3, 6), PREPROCESS, "32 made images")


@pytest.mark.parametrize("target", TARGETS)
def test_fake_quantization_is_the_quantized_graph(target: str) -> None:
    """They differ by float rounding, which now and then moves a value by one step: far less than quantization does."""
    graph, ranges = graph_and_ranges()
    inputs = PREPROCESS.normalize(pixels(16))
    with torch.no_grad():
        fake = FakeQuantized(Calibrated(graph, ranges, target))(torch.from_numpy(inputs)).numpy()
    exact, integers = run(graph, inputs), run(quantize(graph, ranges, target), inputs)
    noise = signal_to_noise_db(exact, integers)
    assert signal_to_noise_db(integers, fake) > noise + 6
    assert abs(signal_to_noise_db(exact, fake) - noise) < 1


@pytest.mark.parametrize("target", TARGETS)
def test_training_brings_the_quantized_graph_nearer_to_the_float_one(target: str) -> None:
    graph, ranges = graph_and_ranges()
    before = graph.SerializeToString(), dict(ranges)
    trained, learned, done = fine_tune(
        Calibrated(graph, ranges, target), training(), STEP, None, Settings(held_out=held_out()), Quiet()
    )
    assert (graph.SerializeToString(), ranges) == before
    assert done["accepted"]
    assert done["sqnr_db"] > done["sqnr_db_before"] + 1
    assert done["measured_on"] == "32 made images"
    inputs = PREPROCESS.normalize(made_images(64, PREPROCESS.size, 3, 7))
    exact = run(graph, inputs)
    gained = signal_to_noise_db(exact, run(quantize(trained, learned, target), inputs)) - signal_to_noise_db(
        exact, run(quantize(graph, ranges, target), inputs)
    )
    assert gained > 1
    assert set(learned) == set(ranges)
    fake = FakeQuantized(Calibrated(trained, learned, target))
    with torch.no_grad():
        found = fake(torch.from_numpy(inputs)).numpy()
    integers = run(quantize(trained, learned, target), inputs)
    assert signal_to_noise_db(integers, found) > signal_to_noise_db(exact, integers) + 4


@pytest.mark.parametrize("target", TARGETS)
def test_learned_scales_are_those_of_the_quantized_graph(target: str) -> None:
    """The scale of every quantized tensor, to the last bit, its zero point, and the integers of every weight."""
    graph, ranges = graph_and_ranges()
    fake = FakeQuantized(Calibrated(graph, ranges, target))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in fake.named_parameters():
            if name.startswith("scale_"):
                parameter.mul_(float(rng.uniform(0.7, 1.0)))
    for tensor, span in fake.ranges().items():
        scale, grid = activation_scale(span, target), fake._grids[tensor]
        assert scale.scale == np.float32(getattr(fake, grid.scale).item())
        assert int(scale.zero_point) == grid.zero_point
    quantized = Graph(quantize(fake.write_into(graph), {**ranges, **fake.ranges()}, target))
    compared = 0
    for edge, layer in fake._weights.items():
        weight = fake.initializer(edge.tensor)
        stored = quantized.constant(f"{edge.reader}.weight.scale")
        with torch.no_grad():
            bias = fake.initializer(layer.bias) if target == "cpu" else None
            found = weight_scales(weight, layer.axis, bias, fake._scale(fake._grids[layer.activation]))
            integers = (fake._quantized_weight(weight, layer) / found).round().to(torch.int8)
        assert np.allclose(found.reshape(-1), stored, rtol=1e-6)
        assert np.mean(integers.numpy() != quantized.constant(f"{edge.reader}.weight.integers")) < 1e-3
        compared += 1
    assert compared > 5


def test_weight_scales_with_a_large_bias_and_dead_channels() -> None:
    weights = np.array([[0.5, -2.0], [0.0, 0.0], [1e-6, 1e-7]], np.float32)
    bias = np.array([0.1, 0.2, 900.0], np.float32)
    for given in (None, bias):
        expected = exact_weight_scales(weights, given, 1e-3 if given is not None else None)
        found = weight_scales(
            torch.from_numpy(weights), 0, None if given is None else torch.from_numpy(given), torch.tensor(1e-3)
        )
        assert np.allclose(found.reshape(-1), expected, rtol=1e-6)


def test_the_gradient_of_a_scale_is_that_of_the_paper() -> None:
    """Equation 3: round(v) - v inside, the bound outside."""
    graph, ranges = graph_and_ranges()
    fake = FakeQuantized(Calibrated(graph, ranges, "gpu"))
    name = next(iter(fake._grids))
    grid = fake._grids[name]
    scale = getattr(fake, grid.scale)
    step = float(scale.detach())
    x = torch.tensor([[0.3 * step, 1.6 * step, 500 * step, -500 * step]], requires_grad=True)
    edge = next(edge for edge in fake._edges if edge.tensor == name)
    fake._made.clear()
    made = fake._quantized(edge, x)
    assert torch.allclose(made, torch.tensor([[0, 2 * step, 127 * step, -128 * step]]))
    made.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    wanted = (-0.3 + 10 * 0.4 + 100 * 127 - 1000 * 128) / np.sqrt(4 * 127)
    assert float(scale.grad) == pytest.approx(wanted, rel=1e-4)


def test_a_graph_that_takes_pixels() -> None:
    graph, ranges = graph_and_ranges(uint8_input=True)
    trained, learned, done = fine_tune(
        Calibrated(graph, ranges, "cpu"), training(), replace(STEP, qat_epochs=1), None, Settings(), Quiet()
    )
    assert done["sqnr_db_before"] > 20
    assert run(quantize(trained, learned, "cpu"), pixels(2)).shape == (2, 20)


def test_what_does_not_help_is_taken_back(tmp_path: Path) -> None:
    graph, ranges = graph_and_ranges()
    settings = Settings(held_out=held_out(), checkpoint=tmp_path / "qat.pt")
    step = Int8(qat_epochs=1, qat_lr=1.0)
    trained, learned, done = fine_tune(Calibrated(graph, ranges, "gpu"), training(), step, None, settings, Quiet())
    assert not done["accepted"]
    assert done["sqnr_db"] < done["sqnr_db_before"]
    assert trained is graph
    assert learned == ranges
    assert (tmp_path / "qat.pt").exists()


def test_bad_arguments() -> None:
    graph, ranges = graph_and_ranges()
    with pytest.raises(BadInput, match="qat_epochs is 0"):
        fine_tune(Calibrated(graph, ranges, "cpu"), training(), Int8(), None, Settings(), Quiet())
    with pytest.raises(BadInput, match="target 'tpu': use cpu or gpu"):
        FakeQuantized(Calibrated(graph, ranges, "tpu"))
    with pytest.raises(BadInput, match="was not calibrated"):
        FakeQuantized(Calibrated(graph, {}, "cpu"))
    other = nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))
    with pytest.raises((BadInput, RuntimeError)):
        fine_tune(Calibrated(graph, ranges, "cpu"), training(), STEP, other, Settings(), Quiet())


@pytest.mark.slow
def test_trained_resnet20(tmp_path: Path) -> None:
    """The real network on unlabelled photographs, a single short epoch: less noise than the calibration leaves."""
    archive, weights = DATA / "cifar10_train.tar.gz", DATA / "weights" / "resnet20-12fca82f.th"
    if not archive.is_file() or not weights.is_file():
        pytest.skip("needs cifar10_train.tar.gz and weights/resnet20-12fca82f.th in ../shared/data")
    with tarfile.open(archive) as opened:
        files = sorted((member for member in opened if member.isfile()), key=lambda member: member.name)[::40]
        opened.extractall(tmp_path, members=files, filter="data")
    arch = archs.get("resnet20")
    images = load_images([tmp_path / member.name for member in files], arch.preprocess)
    network = arch.build(10)
    network.load_state_dict(read(weights).for_network({}), strict=False)
    graph = onnx_from_torch(network.eval(), arch.preprocess, uint8_input=False)
    ranges = calibrate(graph, [arch.preprocess.normalize(images[::4])], "mse")
    data = images_from_array(np.delete(images, slice(None, None, 4), axis=0), arch.preprocess, "CIFAR-10")
    settings = Settings(held_out=images_from_array(images[::4], arch.preprocess, "CIFAR-10"))
    step = Int8(qat_epochs=1, qat_lr=3e-5)
    _, _, done = fine_tune(Calibrated(graph, ranges, "gpu"), data, step, None, settings, Quiet())
    assert done["sqnr_db"] > done["sqnr_db_before"] + 0.2, done["sqnr_db"]
