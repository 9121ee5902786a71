"""Real exports, end to end: what is published runs, is what PyTorch computes, and says so truthfully."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from PIL import Image

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.assets import digits
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import labelled_images, load_images
from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.pipeline.pipeline import Published, run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import CALIBRATION_METHODS, Int8
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.engines import needs_tensorrt
from tests.exporter.onnx_runs import session_of

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def lenets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    """Every kind of export of LeNet-5, as versions of models in one repository."""
    root = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "int8": {"steps": (Int8(),)},
        "uint8": {"input": "uint8"},
        "int8-uint8": {"steps": (Int8("minmax"),), "input": "uint8"},
        "int8-gpu": {"steps": (Int8(),), "target": "gpu"},
    }
    return {
        kind: run(ExportConfig("lenet5", repository=root, name=kind, batch=(1, 6), **options), Quiet())
        for kind, options in kinds.items()
    }


KINDS = ("fp32", "int8", "uint8", "int8-uint8", "int8-gpu")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_reads_digits_at_every_batch_size(kind: str, lenets: dict[str, Published]) -> None:
    folder = lenets[kind].folder
    config = text_format.Parse((folder.parent / "config.pbtxt").read_text(), pb.ModelConfig())
    session = session_of(folder / "model.onnx")
    (signature,) = session.get_inputs()
    assert list(signature.shape[1:]) == list(config.input[0].dims)
    pixels = digits().test[:100]
    inputs = pixels if config.input[0].data_type == pb.TYPE_UINT8 else archs.get("lenet5").preprocess.normalize(pixels)
    for size in (1, 3, config.max_batch_size, 100):
        (logits,) = session.run([config.output[0].name], {signature.name: inputs[:size]})
        assert logits.shape == (size, config.output[0].dims[0])
    assert (logits.argmax(axis=1) == digits().test_labels[:100]).mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_true(kind: str, lenets: dict[str, Published]) -> None:
    folder = lenets[kind].folder
    told = json.loads((folder.parent / "report.json").read_text())
    assert told == json.loads((folder / "report.json").read_text()) == json.loads(lenets[kind].report.to_json())
    content = (folder / "model.onnx").read_bytes()
    (file,) = told["formats"]
    assert (folder.parent / file["file"]).read_bytes() == content
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["bytes"] == len(content)
    assert file["opset"] == onnx.load_from_string(content).opset_import[0].version
    assert told["precision"] == ("int8" if kind.startswith("int8") else "fp32")
    assert told["parity"]["batch_sizes"] == [1, 2, 5, 6]
    assert told["speed"]["batch"] in (1, 6)
    assert told["seconds"] > 0
    assert (folder.parent / "labels.txt").read_text().splitlines() == archs.get("lenet5").labels()


def test_fp32_is_the_same_network_and_int8_a_smaller_one(lenets: dict[str, Published]) -> None:
    exact, small = lenets["fp32"].report, lenets["int8"].report
    assert exact.parity.max_rel_error < 1e-5
    assert exact.parity.top1_agreement == 1
    assert small.parity.max_rel_error > 1e-5  # it was quantized indeed
    assert small.parity.top1_agreement > 0.98
    assert small.formats[0]["bytes"] < 0.35 * exact.formats[0]["bytes"]
    assert [stage["stage"] for stage in small.stages] == ["onnx", "fp32", "int8"]
    assert exact.calibration is None
    assert small.calibration is not None
    assert small.calibration["samples"] <= 256
    assert list(small.calibration["tensors"]) == ["mse"]


@needs_tensorrt
def test_a_gpu_export_is_built_by_tensorrt_and_says_what_was_not_measured(lenets: dict[str, Published]) -> None:
    report = lenets["int8-gpu"].report
    assert report.engine is not None
    assert report.engine["library"] in ("tensorrt", "tensorrt_rtx")
    assert report.engine["bytes"] > 10_000
    assert not report.engine["published"]
    assert "a trial" in report.engine["line"]
    assert not list(lenets["int8-gpu"].folder.glob("*.plan"))
    if not torch.cuda.is_available():
        assert any("measured on a CPU" in caveat for caveat in report.caveats)
    assert lenets["int8"].report.engine is None


def test_the_images_that_check_did_not_calibrate(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, digit in enumerate(digits().test[:8]):
        Image.fromarray(digit.squeeze()).save(photos / f"{index}.png")
    config = ExportConfig(
        "lenet5", repository=tmp_path / "m", steps=(Int8(),), calibration=photos, calibration_samples=4
    )
    report = run(config, Quiet()).report
    assert report.calibration is not None
    assert report.calibration["samples"] + report.parity.samples == 8
    assert "held out" in report.images["check"]


def test_one_image_is_enough_and_said(tmp_path: Path) -> None:
    Image.fromarray(digits().test[0].squeeze()).save(tmp_path / "0.png")
    report = run(ExportConfig("lenet5", repository=tmp_path / "m", calibration=tmp_path), Quiet()).report
    assert report.parity.samples == 1
    assert any("one calibration image" in caveat for caveat in report.caveats)


def test_exporting_again_says_what_changes(tmp_path: Path) -> None:
    base = ExportConfig("lenet5-softmax", weights="random", repository=tmp_path, batch=(1, 2))
    run(base, Quiet())
    labels = tmp_path / "names.txt"
    labels.write_text("cat\ndog\n\n")
    again = ExportConfig(
        "lenet5-softmax", weights="random", repository=tmp_path, batch=(1, 2), labels=labels, input="uint8"
    )
    published = run(again, Quiet())
    assert published.folder == tmp_path / "lenet5-softmax" / "2"
    assert (tmp_path / "lenet5-softmax" / "labels.txt").read_text() == "cat\ndog\n"
    told = " ".join(published.report.caveats)
    assert "FP32[1, 32, 32] to input UINT8[32, 32, 1]" in told
    assert "output changes from logits 10 to logits 2" in told
    with pytest.raises(BadInput, match="older than version 2"):
        run(ExportConfig("lenet5-softmax", weights="random", repository=tmp_path, version=1, force=True), Quiet())


def test_the_seed_decides_random_weights(tmp_path: Path) -> None:
    found = [
        run(ExportConfig("lenet5", weights="random", seed=seed, repository=tmp_path, batch=(1, 1)), Quiet()).report
        for seed in (1, 1)
    ]
    sums = [report.weights["sha256"] for report in found]
    arch = archs.get("lenet5")
    other = weights.load(arch.build(10), arch, "random", seed=2, images=digits().test[:8])
    assert sums[0] == sums[1] != other.sha256
    assert found[0].formats[0]["sha256"] == found[1].formats[0]["sha256"]


def test_weights_that_overflow(tmp_path: Path) -> None:
    state = archs.get("lenet5-softmax").build(10).state_dict()
    torch.save({name: torch.full_like(tensor, 3e38) for name, tensor in state.items()}, tmp_path / "huge.pt")
    with pytest.raises(BadInput, match="not finite"):
        run(ExportConfig("lenet5-softmax", weights=str(tmp_path / "huge.pt"), repository=tmp_path / "m"), Quiet())
    assert not (tmp_path / "m").exists()


def cifar(split: str, folder: Path, every: int) -> Path:
    """Unpack every n-th image of the real CIFAR-10 files; skip where they are not."""
    archive = DATA / f"cifar10_{split}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"needs {archive.name} in ../shared/data")
    with tarfile.open(archive) as opened:
        files = sorted((member for member in opened if member.isfile()), key=lambda member: member.name)
        opened.extractall(folder, members=files[::every], filter="data")
    return folder / split


def cifar_config(tmp_path: Path, every: int, **options: Any) -> ExportConfig:
    return ExportConfig(
        "resnet20",
        weights=str(DATA / "weights" / "resnet20-12fca82f.th"),
        repository=tmp_path / "models",
        eval=cifar("test", tmp_path, every),
        **options,
    )


def test_trained_resnet20_in_fp32_answers_exactly_as_pytorch(tmp_path: Path) -> None:
    config = cifar_config(tmp_path, every=25)
    published = run(config, Quiet())
    arch = archs.get("resnet20")
    labelled = labelled_images(tmp_path / "test", arch.labels())
    images = load_images([path for path, _ in labelled], arch.preprocess)
    assert len(images) == 200
    model = arch.build(10)
    weights.load(model, arch, config.weights, seed=0, images=images)
    inputs = arch.preprocess.normalize(images)
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    (found,) = session_of(published.folder / "model.onnx").run(None, {"input": inputs})
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    accuracy = published.report.accuracy
    assert accuracy is not None
    right = expected.argmax(axis=1) == np.array([label for _, label in labelled])
    assert accuracy.reference_top1 == accuracy.top1 == right.mean()
    assert right.mean() > 0.75


def test_an_accuracy_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    """Ranges from one made-up dark picture are wrong for photographs; --max-drop or the cosine gate must say so."""
    dark = tmp_path / "dark"
    dark.mkdir()
    Image.new("RGB", (32, 32), (3, 3, 3)).save(dark / "0.png")
    config = cifar_config(tmp_path, every=100, steps=(Int8(),), calibration=dark, max_drop=1.0)
    with pytest.raises(Refused, match="nothing was published"):
        run(config, Quiet())
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_int8_keeps_the_accuracy_of_trained_resnet20(target: str, method: str, tmp_path: Path) -> None:
    """All 5,000 test images; at most half a point of top-1 may go."""
    config = cifar_config(
        tmp_path, 1, steps=(Int8(method),), calibration=cifar("train", tmp_path, 50), max_drop=0.5, target=target,
    )  # fmt: skip
    accuracy = run(config, Quiet()).report.accuracy
    assert accuracy is not None
    assert accuracy.samples == 5000
    assert accuracy.reference_top1 == pytest.approx(0.8084, abs=0.001)
