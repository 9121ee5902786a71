"""`convoy audit` of graphs whose output is probabilities already: the same figures as of the logits, or one line."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from convoynet.exporter.assets import digits
from convoynet.exporter.auditing.answers import Said, probabilities, said
from convoynet.exporter.auditing.audit import Asked, audit
from convoynet.exporter.auditing.in_export import Watched
from convoynet.exporter.commands.audit_command import audit as command
from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Quiet
from convoynet.exporter.publishing.published import read_published
from tests.exporter.onnx_runs import session_of

SIZE = 10


def ending_in(models: Path, target: Path, *operators: str) -> Path:
    """A copy of the model whose output further operators compute, each of the one before."""
    shutil.copytree(models / "digits", target)
    file = target / "1" / "model.onnx"
    model = onnx.load(file)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "scores"
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, SIZE, 1, 1]), "as_map"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "classes_axis"))
    read = "scores"
    for index, operator in enumerate(operators):
        name = "logits" if index == len(operators) - 1 else f"{operator}.{index}"
        inputs = {"Reshape": [read, "as_map"], "ReduceSum": [read, "classes_axis"], "Div": ["Exp.0", read]}
        attributes = {"axis": 1} if "Softmax" in operator else {}
        model.graph.node.append(helper.make_node(operator, inputs.get(operator, [read]), [name], **attributes))
        read = name
    onnx.save(model, file)
    return target


@pytest.mark.parametrize(
    "operators", [("Softmax",), ("LogSoftmax",), ("Reshape", "Softmax", "Flatten"), ("Softmax", "Identity")]
)
def test_probabilities_are_audited_by_the_scores_that_they_are_made_of(
    models: Path, classes: Path, tmp_path: Path, operators: tuple[str, ...]
) -> None:
    plain = audit(Asked(models / "digits", classes, fit_temperature=True), Quiet())
    against = str(models / "digits")
    found = audit(
        Asked(ending_in(models, tmp_path / "shares", *operators), classes, against, fit_temperature=True), Quiet()
    )
    assert found.answers.flips.count == 0
    assert found.answers.confidence == pytest.approx(plain.answers.confidence, abs=1e-6)
    assert found.answers.calibration == pytest.approx(plain.answers.calibration, abs=1e-6)
    assert found.temperature is not None
    assert plain.temperature is not None
    assert found.temperature.value == pytest.approx(plain.temperature.value, rel=1e-3)
    assert found.drift is not None
    assert found.drift.median > 0.9999


@pytest.mark.parametrize("operators", [("Softmax",), ("Reshape", "Softmax", "Flatten")])
def test_a_temperature_is_put_before_the_softmax(
    models: Path, classes: Path, tmp_path: Path, operators: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    model = ending_in(models, tmp_path / "shares", *operators)
    for _ in range(2):
        assert (
            command([str(model), "--against", str(models / "digits"), "--images", str(classes), "--fit-temperature"])
            == 0
        )
    after = read_published(model)
    temperature = float(after.config.parameters["temperature"].string_value)
    pixels = after.preprocess.normalize(digits().test[:8])
    before, scaled = session_of(after.graph).run(["logits", "probabilities"], {"input": pixels})
    (scores,) = session_of(models / "digits" / "1" / "model.onnx").run(None, {"input": pixels})
    np.testing.assert_allclose(before, probabilities(scores), atol=1e-5)
    np.testing.assert_allclose(scaled, probabilities(scores, temperature), atol=1e-4)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("operators", "reason"),
    [(("Sigmoid",), "is a probability of its own"), (("Exp", "ReduceSum", "Div"), "add up to 1 for each image")],
)
def test_what_is_no_share_of_one_answer_is_refused(
    models: Path, classes: Path, tmp_path: Path, operators: tuple[str, ...], reason: str
) -> None:
    model = ending_in(models, tmp_path / "shares", *operators)
    content = (model / "1" / "model.onnx").read_bytes()
    with pytest.raises(BadInput, match=reason):
        audit(Asked(model, classes, str(models / "digits"), fit_temperature=True), Quiet())
    with pytest.raises(BadInput, match=reason):
        audit(Asked(models / "digits", classes, str(model / "1" / "model.onnx")), Quiet())
    assert (model / "1" / "model.onnx").read_bytes() == content


def test_an_export_takes_probabilities_for_what_they_are() -> None:
    class Sure:
        name = "sure"

        def prepare(self, images: np.ndarray) -> np.ndarray:
            return images

        def __call__(self, inputs: np.ndarray) -> tuple[np.ndarray]:
            return (inputs,)

    shares = np.array([[0.9, 0.1], [0.25, 0.75]], np.float32)
    for flag, wanted in ((True, Said(np.array([0, 1]), np.array([0.9, 0.75]))), (False, said(shares))):
        watched = Watched(Sure(), shares=flag)
        watched(shares)
        np.testing.assert_array_equal(watched.said.best, wanted.best)
        np.testing.assert_allclose(watched.said.confidence, wanted.confidence, atol=1e-6)
