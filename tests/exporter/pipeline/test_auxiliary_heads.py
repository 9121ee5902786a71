"""A fine-tuning step has the auxiliary classifiers of its network, and what is published has not."""

from pathlib import Path

import onnx
import pytest
from PIL import Image
from torch import nn

from convoynet.exporter.archs import Arch, registry
from convoynet.exporter.archs.auxiliary import Auxiliaries, Head, Map
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Finetune, Sparsify
from tests.exporter.training_nets import CLASSES, PREPROCESS, TinyNet, striped


def head(size: Map, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size[0], classes))


def tiny() -> Arch:
    return Arch(
        name="tiny",
        paper="none",
        source="own",
        num_classes=CLASSES,
        preprocess=PREPROCESS,
        build=lambda classes: TinyNet(),
        labels=lambda: [str(index) for index in range(CLASSES)],
        auxiliaries=Auxiliaries({"aux": Head("first", head)}, 0.3),
    )


def test_heads_learn_and_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._ARCHS, "tiny", tiny)
    # The mask of the zeros has the names of the network's parameters, also with heads around it.
    steps = (Sparsify("unstructured", 0.5), Finetune(steps=3, batch=8))
    (tmp_path / "images").mkdir()
    for index, image in enumerate(striped(24)[0]):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    config = ExportConfig(
        "tiny", repository=tmp_path, weights="random", batch=(1, 2), steps=steps, calibration=tmp_path / "images"
    )
    published = run(config, Quiet())
    sparse, tuned = published.report.compression
    assert sparse["step"] == "sparsify"
    assert tuned["auxiliary_heads"] == ["aux"]
    graph = onnx.load(published.folder / "model.onnx").graph
    assert [output.name for output in graph.output] == ["logits"]
    assert not [tensor.name for tensor in graph.initializer if "aux" in tensor.name]
