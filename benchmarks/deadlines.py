"""How much of a server is left for answers in time when it is asked for five times as much, all with a deadline.

    python benchmarks/deadlines.py --rounds 3 --save
    python benchmarks/deadlines.py --deadlines 2.5 4 --cases one --seconds 4
    python benchmarks/deadlines.py --source OTHER/src           the server of another checkout

A fake engine takes 0.2 s for a batch of up to 8 rows, however few, so that small batches cost most. Each round measures
the peak first, for each mix of sizes: rows answered a second with more requests in flight than two batches hold, and no
deadline. Then requests come at --factor times the peak, at random times and whether or not earlier ones are answered,
each with a gRPC deadline of so many batches. Goodput is the rows whose answers reach the client in time. Given are the
medians of the rounds and, in brackets, the least and the most, then the part in time of each priority and of each size
in rows. The first second of each phase does not count. Large requests are few: with them 8 s vary by a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from convoy_server import SRC, convoy
from grpc import aio
from serving import machine

from convoynet.protos.inference import grpc_service_pb2 as pb

RESULTS = Path(__file__).parent / "results"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNELS = 8
IN_FLIGHT = 32
BATCH_SECONDS, MAX_ROWS = 0.2, 8
CONFIG = f"""backend: "fake" max_batch_size: {MAX_ROWS}
dynamic_batching {{ priority_levels: 3 default_priority_level: 3 }}
input {{ name: "x" data_type: TYPE_FP32 dims: [4] }} output {{ name: "y" data_type: TYPE_FP32 dims: [1] }}
"""


@dataclass(frozen=True)
class Case:
    """A mix of requests: their sizes in rows, each as often, and the shares of the priorities 1, 2 and 3."""

    sizes: tuple[int, ...]
    priorities: tuple[float, ...]


CASES = {
    "one": Case((1,), (0, 0, 1)),
    "two priorities": Case((1,), (0, 0.2, 0.8)),
    "three priorities": Case((1,), (0.05, 0.15, 0.8)),
    "mixed sizes": Case((1, 2, 4), (0, 0, 1)),
    "mixed sizes, two priorities": Case((1, 2, 4), (0, 0.2, 0.8)),
    "half batches": Case((1, 4), (0, 0, 1)),
    "whole batches": Case((1, 8), (0, 0, 1)),
    "whole batches, two priorities": Case((1, 8), (0, 0.2, 0.8)),
    "all sizes": Case((1, 2, 3, 4, 5, 6, 7, 8), (0, 0, 1)),
}


@dataclass(frozen=True)
class Measured:
    """One phase of overload.

    Attributes:
        case, deadline: What was asked, the deadline in batches.
        round: Which.
        peak_per_s: Rows a second without deadlines, of the same round.
        goodput_per_s: Rows in time a second.
        by_priority, by_size: The part of the requests that was in time, by priority and by rows.
        codes: Requests by gRPC status.
    """

    case: str
    deadline: float
    round: int
    peak_per_s: float
    goodput_per_s: float
    by_priority: dict[int, float]
    by_size: dict[int, float]
    codes: dict[str, int]

    @property
    def ratio(self) -> float:
        """Of the peak."""
        return self.goodput_per_s / self.peak_per_s


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadlines", type=float, nargs="+", default=[2.5, 3, 5, 10], help="in batches")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--factor", type=float, default=5.0, help="times the peak (default: 5)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase (default: 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", type=Path, default=SRC, metavar="SRC", help="the src/ of another checkout's server")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/deadlines.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convoy-deadlines-") as made:
        version = Path(made, "fake", "1")
        version.mkdir(parents=True)
        (version / "model.json").write_text(json.dumps({"seconds": BATCH_SECONDS}))
        (version.parent / "config.pbtxt").write_text(CONFIG)
        with convoy(Path(made), "--log-level", "error", source=arguments.source.resolve()) as server:
            measured = uvloop.run(measure(server.url, arguments))
    show(measured)
    if arguments.save:
        found = {"machine": machine(), "factor": arguments.factor, "measured": [asdict(one) for one in measured]}
        (RESULTS / "deadlines.json").write_text(json.dumps(found, indent=1) + "\n")


async def measure(url: str, arguments: argparse.Namespace) -> list[Measured]:
    """All rounds."""
    channels = [aio.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(CHANNELS)]
    load = Load([channel.unary_unary(METHOD) for channel in channels], arguments.seconds)
    measured = []
    for number in range(arguments.rounds):
        peaks: dict[tuple[int, ...], float] = {}
        for name in arguments.cases:
            case = CASES[name]
            if case.sizes not in peaks:
                peaks[case.sizes] = await load.peak(case)
            for deadline in arguments.deadlines:
                one = await load.overload(case, deadline * BATCH_SECONDS, arguments.factor * peaks[case.sizes])
                measured.append(Measured(name, deadline, number, peaks[case.sizes], *one))
    for channel in channels:
        await channel.close()
    return measured


class Load:
    """Requests by the server's own wire format, made once."""

    def __init__(self, calls: list[Any], seconds: float) -> None:
        self._calls = calls
        self._seconds = seconds
        self._payloads = {(rows, level): payload(rows, level) for rows in range(1, MAX_ROWS + 1) for level in (1, 2, 3)}
        self._random = random.Random(0)

    async def peak(self, case: Case) -> float:
        """Rows a second with many in flight."""
        begun = time.perf_counter()
        rows_done = 0

        async def client(call: Any) -> None:
            nonlocal rows_done
            while time.perf_counter() < begun + 1 + self._seconds:
                rows = self._random.choice(case.sizes)
                await call(self._payloads[rows, 3], timeout=60)
                if begun + 1 <= time.perf_counter() < begun + 1 + self._seconds:
                    rows_done += rows

        await asyncio.gather(*(client(self._calls[n % CHANNELS]) for n in range(IN_FLIGHT)))
        return rows_done / self._seconds

    async def overload(
        self, case: Case, deadline: float, rows_per_s: float
    ) -> tuple[float, dict[int, float], dict[int, float], dict[str, int]]:
        """Rows in time a second, the part of the requests of each priority and size that was, and the statuses."""
        tasks: set[asyncio.Task[None]] = set()
        codes, came, in_time = Counter[str](), Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        begun = due = time.perf_counter()

        async def client(rows: int, level: int, counted: bool) -> None:
            try:
                await self._random.choice(self._calls)(self._payloads[rows, level], timeout=deadline)
                code = "OK"
            except aio.AioRpcError as error:
                code = error.code().name
            if counted:
                codes[code] += 1
                came[level, rows] += 1
                in_time[level, rows] += code == "OK"

        rate = rows_per_s / statistics.mean(case.sizes)
        while due < begun + 1 + self._seconds:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            rows, (level,) = self._random.choice(case.sizes), self._random.choices((1, 2, 3), case.priorities)
            task = asyncio.create_task(client(rows, level, due > begun + 1))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += self._random.expovariate(rate)
        await asyncio.gather(*tasks)
        rows_in_time = sum(rows * count for (_, rows), count in in_time.items())
        return rows_in_time / self._seconds, parts(in_time, came, 0), parts(in_time, came, 1), dict(codes)


def parts(in_time: Counter[tuple[int, int]], came: Counter[tuple[int, int]], by: int) -> dict[int, float]:
    """The part of the requests that was in time, by the first or the second of what they are counted by."""
    of: Counter[int] = Counter()
    every: Counter[int] = Counter()
    for kind, count in came.items():
        of[kind[by]] += in_time[kind]
        every[kind[by]] += count
    return {one: of[one] / every[one] for one in sorted(every)}


def payload(rows: int, level: int) -> bytes:
    """A request of that priority, serialized."""
    request = pb.ModelInferRequest(model_name="fake")
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    request.raw_input_contents.append(bytes(16 * rows))
    request.parameters["priority"].int64_param = level
    return request.SerializeToString()


def show(measured: list[Measured]) -> None:
    """A row for each case and deadline."""
    print(f"{machine()}: goodput over the peak, median (least, most); the part in time by priority; by rows; medians")
    cells = dict.fromkeys((one.case, one.deadline) for one in measured)
    for case, deadline in cells:
        ones = [one for one in measured if (one.case, one.deadline) == (case, deadline)]
        ratios = sorted(one.ratio for one in ones)
        peak = statistics.median(one.peak_per_s for one in ones)
        told = "; ".join(
            ", ".join(f"{key}: {statistics.median(one.get(key, 0.0) for one in parts):.2f}" for key in parts[0])
            for parts in ([one.by_priority for one in ones], [one.by_size for one in ones])
        )
        print(
            f"{case:29} {deadline:5g} batches  peak {peak:5.1f}/s  "
            f"goodput {statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})  {told}"
        )


if __name__ == "__main__":
    main()
