"""The Deployment of the overlay dev as a pod of Podman, which reads Kubernetes' manifests.

Podman 4.3 honours the user, the read-only root file system, dropped capabilities, no new privileges, seccomp, the
ConfigMap, hostPath, arguments and limits. It ignores gRPC probes, preStop, terminationGracePeriodSeconds, fsGroup,
topology spread and the service account; so the test asks the probes' questions itself and stops the container with
the pod's grace period. Adapted for it: the folder of the models; no `ports` of the container, which it refuses beside
the host's network; free ports.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.protos.inference import grpc_service_pb2_grpc
from tests.deploy import manifests
from tests.deploy.manifests import DEPLOY, Object
from tests.server.onnx_models import write_linear

pytestmark = pytest.mark.deploy

IMAGE = "localhost/convoy:cpu"
# A container may not raise limits above those of whoever starts it, as Podman's own defaults would.
CONTAINERS = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'


class Podman:
    """The command, with settings of the test's own."""

    def __init__(self, path: str, settings: Path) -> None:
        settings.write_text(CONTAINERS)
        self._command = [path, "--runtime", "runc"]
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CONTAINERS_CONF": str(settings)}

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Its output; it must succeed, unless that does not matter."""
        done = subprocess.run(
            [*self._command, *arguments],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0 or not check, f"podman {' '.join(arguments)}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def podman(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """Podman with the image."""
    for needed in ("runc", "catatonit"):
        tool(needed)
    podman = Podman(tool("podman"), tmp_path_factory.mktemp("podman") / "containers.conf")
    if not podman("images", "--quiet", IMAGE):
        pytest.skip(f"there is no image {IMAGE}: make image")
    return podman


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    """A free one for each."""
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for each in (a, b, c):
            each.bind(("127.0.0.1", 0))
        return {name: s.getsockname()[1] for name, s in (("grpc", a), ("http", b), ("metrics", c))}


@pytest.fixture(scope="module")
def pod_spec() -> Object:
    """The pod of the overlay dev as it is."""
    return next(manifests.pods(manifests.kustomize(DEPLOY / "kustomize" / "overlays" / "dev")))


@pytest.fixture(scope="module")
def container(podman: Podman, ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the server's container, which runs."""
    folder = tmp_path_factory.mktemp("play")
    models = folder / "models"
    write_linear(models)
    for path in (models, *models.rglob("*")):  # the container's user is another one
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in folder.parents:
        if parent.owner() == folder.owner() and parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o755)
    folder.chmod(0o755)
    objects = manifests.kustomize(DEPLOY / "kustomize" / "overlays" / "dev")
    config, deployment = (manifests.of_kind(objects, kind) for kind in ("ConfigMap", "Deployment"))
    (pod,) = manifests.pods([deployment])
    next(volume for volume in pod["volumes"] if "hostPath" in volume)["hostPath"]["path"] = str(models)
    pod["containers"][0].pop("ports")
    pod["containers"][0]["args"] += [f"--{name}-port={port}" for name, port in ports.items()]
    file = folder / "kube.yaml"
    file.write_text(yaml.safe_dump_all([config, deployment]))
    try:
        podman("play", "kube", "--network", "host", str(file))
        yield "convoy-pod-0-convoy"
    finally:
        podman("play", "kube", "--down", str(file), check=False)
        podman("volume", "rm", "--force", config["metadata"]["name"], check=False)


def test_the_pod_serves_and_ends_within_its_grace(
    podman: Podman, container: str, ports: dict[str, int], pod_spec: Object
) -> None:
    probes = [pod_spec["containers"][0][name]["grpc"]["service"] for name in ("livenessProbe", "readinessProbe")]
    with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
        health = health_pb2_grpc.HealthStub(channel)
        while not all(
            health.Check(health_pb2.HealthCheckRequest(service=service)).status
            == health_pb2.HealthCheckResponse.SERVING
            for service in probes
        ):
            time.sleep(0.1)  # the model loads; the test's time limit is the only one
        message = pb.ModelInferRequest(model_name="linear")
        message.inputs.add(name="input", datatype="FP32", shape=[1, 4])
        message.raw_input_contents.append(np.ones((1, 4), np.float32).tobytes())
        answer = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message)
        assert answer.outputs[0].shape == [1, 3]

    (state,) = json.loads(podman("inspect", container))
    _restricted(state)
    podman("stop", "--time", str(pod_spec["terminationGracePeriodSeconds"]), container)
    (state,) = json.loads(podman("inspect", container))
    assert state["State"]["ExitCode"] == 0, podman("logs", container)


def _restricted(state: dict[str, Any]) -> None:
    """What the kernel says of the running server."""
    status = Path(f"/proc/{state['State']['Pid']}/status").read_text()
    said = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert said["Uid"].split() == ["10001"] * 4
    assert int(said["CapBnd"], 16) == int(said["CapEff"], 16) == 0
    assert said["NoNewPrivs"] == "1"
    assert said["Seccomp"] == "2"
    assert state["HostConfig"]["ReadonlyRootfs"] is True
    assert state["HostConfig"]["Memory"] == 2 * 2**30
