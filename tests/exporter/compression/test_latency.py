import math

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convoynet.exporter.compression.latency import seconds_of, seconds_of_module
from convoynet.exporter.compression.layer_graph import layer_graph
from convoynet.exporter.errors import BadInput
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from tests.exporter.onnx_runs import run
from tests.exporter.small_nets import PREPROCESS


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5))


def test_times_are_positive_and_finite() -> None:
    pixels = onnx_from_torch(tiny_net(), PREPROCESS, uint8_input=True)
    layer = layer_graph([nn.Linear(64, 32)], (1, 64))
    found = seconds_of([pixels, pixels.SerializeToString(), layer], batch=2, threads=1, rounds=3)
    assert len(found) == 3
    assert all(0 < seconds < math.inf for seconds in found)


def test_a_network_is_exported_and_timed() -> None:
    assert 0 < seconds_of_module(tiny_net(), PREPROCESS, task="classification", threads=1) < math.inf


def test_a_graph_that_does_not_run_is_told() -> None:
    with pytest.raises(BadInput, match="cannot time this graph"):
        seconds_of([onnx.ModelProto()])


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(12, 7), nn.Linear(7, 5, bias=False)], (1, 12)),
        ([nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 3, 1, bias=False)], (1, 4, 9, 11)),
        ([nn.Conv2d(8, 8, (1, 3), padding=(0, 2), dilation=(1, 2), groups=4)], (1, 8, 6, 6)),
        ([nn.Conv2d(4, 4, 3, padding="same")], (1, 4, 5, 5)),
        ([nn.Conv2d(4, 4, 3, padding="valid")], (1, 4, 5, 5)),
    ],
)
def test_the_graph_of_some_layers_computes_them(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.no_grad():
        wanted = nn.Sequential(*layers)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(layer_graph(layers, shape), x), wanted, rtol=1e-4, atol=1e-5)
