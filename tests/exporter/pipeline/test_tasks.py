"""Segmentation, detection and fully convolutional networks from the exporter to pictures, through a real server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image

from convoynet.exporter.archs import weights
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import made_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline.pipeline import Published, run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from convoynet.exporter.tensorrt.library import find
from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.client.client import Client
from convoynet.server.client.predict import predict
from tests.exporter import task_nets
from tests.exporter.onnx_runs import session_of
from tests.server import onnx_models

NETS = "tests.exporter.task_nets"
PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "imagenet_photos"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for index, size in enumerate([(90, 120), (150, 100), (64, 64), (200, 140)] * 3):
        Image.fromarray(made_images(1, size, 3, index)[0]).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> dict[str, Published]:
    root = tmp_path_factory.mktemp("models")
    common = {"repository": root, "calibration": photos, "calibration_samples": 8, "weights": "random"}
    return {
        "segmenter": run(ExportConfig(f"{NETS}:segmenter", **common), Quiet()),
        "segmenter-int8": run(
            ExportConfig(f"{NETS}:segmenter", name="segmenter-int8", steps=(Int8(),), input="uint8", **common), Quiet()
        ),
        "detector": run(ExportConfig(f"{NETS}:detector", input="uint8", batch=(1, 2), **common), Quiet()),
        "map": run(
            ExportConfig(
                f"{NETS}:classifier", name="map", fully_convolutional=True, input_size=(64, 96), batch=(1, 2), **common
            ),
            Quiet(),
        ),
    }


@pytest.fixture(scope="module")
def live(published: dict[str, Published]) -> Iterator[onnx_models.LiveServer]:
    with onnx_models.serve(published["detector"].folder.parents[1]) as server:
        with Client(server.url) as client:
            while not all(client.model_ready(found.folder.parent.name) for found in published.values()):
                time.sleep(0.1)
        yield server


def config_of(found: Published) -> pb.ModelConfig:
    return text_format.Parse((found.folder.parent / "config.pbtxt").read_text(), pb.ModelConfig())


@pytest.mark.parametrize("name", ["segmenter", "segmenter-int8", "detector", "map"])
def test_the_config_states_what_the_graph_returns(name: str, published: dict[str, Published]) -> None:
    config = config_of(published[name])
    session = session_of(published[name].folder / "model.onnx")
    types = {pb.TYPE_FP32: "float", pb.TYPE_UINT8: "uint8", pb.TYPE_INT32: "int32", pb.TYPE_INT64: "int64"}
    stated = [(out.name, f"tensor({types[out.data_type]})", list(out.dims)) for out in config.output]
    assert stated == [(out.name, out.type, out.shape[1:]) for out in session.get_outputs()]
    assert config.parameters["task"].string_value == published[name].report.parity.task
    pixels = made_images(3, (config.input[0].dims[0], config.input[0].dims[1]), 3, 0)
    if config.input[0].data_type == pb.TYPE_UINT8:
        outputs = session.run(None, {"input": pixels})
        assert [output.shape for output in outputs] == [(3, *out.dims) for out in config.output]


def test_a_map_is_compared_pixel_by_pixel(published: dict[str, Published]) -> None:
    exact, small = published["segmenter"].report, published["segmenter-int8"].report
    assert exact.parity.max_rel_error < 1e-4
    assert exact.parity.agreement > 0.999
    assert small.parity.agreement > 0.9
    assert small.parity.sqnr_db is not None
    assert small.parity.sqnr_db > 5  # 20 and more but where OpenVINO has no VNNI, and saturates in the middle of a sum
    assert exact.input["batch"] == [1, 8]
    assert "pixels of the same class" in (published["segmenter"].folder / "report.md").read_text()


def test_a_detector_is_compared_by_matched_boxes(published: dict[str, Published]) -> None:
    parity = published["detector"].report.parity
    assert parity.matched is not None
    assert parity.matched > 0.9
    assert parity.max_rel_error < 1e-3
    assert parity.batch_sizes == (1, 2)


def test_the_class_map_is_the_best_logit(published: dict[str, Published]) -> None:
    session = session_of(published["segmenter-int8"].folder / "model.onnx")
    logits, classes = session.run(["logits", "classes"], {"input": made_images(2, (48, 64), 3, 7)})
    np.testing.assert_array_equal(classes, logits.argmax(axis=1))
    assert len(np.unique(classes)) > 1


def test_a_fully_convolutional_export_is_the_classifier_slid_over_the_image(published: dict[str, Published]) -> None:
    assert published["map"].report.parity.task == "segmentation"
    assert [list(out.dims) for out in config_of(published["map"]).output] == [[5, 5, 9], [5, 9]]
    network = task_nets.classifier().build(5)
    assert published["map"].report.parameters["after"] == sum(p.numel() for p in network.parameters())


def test_predict_paints_what_is_served(
    live: onnx_models.LiveServer, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, key in (("segmenter-int8", "classes"), ("detector", "detections"), ("map", "classes")):
        flags = ["--model", model, "--url", live.url, "--output", str(tmp_path / model), "--json", "--min-score", "0"]
        assert predict([*flags, str(photos / "01.png")]) == 0
        (answer,) = json.loads(capsys.readouterr().out)
        assert answer[key]
        known = task_nets.LABELS if key == "classes" else task_nets.detector().labels()
        assert {entry["label"] for entry in answer[key]} <= set(known)
        with Image.open(answer["picture"]) as picture, Image.open(photos / "01.png") as original:
            assert picture.width >= original.width
            shown = np.asarray(picture.convert("RGB").crop((0, 0, *original.size)), int)
            assert np.abs(shown - np.asarray(original, int)).max() > 20  # something is painted
        if key == "detections":
            width, height = original.size
            for entry in answer[key]:
                x1, y1, x2, y2 = entry["box"]
                assert 0 <= x1 <= x2 <= width
                assert 0 <= y1 <= y2 <= height


def test_the_graph_of_a_served_detector_builds_for_tensorrt(tmp_path: Path, photos: Path) -> None:
    if find() is None:
        pytest.skip("no TensorRT builder is installed")
    config = ExportConfig(
        f"{NETS}:segmenter", weights="random", target="gpu", steps=(Int8(),), calibration=photos, repository=tmp_path
    )
    engine = run(config, Quiet()).report.engine
    assert engine is not None
    assert engine["bytes"] > 10_000


def test_what_tasks_do_not_have_is_refused_in_a_line(tmp_path: Path, photos: Path) -> None:
    base = {"weights": "random", "repository": tmp_path / "m", "calibration": photos}
    with pytest.raises(BadInput, match=r"class folders say nothing about segmentation; segmenter goes without"):
        run(ExportConfig(f"{NETS}:segmenter", eval=photos, **base), Quiet())
    # What takes everything for background detects nothing.
    arch = task_nets.detector()
    torch.manual_seed(0)
    network = arch.build(8)
    weights.estimate_statistics(network, arch.preprocess.normalize(made_images(2, arch.preprocess.size, 3, 0)))
    with torch.no_grad():
        network.get_parameter("roi_heads.box_predictor.cls_score.bias")[0] += 100
    torch.save(network.state_dict(), tmp_path / "blind.pt")
    blind = {**base, "weights": str(tmp_path / "blind.pt")}
    with pytest.raises(BadInput, match=r"detects nothing in the images that check it.*--calibration DIR"):
        run(ExportConfig(f"{NETS}:detector", **blind), Quiet())
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_vgg16_at_384_gives_a_map_of_6_by_6(tmp_path: Path) -> None:
    # The command of docs/adding-a-network.md, with random weights.
    config = ExportConfig(
        "vgg16", weights="random", fully_convolutional=True, input_size=(384, 384), repository=tmp_path, batch=(1, 2),
        calibration_samples=8,
    )  # fmt: skip
    found = run(config, Quiet())
    assert list(config_of(found).output[0].dims) == [1000, 6, 6]
    assert found.report.parity.max_rel_error < 1e-4
