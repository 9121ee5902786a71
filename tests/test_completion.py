"""`convoy completion`: the script is loaded into real shells, which are then asked what they would complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convoynet.server import cli
from convoynet.usage import parser_of
from tests.test_startup import HEAVY, answers


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made without the heavy libraries, which a serving image does not have."""
    folder = tmp_path_factory.mktemp("completion")
    made = {}
    for line, (code, out, err) in answers(["completion bash", "completion zsh"], folder, HEAVY).items():
        assert (code, err) == (0, "")
        made[line.split()[1]] = folder / line.split()[1]
        made[line.split()[1]].write_text(out)
    return made


def completed(script: Path, line: str, folder: Path) -> list[str]:
    """What bash offers at the end of the line; its own completion of files where the script offers nothing."""
    words = line.split(" ")
    ask = f"""
    source {script}
    COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1} COMP_LINE='{line}'
    _convoy convoy '{words[-1]}' '{words[-2]}'
    if [ ${{#COMPREPLY[@]}} -eq 0 ]; then COMPREPLY=( $(compgen -f -- '{words[-1]}') ); fi
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-uc", ask], capture_output=True, text=True, check=True, cwd=folder, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("convoy e", ["explain", "export"]),
        ("convoy s", ["serve", "sweep"]),
        ("convoy --v", ["--version"]),
        ("convoy help in", ["inspect"]),
        ("convoy completion ", ["bash", "zsh"]),
        ("convoy export --calibration-", ["--calibration-samples", "--calibration-method"]),
        ("convoy export --arch resnet5", ["resnet50", "resnet56"]),
        ("convoy export --arch lenet5 --format ", ["onnx", "tensorrt"]),
        ("convoy inspect lene", ["lenet5"]),
        ("convoy lint --for ope", ["openvino"]),
        ("convoy serve --log-level d", ["debug"]),
        ("convoy serve --no-tune-", ["--no-tune-in-service"]),
        ("convoy predict --tok", ["--token-file", "--token"]),
        # names of files, where nothing else is known
        ("convoy predict ca", ["cat.jpg"]),
        ("convoy export --calibration ph", ["photos"]),
        ("convoy inspect mod", ["model.onnx"]),
        ("convoy nothing ca", ["cat.jpg"]),
    ],
)
def test_bash_completes(scripts: dict[str, Path], tmp_path: Path, line: str, expected: list[str]) -> None:
    (tmp_path / "cat.jpg").touch()
    (tmp_path / "model.onnx").touch()
    (tmp_path / "photos").mkdir()
    found = completed(scripts["bash"], line, tmp_path)
    # Of networks there may be more one day.
    assert found == expected if "ne" not in line.rsplit(" ", maxsplit=1)[-1] else set(expected) <= set(found)


def test_every_flag_of_every_command_is_there(scripts: dict[str, Path], tmp_path: Path) -> None:
    for entry in cli.entry_points(group="convoy.commands"):
        flags = [flag for action in parser_of(entry.load())._actions for flag in action.option_strings]
        assert completed(scripts["bash"], f"convoy {entry.name} -", tmp_path) == flags


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(scripts: dict[str, Path], tmp_path: Path) -> None:
    ask = (
        f"autoload -Uz compinit; compinit -u -d {tmp_path / 'dump'}; source {scripts['zsh']}; print ${{_comps[convoy]}}"
    )
    done = subprocess.run(["zsh", "-fc", ask], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    assert "_convoy" in done.stdout


def test_a_shell_that_is_not_known_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convoynet.server.cli", "completion", "fish"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "choose from 'bash', 'zsh'" in done.stderr or "choose from bash, zsh" in done.stderr
