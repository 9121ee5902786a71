"""Recipes: what is written is read back, and every mistake ends in one line that names it."""

from pathlib import Path

import pytest

from convoynet.exporter import recipe
from convoynet.exporter.errors import BadInput
from convoynet.exporter.recipe import Bf16, Finetune, Fp8, Fp16, Int8, LowRank, Prune, Separable, Sparsify

EVERY = (
    Separable(ratio=0.5),
    Prune(ratio=0.5, of="latency", method="taylor", scope="global", round_to=8, reconstruct=True),
    LowRank(energy=0.9, layers=("linear",), gate=False),
    Sparsify("unstructured", 0.8),
    Finetune(epochs=3, steps=7, lr=0.1, hints=True, attention=True, teacher="resnet56:default"),
    Int8(method="auto", adaround=True, qat_epochs=2),
    Fp16(),
)


@pytest.mark.parametrize("steps", [EVERY, (Prune(0.5), Fp8()), (Sparsify(), Bf16()), (Int8(),)])
def test_a_recipe_is_read_back_as_it_was_written(tmp_path: Path, steps: tuple[recipe.Step, ...]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(steps))
    assert recipe.load(path) == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["[[step]]"]),
        ("step = 3", ["[[step]]"]),
        ("[[step]", ["TOML"]),
        ("seed = 1\n[[step]]\nstep = 'int8'", ["nothing else"]),
        ("[[step]]\nratio = 0.5", ["step 1", "None", "prune"]),
        ("[[step]]\nstep = 'prun'", ["'prun'", "prune", "int8"]),
        ("[[step]]\nstep = 'int8'\nbits = 4", ["step 1 (int8)", "'bits'", "method"]),
        ("[[step]]\nstep = 'fp16'\nbits = 4", ["'bits'", "nothing"]),
        ("[[step]]\nstep = 'prune'", ["ratio is missing"]),
        ("[[step]]\nstep = 'prune'\nratio = 1.0", ["ratio 1.0", "0..1 without 0 and 1"]),
        ("[[step]]\nstep = 'prune'\nratio = nan", ["ratio nan"]),
        ("[[step]]\nstep = 'prune'\nratio = 'half'", ["'half'", "a number"]),
        ("[[step]]\nstep = 'prune'\nratio = true", ["True", "a number"]),
        ("[[step]]\nstep = 'prune'\nratio = 0.5\nround_to = 2.5", ["2.5", "a whole number"]),
        ("[[step]]\nstep = 'prune'\nratio = 0.5\nmethod = 'l1'", ["'l1'", "magnitude, bn, taylor, ablation, random"]),
        ("[[step]]\nstep = 'low-rank'", ["either ratio or energy"]),
        ("[[step]]\nstep = 'low-rank'\nratio = 0.5\nenergy = 0.5", ["either ratio or energy"]),
        ("[[step]]\nstep = 'low-rank'\nratio = 0.5\nlayers = []", ["layers is empty", "linear"]),
        ("[[step]]\nstep = 'low-rank'\nratio = 0.5\nlayers = ['conv']", ["'conv'", "linear"]),
        ("[[step]]\nstep = 'low-rank'\nratio = 0.5\nlayers = [1]", ["[1]", "a list of texts"]),
        ("[[step]]\nstep = 'sparsify'\npattern = 'unstructured'", ["needs a ratio"]),
        ("[[step]]\nstep = 'sparsify'\nratio = 0.5", ["takes none"]),
        ("[[step]]\nstep = 'finetune'\ndistill = false\nhints = true", ["hints", "distill = true"]),
        ("[[step]]\nstep = 'finetune'\ndistill = false\nattention = true", ["attention", "distill = true"]),
        ("[[step]]\nstep = 'int8'\n[[step]]\nstep = 'int8'", ["once"]),
        ("[[step]]\nstep = 'int8'\n[[step]]\nstep = 'fp8'", ["int8 and fp8 exclude"]),
        ("[[step]]\nstep = 'fp16'\n[[step]]\nstep = 'bf16'", ["fp16 and bf16 exclude"]),
        ("[[step]]\nstep = 'int8'\n[[step]]\nstep = 'bf16'", ["int8 and bf16 exclude", "fp16"]),
        ("[[step]]\nstep = 'int8'\n[[step]]\nstep = 'prune'\nratio = 0.5", ["step 2 (prune)", "int8", "last"]),
        ("[[step]]\nstep = 'sparsify'\n[[step]]\nstep = 'prune'\nratio = 0.5", ["step 2 (prune)", "undo the zeros"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_recipe_is_said_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as refused:
        recipe.load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_a_recipe_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        recipe.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="UTF-8"):
        recipe.load(tmp_path / "binary.toml")
