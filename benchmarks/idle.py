"""What a server takes that nobody asks: the CPU time of all its processes, as a share of one core.

    python benchmarks/idle.py                       three models of LeNet-5 as the package carries it, for 60 s
    python benchmarks/idle.py --seconds 20 --frontends 2 --save

It is let be for some seconds first, in which the models have just been loaded. CPU time is counted, not looked at, so
that other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convoy_server import CONVOY, SRC, convoy, from_source
from serving import machine

RESULT = Path(__file__).parent / "results" / "idle.json"
MODELS = ("a", "b", "c")
_SETTLE_SECONDS = 10
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measures, and prints the share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to look (default: %(default)g)")
    parser.add_argument("--frontends", type=int, default=1, help="front ends of the server (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name} into benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            command = [CONVOY, "export", "--arch", "lenet5", "--name", name, "--model-repository", folder]
            subprocess.run(command, check=True, stdout=sys.stderr, env=from_source(SRC))
        with convoy(Path(folder), "--frontends", str(options.frontends)) as server:
            time.sleep(_SETTLE_SECONDS)
            processes = family(server.process.pid)
            before, begun = cpu_seconds(processes), time.monotonic()
            time.sleep(options.seconds)
            share = (cpu_seconds(processes) - before) / (time.monotonic() - begun)
    print(f"{len(MODELS)} models, {len(processes)} processes: {share:.2%} of a core")
    if options.save:
        found = {
            "models": len(MODELS),
            "processes": len(processes),
            "seconds": options.seconds,
            "share_of_a_core": share,
        }
        RESULT.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


def family(process: int) -> list[int]:
    """A process and all that came from it."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(other for child in children for other in family(int(child)))]


def cpu_seconds(processes: list[int]) -> float:
    """User and system time together."""
    stats = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / _TICKS


if __name__ == "__main__":
    main()
