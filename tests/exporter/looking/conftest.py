"""Networks of three layers, and pictures of 24 pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch
from convoynet.exporter.looking.opened import Opened

SIZE = (24, 20)
PREPROCESS = Preprocess(SIZE, SIZE, (0.5,) * 3, (0.25,) * 3)


def opened(network: nn.Module, name: str = "net", preprocess: Preprocess = PREPROCESS, classes: int = 4) -> Opened:
    """A network as the command opens it."""
    network.eval().requires_grad_(False)
    trace = trace_from_torch(name, network, (preprocess.channels, *preprocess.size))
    labels = [f"class {index}" for index in range(classes)]
    return Opened(name, "made", network, dict(network.named_modules()), trace, preprocess, "the test's", labels)


class Net(nn.Module):
    """A stride, a shortcut that is added in place, a pooling, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        before = self.relu(self.stem(x))
        x = self.block(before)
        x += before
        x = self.last(self.pool(self.relu(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@pytest.fixture(scope="session")
def network() -> Opened:
    torch.manual_seed(0)
    return opened(Net())


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for index, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{index}.png")
    return folder
