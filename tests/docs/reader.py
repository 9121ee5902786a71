"""A reader who types what a page says, in a folder of their own, with one terminal for the server."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.docs.documents import Block

PORTS = (8000, 8001, 8002)
"""Those that a server takes by itself, which the pages name."""
STEP_SECONDS = 3600
_REMEMBER = "import json, os; print(json.dumps(dict(os.environ)))"
_LINE = re.compile(r"(?:[^\n]*\\\n)*[^\n]+\n?")


class Reader:
    """Runs blocks one after another; as a context its server is ended.

    Attributes:
        folder: where it works.
        environment: variables of its shell, which blocks may set.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        bare = {name: value for name, value in os.environ.items() if not name.startswith("CONVOY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        self.environment = {**bare, "PATH": path, "COLUMNS": "120", "CURL_HOME": str(folder), **environment}
        self._server: subprocess.Popen[bytes] | None = None
        self._log = folder / ".server.log"

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, block: Block) -> None:
        """Type what it holds; fail where a command does."""
        if block.language == "python":
            (self.folder / "program.py").write_text(block.text)
            self._shell("python program.py", block.place)
            return
        for command, serves in parts(block.text):
            if serves:
                self.serve(command, block.place)
            else:
                self._shell(command, block.place)

    def _shell(self, commands: str, place: str) -> None:
        told, after = self.folder / ".output", self.folder / ".environment"
        script = f"set -aeuo pipefail\n{commands}\npython -c {shlex.quote(_REMEMBER)} >{after}"
        with told.open("w+") as output:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
                timeout=STEP_SECONDS,
            )
        said = told.read_text()
        wrong = done.returncode or "Traceback (most recent call last)" in said
        assert not wrong, f"{place}: exit code {done.returncode}\n{commands}\n{said}\n{self._served()}"
        self.environment = json.loads(after.read_text())

    def serve(self, command: str, place: str) -> None:
        """Start a server in the place of the one that runs, and wait until it is ready."""
        self.stop()
        for port in PORTS:
            with socket.socket() as mine:
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    mine.bind(("127.0.0.1", port))
                except OSError:
                    raise AssertionError(f"{place}: port {port} is taken by another program; end that first") from None
        words = shlex.split(command, comments=True)
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                words, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + STEP_SECONDS
        while not re.search(r"^READY gRPC ", self._served(), re.MULTILINE):
            assert self._server.poll() is None, f"{place}: it ended\n{command}\n{self._served()}"
            assert time.monotonic() < end, f"{place}: it is not ready\n{command}\n{self._served()}"
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server as Ctrl-C does; it must end well."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.terminate()
        try:
            code = server.wait(120)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            raise
        assert code == 0, self._served()

    def _served(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def parts(script: str) -> Iterator[tuple[str, bool]]:
    """The script in parts, and whether a part starts a server, which takes a terminal of its own."""
    waiting = ""
    for line in _LINE.findall(script):
        if line.startswith("convoy serve ") and "--print-config" not in line:
            if waiting.strip():
                yield waiting, False
            waiting = ""
            yield line, True
        else:
            waiting += line
    if waiting.strip():
        yield waiting, False
