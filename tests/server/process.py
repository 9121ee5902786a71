"""`convoy serve` as a process, seen from outside: its addresses, metrics, log and memory."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


class ServeProcess:
    """A running server; as a context it is ended. Its log goes to a file, so that it never waits for a reader.

    Attributes:
        url: Where its gRPC is.
        http: Where its HTTP is, host and port.
        metrics: The same of its metrics.
        process: The process that was started; others may be below it.
    """

    def __init__(self, repository: Path, *flags: str, ready_s: float = 240, **settings: str) -> None:
        command = [sys.executable, "-m", "convoynet.server.cli", "serve", "--model-repository", str(repository)]
        # As variables, since a server that lacks a setting leaves them alone.
        # Measuring engines takes seconds of each start, and is no matter of most tests.
        settings = {"grpc_port": "0", "metrics_port": "0", "http_port": "0", "tune": "false", **settings}
        environment = {**os.environ, **{f"CONVOY_{name.upper()}": text for name, text in settings.items()}}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self.process = subprocess.Popen([*command, *flags], stderr=self._log, env=environment)
        end = time.monotonic() + ready_s
        while (found := re.search(r"^READY gRPC .*$", self.log(), re.MULTILINE)) is None:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not come up:\n{self.log()}")
            time.sleep(0.05)
        self.url = re.findall(r"gRPC ([^\s,]+)", found[0])[0]
        self.http = re.findall(r"HTTP https?://([^\s,]+)", found[0])[0]
        self.metrics = re.findall(r"metrics https?://([^/]+)", found[0])[0]
        self._metrics_url = re.findall(r"metrics ([^\s,]+)", found[0])[0]

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._log.close()

    def log(self) -> str:
        """All that it has written."""
        return os.pread(self._log.fileno(), 2**28, 0).decode()

    def requests(self) -> list[dict[str, Any]]:
        """The lines of --log-requests --log-format json."""
        return [json.loads(line) for line in self.log().splitlines() if '"server.requests"' in line]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels."""
        with urllib.request.urlopen(self._metrics_url, timeout=60) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def tree(self) -> list[int]:
        """The process and all below it."""
        found = [self.process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    found += map(int, task.read_text().split())
                except OSError:
                    continue
        return found

    def engines(self) -> list[int]:
        """The engine processes; none where engines run in the server's own."""
        return [pid for pid in self.tree() if b"convoynet.server.engines" in _read(pid, "cmdline")]

    def resident_bytes(self) -> int:
        """Memory of the whole tree, what processes share counted once for each."""
        pages = sum(int((_read(pid, "statm").split() or [b"0", b"0"])[1]) for pid in self.tree())
        return pages * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port for a server that has to be told one: not of those that the system gives to who asks for any."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    fixed = [port for port in range(20_000, 65_536) if not low <= port <= high]
    while True:
        port = random.choice(fixed)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""
