"""What a model with short batches gets of the cores beside one with long ones, and what that one gets.

    python benchmarks/fairness.py --rounds 5 --save
    python benchmarks/fairness.py --source OTHER/src            the server of another checkout

Two networks made here, both on ONNX Runtime: one answers in about a millisecond, of the other a batch of 8 takes some
0.2 s on a core. Clients send their next request when they have the answer of the one before, so that the short model
has nothing to do for a moment after each batch. The last core belongs to the clients, the server has the others. Each
round measures either model alone, then both together, for each number of requests in flight at the short one. Given
are rates beside the other over those alone in the same round, where a half is an equal share, and the latency of the
short model in batches of the long one: medians of the rounds and, in brackets, the least and the most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from convoy_server import SRC, convoy
from grpc import aio
from onnx import TensorProto, helper, numpy_helper
from serving import machine

from convoynet.protos.inference import grpc_service_pb2 as pb

RESULTS = Path(__file__).parent / "results"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, CLIENT_CORES = CORES[:-1], CORES[-1:]
IN_FLIGHT = (1, 3, 16)
LONG_IN_FLIGHT = 16
MAX_ROWS = 8
CHANNELS, SIDE = 8, 14
NETWORKS = {"short": (64, 1), "long": (512, 4)}
"""Channels and convolutions."""


@dataclass(frozen=True)
class Rate:
    """Answers a second, and their latency in seconds."""

    per_s: float
    p50: float
    p99: float
    slowest: float


@dataclass(frozen=True)
class Measured:
    """One round with so many requests in flight at the short model."""

    round: int
    in_flight: int
    short_alone: Rate
    long_alone: Rate
    short: Rate
    long: Rate

    @property
    def batch_seconds(self) -> float:
        """What a batch of the long model takes."""
        return MAX_ROWS / self.long_alone.per_s


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="+", default=list(IN_FLIGHT), help="at the short model")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", type=Path, default=SRC, metavar="SRC", help="the src/ of another checkout's server")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fairness.json")
    arguments = parser.parse_args()
    if not SERVER_CORES:
        raise SystemExit("this benchmark needs two cores at least: one for the clients")
    os.sched_setaffinity(0, CLIENT_CORES)
    with tempfile.TemporaryDirectory(prefix="convoy-fairness-") as made:
        for name, (channels, layers) in NETWORKS.items():
            write_network(Path(made, name), channels, layers)
        flags = ("--threads", str(len(SERVER_CORES)), "--log-level", "error")
        with convoy(Path(made), *flags, cores=SERVER_CORES, source=arguments.source.resolve()) as server:
            measured = uvloop.run(measure(server.url, arguments))
    show(measured)
    if arguments.save:
        found = {"machine": machine(), "measured": [asdict(one) for one in measured]}
        (RESULTS / "fairness.json").write_text(json.dumps(found, indent=1) + "\n")


def write_network(folder: Path, channels: int, layers: int) -> None:
    """A stack of convolutions that ends in ten numbers, as a model of the repository."""
    rng = np.random.default_rng(0)
    weights, nodes, last = [], [], "x"
    for layer in range(layers + 1):
        shape = (channels, channels if layer else CHANNELS, 3, 3)
        values = rng.normal(0, 1 / np.sqrt(9 * shape[1]), shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [last := f"r{layer}"]))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS, SIDE, SIDE])
    outputs = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", channels, 1, 1])
    graph = helper.make_graph(nodes, folder.name, [inputs], [outputs], weights)
    (folder / "1").mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        folder / "1" / "model.onnx",
    )
    (folder / "config.pbtxt").write_text(
        f'backend: "onnxruntime" max_batch_size: {MAX_ROWS} dynamic_batching {{ }} instance_group {{ count: 1 }}\n'
        f'input {{ name: "x" data_type: TYPE_FP32 dims: [{CHANNELS}, {SIDE}, {SIDE}] }}\n'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: [{channels}, 1, 1] }}\n'
    )


async def measure(url: str, arguments: argparse.Namespace) -> list[Measured]:
    """All rounds."""
    channels = [aio.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
    calls = [channel.unary_unary(METHOD) for channel in channels]
    measured = []

    async def rate(name: str, in_flight: int) -> Rate:
        return await load(calls, name, in_flight, arguments.seconds)

    for number in range(arguments.rounds):
        long_alone = await rate("long", LONG_IN_FLIGHT)
        for in_flight in arguments.in_flight:
            short_alone = await rate("short", in_flight)
            short, long = await asyncio.gather(rate("short", in_flight), rate("long", LONG_IN_FLIGHT))
            measured.append(Measured(number, in_flight, short_alone, long_alone, short, long))
    for channel in channels:
        await channel.close()
    return measured


async def load(calls: list[Any], name: str, in_flight: int, seconds: float) -> Rate:
    """So many requests in flight. The first second does not count."""
    request = pb.ModelInferRequest(model_name=name)
    request.inputs.add(name="x", datatype="FP32", shape=[1, CHANNELS, SIDE, SIDE])
    request.raw_input_contents.append(bytes(4 * CHANNELS * SIDE * SIDE))
    payload = request.SerializeToString()
    begun = time.perf_counter()
    latencies: list[float] = []

    async def client(call: Any) -> None:
        while (sent := time.perf_counter()) < begun + 1 + seconds:
            await call(payload, timeout=60)
            if begun + 1 <= (now := time.perf_counter()) < begun + 1 + seconds:
                latencies.append(now - sent)

    await asyncio.gather(*(client(calls[number % len(calls)]) for number in range(in_flight)))
    p50, p99 = (float(np.percentile(latencies, q)) for q in (50, 99))
    return Rate(len(latencies) / seconds, p50, p99, max(latencies))


def show(measured: list[Measured]) -> None:
    """A row for each number in flight."""
    print(f"{machine()}, {len({one.round for one in measured})} rounds: median (least, most)")
    for in_flight in dict.fromkeys(one.in_flight for one in measured):
        ones = [one for one in measured if one.in_flight == in_flight]

        def told(of: Callable[[Measured], float], digits: int = 2, ones: list[Measured] = ones) -> str:
            values = sorted(map(of, ones))
            return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}, {values[-1]:.{digits}f})"

        print(
            f"{in_flight:3} in flight at the short model; a batch of the long one "
            f"{told(lambda one: 1e3 * one.batch_seconds, 0)} ms\n"
            f"  short {told(lambda one: one.short_alone.per_s, 0)}/s alone, {told(lambda one: one.short.per_s, 0)}/s "
            f"beside the long one: {told(lambda one: one.short.per_s / one.short_alone.per_s)}\n"
            f"  long {told(lambda one: one.long_alone.per_s, 0)}/s alone, {told(lambda one: one.long.per_s, 0)}/s "
            f"beside the short one: {told(lambda one: one.long.per_s / one.long_alone.per_s)}\n"
            f"  latency of the short one in batches of the long one: p99 "
            f"{told(lambda one: one.short.p99 / one.batch_seconds)}, slowest "
            f"{told(lambda one: one.short.slowest / one.batch_seconds)}"
        )


if __name__ == "__main__":
    main()
