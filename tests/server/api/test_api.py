"""`convoynet.serve` and `convoynet.load`: a server as a part of a program, and a model as a function."""

import io
import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convoynet
from convoynet.server.api.loaded import LoadedModel
from tests.server.onnx_models import write_colors, write_linear


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_colors(root)
    write_linear(root)
    return root


@pytest.fixture(scope="module")
def colors(models: Path) -> Iterator[LoadedModel]:
    with convoynet.load(models / "colors", threads=1) as model:
        yield model


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_server_runs_inside_the_block_and_no_longer(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVOY_MAX_QUEUE", "no number")  # these are somebody else's
    monkeypatch.setenv("CONVOY_CA", "absent.pem")
    with convoynet.serve(models, threads=1, tune=False) as server:
        with server.client() as client:
            assert client.models() == ["colors", "linear"]
            (logits,) = client.infer("linear", {"input": np.ones((1, 4), np.float32)})["logits"].tolist()
        assert logits == [1.5, 2, 2]
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=60) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(server.metrics_url, timeout=60) as answer:
            assert b"convoy_" in answer.read()
        assert "READY" in server.log()
        pid = server.pid
        assert alive(pid)
    assert not alive(pid)
    server.close()  # which does nothing any more


@pytest.mark.parametrize(
    ("repository", "options", "line"),
    [
        ("absent", {}, "the model repository 'absent' is not a folder"),
        ("empty", {}, "not one model can be served"),
        ("", {"thread": 1}, "'thread' in the options is not a setting; did you mean 'threads'"),
        ("", {"threads": "many"}, "'threads' in the options must be an integer, got 'many'"),
        ("", {"threads": 0}, "--threads must lie in 1 to 1024, got 0"),
    ],
)
def test_what_does_not_start_says_why_in_one_line(
    repository: str, options: dict[str, object], line: str, models: Path, tmp_path: Path
) -> None:
    if repository == "empty":
        (tmp_path / "empty").mkdir()
        repository = str(tmp_path / "empty")
    with pytest.raises(convoynet.ConvoyError) as told:
        convoynet.serve(repository or models, **options)
    assert line in str(told.value)
    assert "\n" not in str(told.value)


def test_a_server_ends_with_the_program_whatever_ends_it(models: Path) -> None:
    code = (
        "import convoynet, sys, time\n"
        f"server = convoynet.serve({str(models)!r}, threads=1, tune=False)\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        waiting = os.pidfd_open(pid)
        program.send_signal(signal.SIGKILL)
    assert select.select([waiting], [], [], 60)[0], "the server outlived the program"
    os.close(waiting)


def red_and_blue() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), color) for color in ((255, 0, 0), (0, 0, 255))]


def test_a_model_takes_arrays_and_images(colors: LoadedModel, tmp_path: Path) -> None:
    assert (colors.name, colors.task) == ("colors", "classification")
    red, blue = red_and_blue()
    file = tmp_path / "blue.png"
    blue.save(file)
    written = io.BytesIO()
    red.save(written, "PNG")
    (name,) = (output.name for output in colors.config.output)
    together = colors([red, file])[name]
    assert together.shape[0] == 2
    for one, row in ((written.getvalue(), together[0]), (str(file), together[1])):
        np.testing.assert_array_equal(colors(one)[name][0], row)
    dims = list(colors.config.input[0].dims)
    rows = np.zeros((3, *dims), np.uint8 if colors.config.input[0].data_type == 2 else np.float32)
    assert colors(rows)[name].shape[0] == 3
    assert colors({colors.config.input[0].name: rows})[name].shape[0] == 3
    # More than a batch holds.
    many = np.repeat(rows, colors.config.max_batch_size, axis=0)
    assert colors(many)[name].shape[0] == len(many)


def test_a_model_predicts_with_its_labels(colors: LoadedModel) -> None:
    found = colors.predict(red_and_blue(), top=1)
    assert [row[0].label for row in found] == ["red", "blue"]
    assert colors.predict(red_and_blue()[0], top=1) == found[:1]


def test_what_a_model_cannot_take_is_one_line(colors: LoadedModel, models: Path) -> None:
    for wrong in (np.zeros((1, 2, 2), np.float32), "absent.png", b"no image"):
        with pytest.raises(convoynet.ClientError) as told:
            colors(wrong)
        assert "\n" not in str(told.value)
    with pytest.raises(convoynet.ConvoyError, match="images are paths"):
        colors.predict(np.zeros((1, 3)))  # type: ignore[arg-type]
    with pytest.raises(convoynet.NotStarted, match="absent: no such folder"):
        convoynet.load("absent")
    with pytest.raises(convoynet.NotStarted, match="is no model's folder, but one of models"):
        convoynet.load(models)
    with convoynet.load(models / "linear" / "1", threads=1) as model:
        assert model(np.ones((1, 4), np.float32))["logits"].tolist() == [[1.5, 2, 2]]
    with pytest.raises(convoynet.ClientError):
        model(np.ones((1, 4), np.float32))
