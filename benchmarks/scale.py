"""What a request costs in each process of a server, by load, and what more cores would make of that.

    python benchmarks/scale.py                      4 KB and 150 KB, one front end and two
    python benchmarks/scale.py --rounds 5 --save

CPU seconds are counted for the core process, the front ends, the engine and the load generator (h2load). The model: no
process does more than one core's worth, and all of them no more than the machine has. On this machine it is held
against what was measured, as `measured` divided by `predicted`. For other machines the load generator is left out, as
it is elsewhere, and front ends are as many as `--frontends auto` makes. The engine adds up a row: a real one takes more
cores, which is for benchmarks/serving.py to say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import struct
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from convoy_server import Address, convoy
from frontends import METHOD
from serving import machine

from convoynet.protos.inference import grpc_service_pb2 as pb

RESULTS = Path(__file__).parent / "results"
SIZES = {"4 KB": 1024, "150 KB": 37_632}
"""Numbers of a row."""
CORES = (2, 4, 8, 16, 32)
CONFIG = """backend: "fake" max_batch_size: 32 dynamic_batching {{ }}
input {{ name: "x" data_type: TYPE_FP32 dims: [{width}] }} output {{ name: "y" data_type: TYPE_FP32 dims: [10] }}
"""


@dataclass(frozen=True)
class Cost:
    """One measurement: requests/s, and microseconds of CPU for each in the processes of a kind.

    Attributes:
        predicted: What the model says of this machine.
    """

    size: str
    frontends: int
    in_flight: int
    requests_per_s: float
    core_us: float
    front_us: float
    engine_us: float
    load_us: float
    predicted: float


def body(width: int) -> bytes:
    """A request of gRPC."""
    message = pb.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="x", datatype="FP32", shape=[1, width])
    message.raw_input_contents.append(np.zeros(width, np.float32).tobytes())
    written = message.SerializeToString()
    return b"\0" + struct.pack(">I", len(written)) + written


def seconds_by_kind(root: int) -> dict[str, float]:
    """CPU seconds of a server's processes so far."""
    found = dict.fromkeys(("core", "front", "engine"), 0.0)
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    for pid in (root, *map(int, children)):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        kind = "core" if pid == root else "front" if b"convoynet.server.frontend" in command else "engine"
        found[kind] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def possible(cores: int, front_ends: int, core_us: float, front_us: float, rest_us: float) -> float:
    """Requests/s that a machine can do: of each process, of all front ends, and of all cores."""
    limits = [1e6 / core_us, 1e6 * cores / (core_us + front_us + rest_us)]
    if front_us:
        limits.append(1e6 * front_ends / front_us)
    return min(limits)


def measured(server: Address, file: Path, load: tuple[str, int, int], seconds: int) -> Cost:
    """One load: size, front ends, in flight."""
    (size, frontends, in_flight), root = load, server.process.pid
    connections = min(in_flight, 8)
    command = ["h2load", "-t1", f"-c{connections}", f"-m{in_flight // connections}", f"-D{seconds}", "-d", str(file)]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{server.url}{METHOD}"]
    before, used = seconds_by_kind(root), resource.getrusage(resource.RUSAGE_CHILDREN)
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after, now = seconds_by_kind(root), resource.getrusage(resource.RUSAGE_CHILDREN)
    done, rate = re.search(r"(\d+) succeeded, 0 failed", text), re.search(r"finished in .*?, ([\d.]+) req/s", text)
    if done is None or rate is None:
        raise SystemExit(f"h2load said: {text}")
    a_request = 1e6 / int(done[1])
    cost = {kind: (after[kind] - before[kind]) * a_request for kind in before}
    load_us = (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) * a_request
    cores = len(os.sched_getaffinity(0))
    predicted = possible(cores, frontends, cost["core"], cost["front"], cost["engine"] + load_us)
    return Cost(
        size, frontends, in_flight, float(rate[1]), cost["core"], cost["front"], cost["engine"], load_us, predicted
    )


def measure(options: argparse.Namespace) -> list[Cost]:
    """Every load, round after round."""
    found = []
    with tempfile.TemporaryDirectory(prefix="convoy-scale-") as made:
        for size, width in SIZES.items():
            models, file = Path(made, size, "models"), Path(made, size, "body")
            version = models / "tiny" / "1"
            version.mkdir(parents=True)
            (version / "model.json").write_text("{}")
            (version.parent / "config.pbtxt").write_text(CONFIG.format(width=width))
            file.write_bytes(body(width))
            for _ in range(options.rounds):
                for frontends in (1, 2):
                    flags = ("--log-level", "error", "--frontends", str(frontends))
                    with convoy(models, *flags) as server:
                        for in_flight in options.in_flight:
                            load = size, frontends, in_flight
                            found.append(measured(server, file, load, options.seconds))
                        time.sleep(0.2)
    return found


def medians(found: list[Cost]) -> list[Cost]:
    """One line for each load."""
    keys = list(dict.fromkeys((cost.size, cost.frontends, cost.in_flight) for cost in found))
    lines = []
    for key in keys:
        same = [asdict(cost) for cost in found if (cost.size, cost.frontends, cost.in_flight) == key]
        rest = {name: statistics.median(cost[name] for cost in same) for name in list(same[0])[3:]}
        lines.append(Cost(*key, **rest))
    return lines


def automatic(cores: int) -> int:
    """How many front ends a server has on a machine of so many cores."""
    return 1 if cores <= 4 else min(16, cores // 4)


def larger(lines: list[Cost]) -> list[dict[str, object]]:
    """What the model makes of other machines, by the heaviest load of each size."""
    found: list[dict[str, object]] = []
    for size in SIZES:
        for cores in CORES:
            front_ends = automatic(cores)
            of_size = [cost for cost in lines if cost.size == size and cost.frontends == min(front_ends, 2)]
            cost = max(of_size, key=lambda each: each.in_flight)
            rate = possible(cores, front_ends, cost.core_us, cost.front_us, cost.engine_us)
            found.append({"size": size, "cores": cores, "frontends": front_ends, "requests_per_s": round(rate)})
    return found


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement (default: 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scale.json")
    options = parser.parse_args()
    lines = medians(measure(options))
    for cost in lines:
        print(
            f"{cost.size:>7}, {cost.frontends} front end(s), {cost.in_flight:4} in flight: {cost.requests_per_s:7.0f}/s"
            f", us: core {cost.core_us:4.0f}, front ends {cost.front_us:4.0f}, engine {cost.engine_us:4.0f}, load"
            f" {cost.load_us:4.0f}; of what is predicted {cost.requests_per_s / cost.predicted:.2f}"
        )
    others = larger(lines)
    for line in others:
        print("by the model: {size:>7} on {cores:2} cores, {frontends} front end(s): {requests_per_s}/s".format(**line))
    if options.save:
        whole = {"machine": machine(), "measured": [asdict(cost) for cost in lines], "model": others}
        (RESULTS / "scale.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
