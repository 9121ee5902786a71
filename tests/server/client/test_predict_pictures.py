"""`convoy predict` with segmentation and detection models, against a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image

from convoynet.protos.inference import model_config_pb2
from convoynet.server.client.client import Client, ClientError, Detection
from convoynet.server.client.pictures import box_color
from convoynet.server.client.predict import predict
from convoynet.server.client.views import class_of
from tests.server import onnx_models

Run = Callable[..., tuple[int, str, str]]
GREEN, BLUE = (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("predict") / "models"
    onnx_models.write_colors(repository)
    onnx_models.write_colors(repository, "explaining", explains=True)
    onnx_models.write_segmenter(repository)
    onnx_models.write_segmenter(repository, "coarse", cell=4)
    onnx_models.write_segmenter(repository, "cropping", fit="crop", resize=40)
    onnx_models.write_detector(repository)
    file = onnx_models.write_segmenter(repository, "posing") / "config.pbtxt"
    config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    config.parameters["task"].string_value = "pose"
    file.write_text(text_format.MessageToString(config))
    with onnx_models.serve(repository) as server:
        yield server


@pytest.fixture
def run(live: onnx_models.LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with pictures in tmp_path/out: its exit code, what it printed and what it complained about."""

    def command(model: str, *arguments: object) -> tuple[int, str, str]:
        flags = ["--model", model, "--url", live.url, "--output", str(tmp_path / "out")]
        code = predict([*flags, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def scene(size: tuple[int, int], green: tuple[int, ...], blue: tuple[int, ...] | None = None) -> Image.Image:
    """A dark red picture with a green and a blue box, given as x1, y1, x2, y2."""
    image = Image.new("RGB", size, (90, 0, 0))
    image.paste(GREEN, (green[0], green[1], green[2], green[3]))
    if blue:
        image.paste(BLUE, (blue[0], blue[1], blue[2], blue[3]))
    return image


def pixels_of(picture: str | Path) -> np.ndarray:
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def answer_of(out: str) -> dict[str, object]:
    (answer,) = json.loads(out)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("model", ["segmenter", "coarse"])
@pytest.mark.parametrize("size", [(160, 80), (80, 160), (40, 40), (20, 10)], ids=str)
def test_a_mask_lies_on_the_pixels_that_it_is_about(
    run: Run, tmp_path: Path, model: str, size: tuple[int, int]
) -> None:
    """Green fills the right three quarters of the lower half: transposed or shifted it would not fit."""
    width, height = size
    box = (width // 4, height // 2, width, height)
    scene(size, box).save(tmp_path / "lawn.png")
    code, out, err = run(model, "--json", tmp_path / "lawn.png")
    assert (code, err) == (0, "")
    slack = 0.02 if model == "segmenter" else 0.1
    assert answer_of(out) == {
        "image": str(tmp_path / "lawn.png"),
        "classes": [
            {"label": "__background__", "index": 0, "share": pytest.approx(5 / 8, abs=slack)},
            {"label": "grass", "index": 1, "share": pytest.approx(3 / 8, abs=slack)},
        ],
        "picture": str(tmp_path / "out" / "lawn.png"),
    }
    pixels = pixels_of(tmp_path / "out" / "lawn.png")[:height, :width]
    edge = max(2, max(size) // 10)  # a cell of the coarse map
    inside, outside = np.zeros((height, width), bool), np.ones((height, width), bool)
    inside[box[1] + edge :, box[0] + edge :] = True
    outside[max(0, box[1] - edge) :, max(0, box[0] - edge) :] = False
    assert inside.any()
    assert outside.any()
    assert np.abs(pixels[inside] - (64, 127, 0)).max() <= 1  # green and half of class 1's dark red
    assert (pixels[outside] == (90, 0, 0)).all()


def test_what_a_crop_left_out_stays_unmarked(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (160, 80), BLUE).save(tmp_path / "sky.png")
    code, out, _ = run("cropping", "--json", tmp_path / "sky.png")
    assert code == 0
    assert answer_of(out)["classes"] == [{"label": "sky", "index": 2, "share": 1.0}]
    pixels = pixels_of(tmp_path / "out" / "sky.png")[:80]
    marked = (pixels == (0, 64, 127)).all(axis=2)
    assert marked[:, 40:120].all()
    assert marked.sum() == 80 * 80
    assert (pixels[~marked] == BLUE).all()


@pytest.mark.parametrize(
    ("size", "green", "blue"),
    [
        ((160, 80), (16, 20, 80, 60), (120, 4, 156, 12)),
        ((80, 160), (16, 20, 64, 60), (4, 120, 12, 156)),
        ((10, 20), (0, 0, 5, 20), (5, 10, 10, 20)),
    ],
    ids=["landscape", "portrait", "enlarged"],
)
def test_boxes_are_in_pixels_of_the_image(
    run: Run, tmp_path: Path, size: tuple[int, int], green: tuple[int, ...], blue: tuple[int, ...]
) -> None:
    scene(size, green, blue).save(tmp_path / "pond.webp", lossless=True)
    code, out, err = run("detector", "--json", tmp_path / "pond.webp")
    assert (code, err) == (0, "")
    slack = max(size) / 40  # a pixel of the input
    assert answer_of(out) == {
        "image": str(tmp_path / "pond.webp"),
        "detections": [
            {"label": "frog", "index": 1, "score": pytest.approx(0.9), "box": pytest.approx(green, abs=slack)},
            {"label": "bird", "index": 2, "score": pytest.approx(0.6), "box": pytest.approx(blue, abs=slack)},
        ],
        "picture": str(tmp_path / "out" / "pond.png"),
    }
    pixels = pixels_of(tmp_path / "out" / "pond.png")
    assert pixels.shape == (size[1], size[0], 3)
    if min(size) > 20:  # smaller ones vanish below the captions
        frog = (pixels == box_color(1)).all(axis=2)
        left, bottom = green[0], green[3]
        assert frog[bottom - 20 : bottom - 4, left - 4 : left + 5].sum() >= 16
        assert (pixels[green[1] + 6 : bottom - 6, left + 6 : green[2] - 6] == GREEN).all()


def test_flags_of_detection(run: Run, tmp_path: Path) -> None:
    scene((80, 80), (16, 20, 64, 60), (4, 70, 12, 78)).save(tmp_path / "a.png")
    Image.new("RGB", (80, 80)).save(tmp_path / "b.png")
    images = tmp_path / "a.png", tmp_path / "b.png"

    def labels(*flags: object) -> list[list[str]]:
        answers = json.loads(run("detector", "--json", *flags, *images)[1])
        return [[each["label"] for each in answer["detections"]] for answer in answers]

    assert labels() == [["frog", "bird"], []]
    assert labels("--min-score", "0.7") == [["frog"], []]
    assert labels("--min-score", "0.95") == [[], []]
    assert labels("--top", "1") == [["frog"], []]
    code, out, err = run("detector", *images)
    assert (code, err) == (0, "")
    words = out.split()
    assert words[:7] == ["image", "label", "score", "x1", "y1", "x2", "y2"]
    assert {"frog", "0.90", "bird", "0.60", "(nothing)"} <= set(words)
    assert out.splitlines()[-1] == f"2 pictures in {tmp_path / 'out'}"


def test_without_pictures(run: Run, tmp_path: Path) -> None:
    scene((80, 80), (16, 20, 64, 60)).save(tmp_path / "a.png")
    for model in ("segmenter", "detector"):
        code, out, _ = run(model, "--json", "--no-picture", tmp_path / "a.png")
        assert code == 0
        assert answer_of(out)["picture"] is None
    code, out, _ = run("segmenter", "--no-picture", "--top", "1", tmp_path / "a.png")
    assert out.split()[:3] == ["image", "label", "share"]
    assert "__background__" in out
    assert "grass" not in out
    assert not (tmp_path / "out").exists()


def test_every_kind_of_image(run: Run, tmp_path: Path) -> None:
    """Greyscale, with a palette, transparent, 16 bits, rotated by EXIF: the picture has the pixels as stored."""
    folder = tmp_path / "images"
    folder.mkdir()
    lawn = scene((160, 80), (80, 0, 160, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    lawn.save(folder / "turned.jpg", exif=exif, quality=95)
    lawn.quantize(16).save(folder / "palette.png", transparency=b"\xff\x80")
    lawn.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    lawn.convert("L").save(folder / "grey.jpg")
    Image.fromarray(np.full((80, 160), 40_000, np.uint16)).save(folder / "deep.png")
    code, out, err = run("segmenter", "--json", folder)
    assert (code, err) == (0, "")
    for answer in json.loads(out):
        pixels = pixels_of(answer["picture"])
        assert pixels.shape[0] >= 80
        if Path(answer["image"]).stem in ("turned", "palette", "alpha"):
            assert np.abs(pixels[4:76, 90:150] - (64, 127, 0)).max() <= 8
            assert np.abs(pixels[4:76, 4:70] - (90, 0, 0)).max() <= 8
        else:  # grey is no class but the first
            assert [each["label"] for each in answer["classes"]] == ["__background__"]


def test_pictures_of_images_with_one_stem(run: Run, tmp_path: Path) -> None:
    """A folder is searched without the pictures that lie in it, so that a second run finds the same images."""
    (tmp_path / "more").mkdir()
    scene((80, 80), (16, 20, 64, 60)).save(tmp_path / "a.png")
    scene((80, 80), (16, 20, 64, 60)).save(tmp_path / "more" / "a.jpg")
    for _ in range(2):
        code, out, _ = run("detector", "--json", tmp_path)
        assert code == 0
        assert [Path(answer["picture"]).name for answer in json.loads(out)] == ["a.png", "a-2.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-2.png", "a.png"]


def test_a_classifier_names_its_classes_below_the_image_where_a_folder_is_given(
    live: onnx_models.LiveServer, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene((80, 60), (0, 0, 80, 60)).save(tmp_path / "a.png")
    code, out, err = run("colors", "--json", "--top", 2, tmp_path / "a.png")
    assert (code, err) == (0, "")
    (answer,) = json.loads(out)
    assert answer["picture"] == str(tmp_path / "out" / "a.png")
    best, _ = answer["predictions"]
    pixels = pixels_of(tmp_path / "out" / "a.png")
    assert (pixels[:60, :80] == GREEN).all()
    below = pixels[60:]
    assert (below == box_color(best["index"])).all(axis=2).sum() >= 36  # beside the name of the first class
    assert (below == 0).all(axis=2).any()  # which is written in black
    assert predict(["--model", "colors", "--url", live.url, "--json", str(tmp_path / "a.png")]) == 0
    assert "picture" not in answer_of(capsys.readouterr().out)


def test_faults_in_one_line_each(run: Run, tmp_path: Path) -> None:
    scene((80, 80), (16, 20, 64, 60)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    code, out, err = run("detector", "--json", tmp_path / "a.png", tmp_path / "b.png")
    assert code == 1
    assert ["error" in answer for answer in json.loads(out)] == [False, True]
    assert re.fullmatch(r"convoy predict: \S*b.png: .*not a readable image.*\n", err)

    code, out, err = run("posing", tmp_path / "a.png")
    assert (code, out) == (2, "")
    known = "classification, segmentation, detection"
    assert err == f"convoy predict: model 'posing' has the task 'pose'; this command knows {known}\n"

    (tmp_path / "file").write_text("")
    code, out, err = run("detector", "--output", tmp_path / "file", tmp_path / "a.png")
    assert (code, out) == (2, "")
    assert err == f"convoy predict: --output '{tmp_path / 'file'}' is not a folder\n"

    code, out, err = run("detector", "--output", tmp_path / "file" / "below", tmp_path / "a.png")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"convoy predict: \S*a.png: its picture \S*a.png was not written: Not a directory\n", err)


def test_min_score_is_checked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("detector", "--min-score", "1.5", "a.png")
    assert "'1.5' is not a number from 0 to 1" in capsys.readouterr().err


def test_the_clients_methods(live: onnx_models.LiveServer, tmp_path: Path) -> None:
    images: list[Path] = []
    for number in range(6):  # more than one batch
        images.append(tmp_path / f"{number}.png")
        scene((80, 40), (8 * number, 0, 80, 40)).save(images[-1])
    with Client(live.url) as client:
        for number, found in enumerate(client.segment("segmenter", images)):
            assert (found.classes.shape, found.classes.dtype) == ((40, 80), np.int32)
            expected = np.zeros((40, 80))
            expected[:, 8 * number :] = 1
            np.testing.assert_array_equal(found.classes, expected)
            assert {each.label: each.share for each in found.shares}["grass"] == pytest.approx(1 - number / 10)
        for number, objects in enumerate(client.detect("detector", images)):
            assert objects == [Detection("frog", 1, pytest.approx(0.9), (8.0 * number, 0.0, 80.0, 40.0))]
        assert client.segment("segmenter", []) == []
        with pytest.raises(ClientError, match="'segmenter' is for segmentation, not for classification"):
            client.classify("segmenter", images)
        with pytest.raises(ClientError, match="'colors' is for classification, not for detection"):
            client.detect("colors", images)
        tensor = np.zeros((1, 3, 40, 40), np.float32)
        answer = client.infer("detector", {"input": tensor})
        assert {name: (each.dtype.name, each.shape) for name, each in answer.items()} == {
            "boxes": ("float32", (1, 4, 4)),
            "scores": ("float32", (1, 4)),
            "labels": ("int64", (1, 4)),
            "count": ("int64", (1, 1)),
        }
        assert list(client.infer("segmenter", {"input": tensor}, outputs=["classes"])) == ["classes"]
        config = client.model_config("segmenter")
        assert json.loads(config.parameters["labels"].string_value) == ["__background__", "grass", "sky"]
        assert "labels" not in client.model_config("colors").parameters


def test_the_evidence_is_named_and_drawn_where_it_lies(run: Run, tmp_path: Path) -> None:
    """The crop keeps the left and the right quarter of the picture from the network."""
    picture = Image.new("RGB", (120, 60))
    picture.paste((255, 0, 0), (75, 45, 90, 60))
    picture.save(tmp_path / "wide.png")
    code, out, err = run("explaining", "--explain", "--top", 2, "--json", tmp_path / "wide.png")
    assert (code, err) == (0, "")
    answer = answer_of(out)
    entries = answer["predictions"]
    assert isinstance(entries, list)
    first, second = entries
    assert first["label"] == "red"
    assert re.fullmatch(r"lower right \d+%", first["evidence"])
    assert "evidence" not in second
    drawn = pixels_of(str(answer["picture"]))
    assert drawn.shape == (60, 120, 3)
    unseen = np.r_[0:30, 90:120]
    assert np.array_equal(drawn[:, unseen], pixels_of(tmp_path / "wide.png")[:, unseen])
    red, blue = drawn[57, 87], drawn[5, 35]
    assert red[0] > 150
    assert red[2] == 0
    assert blue[2] > 0
    assert blue[0] == 0
    code, out, _ = run("explaining", "--explain", "--no-picture", "--top", 1, tmp_path / "wide.png")
    assert code == 0
    assert "evidence" in out
    assert "lower" in out


def test_the_evidence_for_another_class(run: Run, tmp_path: Path) -> None:
    """A class is named by its label or its number; it is shown behind the first ones where it is none of them."""
    picture = Image.new("RGB", (8, 8))
    picture.paste((255, 0, 0), (0, 0, 8, 5))
    picture.paste((0, 0, 200), (6, 6, 8, 8))
    picture.save(tmp_path / "two.png")
    for name in ("blue", "2"):
        code, out, err = run("explaining", "--explain", "--class", name, "--top", 1, "--json", tmp_path / "two.png")
        assert (code, err) == (0, "")
        answer = answer_of(out)
        entries = answer["predictions"]
        assert isinstance(entries, list)
        assert [entry["label"] for entry in entries] == ["red", "blue"]
        assert "evidence" not in entries[0]
        assert re.fullmatch(r"lower right \d+%", entries[1]["evidence"])
        drawn = pixels_of(str(answer["picture"]))
        assert drawn[7, 7, 0] > 0  # red, and nothing else is
        assert drawn[0, 0, 0] < 255


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("3", "--class 3: model 'explaining' has the classes 0 to 2"),
        ("-1", "--class -1: model 'explaining' has no class of that label"),
        ("blu", "--class blu: model 'explaining' has no class of that label; it has blue"),
    ],
)
def test_a_class_that_there_is_not_is_one_line(run: Run, tmp_path: Path, name: str, reason: str) -> None:
    scene((16, 16), (0, 0, 8, 8)).save(tmp_path / "some.png")
    code, out, err = run("explaining", "--explain", f"--class={name}", tmp_path / "some.png")
    assert (code, out) == (2, "")
    assert err.startswith(f"convoy predict: {reason}")
    assert err.count("\n") == 1


def test_a_model_that_explains_its_first_class_alone_says_so(live: onnx_models.LiveServer) -> None:
    """As TensorRT's engines do, and models of earlier releases."""
    reason = r"--class red: model 'colors' explains its first class alone: it has no input 'explain_class'"
    with Client(live.url) as client, pytest.raises(ClientError, match=reason):
        class_of(client, "colors", "", "red")


def test_a_class_is_asked_for_with_its_explanation(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("explaining", "--class", "red", tmp_path / "some.png")
    assert ended.value.code == 2
    assert "--class red says whose evidence is wanted: add --explain" in capsys.readouterr().err


def test_a_black_picture_has_no_evidence(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    code, out, _ = run("explaining", "--explain", "--json", tmp_path / "black.png")
    assert code == 0
    entries = answer_of(out)["predictions"]
    assert isinstance(entries, list)
    assert entries[0]["evidence"] == "none"


@pytest.mark.parametrize("model", ["colors", "segmenter"])
def test_a_model_without_an_explanation_is_told_how_to_get_one(run: Run, tmp_path: Path, model: str) -> None:
    scene((16, 16), (0, 0, 8, 8)).save(tmp_path / "some.png")
    code, out, err = run(model, "--explain", tmp_path / "some.png")
    assert (code, out) == (2, "")
    assert err == (
        f"convoy predict: --explain: model '{model}' has no output 'explanation'; `convoy export --explain` makes a "
        "classifier that has one, and `convoy explain --add` gives it to a published one\n"
    )
