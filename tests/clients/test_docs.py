"""docs/clients.md: its Python runs as printed, and what its grpcurl lines need is there."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image

from convoynet.server.client.predict import predict
from tests.clients.conftest import REPOSITORY, Script
from tests.server import onnx_models

PAGE = (REPOSITORY / "docs" / "clients.md").read_text()
CONVOY, PIXELS, AWAITED, TRITON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[onnx_models.LiveServer]:
    repository = tmp_path_factory.mktemp("docs") / "models"
    onnx_models.write_photos(repository)
    onnx_models.write_segmenter(repository, "deeplabv3_resnet101")
    onnx_models.write_detector(repository, "fasterrcnn_resnet101_fpn")
    with onnx_models.serve(repository) as server:
        yield server


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    Image.new("RGB", (320, 280), (200, 100, 0)).save(tmp_path / "cat.jpg", quality=95)
    return tmp_path / "cat.jpg"


@pytest.fixture
def pond(tmp_path: Path) -> Path:
    """160x80: a green box of a quarter of the pixels and a blue one of a tenth, on red."""
    image = Image.new("RGB", (160, 80), (90, 0, 0))
    image.paste((0, 255, 0), (40, 16, 120, 56))
    image.paste((0, 0, 255), (0, 64, 80, 80))
    image.save(tmp_path / "pond.png")
    return tmp_path / "pond.png"


def filled(program: str, live: onnx_models.LiveServer, cat: Path) -> Path:
    """The printed program with this test's server and image, as a file."""
    assert "127.0.0.1:8001" in program
    file = cat.with_name("program.py")
    file.write_text(program.replace("127.0.0.1:8001", live.url).replace("cat.jpg", str(cat)))
    return file


def test_python_client(live: onnx_models.LiveServer, cat: Path) -> None:
    command = [sys.executable, str(filled(CONVOY, live, cat))]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert [line.split("  ")[1] for line in out[:3]] == ["red (0)", "green (1)", "blue (2)"]
    assert sum(float(line.split()[0]) for line in out[:3]) == pytest.approx(1, abs=0.002)
    assert out[3:] == ["(2, 3)"]


def test_python_client_with_an_event_loop(live: onnx_models.LiveServer, cat: Path) -> None:
    command = [sys.executable, str(filled(AWAITED, live, cat))]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert out == [f"{cat}: red"] * 3


def test_python_client_on_maps_and_boxes(live: onnx_models.LiveServer, pond: Path) -> None:
    program = pond.with_name("program.py")
    program.write_text(PIXELS.replace("127.0.0.1:8001", live.url).replace("pond.png", str(pond)))
    out = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines() == [
        "(80, 160)",
        "65.0%  __background__ (0)",
        "25.0%  grass (1)",
        "10.0%  sky (2)",
        "0.90  frog (1) from 40,16 to 120,56",
        "0.60  bird (2) from 0,64 to 80,80",
    ]


def test_predict_prints_the_json_of_the_page(
    live: onnx_models.LiveServer, pond: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pond.parent)
    for printed, line in zip(
        re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL),
        re.findall(r"^convoy predict.*pond.png", PAGE, re.M),
        strict=True,
    ):
        command = line.split()[2:]
        assert predict([*command, "--json", "--url", live.url]) == 0
        assert capsys.readouterr().out == printed
        assert Path("predictions/pond.png").is_file()


def test_tritonclient(live: onnx_models.LiveServer, cat: Path, client_script: Script) -> None:
    lines = [line.split(" ") for line in client_script(str(filled(TRITON, live, cat))).splitlines()]
    assert [line[1:] for line in lines] == [["0", "red"], ["1", "green"], ["2", "blue"]]
    assert float(lines[0][0]) == pytest.approx(2 * 200 / 255 - 1, abs=0.03)


def test_reflection_is_enough_for_grpcurl(live: onnx_models.LiveServer, cat: Path) -> None:
    """The page's ModelInfer by JSON, with messages that come from the server alone."""
    text = re.findall(r"<<JSON\n(.*?)JSON\n", PAGE, re.DOTALL)[0]
    text = text.replace("$(base64 -w0 cat.jpg)", base64.b64encode(cat.read_bytes()).decode())
    with grpc.insecure_channel(live.url) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        method = service.FindMethodByName("ModelInfer")
        request = json_format.Parse(text, GetMessageClass(method.input_type)())
        call = channel.unary_unary(
            f"/{service.full_name}/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = json_format.MessageToDict(call(request, timeout=60))
    assert answer["outputs"] == [{"name": "logits", "datatype": "BYTES", "shape": ["1", "3"]}]
    assert b":0:red" in base64.b64decode(answer["rawOutputContents"][0])
