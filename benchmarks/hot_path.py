"""What a request costs in the core: microseconds of CPU from a call's bytes to its answer's, without gRPC.

    python benchmarks/hot_path.py                              this source
    python benchmarks/hot_path.py --before OTHER/src           beside another checkout's
    python benchmarks/hot_path.py --front-end                  with the calls of a front-end process

The whole server runs in a process of its own, without a client: its dispatcher is given the bytes of calls. So what
is counted are rights, parsing, checks, the queue, batches and the messages to the engine, which only adds up a row in
a process that is not counted. With --front-end the calls come from another process that is not counted either, by the
way that those of front ends take; that way's cost is then in it. Each round measures every source once, each in a new
process; given are the least, which is nearest to what a quiet machine takes, and the median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from convoy_server import SRC, from_source

CELLS = [(kilobytes, in_flight) for kilobytes in (4, 150) for in_flight in (1, 8, 32)]
CONFIG = """backend: "fake" max_batch_size: 32 dynamic_batching { }
input { name: "x" data_type: TYPE_FP32 dims: [-1] } output { name: "y" data_type: TYPE_FP32 dims: [10] }
"""


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="SRC", help="the folder src/ of another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3000, help="of each measurement (default: 3000)")
    parser.add_argument("--front-end", action="store_true", help="by way of a front-end process")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measured = measure(arguments.measure, arguments.calls, front_end=arguments.front_end)
        print(json.dumps(uvloop.run(measured)))
        return
    if arguments.ask:
        uvloop.run(ask(*arguments.ask))
        return
    sources = {"now": SRC} if arguments.before is None else {"before": arguments.before.resolve(), "now": SRC}
    found: dict[str, list[list[float]]] = {source: [] for source in sources}
    with tempfile.TemporaryDirectory(prefix="convoy-bench-") as folder:
        version = Path(folder, "tiny", "1")
        version.mkdir(parents=True)
        (version / "model.json").write_text("{}")
        (version.parent / "config.pbtxt").write_text(CONFIG)
        command = [sys.executable, __file__, "--measure", folder, "--calls", str(arguments.calls)]
        if arguments.front_end:
            command.append("--front-end")
        for number in range(arguments.rounds):
            # Every second round the other way round: a machine gets slower or faster with time.
            for name, source in list(sources.items())[:: -1 if number % 2 else 1]:
                text = subprocess.run(command, check=True, env=from_source(source), stdout=subprocess.PIPE).stdout
                found[name].append(json.loads(text))
    report(found)


async def measure(repository: Path, calls: int, *, front_end: bool) -> list[float]:
    """Microseconds of CPU a request, for each of CELLS."""
    from convoynet.server.app import App
    from convoynet.server.config import ServeConfig

    ports = {"grpc_port": 0, "http_port": -1, "metrics_port": 0}
    app = App(ServeConfig(model_repository=(str(repository),), tune=False, **ports))
    await app.start()
    try:
        if front_end:
            return await load_from_outside(app._dispatcher, calls)
        return [await load(app._dispatcher, kilobytes, in_flight, calls) for kilobytes, in_flight in CELLS]
    finally:
        await app.stop()


async def load(dispatcher: Any, kilobytes: int, in_flight: int, calls: int) -> float:
    """The same for one cell, as a front end calls it."""
    from convoynet.server.types import Call

    payload = request(kilobytes * 256)
    whole = hasattr(dispatcher, "over")  # a checkout that counts inside unary() has neither this nor refused()

    async def client(count: int) -> None:
        for _ in range(count):
            call = Call("grpc")
            refused = dispatcher.refused("ModelInfer", call) if whole else None
            reply = refused or await dispatcher.unary("ModelInfer", payload, call)
            if whole:
                dispatcher.over("ModelInfer", call)
            if not reply.payload:
                raise SystemExit(reply.message)

    used = 0.0
    for count in (calls // 10 // in_flight, calls // in_flight):  # the first to warm up
        begun = time.process_time()
        await asyncio.gather(*(client(count) for _ in range(in_flight)))
        used = time.process_time() - begun
    return used * 1e6 / (calls // in_flight * in_flight)


async def load_from_outside(dispatcher: Any, calls: int) -> list[float]:
    """The same for all cells, of calls that another process sends."""
    from convoynet.server.frontend import messages
    from convoynet.server.frontend.channel import Channel, shared_memory
    from convoynet.server.frontend.session import Session

    session, done = Session(dispatcher), asyncio.Event()

    def received(kind: int, number: int, meta: bytes, payload: bytes) -> None:
        if kind == messages.READY:
            done.set()
        else:
            session.received(kind, number, meta, payload)

    way, other = socket.socketpair()
    memory = [shared_memory(*shelf()), shared_memory()]
    descriptors = (other.fileno(), *memory)
    command = [sys.executable, __file__, "--ask", *map(str, descriptors)]
    into, out = (mmap.mmap(descriptor, 0) for descriptor in memory)
    channel = Channel(out, into, received, lambda: None)
    session.attach(channel)
    found = []
    with subprocess.Popen(command, pass_fds=descriptors) as asking:
        other.close()
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=way)
        for kilobytes, in_flight in CELLS:
            for count in (calls // 10 // in_flight, calls // in_flight):  # the first to warm up
                done.clear()
                begun = time.process_time()
                channel.send(messages.STATE, 0, json.dumps([kilobytes, in_flight, count]).encode())
                await done.wait()
                used = time.process_time() - begun
            found.append(used * 1e6 / (calls // in_flight * in_flight))
        asking.terminate()
    return found


async def ask(way: int, out: int, into: int) -> None:
    """The other process: asks as it is told to, until the first is gone."""
    from convoynet.server.frontend import messages
    from convoynet.server.frontend.channel import Channel
    from convoynet.server.frontend.remote import Remote
    from convoynet.server.memory.budget import Budget
    from convoynet.server.types import Call

    remote, told = Remote(Budget(2**40)), asyncio.Queue[bytes]()
    metadata = (("user-agent", "grpc-python/1.75.1 grpc-c/49.0.0 (linux; chttp2)"),)

    def received(kind: int, number: int, meta: bytes, payload: bytes) -> None:
        if kind == messages.STATE:
            told.put_nowait(meta)
        else:
            remote.received(kind, number, meta, payload)

    async def client(payload: bytes, count: int) -> None:
        for _ in range(count):
            reply = await remote.unary("ModelInfer", payload, Call("grpc", metadata=metadata))
            if not reply.payload:
                raise SystemExit(reply.message)

    channel = Channel(mmap.mmap(out, 0), mmap.mmap(into, 0), received, lambda: told.put_nowait(b""), *shelf())
    remote.attach(channel)
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=socket.socket(fileno=way))
    while meta := await told.get():
        kilobytes, in_flight, count = json.loads(meta)
        payload = request(kilobytes * 256)
        await asyncio.gather(*(client(payload, count) for _ in range(in_flight)))
        channel.send(messages.READY, 0)


def shelf() -> list[int]:
    """Bytes of a channel's shelf; a checkout from before has none."""
    from convoynet.server.frontend import channel

    return [channel.SHELF_BYTES] if hasattr(channel, "SHELF_BYTES") else []


def request(elements: int) -> bytes:
    """A ModelInfer request, serialized."""
    from convoynet.protos.inference import grpc_service_pb2 as pb

    message = pb.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="x", datatype="FP32", shape=[1, elements])
    message.outputs.add(name="y")
    message.raw_input_contents.append(np.zeros(elements, np.float32).tobytes())
    return message.SerializeToString()


def report(found: dict[str, list[list[float]]]) -> None:
    """A row for each of CELLS."""
    rounds = len(next(iter(found.values())))
    print(f"{os.cpu_count()} cores, {rounds} rounds: microseconds of CPU a request in the core, least (median)")
    for index, (kilobytes, in_flight) in enumerate(CELLS):
        cells = []
        for source, taken in found.items():
            values = [each[index] for each in taken]
            cells.append(f"{source} {min(values):6.1f} ({statistics.median(values):6.1f})")
        print(f"{kilobytes:4} KB, {in_flight:2} in flight:  {'   '.join(cells)}")


if __name__ == "__main__":
    main()
