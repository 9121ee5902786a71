"""What serving costs: images/s of the bare engine in a loop, of `convoy serve` over gRPC, and their ratio.

    make bench                                   LeNet-5 and ResNet-50 in INT8, as exported here
    python benchmarks/serving.py --rounds 5 --save
    python benchmarks/serving.py --before OTHER/src          beside the server of another checkout

The last core belongs to the load generator (`convoy bench`); the engine, bare or with the whole server around it,
has the others. Rounds are interleaved, bare then served, so that a machine that slows down slows both; ratios are
taken within a round and the median is given. Both sides have the same file, threads and session options, and one
image a request on the served side: the server forms the batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from convoy_server import CONVOY, SRC, convoy, pinned
from rich.console import Console
from rich.table import Table

CORES = sorted(os.sched_getaffinity(0))
ENGINE_CORES, LOAD_CORE = CORES[:-1], CORES[-1:]
EXPORTS = {
    "lenet5": ["--arch", "lenet5"],
    "resnet50": ["--arch", "resnet50", "--weights", "random", "--calibration-samples", "32", "--input", "uint8"],
    "resnet50-fp32-input": ["--arch", "resnet50", "--weights", "random", "--calibration-samples", "32"],
}
BATCHES = (1, 8, 32)
CONCURRENCY = (1, 8, 32)


@dataclass
class Round:
    """Images per second of one round: by batch size of the bare engine, by requests in flight of the server.

    `before` is what another checkout's server gave; empty where none is measured.
    """

    model: str
    bare: dict[int, float]
    served: dict[int, float]
    p99_ms: dict[int, float]
    before: dict[int, float]

    @property
    def ratio(self) -> float:
        """The server's best over the bare engine's best."""
        return max(self.served.values()) / max(self.bare.values())

    @property
    def faster(self) -> float:
        """The server's best over the best of the other checkout's."""
        return max(self.served.values()) / max(self.before.values())


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet5", "resnet50"], choices=sorted(EXPORTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: 4)")
    parser.add_argument("--repository", type=Path, help="models that are exported already (default: export them)")
    parser.add_argument("--convoy-flags", default="", help="further flags of `convoy serve`, in one text")
    parser.add_argument("--before", type=Path, metavar="SRC", help="the folder src/ of another checkout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving-<machine>.json")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        # Pinned already: every core that is left is the engine's.
        print(json.dumps(bare_loops(arguments.bare, arguments.seconds, len(CORES))))
        return
    if not ENGINE_CORES:
        raise SystemExit("this benchmark needs two cores at least: one for the load generator")
    with tempfile.TemporaryDirectory(prefix="convoy-bench-") as made:
        folder = str(arguments.repository or made)
        for name in arguments.models if arguments.repository is None else ():
            command = [CONVOY, "export", *EXPORTS[name], "--int8", "--name", name, "--model-repository", folder]
            subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)
        sources = [SRC] if arguments.before is None else [arguments.before.resolve(), SRC]
        rounds = [
            # Every second round the other way round: a machine gets slower or faster with time.
            measure(Path(folder), name, arguments, sources[:: -1 if number % 2 else 1])
            for number in range(arguments.rounds)
            for name in arguments.models
        ]
    show(rounds)
    if arguments.save:
        save(rounds)


def measure(repository: Path, model: str, arguments: argparse.Namespace, sources: list[Path]) -> Round:
    """One round: the bare loops, then the server of each source under load, on the same cores."""
    seconds = str(arguments.seconds)
    bare = run_on(ENGINE_CORES, [sys.executable, __file__, "--bare", str(repository / model), "--seconds", seconds])
    flags = ["--threads", str(len(ENGINE_CORES)), "--log-level", "error", *arguments.convoy_flags.split()]
    rates, p99_ms = {}, {}
    for source in sources:
        with convoy(repository, *flags, cores=ENGINE_CORES, source=source) as server:
            levels = ",".join(map(str, CONCURRENCY))
            load = [CONVOY, "bench", "--model", model, "--url", server.url, "--concurrency", levels]
            answers = json.loads(run_on(LOAD_CORE, [*load, "--duration", seconds, "--json"]))
        rates[source] = {a["concurrency"]: a["images_per_s"] for a in answers}
        p99_ms[source] = {a["concurrency"]: a["p99_ms"] for a in answers}
    before = next((rates[source] for source in sources if source != SRC), {})
    bare_rates = {int(batch): rate for batch, rate in json.loads(bare).items()}
    return Round(model, bare_rates, rates[SRC], p99_ms[SRC], before)


def run_on(cores: list[int], command: list[str]) -> str:
    """Runs a command on these cores alone and returns what it printed."""
    return subprocess.run(pinned(cores, command), check=True, text=True, stdout=subprocess.PIPE).stdout


def bare_loops(folder: Path, seconds: float, threads: int, batches: Sequence[int] = BATCHES) -> dict[int, float]:
    """Images per second of the engine that the server uses, in a loop with nothing around it, by batch size."""
    from convoynet.server import engines
    from convoynet.server.engines.base import EngineSpec
    from convoynet.server.repository import repository

    (found,) = (f for f in repository.scan(folder.parent, repository.Defaults(1, threads)) if f.name == folder.name)
    if found.spec is None:
        raise SystemExit(found.reason)
    spec = EngineSpec.of(found.spec)
    engine = engines.load(spec).engine
    rates = {}
    for batch in (b for b in batches if b <= found.spec.batch.max_rows):
        inputs = spec.blank(batch)
        engine.run(inputs)
        runs, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            engine.run(inputs)
            runs += 1
        rates[batch] = runs * batch / (time.perf_counter() - begun)
    engine.close()
    return rates


def show(rounds: list[Round]) -> None:
    """One row a model: medians over the rounds."""
    console = Console(width=max(Console().width, 110))
    table = Table(title=f"images/s on {machine()}, {len(ENGINE_CORES)} core(s) for the engine", box=None)
    for heading in ("model", *(f"bare b{b}" for b in BATCHES), *(f"served c{c}" for c in CONCURRENCY), "p99 ms c1"):
        table.add_column(heading, justify="right")
    table.add_column("served/bare (each round)", justify="right")
    for model in dict.fromkeys(r.model for r in rounds):
        mine = [r for r in rounds if r.model == model]

        def median(pick: str, key: int, mine: list[Round] = mine) -> str:
            values = [getattr(r, pick)[key] for r in mine if key in getattr(r, pick)]
            return f"{statistics.median(values):,.1f}" if values else "-"

        ratios = [r.ratio for r in mine]
        table.add_row(
            model,
            *(median("bare", b) for b in BATCHES),
            *(median("served", c) for c in CONCURRENCY),
            median("p99_ms", 1),
            f"{statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})",
        )
    console.print(table)
    for model in dict.fromkeys(r.model for r in rounds if r.before):
        faster = [r.faster for r in rounds if r.model == model]
        each = ", ".join(f"{ratio:.2f}" for ratio in faster)
        console.print(f"{model}: {statistics.median(faster):.2f} of the other checkout's rate (each round: {each})")


def save(rounds: list[Round]) -> None:
    """Writes the rounds beside the other results, with the machine's name."""
    name = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    file = Path(__file__).parent / "results" / f"serving-{name}.json"
    stated = {"machine": machine(), "cores": len(CORES), "rounds": [{**asdict(r), "ratio": r.ratio} for r in rounds]}
    file.write_text(json.dumps(stated, indent=2) + "\n")
    print(f"wrote {file}")


def machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return f"{found[1] if found else platform.processor()}, {len(CORES)} cores"


if __name__ == "__main__":
    main()
