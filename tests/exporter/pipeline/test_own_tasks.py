"""Segmentation and detection networks of one's own, by --arch module:factory and --task, with none of our classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from convoynet.exporter.archs import custom
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from tests.exporter.onnx_runs import session_of

HERE = "tests.exporter.pipeline.test_own_tasks"
LABELS = ("background", "cat", "dog")


class Maps(nn.Module):
    """Logits of the classes at half the resolution, in a dictionary as torchvision's networks have it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, num_classes, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.layers(x)}


class Boxes(nn.Module):
    """A box for each cell of a coarse grid, by its place, not by its score; half of the scores are 0."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.Conv2d(8, 7, 1))
        self.named = named

    def forward(self, x: Tensor) -> Any:
        maps = self.trunk(x).flatten(2).transpose(1, 2)  # N x cells x 7
        corners = maps[..., :2].sigmoid() * 32
        boxes = torch.cat([corners, corners + 8 + maps[..., 2:4].sigmoid() * 16], -1)
        best, labels = maps[..., 4:6].max(-1)
        scores = (best.tanh() * 0.9).clamp(min=0)
        return {"labels": labels + 1, "boxes": boxes, "scores": scores} if self.named else (boxes, scores, labels + 1)


def maps(num_classes: int = 3) -> nn.Module:
    return Maps(num_classes)


class Turned(nn.Module):
    """Maps in other orders of their axes than classes, height, width; or of one class."""

    def __init__(self, *order: int, classes: int = 3) -> None:
        super().__init__()
        self.layer, self.order = nn.Conv2d(3, classes, 3, padding=1), order

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).permute(*self.order)
        return result


def one() -> nn.Module:
    return Turned(0, 1, 2, 3, classes=1)


def last() -> nn.Module:
    return Turned(0, 2, 3, 1)


def turned() -> nn.Module:
    return Turned(0, 1, 3, 2)


def boxes() -> nn.Module:
    return Boxes(named=False)


def named_boxes() -> nn.Module:
    return Boxes(named=True)


def rows() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def many() -> nn.Module:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Any:
            kept = torch.nonzero(x.mean((1, 2, 3)) > -1)
            return kept.float(), kept.float(), kept

    return Many()


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in LABELS))
    return tmp_path / "labels.txt"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(made_images(12, (48, 64), 3, 0)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


def export(tmp_path: Path, name: str, **options: Any) -> Any:
    shared: dict[str, Any] = {"input_size": (64, 64), "batch": (1, 2), "calibration_samples": 8}
    config = ExportConfig(f"{HERE}:{name}", repository=tmp_path / "models", **shared, **options)
    return run(config, Quiet())


def test_maps_are_a_segmentation(tmp_path: Path, labels: Path, photos: Path) -> None:
    published = export(tmp_path, "maps", task="segmentation", labels=labels, calibration=photos, steps=(Int8(),))
    assert published.report.parity.task == "segmentation"
    session = session_of(published.folder / "model.onnx")
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    logits, classes = session.run(None, {"input": images})
    assert logits.shape == (2, 3, 32, 32)
    assert np.array_equal(logits.argmax(1), classes)
    config = (published.folder.parent / "config.pbtxt").read_text()
    assert '"segmentation"' in config
    assert r"\"fit\": \"pad\"" in config
    assert (published.folder.parent / "labels.txt").read_text().split() == list(LABELS)


@pytest.mark.slow
def test_a_detector_is_quantized(tmp_path: Path, labels: Path, photos: Path) -> None:
    published = export(tmp_path, "boxes", task="detection", labels=labels, calibration=photos, steps=(Int8(),))
    parity = published.report.parity
    assert parity.task == "detection"
    assert parity.matched is not None
    assert parity.matched > 0.8


@pytest.mark.parametrize("name", ["boxes", pytest.param("named_boxes", marks=pytest.mark.slow)])
def test_padded_boxes_are_a_detection(name: str, tmp_path: Path, labels: Path, photos: Path) -> None:
    published = export(tmp_path, name, task="detection", labels=labels, calibration=photos)
    assert published.report.parity.task == "detection"
    session = session_of(published.folder / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "labels", "count"]
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    found, scores, classes, count = session.run(None, {"input": images})
    torch.manual_seed(0)
    with torch.no_grad():
        wanted, theirs, known = Boxes(named=False)(torch.from_numpy(images))
    assert found.shape == (2, 64, 4)
    for image in range(2):
        order = np.argsort(-theirs[image].numpy(), kind="stable")
        real = int((theirs[image] > 0).sum())
        assert 0 < real < 64
        assert int(count[image, 0]) == real
        np.testing.assert_allclose(scores[image, :real], theirs[image].numpy()[order][:real], atol=1e-5)
        np.testing.assert_allclose(found[image, :real], wanted[image].numpy()[order][:real], atol=1e-3)
        assert np.array_equal(classes[image, :real], known[image].numpy()[order][:real])
        assert not found[image, real:].any() and not classes[image, real:].any()  # noqa: PT018


@pytest.mark.parametrize(("name", "task"), [("pixels", "segmentation"), ("boxes", "detection")])
def test_the_networks_of_the_documents_are_such(name: str, task: Any) -> None:
    config = ExportConfig(f"docs.examples.sheets:{name}", task=task, num_classes=11, input_size=(192, 256))
    arch = custom.resolve(config)
    assert (arch.task, arch.num_classes) == (task, 11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maps", {}, r"returns \[2, 3, 112, 112\] for two images; .* add --task segmentation or detection"),
        (
            "rows",
            {"task": "segmentation"},
            r"returns \[2, 4\] for two images; .* \[2, classes, height",
        ),
        ("one", {"task": "segmentation"}, r"returns \[1, 224, 224\] for .*: of one class every pixel is it"),
        ("last", {"task": "segmentation"}, r"returns \[224, 224, 3\] for .*, which is no map of it"),
        (
            "turned",
            {"task": "segmentation", "input_size": (64, 128)},
            r"returns \[3, 128, 64\] .*, which is no map of it",
        ),
        ("boxes", {"task": "detection"}, "does not say how many classes it knows: add --labels FILE"),
        ("rows", {"task": "detection", "num_classes": 3}, r"returns \[\[2, 4\]\] for 2 images; it must return boxes"),
        ("many", {"task": "detection", "num_classes": 3}, "it must return boxes"),
        (
            "boxes",
            {"task": "detection", "num_classes": 3, "outputs": ("logits",)},
            "a detector, whose outputs",
        ),
    ],
)
def test_what_is_neither_is_refused_in_a_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        custom.resolve(ExportConfig(f"{HERE}:{name}", **options))
    assert "\n" not in str(refused.value)
