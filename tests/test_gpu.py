"""What needs an NVIDIA GPU and onnxruntime-gpu: `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from convoynet.exporter.assets import digits
from convoynet.exporter.commands import cli
from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.repository import repository

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="onnxruntime-gpu is not installed (it takes the place of onnxruntime)",
    ),
]


@pytest.mark.parametrize("flags", [[], ["--int8"]], ids=["fp32", "int8"])
def test_an_export_for_a_gpu_is_checked_and_served_on_it(tmp_path: Path, flags: list[str]) -> None:
    root = tmp_path / "models"
    assert cli.export(["--arch", "lenet5", "--target", "gpu", "--model-repository", str(root), *flags]) == 0
    report = json.loads((root / "lenet5" / "report.json").read_text())
    assert "CUDAExecutionProvider" in report["parity"]["runtime"]
    (found,) = repository.scan(root, repository.Defaults(8, 1))
    assert found.spec is not None, found.reason
    engine = engines.load(EngineSpec.of(found.spec)).engine
    assert engine.device == "CUDA 0"
    # Labels, not logits: the reference ran in other batches, and INT8 is not exact.
    mean, std = np.float32(0.1 / 1.275), np.float32(1 / 1.275)
    images = (digits().test[:32].transpose(0, 3, 1, 2) / np.float32(255) - mean) / std
    answers = engine.run({"input": np.ascontiguousarray(images, np.float32)})["logits"].argmax(axis=1)
    assert (answers == digits().test_labels[:32]).mean() > 0.9
    engine.close()
