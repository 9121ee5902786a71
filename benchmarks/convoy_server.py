"""`convoy serve` as a process, for the other benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"
CONVOY = str(Path(sys.executable).with_name("convoy"))
_START_SECONDS = 300


@dataclass(frozen=True)
class Address:
    """A server that is ready: its process, and where its gRPC is."""

    process: subprocess.Popen[str]
    url: str


@contextmanager
def convoy(repository: Path, *flags: str, cores: Sequence[int] = (), source: Path = SRC) -> Iterator[Address]:
    """Serves a repository on free ports, on these cores alone; ends the server afterwards.

    Args:
        repository: The models.
        flags: Further ones of `convoy serve`.
        cores: Those that it may use; all where none is named.
        source: The folder src/ that the server is from: this checkout's, or another's.

    Raises:
        SystemExit: It did not start; the message is its log.
    """
    # By the module: on a GPU machine without internet the project is no installed package (gpu_bundle.py).
    command = [sys.executable, "-m", "convoynet.server.cli", "serve", "--model-repository", str(repository)]
    command += ["--grpc-port", "0", "--metrics-port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        environment = {**from_source(source), "CONVOY_HTTP_PORT": "0"}
        process = subprocess.Popen(pinned(cores, [*command, *flags]), stderr=log, text=True, env=environment)
        try:
            yield Address(process, _url(process, log.fileno()))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def from_source(source: Path) -> dict[str, str]:
    """The environment of a process that imports the package from a folder src/."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))}


def _url(process: subprocess.Popen[str], log: int) -> str:
    end = time.monotonic() + _START_SECONDS
    while (ready := re.search(r"(?m)^READY gRPC ([^\s,]+)", text := os.pread(log, 2**20, 0).decode())) is None:
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the server did not start: {text}")
        time.sleep(0.1)
    return ready[1]


def pinned(cores: Sequence[int], command: list[str]) -> list[str]:
    """The command that runs a command on these cores alone; on every core where none is named."""
    return ["taskset", "--cpu-list", ",".join(map(str, cores)), *command] if cores else command
