"""What is left of a server's work when five times as much is asked of it as it can do.

    python benchmarks/overload.py                                     a fake engine: 40 ms for a batch of 4
    python benchmarks/overload.py --repository models --model resnet50 --slo 0.5 --seconds 20

First the peak: the best rate at which answers come within the objective, with ever more requests in flight. Then
requests come at --factor times the peak, at random times and whether or not earlier ones are answered. Goodput is
answers within the objective; with `--latency-slo` it is to be at least 0.9 of the peak, and the slowest hundredth of
the answers within the objective. The same without the objective shows what it is for (--compare).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from convoy_server import convoy
from grpc import aio
from serving import machine

from convoynet.server.client.client import Client
from convoynet.server.client.load import make_load

LEVELS = (4, 8, 16, 32, 64)
CHANNELS = 8
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass
class Outcome:
    """Of one phase.

    Attributes:
        offered_per_s: Requests that were sent, a second.
        goodput_per_s: Answers within the objective, a second.
        p50_ms, p95_ms, p99_ms: Of the answers.
        codes: Requests by gRPC status.
    """

    offered_per_s: float
    goodput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    codes: dict[str, int]


@dataclass
class Recorder:
    """Latencies in seconds, and statuses."""

    latencies: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)

    async def call(self, call: Any, payload: bytes) -> bool:
        """Sends a request and records how it ends; whether it was answered."""
        begun = time.perf_counter()
        try:
            await call(payload, timeout=30)
        except aio.AioRpcError as error:
            self.codes[error.code().name] += 1
            return False
        self.codes["OK"] += 1
        self.latencies.append(time.perf_counter() - begun)
        return True

    def outcome(self, seconds: float, objective: float) -> Outcome:
        """Of a phase that took so long."""
        ms = np.array(self.latencies or [np.nan]) * 1e3
        good = sum(latency <= objective for latency in self.latencies)
        percentiles = (float(np.percentile(ms, q)) for q in (50, 95, 99))
        return Outcome(self.codes.total() / seconds, good / seconds, *percentiles, dict(self.codes))


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, help="models; by default one of the fake engine")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--slo", type=float, default=0.25, help="seconds (default: 0.25)")
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=8.0, help="of overload (default: 8)")
    parser.add_argument("--compare", action="store_true", help="then the same without an objective")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convoy-overload-") as made:
        repository = arguments.repository or write_fake(Path(made))
        with_objective = [f"--latency-slo={arguments.slo}"]
        for flags in [with_objective, []] if arguments.compare else [with_objective]:
            peak, under = serve_and_load(repository, flags, arguments)
            kept, limit = under.goodput_per_s / peak.goodput_per_s, 1e3 * arguments.slo
            print(f"{machine()}, {' '.join(flags) or 'no objective'}")
            print(f"  peak      {json.dumps(asdict(peak))}")
            print(f"  overload  {json.dumps(asdict(under))}")
            print(f"  goodput {kept:.2f} of the peak, p99 {under.p99_ms:.0f} ms of {limit:.0f} ms", flush=True)


def write_fake(folder: Path) -> Path:
    """A repository with a model whose time does not depend on the machine."""
    version = folder / "fake" / "1"
    version.mkdir(parents=True)
    (version / "model.json").write_text('{"seconds": 0.04}')
    (version.parent / "config.pbtxt").write_text(
        'backend: "fake"\nmax_batch_size: 4\ndynamic_batching { }\n'
        'input { name: "x" data_type: TYPE_FP32 dims: [4] }\noutput { name: "y" data_type: TYPE_FP32 dims: [1] }\n'
    )
    return folder


def serve_and_load(repository: Path, flags: list[str], arguments: argparse.Namespace) -> tuple[Outcome, Outcome]:
    """Peak and overload of one server."""
    with convoy(repository, *flags) as server:
        return uvloop.run(load(server.url, arguments))


async def load(url: str, arguments: argparse.Namespace) -> tuple[Outcome, Outcome]:
    """Both phases."""
    payload = await asyncio.to_thread(lambda: make_load(Client(url), arguments.model).payload)
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [aio.insecure_channel(url, options=options) for _ in range(CHANNELS)]
    calls = [channel.unary_unary(METHOD) for channel in channels]
    peak = max([await closed(calls, payload, level, arguments) for level in LEVELS], key=lambda o: o.goodput_per_s)
    under = await opened(calls, payload, arguments.factor * peak.goodput_per_s, arguments)
    for channel in channels:
        await channel.close()
    return peak, under


async def closed(calls: list[Any], payload: bytes, level: int, arguments: argparse.Namespace) -> Outcome:
    """So many requests in flight, for a third of the time."""
    recorder, seconds = Recorder(), max(arguments.seconds / 3, 2.0)
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            if not await recorder.call(calls[number % CHANNELS], payload):
                await asyncio.sleep(0.01)

    await asyncio.gather(*(client(n) for n in range(level)))
    return recorder.outcome(seconds, arguments.slo)


async def opened(calls: list[Any], payload: bytes, rate: float, arguments: argparse.Namespace) -> Outcome:
    """Requests at random times, `rate` of them a second. The first second is left out: what adapts needs some time."""
    rng, tasks = random.Random(0), set()
    recorder = Recorder()
    begun = due = time.perf_counter()
    counted = False
    while due < begun + 1 + arguments.seconds:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        if due >= begun + 1 and not counted:
            recorder, counted = Recorder(), True
        task = asyncio.ensure_future(recorder.call(rng.choice(calls), payload))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += rng.expovariate(rate)
    await asyncio.gather(*tasks)
    return recorder.outcome(arguments.seconds, arguments.slo)


if __name__ == "__main__":
    main()
