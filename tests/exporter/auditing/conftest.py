"""A trained network, published in float32 and in INT8, and the pictures that it was not trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from convoynet.exporter.archs import get
from convoynet.exporter.assets import digits
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, classes: Path) -> Path:
    root = tmp_path_factory.mktemp("audited")
    plain = ExportConfig("lenet5", repository=root, batch=(1, 8), target="cpu")
    run(replace(plain, name="digits"), Quiet())
    run(replace(plain, name="digits-int8", steps=(Int8(),), input="uint8", eval=classes), Quiet())
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for index, (image, label) in enumerate(zip(digits().test[:60], digits().test_labels[:60], strict=True)):
        folder = root / get("lenet5").labels()[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{index}.png")
    return root
