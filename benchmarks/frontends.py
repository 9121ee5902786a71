"""What a gRPC front end costs: requests/s and CPU time a request of empty handlers and of Convoy, side by side.

    python benchmarks/frontends.py                              every case, 5 rounds
    python benchmarks/frontends.py --cases grpcio-empty convoy convoy-2 --rounds 9 --save
    python benchmarks/frontends.py --before OTHER/src           each case beside another checkout's
    python benchmarks/frontends.py --kilobytes 150              with larger requests

Every server runs from the start; each round loads them one after the other, so that a machine that slows down slows
all of them; with --before each case's two in turn, every second round the other way round. Ratios are taken within a
round and the median is given. The request is a tiny network's: 4 KB in, or as many as are asked for, 40
bytes out. The load is h2load's (Debian: nghttp2-client), which costs next to nothing; without it, or with --client
grpcio, a Python client's, which halves what it measures, but sends large messages in long frames.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop
from convoy_server import SRC, convoy, from_source
from grpc import aio

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.frontend.local import LocalFrontEnd, Manner
from convoynet.server.frontend.session import Answers
from convoynet.server.protocol.dispatch import Dispatcher, Reply
from convoynet.server.types import Call

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CASES = {
    "grpcio-empty": "grpcio's asyncio server on uvloop, a handler that returns fixed bytes",
    "grpcio-threads": "grpcio's thread-pool server, the same handler",
    "empty": "Convoy's HTTP/2, the same answer at once",
    "inline": "with dispatcher, service and codec, over a model that answers at once",
    "convoy": "the whole of `convoy serve --frontends 1`, an engine that adds up a row",
    "convoy-2": "the same with --frontends 2",
    "convoy-tls": "the first with TLS",
    "grpcio-inline": "as inline, behind grpcio",
    "grpcio-convoy": "`convoy serve --grpc-stack grpcio --frontends 1`",
    "grpcio-convoy-2": "the same with --frontends 2",
}
BARE = ("grpcio-empty", "grpcio-threads", "empty", "grpcio-inline")
"""Those that have nothing to be compared with in another checkout."""
CONFIG = """backend: "fake" max_batch_size: 32 dynamic_batching { }
input { name: "x" data_type: TYPE_FP32 dims: [-1] } output { name: "y" data_type: TYPE_FP32 dims: [10] }
"""


@dataclass
class Figures:
    """One case: a value a round. With --before `faster` and `cheaper` are its ratios to the other checkout's server."""

    requests_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    faster: list[float] = field(default_factory=list)
    cheaper: list[float] = field(default_factory=list)
    before: Figures | None = None

    def add(self, requests_per_s: float, cpu_ms: float) -> None:
        """A round."""
        self.requests_per_s.append(requests_per_s)
        self.cpu_ms.append(cpu_ms)

    def compare(self, mark: Figures) -> None:
        """Takes the ratios of the round that was added last."""
        self.ratio.append(self.requests_per_s[-1] / mark.requests_per_s[-1])
        if self.before is not None:
            self.faster.append(self.requests_per_s[-1] / self.before.requests_per_s[-1])
            self.cheaper.append(self.cpu_ms[-1] / self.before.cpu_ms[-1])


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="the first is the mark")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--kilobytes", type=int, default=4, help="of the tensor in a request (default: 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument(
        "--client", choices=["h2load", "grpcio"], default="h2load" if shutil.which("h2load") else "grpcio"
    )
    parser.add_argument("--before", type=Path, metavar="SRC", help="the folder src/ of another checkout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/frontends-<cores>-cores.json")
    parser.add_argument("--serve", choices=[case for case in CASES if "convoy" not in case], help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve == "grpcio-threads":
        serve_threads()
    elif arguments.serve:
        uvloop.run(serve_on_a_loop(arguments.serve))
    elif arguments.load:
        print(uvloop.run(python_load(arguments.load, arguments)))
    else:
        report(measure(arguments), arguments)


def request(kilobytes: int) -> bytes:
    """A ModelInfer request with so much input, serialized."""
    message = pb.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="x", datatype="FP32", shape=[1, kilobytes * 256])
    message.outputs.add(name="y")
    message.raw_input_contents.append(np.arange(kilobytes * 256, dtype=np.float32).tobytes())
    return message.SerializeToString()


def answer() -> bytes:
    """The answer to it."""
    message = pb.ModelInferResponse(model_name="tiny", model_version="1")
    message.outputs.add(name="y", datatype="FP32", shape=[1, 10])
    message.raw_output_contents.append(np.zeros(10, np.float32).tobytes())
    return message.SerializeToString()


def measure(arguments: argparse.Namespace) -> dict[str, Figures]:
    """Starts every server, loads them in turn, stops them."""
    beside = arguments.before is not None
    figures = {case: Figures(before=Figures() if beside and case not in BARE else None) for case in arguments.cases}
    with tempfile.TemporaryDirectory(prefix="convoy-bench-") as made:
        folder = Path(made, "models")
        version = folder / "tiny" / "1"
        version.mkdir(parents=True)
        (version / "model.json").write_text("{}")
        (version.parent / "config.pbtxt").write_text(CONFIG)
        signing = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        subprocess.run([*signing, "-keyout", "key", "-out", "cert"], cwd=made, check=True, capture_output=True)
        body = Path(made, "body")
        asked = request(arguments.kilobytes)
        body.write_bytes(b"\0" + struct.pack(">I", len(asked)) + asked)
        with ExitStack() as stack:
            servers = []
            for case, found in figures.items():
                for figure, source in (found.before, arguments.before), (found, SRC):
                    if figure is not None:
                        servers.append((figure, *stack.enter_context(serving(case, folder, source.resolve()))))
            for number in range(arguments.rounds):
                for figure, pid, url in servers if number % 2 == 0 else reversed(servers):
                    used = cpu_seconds(pid)
                    rate = load(url, body, arguments)
                    figure.add(rate, (cpu_seconds(pid) - used) * 1000 / (rate * arguments.seconds))
                for found in figures.values():
                    found.compare(figures[arguments.cases[0]])
    return figures


@contextmanager
def serving(case: str, models: Path, source: Path) -> Iterator[tuple[int, str]]:
    """A server's process and its address, once it answers."""
    if "convoy" in case:
        frontends = "2" if case.endswith("-2") else "1"
        flags = ["--log-level", "error", "--frontends", frontends]
        if source == SRC:
            flags += ["--grpc-stack", "grpcio" if case.startswith("grpcio") else "native"]
        if case.endswith("-tls"):
            flags += ["--tls-cert", str(models.parent / "cert"), "--tls-key", str(models.parent / "key")]
        with convoy(models, *flags, source=source) as server:
            yield server.process.pid, f"https://{server.url}" if case.endswith("-tls") else server.url
        return
    script = str(source.parent / "benchmarks" / Path(__file__).name)
    command, environment = [sys.executable, script, "--serve", case], from_source(source)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline() if process.stderr else ""
        if (found := re.search(r"gRPC (\S+?)(,|$)", line)) is None:
            raise SystemExit(f"the server of {case} did not start")
        yield process.pid, found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def load(url: str, body: Path, arguments: argparse.Namespace) -> float:
    """Requests per second that were answered in full."""
    seconds, in_flight = arguments.seconds, arguments.in_flight
    if arguments.client == "grpcio":
        command = [sys.executable, __file__, "--load", url, "--in-flight", str(in_flight), "--seconds", str(seconds)]
        command += ["--kilobytes", str(arguments.kilobytes)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    connections = min(in_flight, 8)
    command = [
        "h2load",
        "-t1",
        f"-c{connections}",
        f"-m{in_flight // connections}",
        f"-D{round(seconds)}",
        "-d",
        str(body),
    ]
    whole = url if "://" in url else f"http://{url}"
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"{whole}{METHOD}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    done = re.search(r"finished in .*?, ([\d.]+) req/s", text)
    data, count = re.search(r"\((\d+)\) data", text), re.search(r"(\d+) succeeded", text)
    if done is None or data is None or count is None:
        raise SystemExit(f"h2load said: {text}")
    # It does not look at grpc-status: an answer that is an error has no body.
    full = int(data[1]) / (len(answer()) + 5)
    if full < 0.99 * int(count[1]):
        raise SystemExit(f"{count[1]} answers, but the data of {full:.0f}")
    return float(done[1])


async def python_load(url: str, arguments: argparse.Namespace) -> float:
    """The same with grpcio's client, at a third of the speed."""
    end, count = time.perf_counter() + arguments.seconds, 0

    async def client(call: Any) -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call(body)
            count += 1

    body = request(arguments.kilobytes)
    async with aio.insecure_channel(url) as channel:
        await asyncio.gather(*(client(channel.unary_unary(METHOD)) for _ in range(arguments.in_flight)))
    return count / arguments.seconds


def cpu_seconds(root: int) -> float:
    """CPU time of a process and of all that descend from it."""
    total, left = 0.0, [root]
    while left:
        folder = Path(f"/proc/{left.pop()}")
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for thread in (folder / "task").iterdir():
            left += map(int, (thread / "children").read_text().split())
    return total


async def serve_on_a_loop(case: str) -> None:
    """The asyncio cases: an empty handler, or Convoy's own over a model that answers at once."""
    if case == "grpcio-empty":
        await serve_grpcio()
        return
    answers: Answers = inline() if "inline" in case else Empty()
    front = LocalFrontEnd(answers, Manner(grpcio=case.startswith("grpcio")))
    port = await front.start("127.0.0.1", 0)
    sys.stderr.write(f"gRPC 127.0.0.1:{port}\n")
    await asyncio.Event().wait()


async def serve_grpcio() -> None:
    """Grpcio's own server with a handler that does nothing."""
    fixed = answer()

    async def empty(payload: bytes, context: Any) -> bytes:
        return fixed

    methods = {"ModelInfer": grpc.unary_unary_rpc_method_handler(empty)}
    server = aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stderr.write(f"gRPC 127.0.0.1:{port}\n")
    await server.wait_for_termination()


class Empty:
    """What answers every call with the same bytes."""

    def __init__(self) -> None:
        self._reply = Reply(grpc.StatusCode.OK, answer())

    def refused(self, rpc: str, call: Call) -> Reply | None:
        """Nobody is."""
        return None

    def refusal(self, error: Exception) -> Reply:
        """Nothing is refused here."""
        return Reply(grpc.StatusCode.INTERNAL, message=str(error))

    def over(self, rpc: str, call: Call) -> None:
        """Nothing is counted."""

    async def unary(self, rpc: str, payload: bytes | memoryview, call: Call) -> Reply:
        """The answer."""
        return self._reply

    async def stream(self, rpc: str, payloads: AsyncIterator[bytes], call: Call) -> AsyncGenerator[Reply, None]:
        """The answer to each."""
        async for _ in payloads:
            yield self._reply


def inline() -> Dispatcher:
    """Convoy's dispatcher over a core whose one model answers zeros without a queue or an engine."""
    from prometheus_client import CollectorRegistry

    from convoynet.server.observing.metrics import Metrics
    from convoynet.server.protocol.ledger import Ledger
    from convoynet.server.protocol.service import Service, ServiceOptions
    from convoynet.server.spec import BatchPolicy, EngineOptions, ModelSpec, TensorSpec
    from convoynet.server.types import InferRequest, InferResult, Timings

    spec = ModelSpec(
        "tiny", "1", "inline",
        (TensorSpec("x", "FP32", np.dtype(np.float32), (-1,)),),
        (TensorSpec("y", "FP32", np.dtype(np.float32), (10,)),),
        {}, BatchPolicy(32, 0.0, 1024), EngineOptions("fake", Path(), "cpu", 1), 1, (), None,
    )  # fmt: skip

    class Inline:
        """Both core and model."""

        def __init__(self) -> None:
            self.spec = spec
            self.labels = ("tiny", "1")

        def count(self, *_: Any, late: bool) -> None:
            """The model's own statistics are left out, as its queue is."""

        def model(self, name: str, version: str = "") -> Inline:
            return self

        async def infer(self, request: InferRequest) -> InferResult:
            rows = self.spec.check(request)
            return InferResult("tiny", "1", {"y": np.zeros((rows, 10), np.float32)}, Timings())

    core: Any = Inline()
    ledger = Ledger(core, Metrics(CollectorRegistry(), "0"))
    return Dispatcher([Service(core, ServiceOptions("0"))], counted=ledger.over)


def serve_threads() -> None:
    """The thread-pool case."""
    fixed = answer()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    methods = {"ModelInfer": grpc.unary_unary_rpc_method_handler(lambda payload, context: fixed)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    sys.stderr.write(f"gRPC 127.0.0.1:{port}\n")
    server.wait_for_termination()


def report(figures: dict[str, Figures], arguments: argparse.Namespace) -> None:
    """Medians as a table; with --save as JSON as well, with every round."""
    client = "h2load" if arguments.client == "h2load" else "a Python client, which shares the cores"
    asked = f"{arguments.kilobytes} KB, {arguments.in_flight} in flight"
    print(f"{asked}, {client}, {os.cpu_count()} cores; medians of {arguments.rounds} rounds")
    for case, found in figures.items():
        rate, cpu, ratio = map(statistics.median, (found.requests_per_s, found.cpu_ms, found.ratio))
        print(f"{case:15} {rate:9.0f}/s  {cpu:6.3f} CPU ms a request  {ratio:5.2f} of {arguments.cases[0]}")
        if found.before is not None:
            rate, cpu = map(statistics.median, (found.before.requests_per_s, found.before.cpu_ms))
            faster, cheaper = map(statistics.median, (found.faster, found.cheaper))
            rounds = ", ".join(f"{each:.2f}" for each in found.cheaper)
            print(f"{'  before':15} {rate:9.0f}/s  {cpu:6.3f} CPU ms a request")
            print(f"{'  ratio':15} {faster:9.2f}    {cheaper:6.2f} (each round: {rounds})")
    if arguments.save:
        size = "" if arguments.kilobytes == 4 else f"{arguments.kilobytes}-kb-"
        path = Path(__file__).parent / "results" / f"frontends-{size}{os.cpu_count()}-cores.json"
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "grpcio": grpc.__version__}
        settings = {
            "kilobytes": arguments.kilobytes,
            "in_flight": arguments.in_flight,
            "seconds": arguments.seconds,
            "client": client,
        }
        cases = {case: asdict(found) for case, found in figures.items()}
        path.write_text(json.dumps({**machine, **settings, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
