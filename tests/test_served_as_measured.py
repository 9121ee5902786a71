"""What `convoy serve` answers is what the report measured: in each engine, at every batch size from 1 to 8."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convoynet.exporter.config import ExportConfig
from convoynet.exporter.evidence.parity import Sides, compare
from convoynet.exporter.pipeline import pipeline, preflight
from convoynet.exporter.progress import Quiet
from convoynet.exporter.recipe import Int8
from convoynet.exporter.running import openvino
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.runtime import Eager, Session
from convoynet.processor import adds_in_16_bits
from convoynet.server.client.client import Client
from convoynet.server.engines import openvino as served_openvino
from tests.server.process import ServeProcess

ENGINES = ("openvino", "onnxruntime")
NETWORK = """
import torch
from torch import nn


def net(num_classes=6):
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    ).eval()
"""


def test_openvino_is_told_what_the_server_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Core:
        def compile_model(self, model: object, device: str, properties: dict[str, Any]) -> Any:
            given.append(properties)
            return self

        def create_infer_request(self) -> None: ...

    from convoynet.server.spec import EngineOptions

    served_openvino._Request(Core(), None, EngineOptions("onnxruntime", Path("model.onnx"), "cpu", threads=3), {})
    assert given == [openvino.properties(3)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Published:
    if not openvino.installed():
        pytest.skip("OpenVINO is an extra")
    folder = tmp_path_factory.mktemp("served")
    (folder / "nets_as_served.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return pipeline.run(config(folder), Quiet())


def config(folder: Path) -> ExportConfig:
    return ExportConfig(
        "nets_as_served:net", repository=folder / "models", steps=(Int8(),), target="cpu", batch=(1, 8),
        input_size=(32, 32), num_classes=6, name="net",
    )  # fmt: skip


def test_the_server_answers_what_was_measured(exported: pipeline.Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine, in a real server, on the images that checked; and the model as published, which it chooses for."""
    published = exported.folder.parent
    told = json.loads((published / "report.json").read_text())
    order = ENGINES[::-1] if adds_in_16_bits() else ENGINES
    assert [engine["engine"] for engine in told["engines"]] == list(order)
    assert all(engine["verified"] for engine in told["engines"])
    root = published.parent
    for engine in ENGINES:
        shutil.copytree(published, root / engine)
        file = root / engine / "config.pbtxt"
        stated = file.read_text().replace('name: "net"', f'name: "{engine}"', 1)
        file.write_text(stated + f'\nparameters {{ key: "engine" value {{ string_value: "{engine}" }} }}\n')

    monkeypatch.syspath_prepend(root.parent)
    task = preflight.check(config(root.parent), Quiet())
    images = pipeline._load_pictures(task).check
    preprocess, threads = task.arch.preprocess, torch.get_num_threads()
    inputs = preprocess.normalize(images)
    (expected,) = Eager(import_module("nets_as_served").net(), preprocess)(inputs)
    graph = exported.folder / "model.onnx"
    measured = {
        "openvino": OpenVino(graph, preprocess, task="classification", threads=threads),
        "onnxruntime": Session(graph, preprocess, task="classification", target="cpu", threads=threads),
    }
    with ServeProcess(root, "--threads", str(threads)) as server, Client(server.url) as client:
        runtime = client.model_config("net").parameters["runtime"].string_value
        assert runtime.partition(" ")[0] in ("OpenVINO", "ONNX")
        for name in ("net", *ENGINES):
            engine = name if name in ENGINES else ("openvino" if runtime.startswith("OpenVINO") else "onnxruntime")
            runs = client.model_config(name).parameters["runtime"].string_value
            (evidence,) = (one for one in told["engines"] if one["engine"] == engine)
            assert runs == evidence["runtime"]
            for batch in range(1, 9):
                parts = [inputs[at : at + batch] for at in range(0, len(inputs), batch)]
                answers = np.concatenate([client.infer(name, {"input": part})["logits"] for part in parts])
                again = np.concatenate([measured[engine](part)[0] for part in parts])
                np.testing.assert_allclose(answers, again, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
                found = compare(
                    "classification", (expected,), (answers,), np.arange(len(images)), Sides("PyTorch", runs)
                ).parity
                for figure in ("sqnr_db", "min_cosine", "top1_agreement"):
                    assert getattr(found, figure) == pytest.approx(evidence["parity"][figure], abs=0.02), (
                        batch,
                        figure,
                    )
