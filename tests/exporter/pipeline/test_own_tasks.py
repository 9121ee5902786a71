"""Segmentation and detection networks of one's own, by --arch module:factory and --task, with none of our classes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from convoynet.exporter.archs import custom
from convoynet.exporter.commands import inspect_command
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline import first_look
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Finetune, Int8
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


class Returned(nn.Module):
    """The boxes of `Boxes`, returned in another way."""

    def __init__(self, way: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.boxes, self.way = Boxes(named=False), way

    def forward(self, x: Tensor) -> Any:
        return self.way(*self.boxes(x))


def padded(value: float) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """Rows that are no detection filled with something."""

    def way(b: Tensor, s: Tensor, n: Tensor) -> Any:
        return torch.where((s > 0).unsqueeze(-1), b, torch.full_like(b, value)), s, n

    return way


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "swapped": lambda b, s, n: (b, n, s),
    "detectron": lambda b, s, n: {"pred_boxes": b, "pred_classes": n, "scores": s},
    "kept": lambda b, s, n: (b[:, s[0] > 0], s[:, s[0] > 0], n[:, s[0] > 0]),
    "nms": lambda b, s, n: tuple(part[:, torchvision.ops.nms(b[0], s[0], 0.5)] for part in (b, s, n)),
    "shares": lambda b, s, n: (b / 64, s, n),
    "sizes": lambda b, s, n: (torch.cat([b[..., :2], b[..., 2:] - b[..., :2]], -1), s, n),
    "below": lambda b, s, n: (b, b[..., 0] / 32 - 0.5, n),
    "marked": lambda b, s, n: (b, torch.where(s > 0, s, -torch.ones_like(s)), n),
    "logits": lambda b, s, n: (b, s * 5, n),
    "unnamed": lambda b, s, n: (b, s, n + 5),
    "infinite": padded(torch.inf),
    "none": padded(torch.nan),
}


def __getattr__(name: str) -> Any:
    """A detector for each of these ways, as a program of the user's has it."""
    if name not in WAYS:
        raise AttributeError(name)
    return partial(Returned, WAYS[name])


class Known(Boxes):
    """A detector that is made for as many classes as it is told."""

    def __init__(self, num_classes: int = 91) -> None:
        super().__init__(named=False)
        self.classes = num_classes


def cut(num_classes: int = 3) -> nn.Module:
    """Maps without the borders, as convolutions that pad nothing make them."""
    return nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.Conv2d(4, num_classes, 9))


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
        (
            "turned",
            {"task": "segmentation", "input_size": (64, 80)},
            r"returns \[3, 80, 64\] .*, which is no map of it",
        ),
        ("cut", {"task": "segmentation", "input_size": (64, 96)}, r"returns \[3, 48, 80\] .*, without its borders"),
        ("named_boxes", {}, r"returns 3 tensors .*, a detector's: add --task detection"),
        ("swapped", {"task": "detection", "num_classes": 3}, "returns scores that are int64, as labels are"),
        ("detectron", {"task": "detection", "num_classes": 3}, "returns pred_boxes, pred_classes, scores; it must"),
        (
            "kept",
            {"task": "detection", "num_classes": 3, "input_size": (64, 64)},
            r"uses aten::index, which returns as many rows as the image says, as boxes\[scores > 0.3\]",
        ),
        (
            "boxes",
            {"task": "detection"},
            "does not say how many classes it knows: add --num-classes N or --labels FILE",
        ),
        ("rows", {"task": "detection", "num_classes": 3}, r"returns \[\[2, 4\]\] for 2 images; it must return boxes"),
        ("many", {"task": "detection", "num_classes": 3}, "uses aten::nonzero, which .*; it must return boxes"),
        ("nms", {"task": "detection", "num_classes": 3}, "uses torchvision::nms, which .*: keep a fixed number"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shares", "boxes no larger than a pixel, as shares of the image would be"),
        ("sizes", "boxes that end before they begin: they must be x1, y1, x2, y2"),
        ("logits", "scores (of up to|from) .*: they must be 0 to 1, as logits.sigmoid"),
        ("unnamed", "the label [67], and there are 3 names, of 0 to 2"),
    ],
)
def test_detections_that_would_be_taken_for_others_are_refused(
    name: str, message: str, tmp_path: Path, labels: Path, photos: Path
) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        export(tmp_path, name, task="detection", labels=labels, calibration=photos)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "models" / name).exists()


@pytest.mark.parametrize("name", ["infinite", "none", "marked"])
def test_what_pads_boxes_may_be_anything(name: str) -> None:
    config = ExportConfig(f"{HERE}:{name}", task="detection", num_classes=3, input_size=(64, 64))
    arch = custom.resolve(config)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        boxes, scores, *_ = arch.deploy(arch.build(3)).eval()(images)
    assert (scores == 0).any()
    assert (scores > 0).any()
    assert torch.isfinite(boxes).all()
    assert not boxes[scores == 0].any()


def test_a_detector_is_made_for_the_labels_that_there_are(labels: Path) -> None:
    arch = custom.resolve(ExportConfig(f"{HERE}:Known", task="detection", labels=labels, input_size=(64, 64)))
    made = arch.build(arch.num_classes)
    assert isinstance(made, Known)
    assert made.classes == len(LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "unet", "weights": "random", "num_classes": 1}, "1 class: of one class every pixel is it"),
        ({"task": "segmentation", "num_classes": 1}, "1 class: of one class every pixel is it"),
        ({"task": "detection", "num_classes": 1}, "1 class: .* the first being the background"),
        ({"task": "segmentation", "fully_convolutional": True}, "--fully-convolutional is for classification networks"),
        ({"task": "segmentation", "explain": True}, "--explain: .* is for segmentation here"),
        (
            {"task": "segmentation", "steps": (Finetune(distill=False),), "finetune": Path()},
            "without distillation needs labels",
        ),
        ({"task": "detection", "steps": (Finetune(),), "finetune": Path()}, "detectors are not compressed so"),
    ],
)
def test_what_flags_decide_is_said_before_a_network_is_made(options: dict[str, Any], message: str) -> None:
    """The network is not there at all, and nothing looks for it."""
    config = ExportConfig(**{"arch": "absent_module:network", **options})
    with pytest.raises(BadInput, match=message):
        first_look.check_network(config)


def test_maps_of_ones_own_are_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"{HERE}:maps", "--task", "segmentation", "--input-size", "64x96", "--json"]
    assert inspect_command.inspect(flags) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[-1]["output_shape"] == [3, 32, 48]
    assert inspect_command.inspect(["lenet5.onnx", "--task", "detection"]) == 2
