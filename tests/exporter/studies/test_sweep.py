"""`convoy sweep` keeps what was done, goes on where it stopped, and names what is not worth having."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from convoynet.exporter import recipe
from convoynet.exporter.commands import cli, flags, sweep_command
from convoynet.exporter.commands.sweep_command import sweep as command
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput, Refused
from convoynet.exporter.pipeline import first_look, pipeline
from convoynet.exporter.pipeline.pipeline import Published
from convoynet.exporter.progress import Progress, Quiet
from convoynet.exporter.recipe import Finetune, Fp16, Int8, Prune, Step
from convoynet.exporter.studies.sweep import (
    PAGE_FILE,
    PLOT_FILE,
    STATE_FILE,
    USUAL,
    USUAL_OF_FILES,
    Result,
    sweep,
    with_baseline,
)
from convoynet.exporter.studies.variants import Variant
from tests.exporter import given_files

RECIPES: dict[str, tuple[Step, ...]] = {"float32": (), "int8": (Int8(),), "minmax": (Int8("minmax"),)}


def config(folder: Path) -> ExportConfig:
    return ExportConfig("lenet5", repository=folder / "models", batch=(1, 8))


def test_every_recipe_becomes_a_model_and_a_point_also_after_an_interruption(
    tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(config(tmp_path), eval=classes)
    ran: list[str] = []
    real = pipeline.run

    def run(one: ExportConfig, progress: Progress) -> Published:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(one.model_name)
        return real(one, progress)

    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, RECIPES, tmp_path / "out", Quiet())
    done = json.loads((tmp_path / "out" / STATE_FILE).read_text())["results"]
    assert [row["name"] for row in done] == ["float32", "int8"]
    monkeypatch.setattr(pipeline, "run", lambda one, progress: (ran.append(one.model_name), real(one, progress))[1])
    results = sweep(asked, RECIPES, tmp_path / "out", Quiet())
    assert ran == [f"lenet5-{name}" for name in RECIPES]
    assert [result.name for result in results] == list(RECIPES)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {f"lenet5-{name}" for name in RECIPES}
    stated = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert [row["variant"]["precision"] for row in stated["results"]] == ["fp32", "int8", "int8"]
    assert set(stated["dominated"]) <= set(RECIPES)
    changed = [row["variant"]["changes"] for row in stated["results"]]
    assert [one["drift"] == 0 for one in changed] == [True, False, False]
    assert all(one["flips"] < 0.1 and one["drift"] < 0.05 for one in changed)
    assert [result.variant and result.variant.drift for result in results] == [one["drift"] for one in changed]
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert "data:image/png;base64," in page
    assert all(f'<a href="../models/lenet5-{name}/report.html">{name}</a>' in page for name in RECIPES)
    assert '<th scope="row">PyTorch eager</th><td>fp32</td>' in page
    assert all(f'<th scope="col">{name}</th>' in page for name in ("flips", "worst class", "ECE", "drift"))
    baselines = [row["baseline"] for row in stated["results"]]
    assert {one["name"] for one in baselines} == {"PyTorch eager"}
    assert baselines[0]["milliseconds"] > 0
    # Of the results that were read again, too.
    assert [one.name for one in with_baseline(results)] == ["PyTorch eager", *RECIPES]
    assert (tmp_path / "out" / PLOT_FILE).stat().st_size > 1000


def test_withheld_speeds_are_not_told_to_programs() -> None:
    doubted = Variant("a", "int8", 1, 2, 3, 4.0, 250.0, 8, doubt="other processes took 1.5 of 2 cores")
    told = Result("a", "", "b", doubted, baseline=doubted).to_json()
    for side in ("variant", "baseline"):
        assert (told[side]["milliseconds"], told[side]["images_per_second"]) == (None, None)
    assert Result("a", "", "b", refused="no").to_json()["baseline"] is None


def test_a_changed_recipe_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(config(tmp_path), {"one": ()}, tmp_path / "out", Quiet())
    ran: list[str] = []
    real = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda one, progress: (ran.append(one.model_name), real(one, progress))[1])
    sweep(config(tmp_path), {"one": ()}, tmp_path / "out", Quiet())
    assert ran == []
    sweep(config(tmp_path), {"one": (Int8(),)}, tmp_path / "out", Quiet())
    assert ran == ["lenet5-one"]


def test_other_weights_under_the_same_name_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(one: ExportConfig, progress: Progress) -> Published:
        ran.append(one.model_name)
        raise Refused("enough")

    monkeypatch.setattr(pipeline, "run", run)
    weights = tmp_path / "trained.safetensors"
    weights.write_bytes(b"first")
    asked = replace(config(tmp_path), weights=str(weights))
    for content in (None, None, b"retrained"):
        if content is not None:
            weights.write_bytes(content)
        sweep(asked, {"one": ()}, tmp_path / "out", Quiet())
    assert ran == ["lenet5-one"] * 2


def test_a_refused_recipe_is_kept_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.run

    def run(one: ExportConfig, progress: Progress) -> Published:
        if one.steps:
            raise Refused("INT8 moved the outputs too far")
        return real(one, progress)

    monkeypatch.setattr(pipeline, "run", run)
    results = sweep(config(tmp_path), {"float32": (), "int8": (Int8(),)}, tmp_path / "out", Quiet())
    assert results[1].variant is None
    assert "too far" in results[1].refused
    assert "too far" in (tmp_path / "out" / PAGE_FILE).read_text()


def test_a_recipe_that_the_network_does_not_take_stops_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    real = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda one, progress: (ran.append(one.model_name), real(one, progress))[1])
    tried = {"small": (Prune(0.9),), "float32": ()}
    for _ in range(2):
        results = sweep(config(tmp_path), tried, tmp_path / "out", Quiet())
        assert "step prune: ratio 0.9 cannot be reached" in results[0].refused
        assert results[1].variant is not None
    assert ran == ["lenet5-small", "lenet5-float32", "lenet5-small"]
    with pytest.raises(BadInput, match=r"recipe small: step prune: ratio 0\.9 cannot be reached"):
        sweep(config(tmp_path), {"small": (Prune(0.9),)}, tmp_path / "other", Quiet())


def test_the_command_reads_all_recipes_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.toml").write_text(recipe.to_toml((Int8(),)))
    (tmp_path / "bad.toml").write_text("[[step]]\nstep = 'shrink'")
    files = [str(tmp_path / name) for name in ("good.toml", "bad.toml")]
    where = ["--model-repository", str(tmp_path / "m"), "--output", str(tmp_path / "out")]
    assert command(["--arch", "lenet5", *where, *files]) == 2
    assert "'shrink'" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    assert command(["--arch", "lenet5", "--batch", "1:8", *where, files[0], "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["variant"]["precision"] == "int8"


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_a_sweep_takes_every_flag_of_an_export_but_its_version_and_steps() -> None:
    compression = argparse.ArgumentParser()
    flags.add_compression(compression.add_argument_group())
    of_one = {"--version", "--force"} | options_of(compression) - {"-h", "--help"}
    assert options_of(sweep_command._parser()) - {"--output"} == options_of(cli._export_parser()) - of_one


# What a recipe would give another answer without; --resize and --crop exclude each other.
ASKED = (
    "--arch lenet5 --weights own.pt --ema --seed 3 --num-classes 4 --input-size 40x48 --outputs logits,seen=f6 "
    "--task labels --resize 50 --interpolation bicubic --channel-order bgr --mean 0.1 --std 0.2 --input uint8 "
    "--calibration-samples 9 --made-images noise --batch 1:4 --opset 21 --name own --target cpu"
)


def test_a_recipe_of_a_sweep_is_the_export_that_the_same_flags_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[ExportConfig] = []

    def run(one: ExportConfig, progress: Progress) -> Published:
        ran.append(one)
        print("a network that prints")
        raise Refused("enough")

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(first_look, "check", lambda config: None)
    file = tmp_path / "r.toml"
    file.write_text(recipe.to_toml((Int8(),)))
    asked = [*ASKED.split(), "--model-repository", str(tmp_path / "m")]
    assert cli.export([*asked, "--recipe", str(file)]) == Refused.exit_code
    capsys.readouterr()
    assert command([*asked, "--output", str(tmp_path / "out"), "--json", str(file)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["refused"] == "enough"
    exported, swept = ran
    assert replace(swept, name="own", version=None, force=False) == exported
    assert swept.outputs == ("logits", "seen=f6")
    assert swept.task == "labels"
    assert (swept.resize, swept.interpolation, swept.channel_order) == (50, "bicubic", "bgr")


def test_outputs_that_a_recipe_cannot_keep_are_said_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model-repository", str(tmp_path / "m"), "--output", str(tmp_path / "out")]
    assert command(["--arch", "lenet5", "--outputs", "logits,seen=f6", *where]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "recipe pruned-25-int8: --outputs logits,seen=f6" in told
    assert not (tmp_path / "m").exists()


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--output .*file.*cannot be written"):
        sweep(config(tmp_path), {"one": ()}, tmp_path / "file" / "out", Quiet())


def test_images_to_train_on_are_for_the_recipes_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, Path | None] = {}

    def run(one: ExportConfig, progress: Progress) -> Published:
        ran[one.model_name] = one.finetune
        raise Refused("enough")

    monkeypatch.setattr(pipeline, "run", run)
    images = tmp_path / "train"
    images.mkdir()
    Image.new("L", (32, 32)).save(images / "a.png")
    where = ["--arch", "lenet5", "--model-repository", str(tmp_path / "m"), "--output", str(tmp_path / "out")]
    assert command([*where, "--finetune", str(images)]) == 0
    assert ran == {
        f"lenet5-{name}": images if any(isinstance(step, Finetune) for step in steps) else None
        for name, steps in USUAL.items()
    }
    assert None in ran.values()


def test_an_onnx_file_is_swept_beside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = given_files.any_batch(tmp_path / "theirs.onnx")
    (tmp_path / "int8.toml").write_text(recipe.to_toml((Int8(),)))
    (tmp_path / "entropy.toml").write_text(recipe.to_toml((Int8("entropy"),)))
    where = ["--model-repository", str(tmp_path / "m"), "--output", str(tmp_path / "out")]
    options = ["--onnx", str(file), "--input-size", str(given_files.SIZE), "--batch", "1:4", *where]
    assert command([*options, str(tmp_path / "int8.toml"), str(tmp_path / "entropy.toml")]) == 0
    table = capsys.readouterr().out
    assert "the given file in ONNX Runtime" in table
    assert "PyTorch" not in table
    state = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert [row["variant"]["precision"] for row in state["results"]] == ["int8", "int8"]
    assert {row["baseline"]["precision"] for row in state["results"]} == {"fp32"}
    assert all(row["baseline"]["bytes"] > row["variant"]["bytes"] > 0 for row in state["results"])
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert "The first line is the network that was named, in ONNX Runtime" in page
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"theirs-int8", "theirs-entropy"}


@pytest.mark.parametrize("named", ["--onnx", "--arch"])
def test_without_recipes_a_file_is_neither_pruned_nor_trained(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, tuple[Step, ...]] = {}

    def run(one: ExportConfig, progress: Progress) -> Published:
        ran[one.model_name] = one.steps
        raise Refused("enough")

    monkeypatch.setattr(pipeline, "run", run)
    (tmp_path / "theirs.onnx").write_bytes(b"")
    where = ["--model-repository", str(tmp_path / "m"), "--output", str(tmp_path / "out")]
    assert command([named, str(tmp_path / "theirs.onnx"), *where]) == 0
    assert ran == {f"theirs-{name}": steps for name, steps in USUAL_OF_FILES.items()}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["half.toml"], "recipe half: step 1 (prune) needs the network in PyTorch, and theirs.onnx is an ONNX file"),
        (["--finetune", "."], "--finetune .: none of the recipes trains; an ONNX file is not trained, drop this"),
        (["--weights", "random"], "--weights random needs the network in PyTorch"),
        (["--arch", "lenet5"], "argument --arch: not allowed with argument --onnx"),
    ],
)
def test_what_an_onnx_file_cannot_have_is_said_before_any_work(
    flags: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.onnx").write_bytes(b"")
    Path("half.toml").write_text(recipe.to_toml((Prune(0.5), Int8())))
    assert command(["--onnx", "theirs.onnx", *flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert line in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.toml", "theirs.onnx"]


def test_images_that_no_recipe_trains_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--finetune .*: none of the recipes trains; add a step to one, or drop this"):
        sweep(config(tmp_path), {"one": (), "two": (Int8(),)}, tmp_path / "out", Quiet(), tmp_path)


def test_a_recipe_that_does_not_go_with_the_options_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="recipe halves: --fp16 needs --target gpu"):
        sweep(config(tmp_path), {"one": (), "halves": (Fp16(),)}, tmp_path / "out", Quiet())
