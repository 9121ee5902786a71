"""Two replicas, a load balancer before them, and one client that never stops calling."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from convoynet.server.client.client import CHANNEL_OPTIONS, Client
from convoynet.server.client.load import Load
from tests.server.process import ServeProcess

FILES = Path(__file__).parents[2] / "deploy" / "load-balancing"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for it; a test that waits longer has failed."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.05)


def ready(url: str) -> bool:
    """Whether a server, or one behind a proxy, says so."""
    with Client(url, timeout=5) as client:
        return client.server_ready()


class Replica:
    """A server on one port that can be started again and again."""

    def __init__(self, models: Path, port: int) -> None:
        self._models, self.port = models, port
        self.server = self._start()

    def _start(self) -> ServeProcess:
        # Long enough for two of Envoy's health checks.
        settings = {"grpc_port": str(self.port), "threads": "1", "tune": "false", "drain_seconds": "4"}
        return ServeProcess(self._models, **settings)

    def start(self) -> None:
        """Again, on the same port; returns when it is ready."""
        self.server = self._start()

    def kill(self) -> None:
        """As a machine's end does it."""
        self.server.process.kill()
        self.terminate()

    def terminate(self) -> int:
        """As Kubernetes does it; the exit status."""
        self.server.__exit__()
        return self.server.process.wait()

    def answered(self) -> int:
        """Inferences since it started."""
        with Client(f"127.0.0.1:{self.port}", timeout=10) as client:
            return sum(row.inference_stats.success.count for row in client.statistics())


class Proxy:
    """Envoy or nginx with the files of deploy/load-balancing, on free ports; as a context it is ended."""

    def __init__(self, kind: str, program: str, folder: Path, replicas: tuple[int, int], *, tls: bool = False) -> None:
        self.port, admin, secure = free_ports(3)
        ports = {"8001": replicas[0], "8011": replicas[1], "9001": self.port, "9002": self.port}
        ports |= {"9443": secure, "9901": admin}
        if tls and kind == "nginx":
            self.port = secure
        self._folder, self._program = folder, program
        for file in FILES.glob("*"):
            text = re.sub(r"\b(8001|8011|9001|9002|9443|9901)\b", lambda m: str(ports[m[1]]), file.read_text())
            # What the README says to do with sed.
            (folder / file.name).write_text(text.replace("#tls ", "") if tls else text)
        if kind == "envoy":
            # An id of its own, since another Envoy may run on this machine.
            flags = ["-c", "envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"]
        else:
            flags = [*self._nginx(), "-g", "daemon off; pid nginx.pid; error_log stderr warn;"]
        self._log = (folder / "proxy.log").open("w")
        self._process = subprocess.Popen([program, *flags], cwd=folder, stdout=self._log, stderr=self._log)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def _nginx(self) -> list[str]:
        return ["-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]

    def mark(self, replica: Replica, *, down: bool) -> None:
        """What the README says to do before a replica behind nginx stops, and after it is ready again."""
        file = self._folder / "replicas.conf"
        old, new = (";", " down;") if down else (" down;", ";")
        lines = file.read_text().splitlines()
        file.write_text("\n".join(x.replace(old, new) if f":{replica.port} " in x else x for x in lines) + "\n")
        before = set(self.workers())
        self._process.send_signal(signal.SIGHUP)
        until(lambda: bool(self.workers()) and before.isdisjoint(self.workers()))

    def workers(self) -> list[str]:
        """nginx's worker processes."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return children.read_text().split()


class Traffic:
    """Threads that call one after the other, over one connection, until the end of the context.

    Attributes:
        answered: Calls that were answered.
        failures: What the others ended with.
    """

    def __init__(self, load: Load, callers: int = 16) -> None:
        options = (*CHANNEL_OPTIONS, ("grpc.service_config", (FILES / "client.json").read_text()))
        self._channel = grpc.insecure_channel(load.url, options=options)
        self._call = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self._payload = load.payload
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(callers)]
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._call(self._payload, timeout=30)
                self.answered += 1
            except grpc.RpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")

    def more(self, calls: int = 1000) -> None:
        """Waits until so many more are answered."""
        goal = self.answered + calls
        until(lambda: self.answered >= goal)
