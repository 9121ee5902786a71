"""What an export works with where no --calibration is given, and what it says of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs.weights import Weights
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline.made_pictures import made_pictures
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.pipeline.preflight import Task, check
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from convoynet.exporter.running import matched_images
from convoynet.exporter.running.pictures import Pictures

NOISE = "8 images made for the test"
TRAINED, FRESH = Weights("a file", ""), Weights("random", "", trained=False)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matched_images, "_MOST_STEPS", 1)
    monkeypatch.setattr(matched_images, "_FEWEST_STEPS", 1)


def task(tmp_path: Path, arch: str = "resnet20", **options: Any) -> Task:
    config = ExportConfig(arch, weights="random", repository=tmp_path, calibration_samples=8, **options)
    return check(config, Quiet())


def network(name: str = "resnet20") -> nn.Module:
    torch.manual_seed(0)
    module = archs.get(name).build(10).eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            norm.running_mean.uniform_(-0.1, 0.1)
    return module


def noise(size: int = 32) -> Pictures:
    images = np.zeros((8, size, size, 3), np.uint8)
    return Pictures(images, images[:4], NOISE, NOISE)


@pytest.mark.parametrize(
    ("options", "weights", "from_statistics"),
    [
        ({"steps": (Int8(),)}, TRAINED, True),
        ({"steps": (Int8(),), "made_images": "noise"}, TRAINED, False),
        # Nothing depends on them but the check, or there is nothing worth matching.
        ({}, TRAINED, False),
        ({"steps": (Int8(),)}, FRESH, False),
        ({"steps": (Int8(),), "made_images": "statistics"}, FRESH, True),
        ({"made_images": "statistics"}, TRAINED, True),
    ],
)
def test_quantization_gets_images_from_statistics_where_there_are_any(
    tmp_path: Path, options: dict[str, Any], weights: Weights, from_statistics: bool
) -> None:
    export = task(tmp_path, **options)
    made = made_pictures(export, network(), weights, noise())
    (caveat,) = export.caveats
    assert caveat.startswith("no --calibration folder was given: ")
    assert ("from its batch-norm statistics (seed 0, 1 steps), not photographs" in caveat) == from_statistics
    assert ("made for resnet20" in made.calibration_source) == from_statistics
    assert (made.calibration_source in caveat) or from_statistics
    assert len(made.calibration) >= len(made.check) > 0


class Heads(nn.Module):
    """Returns a dictionary, and one value without an axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.cls, self.age = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
            nn.Linear(8, 4),
            nn.Linear(8, 1),
        )
        nn.init.uniform_(self.trunk[1].running_mean, -0.1, 0.1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.trunk(x).mean((2, 3))
        return {"scores": self.cls(found), "age": self.age(found).squeeze(1)}


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": ("logits=scores", "age")},
        {"outputs": ("logits=age",), "task": "regression"},
        {"outputs": ("logits=age",)},
    ],
)
def test_images_are_made_for_whatever_a_network_of_ones_own_returns(tmp_path: Path, options: dict[str, Any]) -> None:
    published = run(
        ExportConfig(
            f"{__name__}:Heads", repository=tmp_path, input_size=(16, 16), batch=(1, 2), calibration_samples=16,
            steps=(Int8(),), **options,
        ),
        Quiet(),
    )  # fmt: skip
    assert "from its batch-norm statistics" in published.report.images["calibration"]


def test_without_batch_norm_noise_serves_and_the_reason_is_said(tmp_path: Path) -> None:
    export = task(tmp_path, arch="squeezenet1_1", steps=(Int8(),), num_classes=10)
    pictures = noise()
    assert made_pictures(export, network("squeezenet1_1"), TRAINED, pictures) is pictures
    assert export.caveats[0].endswith("(it has no batch-norm statistics to make better ones from)")


def test_without_batch_norm_statistics_are_refused(tmp_path: Path) -> None:
    export = task(tmp_path, arch="squeezenet1_1", made_images="statistics", num_classes=10)
    with pytest.raises(BadInput, match=r"^--made-images statistics: squeezenet1_1 has no batch normalisation that"):
        made_pictures(export, network("squeezenet1_1"), TRAINED, noise())


def test_packaged_digits_are_real(tmp_path: Path) -> None:
    export = task(tmp_path, arch="lenet5", steps=(Int8(),))
    pictures = noise()
    assert made_pictures(export, network(), TRAINED, pictures) is pictures


def test_a_folder_of_images_is_what_calibrates(tmp_path: Path) -> None:
    export = task(tmp_path)
    export = replace(export, config=replace(export.config, calibration=tmp_path))
    pictures = noise()
    assert made_pictures(export, network(), TRAINED, pictures) is pictures
    assert not export.caveats


def test_time_that_does_not_suffice_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matched_images, "_MOST_STEPS", 3)
    monkeypatch.setattr(matched_images.time, "monotonic", iter(range(0, 10**6, 1000)).__next__)
    export = task(tmp_path, steps=(Int8(),))
    made_pictures(export, network(), TRAINED, noise())
    assert export.caveats[1] == (
        "making images ended after 120 s, before all steps were done: another export may make others"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"made_images": "real"}, "--made-images 'real' is not one of statistics, noise"),
        ({"made_images": "noise", "calibration": Path("photos")}, "--made-images noise does nothing beside --calib"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ExportConfig("resnet20", **options)
