"""The server that torture.py torments, as the system sees it: its processes, descriptors, memory and leftovers."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from convoynet.server.supervision import processes

MEMORY = Path("/dev/shm")  # noqa: S108 - where the segments of shared memory are
_MARK = "TORTURE_ID"
_OF_RUNTIMES = {".ses"}
"""Written once by ONNX Runtime, and used again by the next process."""
_CONFIG = (
    'backend: "{backend}" max_batch_size: 4 dynamic_batching {{ }} instance_group {{ count: 1 kind: KIND_CPU }}\n'
    'input {{ name: "x" data_type: TYPE_FP32 dims: [4] }} output {{ name: "y" data_type: TYPE_FP32 dims: [1] }}\n'
)
CONFIG_JSON = {
    "backend": "fake",
    "max_batch_size": 4,
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
    "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [1]}],
}


def write_models(root: Path) -> None:
    """Three models that add up their rows: an ONNX graph, an engine of 2 ms and one of 50 ms."""
    ones = numpy_helper.from_array(np.ones((4, 1), np.float32), "ones")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", d]) for n, d in (("x", 4), ("y", 1)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "ones"], ["y"])], "linear", [x], [y], [ones])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    _write(root / "linear", "model.onnx", model.SerializeToString(), "onnxruntime")
    write_fake(root, "quick", 0.002)
    write_fake(root, "slow", 0.05)


def write_fake(root: Path, name: str, seconds: float) -> None:
    """A model whose engine takes so long for a batch."""
    _write(root / name, "model.json", json.dumps({"seconds": seconds}).encode(), "fake")


def _write(folder: Path, name: str, content: bytes, backend: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / name).write_bytes(content)
    (folder / "config.pbtxt").write_text(_CONFIG.format(backend=backend))


class Server:
    """One `convoy serve`.

    Attributes:
        temporary: The folder that it has for temporary files.
        grpc, http: Where it listens.
        log: The last lines that it wrote.
    """

    def __init__(self, folder: Path, repositories: list[str], *flags: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._segments = _segments()
        self._id = secrets.token_hex(8)
        named = [part for repository in repositories for part in ("--model-repository", repository)]
        ports = [part for port in ("grpc", "http", "metrics") for part in (f"--{port}-port", "0")]
        environment = {**os.environ, _MARK: self._id, "TMPDIR": str(self.temporary), "HOME": str(folder)}
        # A pipe: a limit on the size of files is no limit for it.
        self.process = subprocess.Popen(
            processes.command("convoynet.server.cli", "serve", *named, *ports, *flags),  # ends with the campaign
            stderr=subprocess.PIPE,
            env=environment,
        )
        self.log: deque[str] = deque(maxlen=4000)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        ready = self._ready_line(120)
        self.grpc = re.findall(r"gRPC ([^\s,]+)", ready)[0]
        self.http = re.findall(r"HTTP http://([^\s,]+)", ready)[0]

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.log.append(line.decode(errors="replace").rstrip())

    def _ready_line(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if found := next((line for line in list(self.log) if line.startswith("READY gRPC")), ""):
                return found
            time.sleep(0.1)
        self.process.kill()
        raise SystemExit("the server did not start:\n" + "\n".join(self.log))

    def engines(self) -> list[int]:
        """The processes of engines."""
        return [pid for pid in self.processes() if b"convoynet.server.engines.child" in read(pid, "cmdline")]

    def fronts(self) -> list[int]:
        """The processes of front ends."""
        return [pid for pid in self.processes() if b"convoynet.server.frontend\0" in read(pid, "cmdline")]

    def processes(self) -> list[int]:
        """Every process that carries this server's mark, however it came to be; the server's own included."""
        mark = f"{_MARK}={self._id}".encode()
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [pid for pid in pids if mark in read(pid, "environ").split(b"\0") and state(pid) not in "ZX"]

    def descriptors(self) -> int:
        """How many the server's own process has."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Bytes that the server's own process and its front ends have for themselves."""
        pids = [self.process.pid, *self.fronts()]
        found = [re.search(rb"RssAnon:\s+(\d+)", read(pid, "status")) for pid in pids]
        return sum(int(one[1]) * 1024 for one in found if one)

    def leftovers(self) -> list[str]:
        """Shared memory that was not there before, and temporary files."""
        files = [f"{path.name} in TMPDIR" for path in self.temporary.iterdir() if path.name not in _OF_RUNTIMES]
        return [*(f"segment {name}" for name in sorted(_segments() - self._segments)), *files]

    def end(self) -> list[str]:
        """Ends it; what is wrong with how it ended."""
        self.process.send_signal(signal.SIGTERM)
        wrong = []
        try:
            if status := self.process.wait(90):
                wrong.append(f"SIGTERM: exit status {status}")
        except subprocess.TimeoutExpired:
            wrong.append("SIGTERM: it does not end within 90 s")
        wrong += [f"left behind: {self._name(pid)}" for pid in self.processes() if pid != self.process.pid]
        for pid in self.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return wrong + [f"left behind: {what}" for what in self.leftovers()]

    def _name(self, pid: int) -> str:
        return f"process {pid} {read(pid, 'cmdline').replace(bytes(1), b' ').decode(errors='replace')[:120]}"


def read(pid: int, name: str) -> bytes:
    """A file of /proc; nothing where the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def state(pid: int) -> str:
    """A letter; X where the process has ended."""
    return (read(pid, "stat").rpartition(b")")[2].split() or [b"X"])[0].decode()


def _segments() -> set[str]:
    """Of the campaign's clients and of the server; other programs have theirs."""
    return {
        path.name for path in MEMORY.iterdir() if path.name.startswith(("torture-", "convoy inputs", "convoy outputs"))
    }
