"""The command as a user meets it: exit codes, one line an error, and a repository that a failure leaves as it was."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from convoynet.exporter.archs import get
from convoynet.exporter.assets import digits
from convoynet.exporter.commands import cli
from convoynet.exporter.pipeline import pipeline
from tests.exporter.onnx_runs import session_of

TRIAL = ("--arch", "lenet5", "--weights", "random", "--batch", "1:5", "--calibration-samples", "16")


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path under `root`, hidden ones too, with the content of the files."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one export of LeNet-5; tests only read it."""
    root = tmp_path_factory.mktemp("models")
    assert cli.export(["--arch", "lenet5", "--target", "cpu", "--model-repository", str(root)]) == 0
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(folder / f"{index}.png")
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run an export that must fail with `code`, and return its one line."""
    capsys.readouterr()
    assert cli.export(list(arguments)) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    # Steps that finished may have left lines of progress above it.
    lines = [line for line in printed.err.splitlines() if line.startswith("convoy export: ")]
    assert len(lines) == 1, printed.err
    assert printed.err.endswith(lines[0] + "\n")
    assert "Traceback" not in printed.err
    return lines[0]


def test_publishes_tritons_layout_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], lenet: Path) -> None:
    assert {path.name for path in (lenet / "lenet5").iterdir()} == {
        "config.pbtxt", "labels.txt", "report.json", "report.md", "report.html", "parity.png", "speed.png", "1",
    }  # fmt: skip
    onnx.checker.check_model(onnx.load(lenet / "lenet5" / "1" / "model.onnx"))
    assert cli.export([*TRIAL, "--model-repository", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("preprocessing resize shorter side to 32 (bilinear, antialias), centre crop 32, grey, ")
    assert f"convoy serve --model-repository {tmp_path / 'm'}" in out


def test_json_is_the_report_and_alone_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.export([*TRIAL, "--json", "--model-repository", str(tmp_path)]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == json.loads((tmp_path / "lenet5" / "report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "lenet6"], "lenet5"),
        (["--arch", "lenet5", "--weights", "absent.pt"], "absent.pt"),
        (["--arch", "lenet5", "--calibration", "absent"], "absent"),
        (["--arch", "lenet5", "--labels", "absent.txt"], "absent.txt"),
        (["--arch", "lenet5", "--batch", "8:2"], "--batch 8:2"),
        (["--arch", "lenet5", "--batch", "two"], "MIN:MAX"),
        (["--arch", "lenet5", "--opset", "17"], "18..24"),
        (["--arch", "lenet5", "--opset", "18", "--int8"], "19"),
        (["--arch", "lenet5", "--max-drop", "1"], "--eval"),
        (["--arch", "lenet5", "--calibration-method", "minmax"], "--int8"),
        (["--arch", "lenet5", "--force"], "--version"),
        (["--arch", "lenet5", "--name", "../x"], "--name"),
        (["--arch", "lenet5", "--name", ".x"], "--name"),
        (["--arch", "lenet5", "--format", "pickle"], "onnx"),
        (["--arch", "lenet5", "--max-drop", "nan", "--eval", "x"], "--max-drop"),
        (["--arch", "lenet5", "--unheard-of"], "--unheard-of"),
        ([], "--arch"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *arguments, "--model-repository", str(tmp_path / "m"))
    assert tree(tmp_path) == {}


class _Bomb:
    """Runs code when it is unpickled: the file that it makes shows whether it did."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["garbage", "pickled code", "a folder"])
def test_unreadable_weights(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pt"
    if content == "garbage":
        file.write_bytes(b"\x80not a checkpoint")
    elif content == "pickled code":
        file.write_bytes(pickle.dumps({"conv1.weight": _Bomb(tmp_path / "ran")}))
    else:
        file.mkdir()
    before = tree(tmp_path)
    line = refusal(capsys, "--arch", "lenet5", "--weights", str(file), "--model-repository", str(tmp_path / "m"))
    assert str(file) in line
    assert tree(tmp_path) == before


def test_folder_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for option in ("--calibration", "--eval"):
        assert "empty" in refusal(
            capsys, "--arch", "lenet5", option, str(tmp_path / "empty"), "--model-repository", str(tmp_path / "m")
        )
    assert tree(tmp_path) == before


def test_image_that_is_none(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "3.png").write_bytes(b"not an image")
    before = tree(tmp_path)
    assert "3.png" in refusal(
        capsys, *TRIAL, "--calibration", str(photos), "--model-repository", str(tmp_path / "deep" / "m")
    )
    assert tree(tmp_path) == before


def test_labels_must_fit_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    line = refusal(capsys, "--arch", "lenet5", "--labels", str(labels), "--num-classes", "3")
    assert "2 names" in line
    labels.write_text("a\n\nb\n")
    assert "every line" in refusal(capsys, "--arch", "lenet5", "--labels", str(labels))


def test_repository_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    assert "Not a directory" in refusal(capsys, *TRIAL, "--model-repository", str(tmp_path / "file" / "m"))
    assert tree(tmp_path) == before


def test_write_that_fails_leaves_the_earlier_version(
    tmp_path: Path, lenet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process may not write files above a size, which fails as a full disk does: inside write()."""
    root = tmp_path / "models"
    shutil.copytree(lenet, root)
    before = tree(root)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        line = refusal(capsys, *TRIAL, "--model-repository", str(root))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"convoy export: cannot write to the model repository {root}: File too large")
    assert tree(root) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_too_small_is_told_before_the_work(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_build", None)
    line = refusal(capsys, *TRIAL, "--model-repository", str(small_disk / "m"))
    assert "free space" in line
    assert tree(small_disk) == {}


def test_refused_for_losing_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranges learned from one black image cannot hold a digit: a gate must see it, and nothing is published."""
    black, test = tmp_path / "black", tmp_path / "test" / "7"
    black.mkdir()
    test.mkdir(parents=True)
    Image.new("L", (32, 32)).save(black / "0.png")
    for index, seven in enumerate(digits().test[digits().test_labels == 7]):
        Image.fromarray(seven.squeeze()).save(test / f"{index}.png")
    before = tree(tmp_path)
    line = refusal(
        capsys, "--arch", "lenet5", "--int8", "--calibration", str(black), "--eval", str(test.parent),
        "--max-drop", "0", "--model-repository", str(tmp_path / "m"), code=3,
    )  # fmt: skip
    assert "nothing was published" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", ["_build", "measure"])
def test_interrupted_export_leaves_nothing(
    number: signal.Signals,
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes at a known place: within a library's own clean-up Python tells of files that it closed late."""
    root = tmp_path / "models"
    work = getattr(pipeline, step)

    def interrupted(*arguments: Any) -> Any:
        assert any(root.iterdir())  # the hidden folder is there
        os.kill(os.getpid(), number)
        return work(*arguments)

    monkeypatch.setattr(pipeline, step, interrupted)
    assert cli.export([*TRIAL, "--model-repository", str(root)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "convoy export: interrupted; nothing was published"
    assert tree(tmp_path) == {}


def run_blocked(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False)


def test_without_torch_and_onnx_the_help_works_and_an_export_names_the_extra() -> None:
    heavy = ("torch", "torchvision", "onnx", "onnxruntime", "matplotlib")
    shown = run_blocked("from convoynet.exporter.commands import cli; sys.exit(cli.export(['--help']))", *heavy)
    assert shown.returncode == 0, shown.stderr
    assert "examples:" in shown.stdout
    done = run_blocked(
        "from convoynet.exporter.commands import cli; sys.exit(cli.export(['--arch', 'lenet5']))", *heavy
    )
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "pip install 'convoynet[export,cpu]'" in done.stderr
    listed = run_blocked("from convoynet.exporter.commands import cli; sys.exit(cli.archs([]))", *heavy)
    assert listed.returncode == 0, listed.stderr
    assert "resnet101" in listed.stdout


def test_a_bug_is_one_line_and_its_traceback_an_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(argv: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "_archs", explode)
    assert cli.archs([]) == 1
    assert capsys.readouterr().err.startswith("convoy archs: this is a bug in Convoy: RuntimeError: two lines")
    monkeypatch.setenv("CONVOY_DEBUG", "1")
    assert cli.archs([]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_archs_lists_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.archs(["--json"]) == 0
    networks = {network["name"]: network for network in json.loads(capsys.readouterr().out)}
    lenet = networks["lenet5"]
    assert lenet["input_size"] == [1, 32, 32]
    assert lenet["num_classes"] == 10
    assert lenet["published_weights"] is True
    # Published counts of the torchvision documentation, for 1,000 classes.
    assert networks["resnet50"]["parameters"] == 25_557_032
    assert networks["resnet50"]["macs"] == pytest.approx(4.09e9, rel=0.01)
    assert {"name", "paper", "source", "parameters", "macs", "input_size"} <= lenet.keys()
    assert cli.archs([]) == 0
    assert "resnet101" in capsys.readouterr().out


def test_exported_lenet_reads_digits(lenet: Path) -> None:
    images = digits().test[:50]
    session = session_of(lenet / "lenet5" / "1" / "model.onnx")
    (logits,) = session.run(None, {"input": get("lenet5").preprocess.normalize(images)})
    assert logits.shape == (50, 10)
    assert (logits.argmax(axis=1) == digits().test_labels[:50]).mean() > 0.9
