"""The public client package in an environment of its own, as its users have it."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = REPOSITORY / ".venv-clients"
PACKAGE, VERSION = "tritonclient", "2.73.0"
_PYTHON = ENVIRONMENT / "bin" / "python"
NO_NETWORK = re.compile(
    "error sending request|failed to fetch|dns error|connection refused|failed to establish|timed out|"
    "could not connect|temporary failure in name resolution|network request|ENOTFOUND|EAI_AGAIN",
    re.IGNORECASE,
)

Script = Callable[..., str]


@pytest.fixture(scope="session")
def client_script() -> Script:
    """Runs a script (of this folder, or a path) where tritonclient is installed; returns what it prints."""
    with (REPOSITORY / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other processes of this run want it as well
        if _installed() != VERSION:
            _install()

    def run(script: str, *arguments: str) -> str:
        command = [str(_PYTHON), str(Path(__file__).parent / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _installed() -> str:
    """The version in the cached environment; "" where there is none or it is broken."""
    if not _PYTHON.exists():
        return ""
    code = f"import tritonclient.grpc, tritonclient.http, importlib.metadata as m; print(m.version('{PACKAGE}'))"
    done = subprocess.run([str(_PYTHON), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _install() -> None:
    uv = Path(sys.executable).with_name("uv")
    requirement = f"{PACKAGE}[grpc,http]=={VERSION}"
    if uv.exists():
        commands = [
            [str(uv), "venv", "--clear", "--python", sys.executable, str(ENVIRONMENT)],
            [str(uv), "pip", "install", "--python", str(_PYTHON), requirement],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
            [str(_PYTHON), "-m", "pip", "install", "--quiet", requirement],
        ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        if done.returncode and NO_NETWORK.search(done.stderr):
            pytest.skip(f"{requirement} cannot be installed without a network")
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
