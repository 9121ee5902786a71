"""Whole exports with the steps of a recipe: what is published is what the steps left, and the evidence says so."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from convoynet.exporter import archs, recipe
from convoynet.exporter.assets import digits
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.evidence.report import Report
from convoynet.exporter.pipeline.pipeline import CHECKPOINTS, Published, run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.publishing import repository
from convoynet.exporter.recipe import Bf16, Finetune, Fp8, Fp16, Int8, LowRank, Prune, Separable, Sparsify, Step
from convoynet.exporter.running import openvino
from tests.exporter.onnx_runs import session_of

NETS = "tests.exporter.task_nets"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in class folders, forty of each part."""
    root = tmp_path_factory.mktemp("digits")
    labels = archs.get("lenet5").labels()
    for index, (image, label) in enumerate(zip(digits().test[:120], digits().test_labels[:120], strict=True)):
        folder = root / labels[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{index}.png")
    return root


def export(folder: Path, steps: tuple[Step, ...], **options: object) -> Published:
    config = ExportConfig("lenet5", repository=folder, batch=(1, 8), steps=steps, **options)  # type: ignore[arg-type]
    return run(config, Quiet())


def stages(report: Report) -> list[str]:
    return [stage["stage"] for stage in report.stages]


@pytest.mark.usefixtures("drawn")
def test_steps_compose_and_every_stage_is_told(classes: Path, tmp_path: Path) -> None:
    steps = (
        Prune(0.15, round_to=1),
        LowRank(ratio=0.5, layers=("linear",), gate=False),
        Finetune(epochs=4, batch=16, lr=0.01),
        Int8(),
    )
    published = export(tmp_path, steps, finetune=classes, calibration=classes, eval=classes)
    report = published.report
    assert stages(report) == ["1 prune", "2 low-rank", "3 finetune", "onnx", "fp32", "int8"]
    assert [step["step"] for step in report.compression] == ["prune", "low-rank", "finetune", "int8"]
    assert report.macs["after"] < 0.86 * report.macs["before"]
    assert report.parameters["after"] < 0.8 * report.parameters["before"]
    tops = {stage["stage"]: stage["top1"] for stage in report.stages if "top1" in stage}
    assert tops["3 finetune"] >= max(tops["1 prune"], tops["2 low-rank"])
    assert report.accuracy is not None
    assert report.accuracy.top1 > 0.8
    assert report.parity_to_compressed is not None
    assert report.parity_to_compressed.sqnr_db is not None
    assert report.parity.sqnr_db is not None
    # The export is faithful to what was trained; that differs from the network that was named.
    assert report.parity_to_compressed.sqnr_db > report.parity.sqnr_db
    folder = published.folder.parent
    figures = {file.name for file in folder.glob("*.png") if file.stat().st_size > 1000}
    assert figures >= {"parity.png", "speed.png", "divergence.png", "training-3.png"}
    assert "training-3" in (folder / "report.html").read_text()
    told = json.loads((folder / "report.json").read_text())
    assert recipe.from_dicts([step.to_dict() for step in steps], "test") == steps
    (tmp_path / "again.toml").write_text(told["recipe"])
    assert recipe.load(tmp_path / "again.toml") == steps
    session = session_of(published.folder / "model.onnx")
    assert session.run(None, {"input": np.zeros((3, 1, 32, 32), np.float32)})[0].shape == (3, 10)


@pytest.mark.usefixtures("exported_anew")
def test_a_recipe_makes_the_same_file_again(classes: Path, tmp_path: Path) -> None:
    steps = (Prune(0.15, method="random", round_to=1), Finetune(steps=6, batch=8), Int8())
    shas = [
        export(tmp_path / name, steps, calibration=classes, seed=3).report.formats[0]["sha256"] for name in ("a", "b")
    ]
    assert shas[0] == shas[1]


def test_zeros_stay_zero_through_training(classes: Path, tmp_path: Path) -> None:
    report = export(tmp_path, (Sparsify("unstructured", 0.6), Finetune(steps=8, batch=8)), calibration=classes).report
    model = onnx.load(tmp_path / "lenet5" / "1" / "model.onnx")
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.size for weight in weights)
    assert zeros == pytest.approx(0.6, abs=0.02)
    assert report.compression[0]["step"] == "sparsify"


def test_separable_and_low_rank_without_images_are_published_as_they_are(tmp_path: Path) -> None:
    report = export(tmp_path, (Separable(), LowRank(energy=0.5, gate=False))).report
    assert stages(report) == ["1 separable", "2 low-rank", "onnx", "fp32"]
    assert report.macs["after"] < report.macs["before"]


def test_an_interrupted_training_goes_on_with_the_same_command(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (Prune(0.15, round_to=1), Finetune(epochs=3, batch=16))
    whole = export(tmp_path / "whole", steps, calibration=classes).report

    class Stops(Quiet):
        left = 10

        def track(self, items, label, total=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
            for item in items:
                if "epoch" in label:
                    self.left -= 1
                    if self.left == 0:
                        raise KeyboardInterrupt
                yield item

    config = ExportConfig("lenet5", repository=tmp_path / "m", batch=(1, 8), steps=steps, calibration=classes)
    with pytest.raises(KeyboardInterrupt):
        run(config, Stops())
    assert list((tmp_path / "m" / CHECKPOINTS).iterdir())
    assert repository.versions(tmp_path / "m" / "lenet5") == []
    again = run(config, Quiet()).report
    assert again.formats[0]["sha256"] == whole.formats[0]["sha256"]
    assert not (tmp_path / "m" / CHECKPOINTS).exists()


def test_accuracy_that_pruning_lost_is_refused_before_a_search(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="before anything is quantized"):
        export(tmp_path / "m", (Prune(0.15, method="random", round_to=1), Int8()), eval=classes, max_drop=1.0)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("steps", "precision"),
    [
        ((Fp16(),), "fp16"),
        ((Bf16(),), "bf16"),
        ((Int8(), Fp16()), "int8+fp16"),
        ((Fp8(),), "fp8"),
        ((Fp8(), Fp16()), "fp8+fp16"),
    ],
)
def test_floating_point_for_gpus(steps: tuple[Step, ...], precision: str, tmp_path: Path) -> None:
    if precision == "bf16" and not openvino.installed():
        pytest.skip("needs openvino: pip install openvino")
    report = export(tmp_path, steps, target="gpu").report
    assert report.precision == precision
    assert stages(report)[-1] == precision
    assert report.parity.agreement > 0.95
    assert report.formats[0]["bytes"] < 0.95 * report.reference_bytes  # its small layers stay float32 for GPUs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": (Finetune(),)}, ["step 1 (finetune)", "--finetune DIR", "--calibration DIR"]),
        ({"steps": (Fp16(),), "target": "cpu"}, ["--fp16", "--target gpu"]),
        ({"steps": (Bf16(),), "target": "gpu", "opset": 21}, ["--bf16", "22"]),
        ({"steps": (Int8(),), "opset": 18}, ["--int8", "19"]),
        ({"finetune": Path("d")}, ["--finetune d", "no step"]),
        ({"steps": (Prune(0.5, reconstruct=True),)}, ["step 1 (prune)", "reconstruct", "--calibration DIR"]),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(BadInput) as refused:
        ExportConfig("lenet5", **options)  # type: ignore[arg-type]
    for word in words:
        assert word in str(refused.value)


def test_a_reconstruction_of_nothing_is_said(classes: Path, tmp_path: Path) -> None:
    """Of LeNet-5 the channels go that fully connected layers read, and these stay as they are."""
    with pytest.raises(
        BadInput, match="reconstruct has nothing to fit: no convolution reads what was pruned that has one group"
    ):
        export(tmp_path, (Prune(0.15, round_to=1, reconstruct=True),), calibration=classes)


def test_detectors_are_quantized_and_nothing_else(tmp_path: Path) -> None:
    config = ExportConfig(f"{NETS}:detector", repository=tmp_path, weights="random", steps=(Prune(0.5),))
    with pytest.raises(BadInput, match=r"step 1 \(prune\).*detectors"):
        run(config, Quiet())


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_int8_is_refined_and_trained_through_the_same_pairs(target: str, classes: Path, tmp_path: Path) -> None:
    step = Int8(equalize=True, correct_bias=True, adaround=True, qat_epochs=2)
    published = export(tmp_path, (step,), target=target, calibration=classes, finetune=classes)
    plain = export(tmp_path, (Int8(),), target=target, calibration=classes)
    (done,) = published.report.compression
    assert done["refinements"]["tried"] == len(done["refined_layers"]) > 0
    assert done["qat"]["images"] == 120
    assert (published.folder.parent / "qat.png").is_file() or (published.folder / "qat.png").is_file()
    (done,) = plain.report.compression
    assert [entry["technique"] for entry in done["refined_layers"]] == ["mean correction"]
    assert done["biases"].endswith("on 24 images that judge")
    refined, unrefined = published.report.parity.sqnr_db, plain.report.parity.sqnr_db
    assert refined is not None
    assert unrefined is not None
    assert refined > unrefined - 3  # two epochs of 120 digits: by the rounding of the training it is some tenths less
