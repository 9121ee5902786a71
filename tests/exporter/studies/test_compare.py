"""`convoy compare` measures what it is given, and says in one line what it cannot compare."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from convoynet.exporter.commands.compare_command import compare
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    plain = ExportConfig("lenet5", repository=root, batch=(1, 8))
    for name, config in {
        "digits": plain,
        "digits-int8": replace(plain, steps=(Int8(),)),
        "numbers": replace(plain, task="regression"),
        "two-outputs": replace(plain, outputs=("logits", "pooled=f6"), resize=40),
    }.items():
        run(replace(config, name=name), Quiet())
    return root


def test_models_and_networks_are_put_side_by_side(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(models / "digits"), str(models / "digits-int8"), "lenet5"]
    assert compare([*names, "--eval", str(classes), "--json", "--plot", str(tmp_path / "front.png")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == names
    assert [row["precision"] for row in rows] == ["fp32", "int8", "fp32"]
    assert rows[0]["parameters"] == rows[2]["parameters"] == 60_000
    assert rows[1]["bytes"] < rows[0]["bytes"]
    assert rows[0]["top1"] > 0.9
    assert rows[2]["top1"] is None  # random weights know nothing
    first, second, third = (row["changes"] for row in rows)
    assert first["flips"] == first["class_drop"] == first["drift"] == 0
    assert 0 < second["drift"] < 0.05
    assert second["flips"] < 0.1
    assert 0 <= second["calibration_error"] < 0.2
    assert third is None
    for row in rows:  # on a machine that others use, both are withheld
        assert row["doubt"] or (row["milliseconds"] > 0 and row["images_per_second"] > 0)
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_the_table_for_people_names_every_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([str(models / "digits"), str(models / "digits-int8")]) == 0
    shown = capsys.readouterr().out
    assert "digits-int8" in shown
    assert "images/s" in shown


def copied(model: Path, folder: Path, **replaced: str) -> Path:
    """A model with other files: the names' underscores stand for dots."""
    shutil.copytree(model, folder)
    for name, content in replaced.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a comparison ends with."""
    capsys.readouterr()
    assert compare([*arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("other", ["digits", "lenet5"])
def test_models_whose_outputs_mean_different_things_are_not_compared(
    other: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = str(models / other) if other == "digits" else other
    told = refusal(capsys, str(models / "numbers"), second)
    assert f"numbers gives regression and {second} classes" in told
    assert "compare models of one task" in told


def test_a_report_of_boxes_or_maps_is_not_compared(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("detection", "segmentation"):
        config = (models / "digits" / "config.pbtxt").read_text().replace('"classification"', f'"{task}"')
        other = copied(models / "digits", tmp_path / task, config_pbtxt=config)
        assert f"{other}: {task} is not compared here" in refusal(capsys, str(models / "digits"), str(other))


def test_accuracy_is_for_classes_and_for_the_same_classes(
    models: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = refusal(capsys, str(models / "numbers"), "--eval", str(classes))
    assert f"--eval {classes}: class folders say nothing about regression: {models / 'numbers'}" in numbers
    other = copied(models / "digits", tmp_path / "letters", labels_txt="".join(f"{one}\n" for one in "abcdefghij"))
    told = refusal(capsys, str(models / "digits"), str(other), "--eval", str(classes))
    assert "other classes (10 and 10, such as" in told
    assert "compare them without --eval" in told


def test_other_outputs_classes_and_preprocessing_are_said_and_none_is_called_better(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = copied(models / "digits-int8", tmp_path / "letters", labels_txt="a\nb\n")
    assert compare([str(models / "digits"), str(models / "two-outputs"), str(letters)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (answers,) = (line for line in lines if line.startswith("other answers: "))
    assert "digits (classes: 10 logits)" in answers
    assert "two-outputs (classes: 10 logits, pooled)" in answers
    assert "letters (classes: 2 logits)" in answers
    (pictures,) = (line for line in lines if line.startswith("other preprocessing"))
    assert f"{models / 'two-outputs'}: resize shorter side to 40" in pictures
    assert f"{models / 'digits'}, {letters}: resize" in pictures
    assert not [line for line in lines if "no worse" in line]


def test_what_is_the_same_is_compared_without_a_word(
    models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = json.loads((models / "digits" / "report.json").read_text())
    report["parity"]["spread"]["kind"] = "values"  # as of a network that nothing says has classes
    untold = copied(models / "digits", tmp_path / "untold", report_json=json.dumps(report))
    del report["parity"]["spread"], report["input"]["preprocessing"]  # as an earlier version wrote it
    earlier = copied(models / "digits", tmp_path / "earlier", report_json=json.dumps(report))
    same = [models / "digits", models / "digits-int8", untold, earlier]
    assert compare([*map(str, same), "--json"]) == 0
    printed = capsys.readouterr()
    assert {row["group"] for row in json.loads(printed.out)} == {0}
    assert "other" not in printed.err


@pytest.mark.parametrize(
    ("name", "words"), [("resnet999", "convoy archs"), ("fcn_resnet50", "segmentation"), ("empty", "not")]
)
def test_what_cannot_be_compared_is_said(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.pbtxt").write_text("name: 'empty'")
    assert compare([name]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words in told or "no model" in told


def test_a_plot_that_cannot_be_written_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "none" / "a.png", tmp_path / "a.nothing"):
        assert compare([str(models / "digits"), "--plot", str(file)]) == 2
        assert "--plot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("parity", []),
        ("parity", {"spread": "none"}),
        ("input", 3),
        ("parameters", None),
        ("macs", {"after": "many"}),
        ("macs", {"after": float("inf")}),
    ],
)
def test_a_report_that_is_none_is_one_line(
    part: str, broken: object, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((models / "digits" / "report.json").read_text()) | {part: broken}
    other = copied(models / "digits", tmp_path / "other", report_json=json.dumps(report))
    assert "is no model that `convoy export` published" in refusal(capsys, str(models / "digits"), str(other))
