"""A server as a part of a program: `convoynet.serve`."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from convoynet.errors import ConvoyError
from convoynet.server import settings
from convoynet.server.client.client import Client
from convoynet.server.config import ServeConfig
from convoynet.server.host import package_environment
from convoynet.server.repository.lone_files import split
from convoynet.server.supervision import processes

_LINES = 1000
_END_SECONDS = 60.0
_READY = "READY "


class NotStarted(ConvoyError):
    """A server that did not come up, and why."""


class Server:
    """A server in a process of its own, which ends with this one, whatever ends it. Made by `serve`.

    Attributes:
        url: HOST:PORT of gRPC, as `Client` takes it.
        http_url: address of HTTP; "" for none.
        metrics_url: address of the metrics.
        pid: of the process.
    """

    def __init__(self, config: ServeConfig, ready_seconds: float) -> None:
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._up = threading.Event()
        self._tls = config.tls_cert is not None
        self.url = self.http_url = self.metrics_url = ""
        with tempfile.TemporaryDirectory(prefix="convoy-") as folder:
            file = Path(folder) / "server.toml"
            file.write_text(settings.as_toml(config), encoding="utf-8")
            started: list[subprocess.Popen[str]] = []
            # The system ends the process with the thread that starts it: this one lives as long as the process.
            threading.Thread(target=self._run, args=[file, started], name="convoy-serve", daemon=True).start()
            up = self._up.wait(ready_seconds)
        if not self.url:
            if started:
                _end(started[0], os.getpid())
            what = next((line for line in reversed(self._lines) if line.startswith("convoy serve: ")), "")
            why = what.removeprefix("convoy serve: ") or (self._lines[-1] if self._lines else "it said nothing")
            limit = "" if up else f"it was not ready within {ready_seconds:g} s; "
            raise NotStarted(f"the server did not start: {limit}{why}")
        self.pid = started[0].pid
        self._finalizer = weakref.finalize(self, _end, started[0], os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def client(self, **options: Any) -> Client:
        """A client of this server; `options` are those of `Client`, which speaks TLS where the server does."""
        return Client(self.url, **{"tls": self._tls, **options})

    def log(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self._lines)

    def close(self) -> None:
        """Answer what was asked, and end the server; kill it where that takes longer than a minute."""
        self._finalizer()

    def _run(self, file: Path, started: list[subprocess.Popen[str]]) -> None:
        try:
            process = subprocess.Popen(  # noqa: S603 - this interpreter, with our own module
                processes.command("convoynet.server.cli", "serve", "--config", str(file)),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
            )
        except OSError as error:
            self._lines.append(f"the system gives no process: {error.strerror}")
            self._up.set()
            return
        started.append(process)
        assert process.stderr is not None
        with process.stderr as written:
            self._read(written)
        self._up.set()
        process.wait()

    def _read(self, written: IO[str]) -> None:
        for line in written:
            self._lines.append(line.rstrip("\n"))
            if line.startswith(_READY) and not self.url:
                self._note(line)
                self._up.set()

    def _note(self, line: str) -> None:
        """Take the addresses of the line that says that the server is ready."""
        parts = line.removeprefix(_READY).split(", ")
        told = dict(part.split(" ", 1) for part in parts if " " in part)
        self.http_url, self.metrics_url = told.get("HTTP", ""), told.get("metrics", "")
        self.url = told["gRPC"]


def serve(
    model_repository: str | Path | Sequence[str | Path], *, ready_seconds: float = 300.0, **options: Any
) -> Server:
    """Start a server and wait until it is ready.

        with convoynet.serve("models") as server, server.client() as client:
            client.classify("lenet5", ["seven.png"])

    Args:
        model_repository: as `convoy serve` takes it: a folder of models, an ONNX file, a folder of such files, the URL
            of a repository; or several of them.
        ready_seconds: how long to wait until the models are loaded.
        options: the other settings of `convoy serve`, by their names (docs/operations.md), such as `threads=1` or
            `latency_slo=0.25`. Ports are free ones unless they are given, and variables CONVOY_* have no effect.

    Returns:
        The server; as a context it is stopped at the end.

    Raises:
        NotStarted: a setting is none, or the server did not come up; the message has its own reason.
    """
    several = [model_repository] if isinstance(model_repository, str | Path) else list(model_repository)
    ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
    try:
        repositories, files = split([str(each) for each in several])
        named = {"model_repository": repositories, "onnx": files}
        config = settings.of_options({**named, **ports, **options})
    except (ValueError, OSError) as error:
        raise NotStarted(str(error)) from error
    return Server(config, ready_seconds)


def _environment() -> dict[str, str]:
    """This process's, without variables that are settings."""
    taken = {f"{settings.ENVIRONMENT_PREFIX}{each.name.upper()}" for each in fields(ServeConfig)}
    return {name: value for name, value in package_environment().items() if name not in taken | {"CONVOY_CONFIG"}}


def _end(process: subprocess.Popen[str], owner: int) -> None:
    """End a server, also one that does not want to; a fork of the program that owns it has no say."""
    if os.getpid() != owner:
        return
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
