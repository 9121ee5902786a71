"""The layers of an exported graph have the names of the network's modules."""

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from tests.exporter.onnx_runs import run
from tests.exporter.small_nets import PREPROCESS, logits_of, pixels, settled, small_net


def layers(graph: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in graph.graph.node if node.op_type in ("Conv", "Gemm", "BatchNormalization")]


def test_layers_are_called_as_in_pytorch() -> None:
    graph = onnx_from_torch(small_net(), PREPROCESS, uint8_input=False)
    names = ["stem.0", "wide.0", "project.0", "again.0", "depthwise.0", "left.0", "right.0", "mix.0", "logits"]
    assert sorted(layers(graph)) == sorted(names)
    assert not [name for node in graph.graph.node for name in node.output if name.startswith("getitem")]


class Awkward(nn.Module):
    """Names that the graph has for other tensors, one layer that is used twice, and one under another."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.classes = nn.Conv2d(8, 8, 1)
        self.classes.q = nn.Conv2d(8, 8, 1)
        self.pixels = nn.BatchNorm2d(8)
        self.relu = nn.Conv2d(8, 8, 1)
        self.scaled = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(self.input(x)))))
        x = self.relu(torch.relu(self.classes.q(torch.relu(self.classes(x)))))
        x = torch.relu(self.pixels(torch.relu(x)))
        logits: Tensor = self.scaled(x.mean((2, 3)))
        return logits


def test_names_that_are_taken() -> None:
    torch.manual_seed(0)
    model = settled(Awkward(), PREPROCESS.normalize(pixels(8)))
    expected = logits_of(model, pixels(2))
    graph = onnx_from_torch(model, PREPROCESS, uint8_input=True)
    names = [name for node in graph.graph.node for name in node.output]
    assert len(names) == len(set(names))
    assert "twice" in names
    np.testing.assert_allclose(run(graph, pixels(2)), expected, rtol=1e-4, atol=1e-4)
    small = quantize(graph, calibrate(graph, [pixels(8)], "minmax"), "cpu")
    onnx.checker.check_model(small, full_check=True)
    assert np.abs(run(small, pixels(2)) - expected).max() < 0.2 * np.abs(expected).max()
