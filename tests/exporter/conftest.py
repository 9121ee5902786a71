"""Settings for every test of the exporter."""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def one_table_of_operators() -> None:
    """PyTorch reads the sources of 500 operators anew in each export: a second that hundreds of exports need once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = getattr(ONNXRegistry, "from_torchlib", None)
    if made is not None:  # where a later PyTorch has no such method, the tests are slower and as true
        ONNXRegistry.from_torchlib = staticmethod(cache(made))  # type: ignore[method-assign,assignment]


@pytest.fixture(autouse=True, scope="session")
def one_list_of_operators() -> None:
    """PyTorch asks for all operators 64 times in each export, a tenth of a small one; torchvision brings the last."""
    from torch._export import utils

    ask = getattr(utils, "_materialize_cpp_cia_ops", None)
    if ask is not None:
        asked = cache(lambda _: ask())
        utils._materialize_cpp_cia_ops = lambda: asked("torchvision" in sys.modules)


@pytest.fixture(autouse=True, scope="session")
def exported_once() -> None:
    """PyTorch traces a network once in each process of tests: see exports_once.py."""
    import torch

    from tests.exporter.exports_once import Once

    torch.onnx.export = Once(torch.onnx.export)


@pytest.fixture
def exported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch traces every network of this test, as without tests."""
    import torch

    monkeypatch.setattr(torch.onnx, "export", torch.onnx.export.export)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="session")
def undrawn() -> None:
    """Exports make their figures and draw none of them, which would be a seventh of a small one."""
    from convoynet.exporter.evidence import writing
    from convoynet.exporter.pipeline import pipeline

    def write(*arguments: Any) -> list[Path]:
        from matplotlib.figure import Figure

        with patch.object(Figure, "savefig", lambda _, path, **__: Image.new("RGB", (1, 1)).save(path)):
            return writing.write(*arguments)

    pipeline.writing = SimpleNamespace(write=write)  # type: ignore[assignment]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exports of this test draw their figures."""
    from convoynet.exporter.evidence import writing
    from convoynet.exporter.pipeline import pipeline

    monkeypatch.setattr(pipeline, "writing", writing)


@pytest.fixture(autouse=True, scope="session")
def short_rounds() -> None:
    """Exports of tests time every side as often as it takes to have figures, and no longer."""
    from convoynet.exporter.evidence import speed

    speed.MIN_ROUNDS = speed.MAX_ROUNDS = 3
    speed.ROUND_SECONDS = 0.001


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits that the shipped network was not trained on, in a folder for each class."""
    from convoynet.exporter.archs import get
    from convoynet.exporter.assets import digits

    root = tmp_path_factory.mktemp("classes")
    for index, (image, label) in enumerate(zip(digits().test[:60], digits().test_labels[:60], strict=True)):
        folder = root / get("lenet5").labels()[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{index}.png")
    return root
