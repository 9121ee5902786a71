"""Which engine of a model is on which GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format

from convoynet.protos.inference import grpc_service_pb2 as grpc_pb
from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server import gpus
from convoynet.server.engines.base import EngineSpec
from convoynet.server.errors import InvalidModel
from convoynet.server.repository import repository, specs
from convoynet.server.repository.instance_groups import placements
from convoynet.server.spec import Placement
from tests.server.conftest import Serving, fake_model


def _groups(text: str) -> list[pb.ModelInstanceGroup]:
    return list(text_format.Parse(text, pb.ModelConfig()).instance_group)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "visible_gpus", lambda: 2)


@pytest.mark.parametrize(
    ("text", "there", "expected"),
    [
        ("kind: KIND_CPU count: 2", 2, [("cpu", ()), ("cpu", ())]),
        ("kind: KIND_GPU", 2, [("gpu", (0,)), ("gpu", (1,))]),
        ("kind: KIND_GPU count: 2 gpus: [0, 1]", 2, [("gpu", (0,)), ("gpu", (0,)), ("gpu", (1,)), ("gpu", (1,))]),
        ("kind: KIND_GPU gpus: 1", 2, [("gpu", (1,))]),
        ("count: 3", 2, [("auto", ())] * 3),
        ("gpus: [0, 1]", 2, [("auto", (0,)), ("auto", (1,))]),
        ("gpus: [0, 2]", 2, [("cpu", ())]),
        # Without a GPU the engine says what it misses.
        ("kind: KIND_GPU", 0, [("gpu", ())]),
        ("kind: KIND_GPU gpus: 1", 0, [("gpu", (1,))]),
    ],
)
def test_placements(text: str, there: int, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    assert placements(_groups(f"instance_group {{ {text} }}"), there) == tuple(Placement(*each) for each in expected)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kind: KIND_GPU gpus: [0, 2]", "names GPU 2, but this machine has 2 GPUs"),
        ("kind: KIND_GPU gpus: -1", r"gpus \[-1\]: each must be 0 or more"),
        ("kind: KIND_GPU gpus: [1, 1]", r"gpus \[1, 1\]: each must be 0 or more and named once"),
        ("kind: KIND_CPU gpus: 0", r"KIND_CPU names the GPUs \[0\]"),
    ],
)
def test_gpus_that_there_are_not_are_refused(text: str, line: str) -> None:
    with pytest.raises(InvalidModel, match=line) as caught:
        placements(_groups(f"instance_group {{ {text} }}"), 2)
    assert "\n" not in str(caught.value)


def test_groups_are_mixed_and_each_instance_has_its_own_device(tmp_path: Path, two_gpus: None) -> None:
    group = "instance_group { kind: KIND_GPU } instance_group { kind: KIND_CPU count: 2 }"
    fake_model(tmp_path)
    with (tmp_path / "sum" / "config.pbtxt").open("a") as config:
        config.write(group)
    (found,) = repository.scan(tmp_path, repository.Defaults(4, 1))
    assert found.spec is not None, found.reason
    assert found.config is not None
    assert [list(g.gpus) for g in found.config.instance_group] == [[0, 1], []]
    engines = [spec.engine for spec in found.spec.of_instances()]
    assert [(e.device, e.gpus) for e in engines] == [("gpu", (0,)), ("gpu", (1,)), ("cpu", ()), ("cpu", ())]
    sent = EngineSpec.of(found.spec.of_instances()[1])
    assert EngineSpec.from_json(sent.to_json()) == sent


async def test_an_engine_for_each_gpu_is_started(serving: Serving, tmp_path: Path, two_gpus: None) -> None:
    fake_model(tmp_path)
    with (tmp_path / "sum" / "config.pbtxt").open("a") as config:
        config.write("instance_group { kind: KIND_GPU count: 2 } instance_group { kind: KIND_CPU }")
    async with serving() as running:
        config = (await running.stub.ModelConfig(grpc_pb.ModelConfigRequest(name="sum"))).config
        assert config.parameters["instances"].string_value == "5"
        assert [(g.count, list(g.gpus)) for g in config.instance_group] == [(2, [0, 1]), (1, [])]


@pytest.mark.parametrize(
    ("files", "stated", "count"),
    [
        ([], None, 0),
        ([], "0,1", 0),
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, 2),
        (["nvidia3"], None, 1),
        (["dxg"], None, 1),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "-1", 0),
        (["nvidia0", "nvidia1"], "1, 7, 0", 1),
        (["nvidia0", "nvidia1"], "GPU-1b, MIG-2c", 2),
    ],
)
def test_gpus_are_counted_as_cuda_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], stated: str | None, count: int
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if stated is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", stated)
    assert gpus.visible_gpus() == count
