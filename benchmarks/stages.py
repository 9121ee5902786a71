"""Where a request's CPU time goes in the default front end and the core behind it, by a sampling profiler.

    pip install py-spy                                          into any environment
    python benchmarks/stages.py --py-spy PATH/TO/py-spy
    python benchmarks/stages.py --before OTHER/src              beside another checkout's

`convoy serve --frontends 1` with an engine that only adds up a row, in a process that is not counted, and the load of
frontends.py. py-spy looks at what the server's threads do while they run, without stopping them. A sample belongs to
the innermost function of the server's own, with the libraries and system calls that it calls, or else to the event
loop. The samples' shares are given in microseconds of the process's CPU a request.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from convoy_server import SRC
from frontends import CONFIG, load, request, serving

_OURS = re.compile(r"(\S+) \(\S*convoynet/server/(\S+?):\d+\)")
STAGES = {
    "the event loop: reading sockets, waking up; all of grpcio": (),
    "writing to clients, with what the kernel does then": ("http2/sending.py _flush",),
    "HTTP/2": ("http2/",),
    "calls, rights": ("frontend/", "security/"),
    "requests and answers as bytes, checks": ("protocol/",),
    "queue, batches": ("scheduling/", "models/"),
    "copies into the batch and out of it, memory": ("engines/rows.py", "memory/"),
    "messages to the engine's process": ("engines/",),
    "counting": ("observing/",),
    "other": ("",),
}
"""By the beginnings of a file and function; the first that fits."""


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[4, 150], help="of the tensor in a request")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=10, help="of each profile (default: 10)")
    parser.add_argument("--before", type=Path, metavar="SRC", help="the folder src/ of another checkout")
    parser.add_argument("--py-spy", default=shutil.which("py-spy"), metavar="FILE", help="where that is not on PATH")
    arguments = parser.parse_args()
    arguments.client = "h2load"
    if arguments.py_spy is None or shutil.which("h2load") is None:
        raise SystemExit("this needs py-spy (pip install py-spy, or --py-spy FILE) and h2load (nghttp2-client)")
    sources = {"now": SRC} if arguments.before is None else {"before": arguments.before.resolve(), "now": SRC}
    columns = {}
    for kilobytes in arguments.kilobytes:
        for name, source in sources.items():
            columns[f"{kilobytes} KB, {name}"] = profile(source, kilobytes, arguments)
    report(columns)


def profile(source: Path, kilobytes: int, arguments: argparse.Namespace) -> tuple[Counter[str], float]:
    """Samples of each stage, and microseconds of CPU a request."""
    with tempfile.TemporaryDirectory(prefix="convoy-bench-") as made:
        version = Path(made, "models", "tiny", "1")
        version.mkdir(parents=True)
        (version / "model.json").write_text("{}")
        (version.parent / "config.pbtxt").write_text(CONFIG)
        body, asked, found = Path(made, "body"), request(kilobytes), Path(made, "found")
        body.write_bytes(b"\0" + struct.pack(">I", len(asked)) + asked)
        with serving("convoy", Path(made, "models"), source) as (pid, url):
            load(url, body, argparse.Namespace(**{**vars(arguments), "seconds": 1}))
            command = [arguments.py_spy, "record", "--nonblocking", "--rate", "250", "--format", "raw"]
            command += ["--duration", str(arguments.seconds), "--output", str(found), "--pid", str(pid)]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as spying:
                used = cpu_seconds(pid)
                rate = load(url, body, arguments)
                used = cpu_seconds(pid) - used
                if spying.wait():
                    raise SystemExit("py-spy failed: it needs the right to look at other processes")
        samples: Counter[str] = Counter()
        for line in found.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            samples[stage(stack)] += int(count)
    return samples, used * 1e6 / (rate * arguments.seconds)


def stage(stack: str) -> str:
    """Where a sample belongs."""
    for frame in reversed(stack.split(";")):
        if (own := _OURS.fullmatch(frame)) is None or own[2].startswith(("serve.py", "cli.py")):
            continue
        place = f"{own[2]} {own[1].rpartition('.')[2]}"
        return next(name for name, begins in STAGES.items() if place.startswith(begins))
    return next(iter(STAGES))


def cpu_seconds(pid: int) -> float:
    """CPU time of one process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(columns: dict[str, tuple[Counter[str], float]]) -> None:
    """A table in Markdown."""
    print("| microseconds a request (share of the samples) |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name in STAGES:
        cells = []
        for samples, microseconds in columns.values():
            share = samples[name] / samples.total()
            cells.append(f"{share * microseconds:.1f} ({share:.0%})")
        print(f"| {name} |", " | ".join(cells), "|")
    print("| all |", " | ".join(f"{microseconds:.0f}" for _, microseconds in columns.values()), "|")


if __name__ == "__main__":
    main()
