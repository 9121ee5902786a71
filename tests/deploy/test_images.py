"""deploy/docker: the CPU server's image as a user of it would run it, and what linters say."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from convoynet.server.client.client import Client
from tests.deploy.balancing import free_ports, ready, until
from tests.deploy.images import ROOT, limits, podman
from tests.server.process import ServeProcess

pytestmark = pytest.mark.deploy

LIMIT_BYTES = 500_000_000
# What checkov would have and these images do not do, with the reason.
EXCEPTIONS = {"CKV_DOCKER_7": "the base is pinned by version in ARG BASE_IMAGE, through which checkov does not see"}


@pytest.fixture(scope="module")
def container(tool: Callable[[str], str], cpu_image: str, lenet5: Path) -> Iterator[tuple[str, int]]:
    """A running server with nothing that it does not need: its name, and the port of gRPC on the host."""
    program, name = tool("podman"), "convoy-test-images"
    grpc_port, http_port, metrics_port = free_ports(3)
    # Restricted, as Kubernetes calls it. podman's health checks want systemd: it is asked by hand below.
    flags = ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--no-healthcheck", *limits()]
    flags += [f"--volume={lenet5}:/models:ro", f"--name={name}", "--detach", "--env=CONVOY_TUNE=false"]
    ports = [f"--grpc-port={grpc_port}", f"--http-port={http_port}", f"--metrics-port={metrics_port}"]
    subprocess.run([program, "rm", "--force", name], check=False, capture_output=True)
    subprocess.run([*podman(program), "run", *flags, cpu_image, "serve", *ports], check=True)
    try:
        until(lambda: ready(f"127.0.0.1:{grpc_port}"), 120)
        yield name, grpc_port
    finally:
        subprocess.run([program, "rm", "--force", name], check=False, capture_output=True)


def test_its_size(tool: Callable[[str], str], cpu_image: str) -> None:
    answer = subprocess.run([tool("podman"), "image", "inspect", cpu_image], check=True, capture_output=True)
    (image,) = json.loads(answer.stdout)
    print(f"convoy:cpu is {image['Size'] / 1e6:.0f} MB")
    assert image["Size"] < LIMIT_BYTES
    assert image["Config"]["User"] == "10001:10001"
    assert image["Labels"]["org.opencontainers.image.title"] == "Convoy"
    assert image["Healthcheck"]["Test"][0] == "CMD"


def test_nothing_of_the_build_or_of_training_is_left(tool: Callable[[str], str], cpu_image: str) -> None:
    script = (
        "from importlib.util import find_spec; from pathlib import Path; "
        "print([m for m in ('torch', 'onnx', 'pip') if find_spec(m)], "
        "[p for p in ('/etc/pip.conf', '/run/secrets/ca_bundle', '/src') if Path(p).exists()])"
    )
    run = [*podman(tool("podman")), "run", "--rm", "--no-healthcheck", *limits(), "--entrypoint=python3", cpu_image]
    answer = subprocess.run([*run, "-c", script], check=True, capture_output=True, text=True)
    assert answer.stdout.split("\n")[0] == "[] []"


def test_it_serves_restricted_and_ends_with_0(tool: Callable[[str], str], container: tuple[str, int]) -> None:
    program, (name, port) = tool("podman"), container
    with Client(f"127.0.0.1:{port}", timeout=30) as client:
        (x,) = client.model_metadata("lenet5").inputs
        shape = [1, *x.shape[1:]]
        (answer,) = client.infer(
            "lenet5", {x.name: np.zeros(shape, np.uint8 if x.datatype == "UINT8" else "f4")}
        ).values()
    assert answer.shape == (1, 10)

    def inside(*command: str) -> str:
        run = subprocess.run([program, "exec", name, *command], check=False, capture_output=True, text=True)
        return run.stdout + run.stderr

    assert inside("id", "-u") == "10001\n"
    assert "Read-only file system" in inside("touch", "/opt/convoy/x")
    status = inside("cat", "/proc/1/status")
    assert [line.split()[1] for line in status.splitlines() if line.startswith("Cap")] == ["0" * 16] * 5
    assert "NoNewPrivs:\t1" in status
    log = subprocess.run([program, "logs", name], check=True, capture_output=True, text=True).stderr
    # OpenVINO, the default, was not stripped to death: it was tried, and answers as the other one does.
    assert "compared: as ONNX Runtime" in log

    begun = time.monotonic()
    subprocess.run([program, "stop", "--time=30", name], check=True, capture_output=True)
    code = subprocess.run([program, "wait", name], check=True, capture_output=True, text=True).stdout
    print(f"it ended {time.monotonic() - begun:.1f} s after SIGTERM")
    assert code == "0\n"


def test_its_health_check(tool: Callable[[str], str], cpu_image: str, lenet5: Path) -> None:
    """As the image states it, on the ports that the image has: says no before the server is ready, and then yes."""
    answer = subprocess.run([tool("podman"), "image", "inspect", cpu_image], check=True, capture_output=True)
    command = json.loads(answer.stdout)[0]["Healthcheck"]["Test"][1:]
    assert command[:2] == ["python3", "-c"]
    (port,) = free_ports(1)
    check = ["python3", "-c", command[2].replace("8000", str(port))]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 1
    with ServeProcess(lenet5, http_port=str(port), tune="false"):
        assert subprocess.run(check, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("file", sorted((ROOT / "deploy" / "docker").glob("*Dockerfile")), ids=lambda p: p.name)
def test_hadolint_finds_nothing(file: Path, tool: Callable[[str], str]) -> None:
    run = subprocess.run([tool("hadolint"), str(file)], check=False, capture_output=True, text=True)
    assert run.stdout + run.stderr == ""


def test_checkov_finds_nothing_else(tool: Callable[[str], str]) -> None:
    command = [tool("checkov"), "--framework", "dockerfile", "--output", "json", "--quiet", "--compact", "--soft-fail"]
    command.append("--skip-download")  # of texts about its rules, from a host that not everybody reaches
    files = [str(p) for p in sorted((ROOT / "deploy" / "docker").glob("*Dockerfile"))]
    run = subprocess.run([*command, "--file", *files], check=False, capture_output=True, text=True)
    report = json.loads(run.stdout)
    assert report["summary"]["passed"] > 0, run.stderr
    failed = {check["check_id"]: check["check_name"] for check in report["results"]["failed_checks"]}
    assert failed.keys() == EXCEPTIONS.keys(), failed
