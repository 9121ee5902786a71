"""`convoy audit` on the packaged network: what it says, its gates, its page, and one line for what cannot be."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

import convoynet
from convoynet.exporter.archs import get
from convoynet.exporter.auditing import audit as auditing
from convoynet.exporter.auditing import page
from convoynet.exporter.auditing.audit import Asked, audit
from convoynet.exporter.auditing.gates import Gates
from convoynet.exporter.auditing.in_export import Watched
from convoynet.exporter.auditing.in_export import told as told_of
from convoynet.exporter.commands import audit_command
from convoynet.exporter.commands.audit_command import audit as command
from convoynet.exporter.data.images import load_images
from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.progress import Quiet
from convoynet.exporter.publishing.published import read_published
from convoynet.protos.inference import model_config_pb2 as pb
from tests.exporter.onnx_runs import session_of


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line that a command ends with; with --json it says nothing of what takes long."""
    capsys.readouterr()
    assert command([*(str(one) for one in arguments), "--json"]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("convoy audit: ")
    return error


def random_digits(models: Path, target: Path) -> Path:
    """The model with weights that know nothing: noise in the place of the last layer's."""
    shutil.copytree(models / "digits", target)
    file = target / "1" / "model.onnx"
    graph = onnx.load(file)
    rng = np.random.default_rng(0)
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            value = rng.normal(0, 0.2, list(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(graph, file)
    return target


def test_a_model_against_the_network_that_it_was_made_from(models: Path, classes: Path) -> None:
    found = audit(Asked(models / "digits", classes), Quiet())
    assert found.reference == "lenet5"
    assert found.answers.flips.count == 0
    assert found.answers.agreement == 1
    assert found.answers.top1[0] == found.answers.top1[1] > 0.9
    assert found.answers.calibration[0] == pytest.approx(found.answers.calibration[1], abs=1e-5)
    assert not any(one.paid for one in found.answers.classes)


def test_int8_that_takes_pixels_against_float_that_does_not(
    models: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for against in (str(models / "digits"), str(models / "digits" / "1" / "model.onnx"), "lenet5"):
        assert command([str(models / "digits-int8"), "--against", against, "--images", str(classes), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["reference"] == against
        assert found["source"] == f"the 60 images in {classes}"
        assert found["agreement"] >= 0.95
        assert found["flips"]["share"] == pytest.approx(1 - found["agreement"])
        assert sum(one["images"] for one in found["classes"]) == 60
        assert 0 <= found["calibration_error"]["after"] < 0.2


def test_another_engine_that_serves_is_noted(models: Path, classes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(models / "digits", folder)
    with (folder / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "engine" value { string_value: "openvino" } }\n')
    found = audit(Asked(folder, classes, against=str(models / "digits"), most=20, drift_images=0), Quiet())
    assert found.notes == ["config.pbtxt has OpenVINO serve the model: here ONNX Runtime answered"]


def test_what_flipped_is_named_gated_and_shown(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = random_digits(models, tmp_path / "worse")
    page = tmp_path / "audit.html"
    arguments = [worse, "--against", models / "digits", "--images", classes, "--html", page]
    assert command([*(str(one) for one in arguments), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lost = found["flips"]["right_to_wrong"]
    assert lost["count"] == len(lost["pictures"]) > 30
    assert all((classes / name).is_file() for name in lost["pictures"])
    assert any(one["paid"] for one in found["classes"])

    text = page.read_text()
    assert text.count("<figure>") == 24
    assert text.count('<figure class="three">') == 12
    drifted = found["drift"]
    assert drifted["drift"] == pytest.approx(1 - drifted["correlation"]["median"])
    assert len(drifted["pictures"]) == drifted["images"] == 60
    assert drifted["pictures"][0]["correlation"] <= drifted["pictures"][-1]["correlation"]
    assert drifted["pictures"][0]["picture"] in text
    assert lost["pictures"][0] in text
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    HTMLParser().feed(text)

    line = told(capsys, *arguments, "--max-flips", 5, "--max-class-drop", 3, "--max-drift", 0.1, code=3)
    assert re.search(
        r"; the evidence drifted by [\d.]+ \(1 less the median .* 60 images\), and --max-drift allows 0", line
    )
    assert re.search(r"[\d.]+ % of 60 answers flipped \(\d+ right to wrong, .* and --max-flips allows 5; class '", line)
    assert "--max-class-drop allows 3" in line
    assert command([str(one) for one in [*arguments, "--max-flips", 100, "--max-class-drop", 100]]) == 0


def test_the_table_for_people(models: Path, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([str(models / "digits-int8"), "--images", str(classes)]) == 0
    out = capsys.readouterr().out
    assert f"{models / 'digits-int8'} against lenet5, on the 60 images in {classes}" in out
    assert "right to wrong" in out
    assert "no class lost more than chance explains" in out
    for label in get("lenet5").labels():
        assert re.search(rf"^{label} ", out, re.M)


def test_gates_compare_what_was_measured(models: Path, classes: Path) -> None:
    found = audit(Asked(models / "digits", classes), Quiet())
    assert found.drift is not None
    assert found.drift.median > 0.999
    Gates(flips=0, class_drop=0, drift=0.001).check(found)
    for wrong in ({"flips": -1}, {"flips": 101}, {"class_drop": -0.1}, {"flips": float("nan")}):
        with pytest.raises(BadInput, match="is not in 0"):
            Gates(**wrong)


def test_of_many_images_as_many_evenly_spread_ones_are_looked_at(models: Path, classes: Path) -> None:
    found = audit(Asked(models / "digits", classes, most=12), Quiet())
    assert found.source == f"12 of the 60 images in {classes}"
    assert len(set(found.classes.tolist())) > 5
    assert found.answers.images == 12


def test_a_temperature_becomes_an_output_of_the_published_graph(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calibrated"
    shutil.copytree(models / "digits-int8", folder)
    before = read_published(folder)
    arguments = [str(folder), "--against", str(models / "digits"), "--images", str(classes), "--fit-temperature"]
    for _ in range(2):  # the second time the output is replaced
        assert command([*arguments, "--json"]) == 0
        fitted = json.loads(capsys.readouterr().out)["temperature"]
    after = read_published(folder)
    assert [output.name for output in after.config.output] == ["logits", "probabilities"]
    assert float(after.config.parameters["temperature"].string_value) == pytest.approx(fitted["temperature"])
    assert after.report["formats"][0]["bytes"] == len(after.graph)
    assert after.report["temperature"]["temperature"] == fitted["temperature"]
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert after.report["formats"][0]["sha256"][:12] in text
        assert before.report["formats"][0]["sha256"][:12] not in text
        assert (folder / "1" / name).read_text() == text

    images = load_images(sorted(classes.rglob("*.png")), after.preprocess)
    sessions = [session_of(one.graph) for one in (before, after)]
    (old,), (new, shares) = (session.run(None, {"input": images}) for session in sessions)
    np.testing.assert_array_equal(old, new)
    scaled = np.exp((old - old.max(axis=1, keepdims=True)) / fitted["temperature"])
    np.testing.assert_allclose(shares, scaled / scaled.sum(axis=1, keepdims=True), atol=1e-5)


def test_a_model_with_a_temperature_is_served(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its config nothing is changed but the output and the temperature."""
    folder = tmp_path / "calibrated"
    shutil.copytree(models / "digits", folder)
    file = folder / "config.pbtxt"
    before = file.read_text()
    assert command([str(folder), "--images", str(classes), "--fit-temperature"]) == 0
    assert f"{folder} has the output 'probabilities' now" in capsys.readouterr().out
    with convoynet.load(folder, threads=1, tune=False) as model:
        images = load_images(sorted(classes.rglob("*.png"))[:3], read_published(folder).preprocess)
        inputs = {"input": read_published(folder).preprocess.normalize(images)}
        shares = model(inputs)["probabilities"]
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    config = text_format.Parse(file.read_text(), pb.ModelConfig())
    del config.output[1:]
    del config.parameters["temperature"]
    assert config == text_format.Parse(before, pb.ModelConfig())


def test_the_page_shows_every_way_and_class_first() -> None:
    """Of twelve that flipped: nine of class 0 that were lost, one of class 1, two that were gained."""
    flips = SimpleNamespace(lost=np.arange(10), other=np.array([], int), gained=np.array([10, 11]))
    labelled = np.array([0] * 9 + [1, 0, 2])
    found = page.in_turn(SimpleNamespace(answers=SimpleNamespace(flips=flips), classes=labelled))  # type: ignore[arg-type]
    assert found[:4] == [0, 9, 10, 11]
    assert sorted(found) == list(range(12))


def test_a_refused_model_is_left_as_it_is(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = random_digits(models, tmp_path / "worse")
    graph = (worse / "1" / "model.onnx").read_bytes()
    told(capsys, worse, "--images", classes, "--fit-temperature", "--max-flips", 1, code=3)
    assert (worse / "1" / "model.onnx").read_bytes() == graph
    with (worse / "config.pbtxt").open("a") as config:
        config.write("version_policy { all {} }")
    line = told(capsys, worse, "--against", models / "digits", "--images", classes, "--fit-temperature")
    assert "has versions served beside the newest (version_policy: all)" in line
    assert (worse / "1" / "model.onnx").read_bytes() == graph


def test_what_cannot_be_audited_is_one_line(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models / "digits"
    label = next(one for one in get("lenet5").labels() if (classes / one).is_dir())
    alone, flat, wrong = (tmp_path / name for name in ("alone", "flat", "wrong"))
    shutil.copytree(classes / label, alone / label)
    shutil.copytree(classes / label, flat)
    shutil.copytree(classes / label, wrong / "11")
    (tmp_path / "empty").mkdir()
    assert f"images are of one class, '{label}'" in told(capsys, model, "--images", alone)
    assert "lies in no class folder" in told(capsys, model, "--images", flat)
    assert "'11' is no class; a folder is named by one of the 10 labels" in told(capsys, model, "--images", wrong)
    assert "holds no image" in told(capsys, model, "--images", tmp_path / "empty")
    assert "no such folder of images" in told(capsys, model, "--images", tmp_path / "none")
    assert "is no model that `convoy export` published" in told(capsys, tmp_path, "--images", classes)
    assert f"it is a version of the model {model}" in told(capsys, model / "1", "--images", classes)
    assert f"it is a version of the model {model}" in told(capsys, model, "--against", model / "1", "--images", classes)
    assert "--against resnet999: no such thing" in told(capsys, model, "--against", "resnet999", "--images", classes)
    assert "--max-images 0 is not 1 or more" in told(capsys, model, "--images", classes, "--max-images", 0)
    assert "--max-flips 200 is not in 0..100" in told(capsys, model, "--images", classes, "--max-flips", 200)
    assert "--drift-images -1 is not 0 or more" in told(capsys, model, "--images", classes, "--drift-images", -1)
    assert "--drift-images 0 looks at no evidence, and --max-drift judges it" in told(
        capsys, model, "--images", classes, "--drift-images", 0, "--max-drift", 0.1
    )
    assert "there is no folder" in told(capsys, model, "--images", classes, "--html", tmp_path / "x" / "y.html")
    labels = models / "digits" / "labels.txt"
    assert "ends in .html" in told(capsys, model, "--images", classes, "--html", labels)
    assert labels.read_text().splitlines() == list(get("lenet5").labels())
    torn = tmp_path / "torn" / label
    torn.mkdir(parents=True)
    (torn / "one.png").write_bytes(b"no picture")
    shutil.copytree(classes / get("lenet5").labels()[1], tmp_path / "torn" / "1")
    assert "one.png: cannot be read as an image" in told(capsys, model, "--images", tmp_path / "torn")


def test_sides_that_answer_or_see_something_else_are_not_compared(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "letters"
    shutil.copytree(models / "digits", other)
    (other / "labels.txt").write_text("".join(f"{one}\n" for one in "abcdefghij"))
    assert "have other classes (10 and 10, such as" in told(
        capsys, models / "digits", "--against", other, "--images", classes
    )
    (other / "labels.txt").write_text((models / "digits" / "labels.txt").read_text().rpartition("9")[0])
    assert "have other classes (9 and 10, such as none and '9')" in told(
        capsys, models / "digits", "--against", other, "--images", classes
    )
    crop = tmp_path / "cropped"
    shutil.copytree(models / "digits", crop)
    config = (crop / "config.pbtxt").read_text()
    (crop / "config.pbtxt").write_text(config.replace('\\"resize\\": 32', '\\"resize\\": 40'))
    assert "take other pictures" in told(capsys, models / "digits", "--against", crop, "--images", classes)
    for task in ("detection", "segmentation"):
        boxes = tmp_path / task
        shutil.copytree(models / "digits", boxes)
        (boxes / "config.pbtxt").write_text(config.replace('"classification"', f'"{task}"'))
        assert f"{task} is not audited" in told(capsys, boxes, "--images", classes)


def test_weights_that_are_not_the_models_own_are_asked_for(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "own"
    shutil.copytree(models / "digits", other)
    report = json.loads((other / "report.json").read_text())
    report["weights"] = {"source": "file mine.pt", "sha256": "0" * 64}
    (other / "report.json").write_text(json.dumps(report))
    line = told(capsys, other, "--images", classes)
    assert "was made from lenet5 with weights file mine.pt" in line
    assert "--against lenet5:FILE" in line
    report["weights"]["source"] = "published weights of another year"
    (other / "report.json").write_text(json.dumps(report))
    assert "with other weights (published weights of another year)" in told(capsys, other, "--images", classes)
    report["arch"] = "nets:small"
    (other / "report.json").write_text(json.dumps(report))
    assert "was made from nets:small with weights published weights of another year: say what" in told(
        capsys, other, "--images", classes
    )


def test_the_command_states_the_limits_that_hold() -> None:
    assert audit_command._MOST_IMAGES == auditing.MOST_IMAGES
    assert audit_command._DRIFT_IMAGES == auditing.DRIFT_IMAGES


def test_a_refusal_names_every_gate(models: Path, classes: Path, tmp_path: Path) -> None:
    found = audit(Asked(random_digits(models, tmp_path / "worse"), classes, against=str(models / "digits")), Quiet())
    with pytest.raises(Refused, match=r"flipped .*; class .* lost"):
        Gates(flips=1, class_drop=1).check(found)


def test_a_model_without_a_feature_map_has_a_note_and_no_drift_to_judge(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(models / "digits", flat)
    weights = np.random.default_rng(0).normal(size=(1024, 10)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Flatten", ["input"], ["pixels"]),
        onnx.helper.make_node("MatMul", ["pixels", "weights"], ["logits"]),
    ]
    whole = onnx.load(flat / "1" / "model.onnx")
    graph = onnx.helper.make_graph(
        nodes, "flat", whole.graph.input, whole.graph.output[:1], [onnx.numpy_helper.from_array(weights, "weights")]
    )
    made = onnx.helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    onnx.save(made, flat / "1" / "model.onnx")
    arguments = [flat, "--against", models / "digits", "--images", classes]
    assert command([*(str(one) for one in arguments), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drift"] is None
    assert re.search("no evidence was looked at: .*flat has no feature map", found["notes"][0])
    assert "flat has no feature map" in told(capsys, *arguments, "--max-drift", 0.1)


def test_an_export_with_labelled_images_says_what_an_audit_does(models: Path, classes: Path) -> None:
    report = json.loads((models / "digits-int8" / "report.json").read_text())
    found = audit(Asked(models / "digits-int8", classes, drift_images=0), Quiet())
    assert report["engine"] is None
    if report["engines"][0]["engine"] == "onnxruntime":
        expected = found.to_json()
        for name in ("agreement", "top1", "drop_interval"):
            assert report["answers"][name] == expected[name]
        for way in ("right_to_wrong", "wrong_to_right", "wrong_to_other"):
            assert report["answers"]["flips"][way]["count"] == expected["flips"][way]["count"]
        assert report["answers"]["calibration_error"] == pytest.approx(expected["calibration_error"], abs=1e-4)
    assert report["answers"]["images"] == 60
    assert {one["class"] for one in report["answers"]["classes"]} == set(get("lenet5").labels())
    assert report["answers"]["classes_left_out"] == 0
    assert report["answers"]["paid"] == []
    page = (models / "digits-int8" / "report.html").read_text()
    assert "Whom it fails" in page
    assert "no class paid" in page
    assert "flipped (" in (models / "digits-int8" / "report.md").read_text()
    assert json.loads((models / "digits" / "report.json").read_text())["answers"] is None


def test_answers_that_are_no_numbers_can_be_reported() -> None:
    class Broken:
        name = "broken"

        def prepare(self, images: np.ndarray) -> np.ndarray:
            return images

        def __call__(self, inputs: np.ndarray) -> tuple[np.ndarray]:
            return (np.array([[np.nan, 1, 2], [np.inf, 0, 0], [-np.inf, 0, 1]], np.float32),)

    sides = Watched(Broken()), Watched(Broken())
    for side in sides:
        side(np.zeros(3))
    made = told_of(*sides, [0, 1, 2], "abc")
    assert json.loads(json.dumps(made, allow_nan=False))["images"] == 3
    assert made["flips"]["share"] == 0
