"""`convoy explain --method` against a real server, and without one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import helper, numpy_helper
from PIL import Image, ImageDraw

from convoynet.explain import explain
from convoynet.protos.inference import model_config_pb2
from convoynet.server.client.client import Client
from convoynet.server.explaining import command as command_module
from tests.server import onnx_models

Run = Callable[..., tuple[int, str, str]]
FLOATS = ("--resize", "40", "--mean", "0,0,0", "--std", "1,1,1")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "models"
    file = onnx_models.write_colors(folder) / "config.pbtxt"
    config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    config.dynamic_batching.priority_levels, config.dynamic_batching.default_priority_level = 2, 1
    file.write_text(text_format.MessageToString(config))
    onnx_models.write_colors(folder, "explaining", explains=True)
    onnx_models.write_colors(folder, "mapping", maps=["maps"])
    onnx_models.write_colors(folder, "mapping-twice", maps=["early", "late"])
    onnx_models.write_detector(folder)
    onnx_models.write_linear(folder)
    onnx_models.write_segmenter(folder)
    return folder


@pytest.fixture(scope="module")
def live(repository: Path) -> Iterator[onnx_models.LiveServer]:
    with onnx_models.serve(repository) as server:
        yield server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Dark, with a green square in the upper right and a blue one below on the left."""
    picture = Image.new("RGB", (80, 80), (20, 20, 20))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((50, 10, 69, 29), fill=(0, 255, 0))
    draw.rectangle((10, 50, 29, 69), fill=(0, 0, 255))
    picture.save(tmp_path / "squares.png")
    return tmp_path / "squares.png"


@pytest.fixture
def run(live: onnx_models.LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command: its exit code, what it printed and what it complained about."""

    def command(*arguments: object, model: str = "colors") -> tuple[int, str, str]:
        given = ["--model", model, "--url", live.url, "--output", tmp_path / "made", *arguments]
        try:
            code = explain([str(each) for each in given])
        except SystemExit as stop:
            code = int(str(stop.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def told(run: Run, *arguments: object, model: str = "colors") -> tuple[dict[str, Any], np.ndarray]:
    """What --json says of one image, and its map."""
    code, out, err = run("--json", *arguments, model=model)
    assert (code, err) == (0, "")
    (one,) = json.loads(out)
    return one, np.load(one["map"])


def square(found: np.ndarray, top: int, left: int) -> float:
    """The mean of a square of the image, as a part of the map that has 80 pixels a side in it."""
    scale = len(found) / 80
    rows, columns = (slice(round(at * scale), round((at + 20) * scale)) for at in (top, left))
    return float(found[rows, columns].mean())


@pytest.mark.parametrize(
    "method", [("rise", "--masks", 150, "--share", 1), ("occlusion", "--window", 2, "--stride", 1, "--share", 1)]
)
def test_a_classifier_is_explained_where_its_class_is(run: Run, image: Path, method: tuple[object, ...]) -> None:
    one, found = told(run, "--method", *method, "--class", "blue", image)
    assert (one["label"], one["index"], one["box"]) == ("blue", 2, None)
    assert one["masks"] == one["of"]
    assert found.shape == (8, 8)
    assert square(found, 50, 10) > found.mean() > square(found, 10, 50)
    assert re.fullmatch(r"[a-z ]+ \d+%", one["evidence"])
    with Image.open(one["picture"]) as picture:
        assert picture.size == (80, 80)
    again, same = told(run, "--method", *method, "--class", "2", image)
    assert again["picture"] == one["picture"]
    assert same == pytest.approx(found, abs=1e-6)
    other = told(run, "--method", *method, "--class", "green", image)[1]
    assert square(other, 10, 50) > other.mean() > square(other, 50, 10)


@pytest.mark.parametrize(
    ("flags", "model"), [((), "mapping"), (("--maps", "maps"), "mapping"), (("--maps", "late"), "mapping-twice")]
)
def test_the_channels_of_a_map_explain_a_class(run: Run, image: Path, flags: tuple[str, ...], model: str) -> None:
    asked = ("--method", "score-cam", *flags, "--share", 1, image)
    one, found = told(run, "--class", "blue", *asked, model=model)
    assert (one["label"], one["masks"], one["of"], one["seed"]) == ("blue", 3, 3, None)
    assert one["most"] == found.max() > 0
    assert 0 < one["score"] < 1  # the probability is told, though the bare output weighs
    assert square(found, 50, 10) > max(found.mean(), square(found, 10, 50))
    other = told(run, "--class", "green", *asked, model=model)[1]
    assert square(other, 10, 50) > max(other.mean(), square(other, 50, 10))


@pytest.mark.parametrize(
    "method", [("rise", "--masks", 250, "--share", 1), ("occlusion", "--window", 12, "--stride", 4, "--share", 1)]
)
def test_a_detector_is_explained_where_its_object_is(run: Run, image: Path, method: tuple[object, ...]) -> None:
    for object_, label, place in ((1, "frog", (10, 50)), (2, "bird", (50, 10))):
        flags = ("--object", object_, "--baseline", "20,20,20")
        one, found = told(run, "--method", *method, *flags, image, model="detector")
        assert one["label"] == label
        assert one["box"] == [place[1] / 2, place[0] / 2, place[1] / 2 + 10, place[0] / 2 + 10]
        assert square(found, *place) == max(square(found, *at) for at in ((10, 50), (50, 10), (10, 10), (50, 50)))


def test_an_input_that_may_be_left_out_is_not_the_picture(run: Run, image: Path) -> None:
    one, found = told(
        run, "--method", "rise", "--masks", 150, "--share", 1, "--class", "blue", image, model="explaining"
    )
    assert (one["label"], one["index"]) == ("blue", 2)
    assert square(found, 50, 10) > found.mean() > square(found, 10, 50)


def test_the_table_says_what_was_explained_and_a_bad_image_hides_no_other(run: Run, image: Path) -> None:
    words = image.with_name("words.txt")
    words.write_text("no image")
    code, out, err = run("--method", "rise", "--masks", 20, words, image, image.with_name("none.png"))
    assert code == 1
    assert re.search(r"squares.png +green +0\.\d{4} .* 20 ", out)
    assert "pictures and numbers (.npy) in" in out
    assert [line.rpartition("/")[2] for line in err.splitlines()] == [
        "words.txt: not an image file",
        "none.png: No such file or directory",
    ]


def test_files_of_somebody_else_stay(run: Run, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "squares.npy").write_text("mine")
    Image.new("RGB", (1, 1)).save(folder / "squares-2.png")
    one, _ = told(run, "--method", "rise", "--masks", 5, image)
    assert Path(one["map"]).name == "squares-3.npy"
    assert (folder / "squares.npy").read_text() == "mine"
    assert sorted(file.name for file in folder.iterdir()) == [
        "squares-2.png",
        "squares-3.npy",
        "squares-3.png",
        "squares.npy",
    ]


def test_two_commands_that_write_the_same_file_leave_whole_ones(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--method", "rise", "--masks", 5, image)
    replace, others = Path.replace, []

    def after_another(self: Path, target: Path) -> Path:
        if not others:
            others.append(self)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(run, *flags).result()[0] == 0
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", after_another)
    one, found = told(run, *flags)
    assert found.shape == (8, 8)
    assert sorted(file.name for file in Path(one["map"]).parent.iterdir()) == ["squares.npy", "squares.png"]


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ("--method rise", "nothing", r"unknown model: 'nothing' is not found; .* serves colors, detector, explaining"),
        ("--method rise", "linear", "model 'linear' takes no image files"),
        ("--method rise", "segmenter", "model 'segmenter' is for segmentation"),
        ("--method rise --class 3", "colors", "--class 3: model 'colors' has the classes 0 to 2, or a label such as"),
        ("--method rise --object 3", "detector", "--object 3: model 'detector' finds 2 objects in it"),
        ("--method occlusion --window 2 --stride 3", "colors", "--stride 3 leaves gaps between squares of 2 pixels"),
        ("--method occlusion --window 9", "colors", "--window 9 hides all of an input of 8x8 pixels"),
        ("--method rise --local x.onnx", "colors", "give --model NAME of a server, or --local PATH"),
        ("--method rise --mean 0.5", "colors", "--mean is for --local"),
        ("--method rise --stride 3", "colors", "--stride is for --method occlusion"),
        ("--method occlusion --masks 3", "colors", "--masks is for --method rise"),
        ("--method rise --masks 100001", "colors", "--masks 100001: at most 100000"),
        ("--method rise --grid 33", "colors", "--grid 33: at most 32 cells along a side"),
        ("--method rise --share 0", "colors", "--share 0 leaves no time for masks"),
        ("--method rise --keep 1", "colors", "--keep 1 hides nothing"),
        ("--method rise --baseline red", "colors", "'red' is neither mean nor R,G,B of 0 to 255 each"),
        ("--method rise --of logits", "colors", "--of goes with --add"),
        ("--method rise --time-limit 0.0001", "colors", r"within 0.0001 s; give it a longer --time-limit"),
        ("--method grad-cam", "colors", "invalid choice: 'grad-cam'"),
        ("--method score-cam", "colors", "model 'colors' has no output of maps, .* with --outputs logits,maps=LAYER"),
        ("--method score-cam", "detector", "model 'detector' has no output of maps"),
        ("--method score-cam", "mapping-twice", "has maps in early, late: say --maps with one of them"),
        ("--method score-cam --maps logits", "mapping", "has maps in maps: --maps logits is none of them"),
        ("--method score-cam --seed 1", "mapping", "--seed is for --method rise or occlusion"),
        ("--method rise --maps maps", "mapping", "--maps is for --method score-cam"),
        ("--method rise --add x.onnx", "colors", "not allowed with argument"),
        ("--add x.onnx", "colors", "an image goes with --method"),
        ("--url 127.0.0.1:1 --method rise", "colors", "no server at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    run: Run, image: Path, tmp_path: Path, arguments: str, model: str, message: str
) -> None:
    code, out, err = run(*arguments.split(), image, model=model)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_a_file_that_answers_maps_is_no_classifier(
    repository: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file tells no task."""
    file = repository / "segmenter" / "1" / "model.onnx"
    assert explain(["--method", "occlusion", "--local", str(file), *FLOATS, str(image)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"output '\w+' of model '\w+' is \[.*\] for an image, and no row of classes", error)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("value", "why"), [(np.nan, "no map of finite numbers"), (7, "the same number everywhere")])
def test_maps_that_are_none_are_one_line(
    repository: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, why: str
) -> None:
    network = onnx.load(repository / "mapping" / "1" / "model.onnx")
    (pool,) = (node for node in network.graph.node if node.op_type == "AveragePool")
    pool.output[0] = "squares"
    network.graph.initializer.append(numpy_helper.from_array(np.array([[[[value]]]], np.float32), "value"))
    network.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "nothing"))
    network.graph.node.append(helper.make_node("Mul", ["squares", "nothing"], ["none"]))
    network.graph.node.append(helper.make_node("Add", ["none", "value"], ["maps"]))
    onnx.save(network, tmp_path / "flat.onnx")
    arguments = ["--method", "score-cam", "--local", str(tmp_path / "flat.onnx"), "--resize", "8"]
    assert explain([*arguments, "--output", str(tmp_path / "made"), str(image)]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_an_onnx_file_is_explained_without_a_server(
    repository: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes((repository / "colors" / "1" / "model.onnx").read_bytes())
    arguments = ["--method", "rise", "--masks", "200", "--local", str(foreign), "--output", str(tmp_path / "made")]
    assert explain([*arguments, "--resize", "8", "--class", "2", "--json", str(image)]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["label"] == "2"
    assert one["score"] > 0.5  # the bare output
    found = np.load(one["map"])
    assert square(found, 50, 10) > found.mean() > square(found, 10, 50)


def test_a_file_without_preprocessing_is_one_line_with_the_way_out(
    live: onnx_models.LiveServer, image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = SimpleNamespace(url=live.url, name="linear", version="")  # what a server of the file's own is to it
    monkeypatch.setattr(command_module, "load", lambda path: nullcontext(served))
    assert explain(["--method", "rise", "--local", "foreign.onnx", str(image)]) == 2
    err = capsys.readouterr().err
    assert "takes no image files" in err
    assert "say --mean and --std, or of a file that takes pixels --input-size, as for `convoy serve`" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(
    live: onnx_models.LiveServer, image: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "convoynet.server.cli", "explain", "--method", "rise", "--model", "colors"]
    command += ["--masks", "100000", "--share", "1", "--url", live.url, "--output", str(tmp_path / "made"), str(image)]
    with Client(live.url) as client:
        before = client.statistics("colors")[0].inference_stats.success.count
        # What runs in the background of a shell has it ignored, and so would the command.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, preexec_fn=heard, **streams)  # noqa: PLW1509
        try:
            while client.statistics("colors")[0].inference_stats.success.count < before + 20:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)
            out, err = process.communicate(timeout=90)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, out) == (130, "")
    assert err == "convoy explain: interrupted; nothing is explained\n"
    assert not (tmp_path / "made").exists()
