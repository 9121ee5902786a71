"""`convoy compare` measures what it is given, and says in one line what it cannot compare."""

import json
from pathlib import Path

import pytest

from convoynet.exporter.archs import get
from convoynet.exporter.assets import digits
from convoynet.exporter.commands.compare_command import compare
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.pipeline.pipeline import run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, steps in {"digits": (), "digits-int8": (Int8(),)}.items():
        run(ExportConfig("lenet5", repository=root, name=name, batch=(1, 8), steps=steps), Quiet())
    return root


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("classes")
    for index, (image, label) in enumerate(zip(digits().test[:60], digits().test_labels[:60], strict=True)):
        folder = root / get("lenet5").labels()[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{index}.png")
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
    for row in rows:  # on a machine that others use, both are withheld
        assert row["doubt"] or (row["milliseconds"] > 0 and row["images_per_second"] > 0)
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_the_table_for_people_names_every_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([str(models / "digits"), str(models / "digits-int8")]) == 0
    shown = capsys.readouterr().out
    assert "digits-int8" in shown
    assert "images/s" in shown


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
