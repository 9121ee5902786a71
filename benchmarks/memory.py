"""The memory that docs/operations.md promises, beside what a server takes at most under what is worst for it.

    python benchmarks/memory.py                              one front end, 128 MiB
    python benchmarks/memory.py --frontends 2 --save

The server has `--max-inflight-bytes`; every attack sends or asks for many times as much, at once. The processes that
hold requests (the core and its front ends, not the engines) may grow by twice that and 128 MiB, and by 64 MiB more for
each front end. Their memory is looked at every few milliseconds; each attack has a server of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import io
import json
import multiprocessing
import socket
import struct
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from convoy_server import convoy
from grpc import aio
from PIL import Image
from serving import machine

from convoynet.protos.inference import grpc_service_pb2 as pb

RESULTS = Path(__file__).parent / "results"
METHOD, STREAM = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"
MIB = 2**20
FORK = multiprocessing.get_context("fork")
_HOLD_SECONDS = 2.0


@dataclass(frozen=True)
class Target:
    """Where a server listens."""

    grpc: str
    http: int


@dataclass(frozen=True)
class Peak:
    """Of one attack: MiB that the server grew by at most, and what was promised."""

    attack: str
    grew_mib: int
    promised_mib: int


Attack = Callable[[Target], Awaitable[None]]


def repository(folder: Path) -> Path:
    """A model of rows of any width, one of pictures, and one with a large answer."""
    for name, tensors in {
        "wide": 'input { name: "x" data_type: TYPE_FP32 dims: [-1] }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }',
        "photo": 'input { name: "x" data_type: TYPE_UINT8 format: FORMAT_NHWC dims: [224, 224, 3] }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }\nparameters { key: "preprocess" value { string_value: '
        + json.dumps(json.dumps({"color": "RGB", "resize": 256, "size": [224, 224], "interpolation": "bilinear"}))
        + " } }",
        "large": 'input { name: "x" data_type: TYPE_FP32 dims: [4] }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [2000000] }',
    }.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.json").write_text('{"seconds": 0.2}')
        (version.parent / "config.pbtxt").write_text(f'backend: "fake"\nmax_batch_size: 1\n{tensors}\n')
    return folder


def request(model: str, values: np.ndarray) -> bytes:
    """A request of one row."""
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[values.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=[1, values.size])
    return message.SerializeToString()


def calls(payload: bytes, count: int) -> Attack:
    """Calls of gRPC at once, over ten connections."""

    async def attack(target: Target) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        channels = [aio.insecure_channel(target.grpc, options=options) for _ in range(10)]
        sent = [channels[i % 10].unary_unary(METHOD)(payload, timeout=30) for i in range(count)]
        await asyncio.gather(*(outcome(call) for call in sent))
        for channel in channels:
            await channel.close()

    return attack


async def outcome(call: Awaitable[object]) -> None:
    """Waits for an answer or a refusal."""
    with suppress(aio.AioRpcError, ConnectionError, asyncio.IncompleteReadError):
        await call


def never_finished(count: int, size: int, method: str = METHOD) -> Attack:
    """Messages of gRPC that promise 60 MB and stop before."""
    return sent_raw(struct.pack(">BI", 0, 60_000_000) + bytes(size), count, method)


def packed(message: bytes, count: int) -> Attack:
    """Messages of gRPC that are gzip, ended as they should be."""
    return sent_raw(struct.pack(">BI", 1, len(message)) + message, count, encoding="gzip", ends=True)


def sent_raw(
    data: bytes, count: int, method: str = METHOD, *, encoding: str = "identity", ends: bool = False
) -> Attack:
    """Calls of which exactly these bytes are sent, each on a connection of its own."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    fields = (":method", "POST", ":scheme", "http", ":path", method, ":authority", "a", "te", "trailers")
    block = b"".join(
        (b"\0" if not i % 2 else b"") + bytes([len(text)]) + text.encode()
        for i, text in enumerate((*fields, "content-type", "application/grpc", "grpc-encoding", encoding))
    )

    async def one(target: Target) -> None:
        host, port = target.grpc.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        # Pretends to have a window without end: what the server lets through arrives, the rest waits in the socket.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, block))
        windows = {0: 65_535, 1: 65_535}

        async def listen() -> None:
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] == 8:
                    number = int.from_bytes(head[5:9], "big")
                    windows[number] = windows.get(number, 0) + int.from_bytes(payload, "big")
                elif head[3] == 4 and not head[4]:
                    for i in range(0, len(payload), 6):
                        if payload[i : i + 2] == b"\0\x04":
                            windows[1] += int.from_bytes(payload[i + 2 : i + 6], "big") - 65_535
                    writer.write(frame(4, 1, 0))

        async def send(end: float) -> None:
            at = 0
            while at < len(data) and asyncio.get_running_loop().time() < end and not listening.done():
                part = min(16_384, len(data) - at, *windows.values())
                if part <= 0:
                    await asyncio.sleep(0.01)
                    continue
                at += part
                writer.write(frame(0, int(ends and at == len(data)), 1, data[at - part : at]))
                await writer.drain()
                for number in windows:
                    windows[number] -= part

        listening = asyncio.ensure_future(listen())
        end = asyncio.get_running_loop().time() + 3 * _HOLD_SECONDS
        with suppress(ConnectionError):
            await send(end)
        await asyncio.sleep(_HOLD_SECONDS)
        listening.cancel()
        writer.close()
        await asyncio.gather(listening, return_exceptions=True)

    async def attack(target: Target) -> None:
        await asyncio.gather(*(outcome(one(target)) for _ in range(count)))

    return attack


def headers(count: int, size: int) -> Attack:
    """Connections with headers of two frames of which the last byte never comes."""

    async def one(target: Target) -> None:
        host, port = target.grpc.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        for kind in (1, 9):
            head = struct.pack(">I", size)[1:] + bytes((kind, 0)) + struct.pack(">I", 1)
            writer.write(head + bytes(size if kind == 1 else size - 1))
        with suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(2 * _HOLD_SECONDS)
        writer.close()

    async def attack(target: Target) -> None:
        await asyncio.gather(*(outcome(one(target)) for _ in range(count)))

    return attack


def posts(path: str, body: bytes, headers: str, count: int, *, short: int = 0, reads: bool = True) -> Attack:
    """Requests of HTTP at once; `short` leaves out the last bytes, and not all of them read their answer."""

    async def one(target: Target) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.http, limit=1024)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        writer.write(head.encode())
        writer.write(memoryview(body)[: len(body) - short])
        with suppress(ConnectionError):
            await writer.drain()
        if reads and not short:
            await outcome(reader.readuntil(b"\r\n\r\n"))
        else:
            await asyncio.sleep(_HOLD_SECONDS)
        writer.close()

    async def attack(target: Target) -> None:
        await asyncio.gather(*(outcome(one(target)) for _ in range(count)))

    return attack


def picture(width: int, height: int) -> bytes:
    """A black PNG."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def attacks() -> dict[str, Attack]:
    """Those of the table."""
    infer, raw = "/v2/models/wide/infer", "Inference-Header-Content-Length: 0\r\n"
    ones = np.ones(2_500_000, np.float32)
    numbers = b"1," * (8 * MIB) + b"1"
    typed = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 5], "data": [' + numbers + b"]}]}"
    bomb = gzip.compress(bytes(200 * MIB))
    few = zlib.compress(bytes(200 * MIB))
    image = "Content-Type: image/png\r\n"
    asked = (
        b'{"parameters": {"binary_data_output": true}, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], '
        b'"data": [1, 2, 3, 4]}]}'
    )
    return {
        "gRPC: 100 requests of 10 MB": calls(request("wide", ones), 100),
        "gRPC: 60 requests of 60 MB that never end": never_finished(60, 20_000_000),
        "gRPC: 60 messages of streams, 60 MB, that never end": never_finished(60, 20_000_000, STREAM),
        "gRPC: 30 requests of 4 million empty inputs": calls(b"\x2a\x00" * (4 * MIB), 30),
        "gRPC: 30 requests of 16 million numbers of one byte": calls(
            b"\x0a\x04wide\x2a\x86\x80\x80\x08\x2a\x82\x80\x80\x08\x12\xfe\xff\xff\x07" + bytes(16 * MIB), 30
        ),
        "gRPC: 20 requests of 200 kB that are 200 MB of gzip": packed(bomb, 20),
        "gRPC: 900 connections with headers of 500 kB that never end": headers(900, 250_000),
        "HTTP: 100 bodies of 10 MB that never end": posts(infer, bytes(10**7), raw, 100, short=1),
        "HTTP: 100 bodies of 10 MB": posts(infer, bytes(10**7), raw, 100),
        "HTTP: 20 bodies of 200 kB that are 200 MB of gzip": posts(infer, bomb, raw + "Content-Encoding: gzip\r\n", 20),
        "HTTP: 20 of deflate": posts(infer, few, raw + "Content-Encoding: deflate\r\n", 20),
        "HTTP: 10 bodies of 16 MB of JSON": posts(infer, typed, "", 10),
        "HTTP: 40 answers of 8 MB that nobody reads": posts("/v2/models/large/infer", asked, "", 40, reads=False),
        "HTTP: 40 pictures of 7000 x 7000": posts("/v2/models/photo/infer", picture(7000, 7000), image, 40),
        "HTTP: 100 pictures of 1 x 65,000": posts("/v2/models/photo/infer", picture(1, 65_000), image, 100),
    }


def processes(root: int) -> list[int]:
    """The core and its front ends."""
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    fronts = []
    for pid in children:
        with suppress(OSError):
            if b"convoynet.server.frontend" in Path(f"/proc/{pid}/cmdline").read_bytes():
                fronts.append(int(pid))
    return [root, *fronts]


def private(pids: list[int]) -> int:
    """Bytes that these processes have for themselves."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
            total += 4096 * (int(resident) - int(shared))
    return total


def measured(name: str, attack: Attack, folder: Path, options: argparse.Namespace) -> Peak:
    """One attack on a new server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    limit = options.limit * MIB
    flags = ["--http-port", str(port), "--max-inflight-bytes", str(limit), "--frontends", str(options.frontends)]
    with convoy(folder, *flags, "--grpc-stack", options.stack) as server:
        before = peak = private(processes(server.process.pid))
        # In a process of its own: who sends with all its might comes to look too seldom.
        running = FORK.Process(target=run, args=(attack, Target(server.url, port)))
        running.start()
        while running.is_alive():
            # Anew each time: a front end that was ended has a successor.
            peak = max(peak, private(processes(server.process.pid)))
            time.sleep(0.003)
        if running.exitcode:
            raise SystemExit(f"{name}: the attack itself failed")
    apart = options.frontends if options.frontends > 1 else 0
    promised = 2 * options.limit + 128 + 64 * apart
    return Peak(name, (peak - before) // MIB, promised)


def run(attack: Attack, target: Target) -> None:
    """One attack, in the process that is for it."""
    asyncio.run(attack(target))


def main_of(options: argparse.Namespace) -> list[Peak]:
    """Every attack, one after another."""
    peaks = []
    with tempfile.TemporaryDirectory(prefix="convoy-memory-") as made:
        folder = repository(Path(made))
        for name, attack in attacks().items():
            if options.only in name:
                peaks.append(peak := measured(name, attack, folder, options))
                print(f"{peak.grew_mib:6} MiB of {peak.promised_mib}  {name}", flush=True)
    return peaks


def main() -> None:
    """Parses, measures, prints; the exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=128, help="--max-inflight-bytes, in MiB (default: 128)")
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--stack", choices=("native", "grpcio"), default="native")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    peaks = main_of(options)
    if options.save:
        file = RESULTS / f"memory-{options.stack}-{options.frontends}.json"
        settings = {"machine": machine(), "max_inflight_mib": options.limit}
        file.write_text(json.dumps({**settings, "peaks": [asdict(peak) for peak in peaks]}, indent=2) + "\n")
    raise SystemExit(any(peak.grew_mib > peak.promised_mib for peak in peaks))


if __name__ == "__main__":
    main()
