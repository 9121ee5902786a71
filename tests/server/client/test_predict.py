"""`convoy predict` against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client.client import activation_of
from convoynet.server.client.connection import ClientError
from convoynet.server.client.predict import predict
from convoynet.server.client.results import detections, predictions
from convoynet.server.client.views import view_of
from tests.server import onnx_models


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("predict") / "models"
    onnx_models.write_colors(repository)
    onnx_models.write_linear(repository)
    with onnx_models.serve(repository) as server:
        yield server


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    Image.new("RGB", (20, 16), "red").save(folder / "b.png")
    Image.new("RGB", (20, 16), "blue").save(folder / "a.jpg", quality=95)
    Image.new("RGB", (20, 16), "lime").save(folder / "below" / "c.webp", lossless=True)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def run(live: onnx_models.LiveServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: its exit code, what it printed and what it complained about."""

    def command(*arguments: object, model: str = "colors") -> tuple[int, str, str]:
        code = predict(["--model", model, "--url", live.url, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


Run = Callable[..., tuple[int, str, str]]


def test_folder_as_json(run: Run, images: Path) -> None:
    code, out, err = run(images, "--json", "--top", 2)
    assert (code, err) == (0, "")
    answers = json.loads(out)
    assert [answer["image"] for answer in answers] == [
        str(images / name) for name in ("a.jpg", "b.png", "below/c.webp")
    ]
    assert [answer["predictions"][0]["label"] for answer in answers] == ["blue", "red", "green"]
    assert [len(answer["predictions"]) for answer in answers] == [2, 2, 2]
    best = answers[1]["predictions"][0]
    assert best["index"] == 0
    assert best["probability"] == pytest.approx(np.exp(10) / (np.exp(10) + 2), rel=1e-5)


def test_many_images_keep_their_order(run: Run, images: Path) -> None:
    paths = [images / name for name in ("b.png", "a.jpg", "b.png", "below/c.webp", "a.jpg")] * 5
    code, out, _ = run("--json", "--top", 1, *paths)
    assert code == 0
    answers = json.loads(out)
    assert [answer["image"] for answer in answers] == [str(path) for path in paths]
    labels = [answer["predictions"][0]["label"] for answer in answers]
    assert labels == ["red", "blue", "red", "green", "blue"] * 5


def test_table(run: Run, images: Path) -> None:
    code, out, err = run(images / "b.png", "--top", 1)
    assert (code, err) == (0, "")
    assert "probability" in out
    assert "red" in out
    assert "0.9999" in out
    assert "blue" not in out


def test_a_bad_image_does_not_hide_the_others(run: Run, images: Path) -> None:
    cut = images / "cut.png"
    cut.write_bytes((images / "b.png").read_bytes()[:-30])
    paths = [images / "b.png", images / "notes.txt", cut, images / "missing.jpg", images / "a.jpg"]
    code, out, err = run("--json", "--top", 1, *paths)
    assert code == 1
    answers = json.loads(out)
    assert ["error" in answer for answer in answers] == [False, True, True, True, False]
    assert [answers[i]["predictions"][0]["label"] for i in (0, 4)] == ["red", "blue"]
    lines = err.splitlines()
    assert len(lines) == 3
    assert "notes.txt: not an image file (.jpeg, .jpg, .png, .webp)" in lines[0]
    assert "cut.png: " in lines[1]
    assert "not a readable image" in lines[1]
    assert lines[2].endswith("missing.jpg: No such file or directory")


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        ("nothing", "b.png", r"unknown model: 'nothing' is not found; 127.0.0.1:\d+ serves colors, linear$"),
        ("linear", "b.png", "model 'linear' takes no image files"),
        ("colors", "notes.txt", "notes.txt: not an image file"),
        ("colors", "empty", "empty' holds no image"),
    ],
)
def test_nothing_to_show(run: Run, images: Path, model: str, path: str, message: str) -> None:
    (images / "empty").mkdir()
    code, out, err = run(images / path, model=model)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err.strip())


def test_version(run: Run, images: Path) -> None:
    assert run(images / "b.png", "--version", "1")[0] == 0
    code, _, err = run(images / "b.png", "--version", "7")
    assert code == 2
    assert "'colors' version 7 is not found" in err


def test_no_server(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(["--model", "colors", "--url", "127.0.0.1:1", str(images)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("convoy predict: no server at 127.0.0.1:1 (connection refused); start one with `convoy serve")
    assert len(err.splitlines()) == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        predict(["--help"])
    out = capsys.readouterr().out
    assert "convoy predict --model resnet50 cat.jpg" in out
    assert "exit codes:" in out


@pytest.mark.parametrize(
    ("activation", "kind", "expected"),
    [
        ("softmax", "probability", 1 / (1 + np.exp(-4.0))),
        ("sigmoid", "probability", 1 / (1 + np.exp(-3.0))),
        ("none", "output", 3.0),
        ("", "output", 3.0),
    ],
)
def test_only_a_probability_is_called_one(activation: str, kind: str, expected: float) -> None:
    config = ModelConfig()
    if activation:
        config.parameters["activation"].string_value = activation
    (first, _) = predictions(np.array([b"3.0:1:cat", b"-1.0:0:dog"]), activation_of(config))
    assert first == ("cat", 1, pytest.approx(expected))
    assert hasattr(first, "probability") == (kind == "probability")
    view = view_of("classification", activation_of(config))
    assert view is not None
    assert list(view.columns) == ["label", "class", kind]
    assert view.columns[kind]({kind: first.score}) == f"{expected:.4f}"


def test_a_sigmoid_of_large_outputs_does_not_overflow() -> None:
    found = predictions(np.array([b"900:0", b"-900:1"]), "sigmoid")
    assert [each.score for each in found] == [1.0, 0.0]
    with pytest.raises(ClientError, match="has the activation 'tanh', this client knows softmax, sigmoid, none"):
        predictions(np.array([b"1:0"]), "tanh")


def test_a_class_below_the_first_has_no_name() -> None:
    boxes, scores = np.array([[0.0, 0.0, 2.0, 2.0]] * 3), np.array([0.5, 0.4, 0.3])
    found = detections(boxes, scores, np.array([-1, 1, 2]), ["a", "b"])
    assert [each.label for each in found] == ["-1", "b", "2"]
