"""The preprocessing that the flags ask for is that of the evidence, the model's config and the report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image

from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.pipeline import pipeline
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.protos.inference import model_config_pb2 as pb

SOURCE = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
                         nn.Softmax(1))
"""
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "export_nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for index in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(made_images(1, (40, 52), 3, index)[0]).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "notes.txt").write_text("")
    yield
    monkeypatch.undo()


def config(**options: Any) -> ExportConfig:
    return ExportConfig(
        "export_nets:net", input_size=(16, 16), calibration=Path("photos"), batch=(1, 2), resize=(20, 18),
        interpolation="lanczos", channel_order="bgr", mean=MEAN, std=STD, **options,
    )  # fmt: skip


def own_pipeline(file: Path) -> np.ndarray:
    """BGR, as somebody's own script makes it."""
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB").resize((18, 20), Image.Resampling.LANCZOS).crop((1, 2, 17, 18)))
    return ((pixels[..., ::-1] / 255 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)


def test_config_and_report_state_it(tmp_path: Path) -> None:
    picture = Path("photos/0.png")
    np.save("mine.npy", own_pipeline(picture))
    published = run(config(check_preprocessing=(Path("mine.npy"), picture)), Quiet())
    described = text_format.Parse((published.folder.parent / "config.pbtxt").read_text(), pb.ModelConfig())
    assert json.loads(described.parameters["preprocess"].string_value) == {
        "color": "BGR", "resize": [20, 18], "size": [16, 16], "interpolation": "lanczos",
        "mean": list(MEAN), "std": list(STD),
    }  # fmt: skip
    assert described.parameters["activation"].string_value == "none"  # it ends in a softmax itself
    told = json.loads((published.folder / "report.json").read_text())
    assert told["input"]["preprocessing"] == (
        "resize to 20x18 (lanczos, antialias), centre crop 16, BGR, /255, mean (0.4, 0.5, 0.6), std (0.2, 0.25, 0.3); "
        "by default: export_nets:net comes with no configuration; "
        "--resize, --interpolation, --channel-order, --mean, --std as given"
    )
    assert told["input"]["preprocessing_check"].endswith("the same but for rounding")
    assert any(line.endswith("photos: 1 .txt file") for line in told["caveats"])
    for name in ("report.md", "report.html"):
        text = (published.folder / name).read_text()
        assert "resize to 20x18 (lanczos, antialias)" in text
        assert "the same but for rounding" in text
        assert (published.folder.parent / name).read_text() == text


def test_another_preprocessing_is_refused_before_any_work(tmp_path: Path) -> None:
    picture = Path("photos/0.png")
    np.save("mine.npy", own_pipeline(picture)[::-1])
    with pytest.raises(Refused, match=r"mean and std in the other order of the channels|in the order RGB"):
        run(config(check_preprocessing=(Path("mine.npy"), picture)), Quiet())
    assert not Path("models").exists()


def test_wrong_weights_are_named_before_an_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_load_pictures", None)
    torch.save({"0.weight": torch.zeros(4, 3, 3, 3)}, "wrong.pt")
    with pytest.raises(BadInput, match=r"lacks 0\.bias"):
        run(config(weights="wrong.pt"), Quiet())
