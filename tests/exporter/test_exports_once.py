"""What the tests of the exporter do otherwise than users."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from tests.exporter.exports_once import Once
from tests.exporter.onnx_runs import run
from tests.exporter.small_nets import PREPROCESS


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)
        self.times = 2.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mean((2, 3))) * self.times


def network(module: type[Scaled] = Scaled) -> Scaled:
    torch.manual_seed(0)
    return module()


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> Once:
    made = Once(torch.onnx.export.export)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.onnx, "export", made)
    return made


def graph(module: nn.Module, **options: Any) -> onnx.ModelProto:
    return onnx_from_torch(module, PREPROCESS, **{"uint8_input": False, **options})


def test_the_same_network_is_traced_once_and_gives_the_same_bytes(once: Once) -> None:
    first, again = graph(network()), graph(network())
    assert once.taken == 1
    assert again.SerializeToString() == first.SerializeToString()
    graph(network(), uint8_input=True)  # pixels are our part
    assert once.taken == 2


def test_another_network_is_traced_anew(once: Once, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_weight(module: Scaled) -> None:
        module.fc.weight.data[0, 0] += 1

    def other_attribute(module: Scaled) -> None:
        module.times = 3.0

    def hooked(module: Scaled) -> None:
        module.fc.register_forward_hook(lambda *called: called[-1] + 1)

    def other_code(_: Scaled) -> None:
        monkeypatch.setattr(Scaled, "forward", lambda self, images: self.fc(images.mean((2, 3)) + 1))

    images = np.ones((2, 3, 32, 32), np.float32)
    graph(network())
    changes: list[Callable[[Scaled], None]] = [other_weight, other_attribute, hooked, other_code]
    for change in changes:
        module = network()
        change(module)
        with torch.no_grad():
            expected = module(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(run(graph(module), images), expected, rtol=1e-5, err_msg=change.__name__)
    graph(network(), opset=21)
    assert once.taken == 0


def test_pytorch_computes_with_one_thread_whichever_tests_are_read_before() -> None:
    assert torch.get_num_threads() == 1
