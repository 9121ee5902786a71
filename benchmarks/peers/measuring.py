"""The load and the clocks of benchmarks/peers.py: h2load against one server, CPU seconds of the server's processes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image
from session import Session, Stated, stated

from convoynet.protos.inference import grpc_service_pb2 as pb
from convoynet.server.repository import repository

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CONNECTIONS = 8
SHARE_OF_PEAK, PACED_LEVEL = 0.7, 128


@dataclass
class Run:
    """How to load: `level` requests in flight at most, `rate` a second, or 0 for one after the other."""

    round: int
    seconds: int
    level: int
    rate: float = 0.0


@dataclass
class Row:
    """One measurement.

    Attributes:
        peer, case: What was measured.
        round: Its number.
        concurrency: Requests in flight; where `paced`, the most that may be.
        paced: Whether requests came at 70 % of the peer's best rate rather than one after the other.
        requests_per_s: Good answers a second.
        p50_ms, p99_ms: Of all answers.
        errors: Answers that were missing or not as long as a good one.
        server_cpu_ms: CPU time of the server's processes for each request.
        server_cores, client_cores, other_cores: Cores in use by the server, by h2load, by anything else.
    """

    peer: str
    case: str
    round: int
    concurrency: int
    paced: bool
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    server_cpu_ms: float
    server_cores: float
    client_cores: float
    other_cores: float


@dataclass
class Case:
    """One kind of request.

    Attributes:
        name: tiny, uint8 or jpeg.
        model: Peers know it under this name.
        row: The input: an array of one row, or the bytes of a file.
        expected: The right logits.
    """

    name: str
    model: Stated
    row: Any
    expected: Any

    def request(self, peer: str) -> tuple[bytes, str]:
        """Body and path; gRPC's frame is not around it yet."""
        data = self.row if isinstance(self.row, bytes) else self.row.tobytes()
        if peer == "litserve":
            return json.dumps({"b64": base64.b64encode(data).decode()}).encode(), f"/{self.model.name}"
        # Convoy decodes images for the model that takes tensors; the others have a model for each.
        name = self.model.name.removesuffix("_jpeg") if peer.startswith("convoy") else self.model.name
        message = pb.ModelInferRequest(model_name=name)
        message.inputs.add(name="input", datatype=self.model.datatype, shape=[1, *self.model.shape])
        message.outputs.add(name="logits")
        message.raw_input_contents.append(
            struct.pack("<I", len(data)) + data if self.model.datatype == "BYTES" else data
        )
        return message.SerializeToString(), METHOD


def write_models(models: Path, folder: Path, threads: int) -> None:
    """FOLDER/models.json: what the exported networks are, for launchers that know nothing of ours."""
    found = {f.name: f.spec for f in repository.scan(models, repository.Defaults(1, threads)) if f.spec is not None}
    written = []
    for name, spec in found.items():
        (tensor,), (output,) = spec.inputs, spec.outputs
        of_model = {"name": name, "file": str(spec.engine.file.absolute()), "datatype": tensor.datatype}
        of_model |= {"shape": list(tensor.dims), "classes": output.dims[-1], "max_batch": spec.batch.max_rows}
        # More threads than one only slow down a network that takes microseconds.
        of_model["threads"] = threads if output.dims[-1] > 10 else 1
        written.append(of_model)
        if tensor.datatype == "UINT8" and spec.image is not None:
            side, resize = spec.image.size[0], spec.image.resize
            jpeg = {"name": f"{name}_jpeg", "datatype": "BYTES", "shape": [1], "side": side, "resize": resize}
            written.append({**of_model, **jpeg})
    (folder / "models.json").write_text(json.dumps(written))


def cases(folder: Path) -> list[Case]:
    """Every kind of request, with the right answer."""
    rng = np.random.default_rng(7)
    smooth = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", quality=90)
    found = []
    for model in stated(folder):
        name = {"FP32": "tiny", "UINT8": "uint8", "BYTES": "jpeg"}[model.datatype]
        if name == "jpeg":
            row: Any = buffer.getvalue()
            rows = np.array([row], np.object_)
        else:
            rows = row = (rng.random((1, *model.shape)) * (255 if name == "uint8" else 1)).astype(model.dtype)
        found.append(Case(name, model, row, Session(model)(rows)[0]))
    return found


class Server:
    """A peer that runs; as a context it is ended with all of its processes."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.port = free_port()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            [*command, str(self.port)], stdout=self._log, stderr=self._log, start_new_session=True
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._log.close()

    def answer(self, case: Case, patience_s: float = 90) -> bytes:
        """The answer to a request, once the server gives one.

        Raises:
            RuntimeError: It gives none.
        """
        body, path = case.request(self.name)
        end = time.monotonic() + patience_s
        while True:
            try:
                return self._call(body, path)
            except (grpc.RpcError, OSError) as error:
                if time.monotonic() > end or self._process.poll() is not None:
                    said = os.pread(self._log.fileno(), 2**20, 0).decode(errors="replace")[-1500:]
                    raise RuntimeError(f"no answer: {error}\n{said}") from error
                time.sleep(0.3)

    def _call(self, body: bytes, path: str) -> bytes:
        if self.name == "litserve":
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            connection.request("POST", path, body, {"content-type": "application/json"})
            return connection.getresponse().read()
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            return bytes(channel.unary_unary(path)(body, timeout=20))

    def cpu_seconds(self) -> float:
        """Of the process and all below it, since they started."""
        ticks: dict[int, tuple[int, int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                ticks[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:13]))
        tree = {self._process.pid}
        while below := {pid for pid, (parent, _) in ticks.items() if parent in tree and pid not in tree}:
            tree |= below
        return sum(ticks[pid][1] for pid in tree if pid in ticks) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """The first of three free ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                for further in (port + 1, port + 2):
                    socket.create_server(("127.0.0.1", further)).close()
            except OSError:
                continue
        return port


def check(server: Server, case: Case) -> int:
    """Length of a good answer.

    Raises:
        RuntimeError: The answer is not the right one.
    """
    answer = server.answer(case)
    if server.name == "echo":
        return len(answer)
    if server.name == "litserve":
        logits = np.array(json.loads(answer), np.float32).ravel()
    else:
        output = pb.ModelInferResponse.FromString(answer)
        typed = output.outputs[0].contents.fp32_contents
        raw = output.raw_output_contents
        logits = np.frombuffer(raw[0], np.float32) if raw else np.array(typed, np.float32)
    # Decoders and batches differ in the last bits of a pixel, engines in those of a logit.
    if logits.shape != case.expected.shape or np.abs(logits - case.expected).max() > 0.15 * np.ptp(case.expected):
        raise RuntimeError(f"the answer is wrong: {logits[:4]}, expected {case.expected[:4]}")
    return len(answer)


def measure(server: Server, case: Case, levels: list[int], seconds: int, round_: int) -> list[Row]:
    """A row for each level of concurrency, and one at 70 % of the best rate.

    Raises:
        RuntimeError: The server does not answer, or wrongly.
    """
    length = check(server, case)
    rows = [load(server, case, length, Run(round_, seconds, level)) for level in levels]
    best = max(row.requests_per_s for row in rows)
    rows.append(load(server, case, length, Run(round_, seconds, PACED_LEVEL, SHARE_OF_PEAK * best)))
    return rows


def load(server: Server, case: Case, length: int, run: Run) -> Row:
    """One run of h2load."""
    body, path = case.request(server.name)
    is_grpc = server.name != "litserve"
    # HTTP/1.1 has one request on a connection at a time. A paced connection needs a few a second to be even.
    connections = min(run.level, CONNECTIONS if is_grpc else 32)
    if run.rate and is_grpc:
        connections = min(connections, max(int(run.rate / 10), 1))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "body").write_bytes((struct.pack(">BI", 0, len(body)) if is_grpc else b"") + body)
        command = ["h2load", "-t1", f"-c{connections}", f"-D{run.seconds}", "--warm-up-time=1", f"-d{folder}/body"]
        command += [f"-m{run.level // connections}" if is_grpc else "--h1", f"--log-file={folder}/log"]
        command += ["-H", f"content-type: application/{'grpc' if is_grpc else 'json'}", "-H", "te: trailers"]
        if run.rate:
            command.append(f"--rps={run.rate / connections:.2f}")
        before, begun, of_all = server.cpu_seconds(), time.monotonic(), busy_seconds()
        own = sum(os.times()[:4])
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{server.port}{path}"], capture_output=True, text=True, check=True
        )
        passed = time.monotonic() - begun
        of_server, of_client = server.cpu_seconds() - before, sum(os.times()[:4]) - own
        of_all = busy_seconds() - of_all
        log = Path(folder, "log").read_text().split()
    milliseconds = np.array(log, np.int64).reshape(-1, 3)[:, 2] / 1e3
    total, data = found(r"requests: (\d+) total", done.stdout), found(r"\((\d+)\) data", done.stdout)
    # A gRPC error has no body: what is missing in bytes is missing in answers. The last may be cut off.
    good = min(total, round(data / (length + 5 * is_grpc)))
    p50, p99 = np.percentile(milliseconds, [50, 99]) if len(milliseconds) else (float("nan"),) * 2
    # CPU time includes the second of warm-up, in which the rate is about the same.
    requests = good * passed / run.seconds
    return Row(
        server.name, case.name, run.round, run.level, bool(run.rate), good / run.seconds, float(p50), float(p99),
        max(total - good - connections, 0), 1e3 * of_server / max(requests, 1), of_server / passed,
        of_client / passed, max(of_all - of_server - of_client, 0.0) / passed,
    )  # fmt: skip


def found(pattern: str, text: str) -> int:
    """The number that the pattern finds.

    Raises:
        RuntimeError: It finds none.
    """
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"h2load said: {text[-500:]}")
    return int(match[1])


def busy_seconds() -> float:
    """CPU seconds of the whole machine since it started."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
