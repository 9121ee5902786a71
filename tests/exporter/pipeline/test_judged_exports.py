"""Whole exports of networks that a gate has to see through: judged by what their outputs say, and by PyTorch itself."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.errors import ExporterError, Refused
from convoynet.exporter.evidence.parity import Sides, compare
from convoynet.exporter.evidence.unsteady import Rounding, measure_rounding
from convoynet.exporter.evidence.verify import Reference
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8


class Swamped(nn.Module):
    """Points in pixels, whose informative channels are small beside one that is large and not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        with torch.no_grad():
            self.a.weight[0] *= 3000
            self.b.weight[:, 0] = 0
            self.head.bias.copy_(torch.tensor([40.0, 80.0, 120.0, 160.0]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return result


def one_logit() -> nn.Module:
    """On both sides of zero, as a trained classifier of two classes is."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 1)
    )


class Noisy(nn.Module):
    """Random by an operator that no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = one_logit()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x[:, torch.randperm(3)])
        return result


def config(factory: str, root: Path) -> ExportConfig:
    return ExportConfig(
        f"{__name__}:{factory}",
        repository=root,
        input_size=(16, 16),
        batch=(1, 4),
        steps=(Int8(),),
        calibration_samples=32,
    )


def test_a_graph_that_answers_alike_for_every_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"one answer for all images has 1.*first tensor that diverges"):
        run(config("Swamped", tmp_path), Quiet())
    assert not list(tmp_path.glob("*/1"))


def test_a_sound_graph_of_one_logit_is_published(tmp_path: Path) -> None:
    report = run(config("one_logit", tmp_path), Quiet()).report
    assert report.parity.spread is not None
    assert report.parity.spread.kind == "one value"
    assert report.parity.spread.error is not None
    assert report.parity.spread.error < 0.3
    assert report.parity.agreement_name == "same side of the threshold"


def test_chance_is_named_before_the_graph_is_blamed(tmp_path: Path) -> None:
    with pytest.raises(ExporterError, match="PyTorch itself answers otherwise when it is asked again"):
        run(config("Noisy", tmp_path), Quiet())


class Constant(nn.Module):
    """One answer for all images, without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * 0 + 1


def test_a_network_without_weights_that_says_nothing_is_published_and_told(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\n|")
    folder.mkdir()
    for place in range(2):
        Image.new("RGB", (16, 16), (place, 0, 0)).save(folder / f"{place}.png")
    options = replace(config("Constant", tmp_path / "models"), steps=(), calibration=folder)
    published = run(options, Quiet())
    assert "\\udcff" in (published.folder.parent / "report.md").read_text()
    report = run(replace(options, calibration=None), Quiet()).report
    assert any("answers the same for all" in caveat for caveat in report.caveats)


class Offset(nn.Module):
    """What is left of small numbers behind a large one: float32's rounding."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.offset = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), offset

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x) + self.offset
        return result


PREPROCESS = Preprocess((8, 8), 8, (0.5,) * 3, (0.5,) * 3)


def rounding_of(offset: float) -> tuple[Rounding, Reference]:
    images = made_images(32, (8, 8), 3, 0)
    network = Offset(offset).eval()
    with torch.inference_mode():
        outputs = network(torch.from_numpy(PREPROCESS.normalize(images))).numpy()
    reference = Reference("PyTorch", "classification", (outputs,))
    rounding = measure_rounding(network, reference, images, PREPROCESS)
    assert rounding is not None
    return rounding, reference


def test_rounding_that_pytorch_itself_has_is_not_held_against_a_graph() -> None:
    rounding, reference = rounding_of(2.0**17)  # steps of 0.0156
    (outputs,) = reference.outputs
    steps = (np.random.default_rng(0).random(outputs.shape) < 0.25) * np.float32(0.015625)
    graph, other = (
        compare("classification", (outputs,), (outputs + error,), np.arange(32), Sides("PyTorch", "graph")).parity
        for error in (steps, 16 * steps)
    )
    assert rounding.explains(graph)
    assert not rounding.explains(other)
    assert "float32's own rounding" in rounding.line(graph)


def test_without_rounding_nothing_is_explained() -> None:
    rounding, reference = rounding_of(0.0)
    (outputs,) = reference.outputs
    noisy = outputs + np.float32(0.05) * outputs.std(axis=0) * np.random.default_rng(0).standard_normal(outputs.shape)
    graph = compare("classification", (outputs,), (noisy,), np.arange(32), Sides("PyTorch", "graph")).parity
    assert not rounding.explains(graph)
