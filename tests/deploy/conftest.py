"""Where the tests of deploy/ find the tools that are not Python packages of the project."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy import images

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "build" / "deploy-tools" / "bin"


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """`tool("promtool")`: its path, from `make deploy-tools` or the system; the test skips where there is none."""

    def find(name: str) -> str:
        path = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed: make deploy-tools, or the Debian packages that .ci/run names")
        return path

    return find


@pytest.fixture(scope="session")
def lenet5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the shipped LeNet-5."""
    folder = tmp_path_factory.mktemp("models")
    convoy = [
        sys.executable,
        "-m",
        "convoynet.server.cli",
        "export",
        "--arch",
        "lenet5",
        "--model-repository",
        str(folder),
    ]
    subprocess.run(convoy, check=True, capture_output=True)
    folder.chmod(0o755)  # another user reads it in a container
    return folder


@pytest.fixture(scope="session")
def cpu_image(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the CPU server's image, built from this working tree."""
    program = tool("podman")
    base = images.base_image(program)
    if base is None:
        pytest.skip("no base image: name one in CONVOY_BASE_IMAGE, or be root and have mmdebstrap")
    return images.build(program, base, tmp_path_factory.mktemp("build"))
