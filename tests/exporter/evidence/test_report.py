"""The report's three forms say the same, and the plots are images with the same name and content every time."""

import dataclasses
import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoynet.exporter.evidence import divergence, report, speed, writing
from convoynet.exporter.evidence.accuracy import Accuracy
from convoynet.exporter.evidence.divergence import TensorError
from convoynet.exporter.evidence.engines import Engine
from convoynet.exporter.evidence.html_report import html
from convoynet.exporter.evidence.load import Load
from convoynet.exporter.evidence.parity import Comparison, Parity
from convoynet.exporter.evidence.speed import FP32, REFERENCE, Rate, Timing
from convoynet.exporter.evidence.spread import OutputError, Spread
from convoynet.exporter.evidence.verdicts import line, verdicts

PARITY = Parity(
    "classification",
    64,
    0.25,
    0.01,
    "PyTorch 2.15 eager FP32 on cpu",
    "ONNX Runtime 1.31",
    (1, 2, 5, 32),
    sqnr_db=31.25,
    min_cosine=0.998765,
    top1_agreement=0.96875,
    top5_agreement=0.99,
)
ACCURACY = Accuracy(5000, 0.8084, 0.8064, 0.99, 0.99, 40, 30, (0.797, 0.819), (0.795, 0.817), (-0.0013, 0.0053))


def timed(load: Load, *rates: Rate) -> list[Timing]:
    return [Timing(1, 2, load, rates), Timing(8, 2, load, rates)]


def speed_of(timings: list[Timing]) -> dict[str, object]:
    told = {"engine": "openvino", "precision": "int8", "measured": speed.measured(timings)}
    return {**speed.summary(timings[::-1], "openvino", "int8"), **told}


TIMINGS = timed(
    Load(0.04, 2),
    Rate(REFERENCE, FP32, 20.0, (19.8, 20.3), 9),
    Rate("openvino", "int8", 70.0, (69.0, 71.2), 9),
    Rate("onnxruntime", "int8", 50.0, (49.0, 51.0), 9),
)
BUSY = [dataclasses.replace(timing, load=Load(1.3, 2)) for timing in TIMINGS]


def engines_of(timings: list[Timing]) -> list[dict[str, object]]:
    exact = dataclasses.replace(PARITY, sqnr_db=120.0, max_rel_error=1e-6)
    first = Engine("openvino", "OpenVINO 2026.4.1", parities={"fp32": exact, "int8": PARITY}, accuracy=ACCURACY)
    other = Engine(
        "onnxruntime", "ONNX Runtime 1.31.1", parities={"fp32": exact, "int8": PARITY},
        excluded="INT8 moved the outputs too far: smallest cosine 0.4000 (at least 0.8)",
    )  # fmt: skip
    first.speed = speed.summary(timings, "openvino", "int8")
    return [first.to_json(), other.to_json()]


REPORT = report.Report(
    name="net",
    version=3,
    arch="resnet18",
    paper="He et al. 2015",
    weights={"source": "file a|b.pt", "sha256": "ab" * 32},
    target="gpu",
    precision="int8",
    input={"dtype": "uint8", "shape": [224, 224, 3], "batch": [1, 32], "preprocess": {}},
    classes=1000,
    formats=[{"format": "onnx", "file": "3/model.onnx", "sha256": "cd" * 32, "bytes": 11_800_000, "opset": 20}],
    reference_bytes=46_800_000,
    parameters={"before": 11_689_512, "after": 11_689_512},
    macs={"before": 1_814_073_344, "after": 1_814_073_344},
    images={"calibration": "224 of 256 images", "check": "32 held out from 256 images"},
    parity=PARITY,
    stages=[],
    accuracy=None,
    speed=speed_of(TIMINGS),
    engines=engines_of(TIMINGS),
    calibration={"method": "auto", "tensors": {"mse": 4, "minmax": 7}, "samples": 224, "source": "224 of 256 images"},
    compression=[{"step": "int8", "biases": "left as they are: no quantized layer has one of its own"}],
    engine={"precisions": {"int8": 21, "fp32": 2}, "inspected": True, "layers": [], "line": "TensorRT-RTX builds it"},
    caveats=["no --calibration folder was given"],
    environment={
        "cpu": "Some CPU",
        "gpu": None,
        "threads": 2,
        "platform": "Linux",
        "python": "3.11",
        "libraries": {"torch": "2.15"},
    },
)


def test_json_has_every_field_that_programs_rely_on() -> None:
    told = json.loads(REPORT.finished(1.2345).to_json())
    assert told["schema_version"] == 1
    assert told["seconds"] == 1.23
    assert told["accuracy"] is None
    assert told["parity_to_compressed"] is None
    assert {
        "arch", "weights", "target", "precision", "formats", "parameters", "macs", "parity", "accuracy", "speed",
        "calibration", "compression", "environment",
    } <= told.keys()  # fmt: skip
    assert {
        "samples", "max_abs_error", "max_rel_error", "min_cosine", "top1_agreement", "top5_agreement", "reference",
        "runtime",
    } <= told["parity"].keys()  # fmt: skip
    assert {"file", "sha256", "bytes", "opset"} <= told["formats"][0].keys()
    assert {"batch", "reference_images_per_second", "images_per_second"} <= told["speed"].keys()


def test_json_refuses_what_json_does_not_have() -> None:
    broken = dataclasses.replace(REPORT, parity=dataclasses.replace(PARITY, min_cosine=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


def test_text_has_the_figures_on_one_screen() -> None:
    shown = report.text(REPORT)
    for words in (
        "# net, version 3", "| top-1 agreement | 96.88%, 64 images |", "0.998765", "31.2 dB", "11.8 MB",
        "20 -&gt; 70 images/s at batch 8 (3.5x PyTorch eager; half of the rounds from 69 to 71, other",
        "uint8 [224, 224, 3], batch 1 to 32", "TensorRT-RTX builds it", "21 int8, 2 fp32",
        "- no --calibration folder was given",
        "Some CPU, 2 threads", "auto (minmax 7, mse 4 tensors), 224 of 256 images",
        "| biases | left as they are: no quantized layer has one of its own |",
    ):  # fmt: skip
        assert words in shown
    assert len(shown.splitlines()) <= 60
    # A bar in a name would break the table.
    assert "file a/b.pt" in shown


def test_a_detector_has_no_logits_to_speak_of() -> None:
    found = Parity("detection", 8, 0.5, 1e-3, "PyTorch 2.15", "ONNX Runtime 1.31", (1, 2), matched=0.9875)
    engine = Engine("onnxruntime", "ONNX Runtime 1.31", parities={"fp32": found, "int8": found})
    detector = dataclasses.replace(REPORT, parity=found, engines=[engine.to_json()])
    shown = report.text(detector)
    assert "| matched detections | 98.75%, 8 images |" in shown
    assert "| int8: matched detections | 98.75% |" in shown
    assert "0.5 pixels, 1.0e-03 of the largest coordinate" in shown
    assert not any(word in shown for word in ("cosine", "top-1", "logit", "--eval", "dB"))
    assert "matched detections 98.75%, max error 0.5 pixels" in report.summary(detector, Path("m/1"), Path("m"))


def test_summary_starts_with_parity_and_ends_with_the_next_command() -> None:
    measured = dataclasses.replace(REPORT, accuracy=ACCURACY)
    lines = report.summary(measured, Path("models/net/3"), Path("models")).splitlines()
    assert lines[0].startswith("parity     64 images, cosine >= 0.99877, top-1 agreement 96.88%, max error 0.25")
    assert (
        "top-1 80.84% -> 80.64% (-0.20 points, 95 % interval -0.53 to +0.13; 40 right answers lost, 30 gained) "
        "on 5000 images" in lines[1]
    )
    assert lines[-2].startswith("published  models/net/3 ")
    assert lines[-1] == "next       convoy serve --model-repository models"


STAGES = [
    {"stage": "1 prune", "parity": dataclasses.asdict(PARITY), "top1": 0.5, "parameters": 10, "macs": 20},
    {"stage": "int8", "bytes": 1000, "parity": dataclasses.asdict(PARITY)},
]
COMPRESSED = dataclasses.replace(
    REPORT,
    accuracy=ACCURACY,
    stages=STAGES,
    compression=[{"step": "prune", "ratio": 0.5, "channels": [{"layer": "conv<1>", "before": 16, "after": 8}]}],
    divergence={
        "images": 4, "threshold_db": 20.0, "first": {"tensor": "relu_7", "operator": "Relu", "sqnr_db": 12.5},
        "tensors": [],
    },
    sensitivity=[{"layer": "conv2", "sqnr_db": 31.5}],
    recipe='[[step]]\nstep = "prune"\nratio = 0.5\n',
)  # fmt: skip


def test_every_output_behind_the_logits_has_a_row() -> None:
    told = dataclasses.replace(REPORT, parity=dataclasses.replace(PARITY, others={"features": PARITY}))
    line = "max error 0.25 (1.0e-02 of the largest logit)"
    assert re.search(rf"^\| output features \| .*{re.escape(line)} \|$", report.text(told), re.M)
    assert re.search(rf"^output features .*{re.escape(line)}$", report.summary(told, Path("m/net/3"), Path("m")), re.M)
    assert "output features" in html(told, [])


def test_text_shows_the_stages() -> None:
    shown = report.text(COMPRESSED)
    assert "| 1 prune | 96.88% | 31.2 dB |  | 50.00% |  |" in shown
    assert "| int8 | 96.88% | 31.2 dB |  |  | 1 kB |" in shown


SPREAD = Spread("classification", 64, 10, 10, 0.12, worst=OutputError(7, 0.31, ""))
JUDGED = dataclasses.replace(
    PARITY,
    spread=SPREAD,
    others={"features": dataclasses.replace(PARITY, spread=dataclasses.replace(SPREAD, kind="embedding", error=0.4))},
)


def test_every_output_is_shown_with_its_figure_its_limit_and_the_verdict() -> None:
    engine = Engine("onnxruntime", "ONNX Runtime 1.31", parities={"fp32": JUDGED, "int8": JUDGED})
    stages = [{"stage": "int8", "bytes": 1000, "parity": dataclasses.asdict(JUDGED)}] * 2
    told = dataclasses.replace(REPORT, parity=JUDGED, engines=[engine.to_json()], stages=stages)
    logits = ("logits", "classes", "error 0.12 of the spread (18.4 dB); output 7 alone 0.31")
    limit = "at most 0.5; each alive and in its place"
    features = "error 0.4 of the spread (8.0 dB); output 7 alone 0.31"
    verdict = "passes, above 0.32: measure the accuracy"
    text, page = report.text(told), html(told, [])
    assert f"| {' | '.join(logits)} | {limit} | passes |" in text
    assert f"| features | embeddings | {features} | at most 0.5; each alive and in its place | {verdict} |" in text
    assert "| int8 | 96.88% | 31.2 dB | 0.12 |  | 1 kB |" in text
    assert "| int8: error of the spread | 0.12 |" in text
    for words in ("What was judged", *logits, limit, features, verdict, '<th scope="col">error of the spread</th>'):
        assert words in page
    lines = report.summary(told, Path("m/net/3"), Path("m")).splitlines()
    (line,) = (line for line in lines if line.startswith("judged "))
    assert line.startswith(
        f"judged     logits (classes): {logits[2]}, {limit}: passes; features (embeddings): error 0.4"
    )


@pytest.mark.parametrize(
    ("precision", "changed", "words"),
    [
        (
            "fp32",
            {"error": 1e-6},
            ("error 1e-06 of the spread (120.0 dB); 1.0e-04", "at most 0.01; 1e-03", "passes"),
        ),
        ("fp32", {"error": 0.05}, ("error 0.05", "at most 0.01", "passes by PyTorch's own rounding")),
        ("fp16", {"error": 0.05}, ("top-1 agreement 100.00%", "at most 10 points below the float32 graph's", "passes")),
        ("int8+fp16", {"error": 0.95}, ("error 0.95", "at most 0.5", "refused: their error is 0.95")),
        ("int8", {"error": 0.7, "untrained": True}, ("error 0.7", "at most 0.9", "passes, above 0.32: measure")),
        ("fp8", {"error": 0.3, "kind": "regression"}, ("error 0.3", "at most 0.5; each at most 0.5", "passes")),
        ("int8", {"error": None, "varying": 0}, ("no output varies over 64 images", "", "passes")),
        (
            "int8",
            {"error": None, "images": 1},
            ("one image shows", "error at most 0.5 of their size", "passes"),
        ),
        ("int8", {"images": 4, "worst": None}, ("error 0.12", "at most 0.9", "passes")),
    ],
)
def test_the_limit_is_that_of_the_precision_and_of_what_outputs_mean(
    precision: str, changed: dict[str, object], words: tuple[str, str, str]
) -> None:
    spread = dataclasses.replace(SPREAD, **changed)
    parity = dataclasses.replace(PARITY, spread=spread, max_rel_error=1e-4, top1_agreement=1.0, sqnr_db=40.0)
    (found,) = verdicts(parity, precision)
    assert found.figure.startswith(words[0])
    assert found.limit.startswith(words[1])
    assert found.verdict.startswith(words[2])


@pytest.mark.parametrize(("precision", "limit"), [("int8", "at least 50%"), ("fp32", "at least 90%")])
def test_detections_are_judged_by_their_partners(precision: str, limit: str) -> None:
    found = Parity("detection", 8, 0.5, 1e-3, "PyTorch 2.15", "ONNX Runtime 1.31", (1, 2), matched=0.9875)
    assert line(verdicts(found, precision)) == f"detections (boxes): matched detections 98.75%, {limit}: passes"


def test_writes_the_same_files_every_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference = np.sort(rng.standard_normal(5000)).astype(np.float32)
    compared = Comparison(PARITY, reference, reference + np.float32(0.1))
    errors = [TensorError("relu", "Relu", 30.0), TensorError("relu_7", "Relu", 12.5)]
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        paths = writing.write(COMPRESSED, folder, compared, {"tensors.png": partial(divergence.plot, errors)})
        names = ["report.json", "report.md", "report.html", "parity.png", "speed.png", "tensors.png"]
        assert [path.name for path in paths] == names
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    for name in ("parity.png", "speed.png"):
        with Image.open(tmp_path / "a" / name) as plot:
            assert plot.size == (450, 450)
            assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 10  # something is drawn


def test_the_page_opens_by_itself_and_has_everything(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    page = html(COMPRESSED, [tmp_path / "one.png", tmp_path / "two.png"])
    assert page.count("data:image/png;base64,") == 2
    # Nothing is fetched, from anywhere.
    assert not re.search(r"<(?:script|link|iframe)|src=\"(?!data:)|url\(", page)
    for words in (
        "net, version 3", "3.5x", "80.64%", "-0.20 points", "31.2 dB", "1 prune", "50.00%", "relu_7", "12.5 dB",
        "conv2", "no --calibration folder was given", "Some CPU", "11,689,512", "ratio = 0.5",
    ):  # fmt: skip
        assert words in page, words
    assert "conv&lt;1&gt;" in page  # what a network calls its layers is no markup


def test_the_page_says_how_sure_its_figures_are() -> None:
    page = html(COMPRESSED, [])
    for words in (
        "With PyTorch, on 64 images, 95 % interval 89.3 to 99.1 %.",
        "The right class comes first, 95 % interval 79.5 to 81.7 %; the change lies between -0.53 and +0.13.",
        "80.84% (79.7 to 81.9)", "80.64% (79.5 to 81.7)", "20 (20 to 20)", "70 (69 to 71)",
    ):  # fmt: skip
        assert words in page, words
    # Of detections or of pixels the images are not so many tries.
    found = Parity("detection", 8, 0.5, 1e-3, "PyTorch 2.15", "ONNX Runtime 1.31", (1, 2), matched=0.9875)
    assert found.agreement_interval is None
    assert "With PyTorch, on 8 images." in html(dataclasses.replace(REPORT, parity=found), [])


def test_a_tensor_is_found_by_the_layer_that_it_comes_from() -> None:
    first = {"tensor": "mul_7", "layer": "layer1.0.conv1", "operator": "Mul", "sqnr_db": 12.5}
    told = {"images": 4, "threshold_db": 20.0, "first": first, "tensors": [first]}
    page = html(dataclasses.replace(COMPRESSED, divergence=told), [])
    assert "behind the layer <code>layer1.0.conv1</code>" in page
    assert '<th scope="row">mul_7</th><td>layer1.0.conv1</td><td>Mul</td><td>12.5</td>' in page


@pytest.mark.parametrize("name", ["parity", "speed", "divergence", "sensitivity", "qat", "training-3"])
def test_every_plot_is_explained(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (9, 3)).save(tmp_path / f"{name}.png")
    page = html(COMPRESSED, [tmp_path / f"{name}.png"])
    assert re.search(rf'<figure class="wide"><img alt="Plot: {name}"[^>]+><figcaption>[A-Z][^<]+\.</figcaption>', page)


@pytest.mark.parametrize(("count", "shown"), [(999, "1 kB"), (305_000, "305 kB"), (1_100_000, "1.1 MB")])
def test_megabytes(count: int, shown: str) -> None:
    assert report.megabytes(count) == shown


def test_every_engine_has_a_column() -> None:
    for shown in (report.text(REPORT), report.summary(REPORT, Path("m/1"), Path("m")), html(REPORT, [])):
        assert "OpenVINO 2026.4.1" in shown
        assert "ONNX Runtime 1.31.1" in shown
        assert re.search(r"fp32: signal to noise, dB\W[^\n]*120\.0[^\n]*120\.0", shown)
        assert re.search(r"int8: signal to noise, dB\W[^\n]*31\.2[^\n]*31\.2", shown)
        assert re.search(r"images/s at batch 8\W[^\n]*70 \(69 to 71\)", shown)
        assert "smallest cosine 0.4000 (at least 0.8)" in shown


def test_a_speed_that_cannot_be_believed_is_not_shown(tmp_path: Path) -> None:
    busy = dataclasses.replace(REPORT, speed=speed_of(BUSY), engines=engines_of(BUSY))
    for shown in (report.text(busy), report.summary(busy, Path("m/1"), Path("m")), html(busy, [])):
        assert "withheld: other processes took 1.3 of 2 cores" in shown
        assert not re.search(r"3\.5x|\b70\b|x PyTorch", shown)
    told = json.loads(busy.to_json())["speed"]
    assert told["images_per_second"] is None
    assert told["withheld"]
    assert told["measured"][0]["load"]["others"] == 1.3
    writing._plot_speed(busy, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_no_column_of_the_page_is_hidden() -> None:
    """What is long is broken into lines, so that a table is no wider than the page."""
    stage = {"stage": "int8", "parity": dataclasses.asdict(dataclasses.replace(PARITY, runtime="ONNX Runtime " * 4))}
    page = html(dataclasses.replace(REPORT, stages=[stage]), [])
    assert f'<td class="text">{"ONNX Runtime " * 4}</td>' in page
    assert "td.text, th.text { white-space: normal;" in page


def test_the_environment_names_the_libraries_that_are_here() -> None:
    libraries = report.environment(1)["libraries"]
    assert libraries["convoynet"] == version("convoynet")
    assert {"torch", "onnx", "numpy"} <= set(libraries)


EVIL = "<script>alert(1)</script>\n\n# big\n[x](javascript:alert(2)) | `y` <img src=x onerror=alert(3)>"


def test_names_of_others_are_no_markup() -> None:
    hostile = dataclasses.replace(
        COMPRESSED,
        name=EVIL,
        arch=EVIL,
        paper=EVIL,
        weights={"source": EVIL, "sha256": "ab" * 32},
        images={"calibration": EVIL, "check": EVIL},
        caveats=[EVIL],
        compression=[{"step": EVIL, EVIL: EVIL}],
        calibration={"method": "mse", "tensors": {EVIL: 4}, "samples": 4, "source": EVIL},
    )
    page, text = html(hostile, []), report.text(hostile)
    for written in (page, text):
        assert "<script>alert" not in written
        assert "<img src=x" not in written
        assert "&lt;script&gt;" in written
    assert "\n# big" not in text
    assert "](javascript" not in text
    assert not [line for line in report.summary(hostile, Path("m/1"), Path("m")).splitlines() if line.startswith("#")]
