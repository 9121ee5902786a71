"""A trained network, published in float32 and in INT8."""

from dataclasses import replace
from pathlib import Path

import pytest

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
