"""The flags of `convoy export` stand for the steps that docs/compression.md says they do."""

import argparse
from pathlib import Path

import pytest

from convoynet.exporter import recipe
from convoynet.exporter.commands import flags
from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Finetune, Fp16, Int8, LowRank, Prune, Separable, Sparsify, Step


def steps_of(line: str) -> tuple[Step, ...]:
    parser = argparse.ArgumentParser()
    flags.add_images(parser.add_argument_group())
    flags.add_compression(parser.add_argument_group())
    return flags.take_steps(vars(parser.parse_args(line.split())))


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        ("", ()),
        ("--int8", (Int8(),)),
        ("--int8 --fp16 --calibration-method auto --adaround", (Int8("auto", adaround=True), Fp16())),
        ("--int8 --keep-biases", (Int8(correct_means=False),)),
        ("--int8 --refine", (Int8(equalize=True, correct_bias=True),)),
        ("--int8 --qat", (Int8(qat_epochs=2),)),
        ("--int8 --qat 5 --finetune d", (Int8(qat_epochs=5),)),
        ("--prune 0.5", (Prune(0.5),)),
        ("--prune 0.5 --calibration d", (Prune(0.5), Finetune(steps=flags.RECOVERY_STEPS))),
        ("--prune 0.5 --finetune d", (Prune(0.5), Finetune())),
        (
            "--prune 0.5 --reconstruct --calibration d",
            (Prune(0.5, reconstruct=True), Finetune(steps=flags.RECOVERY_STEPS)),
        ),
        ("--prune 0.5 --prune-method bn --finetune d --epochs 3", (Prune(0.5, method="bn"), Finetune(epochs=3))),
        ("--finetune d", (Finetune(distill=False),)),
        ("--finetune d --distill", (Finetune(),)),
        ("--finetune d --distill resnet56:w.pt", (Finetune(teacher="resnet56:w.pt"),)),
        ("--low-rank 0.4 --sparsity 2:4", (LowRank(0.4), Sparsify())),
        ("--separable --sparsity 0.8 --int8", (Separable(), Sparsify("unstructured", 0.8), Int8())),
        ("--calibration d --int8", (Int8(),)),
    ],
)
def test_flags_stand_for_steps(line: str, steps: tuple[Step, ...]) -> None:
    assert steps_of(line) == steps


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--prune-method bn", ["--prune-method", "--prune"]),
        ("--reconstruct", ["--reconstruct", "--prune"]),
        ("--calibration-method mse", ["--calibration-method", "--int8 or --fp8"]),
        ("--adaround --fp16", ["--adaround", "--int8"]),
        ("--qat 3", ["--qat", "--int8"]),
        ("--refine", ["--refine", "--int8"]),
        ("--keep-biases --fp8", ["--keep-biases", "--int8"]),
        ("--epochs 3", ["--epochs", "--finetune DIR"]),
        ("--distill", ["--distill", "--finetune DIR"]),
        ("--sparsity half", ["'half'", "2:4"]),
        ("--sparsity 1.5", ["1.5"]),
        ("--prune 0", ["ratio 0.0"]),
        ("--prune 1", ["ratio 1.0"]),
        ("--int8 --fp8", ["exclude"]),
        ("--recipe r.toml --prune 0.5", ["--prune", "recipe"]),
    ],
)
def test_what_does_not_go_together_is_said(line: str, words: list[str]) -> None:
    with pytest.raises(BadInput) as refused:
        steps_of(line)
    for word in words:
        assert word in str(refused.value)


def test_a_recipe_takes_the_place_of_the_flags(tmp_path: Path) -> None:
    steps = (Prune(0.25), Int8(adaround=True))
    file = tmp_path / "r.toml"
    file.write_text(recipe.to_toml(steps))
    assert steps_of(f"--recipe {file}") == steps
