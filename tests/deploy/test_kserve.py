"""The runtimes for KServe with a real server: its arguments, its probes, and one model under /mnt/models."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from tests.deploy import manifests
from tests.deploy.manifests import DEPLOY, Object
from tests.server.onnx_models import write_linear
from tests.server.process import ServeProcess

RUNTIMES = manifests.documents((DEPLOY / "kserve" / "runtimes" / "clusterservingruntime.yaml").read_text())


def started(runtime: Object, mounted: Path, name: str) -> ServeProcess:
    """The runtime's container as KServe starts it, but for the ports, and without what takes long."""
    container = runtime["spec"]["containers"][0]
    flags = [each.replace("{{.Name}}", name) for each in container["args"]]
    assert flags[:2] == ["serve", "--model-repository=/mnt/models"]
    return ServeProcess(mounted, *flags[2:], "--drain-seconds=0", "--no-tune")


def healthy(server: ServeProcess, probe: dict[str, Any]) -> bool:
    """What the kubelet would make of a probe."""
    if "httpGet" in probe:
        url = f"http://{server.http}{probe['httpGet']['path']}"
        with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as answer:
            return bool(answer.status == 200)
    with grpc.insecure_channel(server.url) as channel:
        request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model's own folder, with nothing but a version and its file."""
    home = write_linear(tmp_path)
    for file in home.iterdir():
        if file.is_file():
            file.unlink()
    return home


@pytest.fixture
def pets(bare: Path) -> Iterator[ServeProcess]:
    """The server that an InferenceService `pets` starts; the runtimes differ in nothing that it is told."""
    (arguments, other) = (runtime["spec"]["containers"][0]["args"] for runtime in RUNTIMES)
    assert arguments == other
    with started(RUNTIMES[0], bare, "pets") as server:
        yield server


def test_one_model_is_served_under_the_name_of_the_inference_service(pets: ServeProcess) -> None:
    """And the probes of the runtimes and of the chart, with and without TLS there, ask what the server answers."""
    with grpc.insecure_channel(pets.url) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = pb.ModelInferRequest(model_name="pets")
        message.inputs.add(name="input", datatype="FP32", shape=[1, 4])
        message.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
        assert stub.ModelInfer(message).model_name == "pets"
    rendered = manifests.render({name: ("convoy", manifests.values(name)) for name in ("cpu", "zero")})
    objects = [*RUNTIMES, *(each for some in rendered.values() if isinstance(some, list) for each in some)]
    probes = [
        probe for pod in manifests.pods(objects) for name, probe in pod["containers"][0].items() if "Probe" in name
    ]
    assert len(probes) == 2 + 2 + 3 + 3
    for probe in probes:
        assert healthy(pets, probe), probe


def test_the_grace_of_the_example_is_that_of_the_runtime() -> None:
    (service,) = manifests.documents((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
    predictor = service["spec"]["predictor"]
    runtime = next(each for each in RUNTIMES if each["metadata"]["name"] == predictor["model"]["runtime"])
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = {each["name"] for each in runtime["spec"]["supportedModelFormats"]}
    assert predictor["model"]["modelFormat"]["name"] in formats
    flags = dict(each.partition("=")[::2] for each in runtime["spec"]["containers"][0]["args"])
    assert predictor["terminationGracePeriodSeconds"] >= int(flags["--drain-seconds"]) + 30 + 5
