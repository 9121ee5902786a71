"""Refinements are kept where they help on images that they were not made from, and rolled back where they hurt."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.data.folder import list_images
from convoynet.exporter.data.images import load_images
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization import refine
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.recipe import Int8
from tests.exporter.layer_nets import classifier, conv, drawn, head, images
from tests.exporter.onnx_runs import run, signal_to_noise_db

DATA = Path(__file__).parents[4] / "shared" / "data"
ALL = Int8(method="mse", equalize=True, correct_bias=True, adaround=True)


def network() -> onnx.ModelProto:
    stored = drawn(0, one=(16, 3, 3, 3), two=(16, 16, 3, 3), head=(20, 16))
    # What one scale for the tensor serves badly, and equalization mends.
    factors = np.logspace(-1.5, 1.5, 16, dtype=np.float32)
    stored["one.weight"] *= factors.reshape(-1, 1, 1, 1)
    stored["one.bias"] *= factors
    stored["two.weight"] /= factors.reshape(1, -1, 1, 1)
    relus = [helper.make_node("Relu", [name], [f"{name}.relu"]) for name in ("one", "two")]
    return classifier(stored, [conv("input", "one"), relus[0], conv("one.relu", "two"), relus[1], *head("two.relu")])


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_what_helps_is_kept_and_the_same_each_time(target: str) -> None:
    model, pictures = network(), images(128)
    ranges = calibrate(model, [pictures], "mse")
    before = model.SerializeToString(deterministic=True)

    found = refine.refine(model, ranges, pictures, ALL, target, Quiet())

    assert model.SerializeToString(deterministic=True) == before
    assert found == refine.refine(model, ranges, pictures, ALL, target, Quiet())
    assert json.loads(json.dumps(found.log)) == found.log
    assert [entry["technique"] for entry in found.log] == (
        [refine.EQUALIZATION, refine.MEANS] + 3 * [refine.ROUNDING] + 3 * [refine.BIAS]
    )
    assert found.log[0]["layer"] == "one - two"
    assert found.log[0]["kept"]
    sqnr = found.log[0]["sqnr_before"]
    for entry in found.log:
        assert entry["sqnr_before"] == sqnr
        assert entry["kept"] == (entry["sqnr_after"] > entry["sqnr_before"] + 0.01)
        sqnr = entry["sqnr_after"] if entry["kept"] else sqnr
    unseen = images(64, seed=1)
    exact = run(model, unseen)
    plain = signal_to_noise_db(exact, run(quantize(model, ranges, target), unseen))
    refined = signal_to_noise_db(exact, run(quantize(found.model, found.ranges, target), unseen))
    assert refined > plain + 3


def test_what_hurts_is_rolled_back() -> None:
    """The images that a bias is made from are bright, those that judge are dark: it takes the wrong means over."""
    stored = drawn(1, one=(16, 3, 3, 3), head=(20, 16))
    model = classifier(stored, [conv("input", "one"), helper.make_node("Relu", ["one"], ["relu"]), *head("relu")])
    pictures = images(64)
    judges = np.arange(64) % 4 == 1
    pictures[~judges] = 40 * np.abs(pictures[~judges])
    ranges = calibrate(model, [pictures[judges]], "minmax")  # which clip the bright ones, and move their means

    found = refine.refine(model, ranges, pictures, Int8(correct_means=False, correct_bias=True), "gpu", Quiet())

    first = found.log[0]
    assert (first["layer"], first["technique"], first["kept"]) == ("one", refine.BIAS, False)
    assert first["sqnr_after"] < first["sqnr_before"] - 3
    assert not any(entry["kept"] for entry in found.log)
    assert found.model == model
    assert found.ranges == ranges


def test_a_layer_too_wide_to_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "MAX_INPUTS", 30)
    model, pictures = network(), images(16)
    found = refine.refine(model, calibrate(model, [pictures], "mse"), pictures, ALL, "gpu", Quiet())
    skipped = [entry for entry in found.log if "reason" in entry]
    assert [(entry["layer"], entry["reason"]) for entry in skipped] == [("two", "144 inputs are more than 30")]
    assert skipped[0]["sqnr_after"] is None
    assert not skipped[0]["kept"]


def test_what_cannot_be_judged_is_left_as_it_is_with_the_reason() -> None:
    model, pictures = network(), images(8)
    ranges = calibrate(model, [pictures], "mse")
    nothing = replace(ALL, equalize=False, correct_means=False, correct_bias=False, adaround=False)
    detector = onnx.ModelProto()
    detector.CopyFrom(model)
    del detector.graph.output[:]
    detector.graph.output.add(name="two.relu")
    for graph, shown, step, reason in (
        (model, pictures, nothing, "no refinement was asked for"),
        (model, pictures[:1], ALL, "a single image"),
        (detector, pictures, ALL, "detections"),
    ):
        found = refine.refine(graph, ranges, shown, step, "gpu", Quiet())
        assert reason in found.reason
        assert found.log == []
        assert found.model is graph


def test_fewer_images_for_more_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the work is multiply-adds, whatever the network."""
    model, pictures = network(), images(400)
    per_image = 64 * 16 * 27 + 64 * 16 * 144 + 16 * 20
    monkeypatch.setattr(refine, "WORK", 300 * 10 * per_image)
    assert len(refine._sample(model, pictures, 10, refine.WORK)) == 300
    assert len(refine._sample(model, pictures, 1, refine.WORK)) == 400
    assert len(refine._sample(model, pictures, 10_000, refine.WORK)) == refine.FEWEST_IMAGES


def test_a_perfect_result_is_a_number() -> None:
    logits = np.ones((2, 3), np.float32)
    assert refine.sqnr_db(logits, logits) == 200
    assert refine.sqnr_db(logits, logits * np.float32(1.1)) == pytest.approx(20, abs=1e-4)


def test_trained_resnet20_comes_nearer_to_float32(tmp_path: Path) -> None:
    archive, trained = DATA / "cifar10_test.tar.gz", DATA / "weights" / "resnet20-12fca82f.th"
    if not (archive.is_file() and trained.is_file()):
        pytest.skip(f"needs {archive.name} and weights/{trained.name} in ../shared/data")
    with tarfile.open(archive) as opened:
        files = sorted((member for member in opened if member.isfile()), key=lambda member: member.name)
        opened.extractall(tmp_path, members=files[::25], filter="data")
    arch = archs.get("resnet20")
    pixels = load_images(list_images(tmp_path), arch.preprocess)
    inputs = arch.preprocess.normalize(pixels)
    shown, unseen = inputs[::2], inputs[1::2]
    module = arch.build(10)
    weights.load(module, arch, str(trained), seed=0, images=pixels)
    model = onnx_from_torch(arch.deploy(module), arch.preprocess, uint8_input=False)
    ranges = calibrate(model, [shown], "mse")

    found = refine.refine(model, ranges, shown, Int8(correct_bias=True), "gpu", Quiet())

    assert [entry["technique"] for entry in found.log] == [refine.MEANS] + [refine.BIAS] * 19
    exact = run(model, unseen)
    plain = signal_to_noise_db(exact, run(quantize(model, ranges, "gpu"), unseen))
    assert signal_to_noise_db(exact, run(quantize(found.model, found.ranges, "gpu"), unseen)) > plain
