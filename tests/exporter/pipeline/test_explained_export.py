"""Exports with an explanation: what is published, what is served of it, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from convoynet.exporter.assets import digits
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import BadInput
from convoynet.exporter.pipeline import first_look
from convoynet.exporter.pipeline.pipeline import Published, run
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.client.client import Client, ClientError
from tests.exporter.onnx_runs import session_of
from tests.server import onnx_models

KINDS = ("fp32", "int8")
OUTPUTS = ("logits", "explanation", "features")


@pytest.fixture(scope="module")
def lenets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    root = tmp_path_factory.mktemp("models")
    steps = {"fp32": (), "int8": (Int8(),)}
    return {
        kind: run(
            ExportConfig(
                "lenet5",
                repository=root,
                name=kind,
                batch=(1, 8),
                input="uint8",
                steps=steps[kind],
                explain=True,
                features=True,
            ),
            Quiet(),
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def live(lenets: dict[str, Published]) -> Iterator[onnx_models.LiveServer]:
    with onnx_models.serve(lenets["fp32"].folder.parents[1]) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_and_the_report_say_what_the_graph_explains(kind: str, lenets: dict[str, Published]) -> None:
    folder = lenets[kind].folder
    config = text_format.Parse((folder.parent / "config.pbtxt").read_text(), pb.ModelConfig())
    assert [(out.name, out.data_type, list(out.dims)) for out in config.output] == [
        ("logits", pb.TYPE_FP32, [10]),
        ("explanation", pb.TYPE_FP32, [5, 5]),
        ("features", pb.TYPE_FP32, [84]),
    ]
    asked = config.input[1]
    assert (asked.name, asked.data_type, list(asked.dims)) == ("explain_class", pb.TYPE_INT64, [1])
    assert asked.optional
    assert config.parameters["values.explain_class"].string_value == "-1 to 9"
    assert config.parameters["seldom_outputs"].string_value == "explanation"
    told = json.loads((folder / "report.json").read_text())["explanation"]
    assert (told["size"], told["classes"]) == ([5, 5], 10)
    assert told["max_rel_error"] < 1e-3
    text = (folder / "report.md").read_text()
    assert "| explanation | Grad-CAM of the winning class at " in text
    assert "| features | 84 at " in text
    names = [value.name for value in onnx.load(folder / "model.onnx").graph.output]
    assert names == list(OUTPUTS)


def near(found: Any, wanted: Any, scale: float, kind: str, *, same: bool) -> bool:
    """Whether two engines have the same evidence; `same`: and the same logits, as where no sum saturates."""
    if kind == "fp32" or same:
        return bool(np.abs(found - wanted).max() < (1e-4 if kind == "fp32" else 0.05) * scale)
    return bool(np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_what_the_graph_computes_at_every_batch(
    kind: str, lenets: dict[str, Published], live: onnx_models.LiveServer
) -> None:
    images = digits().test[:8]
    session = session_of(lenets[kind].folder / "model.onnx")
    logits, maps, features = session.run(OUTPUTS, {"input": images})
    assert maps.min() >= 0
    assert maps.max() > 0
    with Client(live.url) as client:
        for size in range(1, 9):
            made = client.infer(kind, {"input": images[:size]}, outputs=OUTPUTS)
            alone = client.infer(kind, {"input": images[:size]}, outputs=["logits"])
            # OpenVINO adds up LeNet-5's distances in another order where the features are read twice; without VNNI its
            # 8-bit sums saturate, and elsewhere in each graph.
            room = 1e-6 if kind == "fp32" else 0.05
            assert np.abs(alone["logits"] - made["logits"]).max() <= room * np.abs(made["logits"]).max()
            assert np.array_equal(made["logits"].argmax(1), logits[:size].argmax(1))
            same = np.abs(made["logits"] - logits[:size]).max() <= 1e-3 * np.abs(logits).max()
            assert near(made["explanation"], maps[:size], maps.max(), kind, same=same)
            assert near(made["features"], features[:size], features.max(), kind, same=same)
            classes = np.arange(1, size + 1, dtype=np.int64)[:, None]
            (wanted,) = session.run(["explanation"], {"input": images[:size], "explain_class": classes})
            asked = {"input": images[:size], "explain_class": classes}
            found = client.infer(kind, asked, outputs=["explanation"])["explanation"]
            assert near(found, wanted, wanted.max(), kind, same=same)
        assert set(client.infer(kind, {"input": images[:1]}, outputs=["logits"])) == {"logits"}
        with pytest.raises(ClientError, match=r"'explain_class' .* holds 10, -1 to 9 are allowed"):
            client.infer(kind, {"input": images[:1], "explain_class": np.array([[10]])})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": "deeplabv3_resnet50"}, "--explain: deeplabv3_resnet50 is for segmentation here"),
        ({"arch": "fasterrcnn_resnet101_fpn"}, "--explain: fasterrcnn_resnet101_fpn is for detection here"),
        ({"arch": "vgg16-cifar", "fully_convolutional": True}, "--explain: vgg16-cifar is for segmentation here"),
        ({"arch": "lenet5", "task": "embedding"}, "--task embedding has none"),
        ({"arch": "lenet5", "outputs": ("logits", "explanation=f6")}, "explanation, explain_class are taken"),
    ],
)
def test_what_has_no_class_to_explain_is_refused_at_once(
    options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=reason) as refused:
        first_look.check(ExportConfig(**options, weights="random", explain=True, repository=tmp_path))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": "deeplabv3_resnet50"}, "--features: deeplabv3_resnet50 is for segmentation here"),
        ({"arch": "vgg16-cifar", "fully_convolutional": True}, "--features: vgg16-cifar is for segmentation here"),
        ({"arch": "lenet5", "outputs": ("logits", "features=f6")}, "--outputs logits,features=f6 has one: drop one"),
    ],
)
def test_what_has_no_features_is_refused_at_once(options: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=reason):
        first_look.check(ExportConfig(**options, weights="random", features=True, repository=tmp_path))  # type: ignore[arg-type]
