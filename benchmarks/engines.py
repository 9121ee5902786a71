"""What an engine process costs over the bare engine, and OpenVINO beside ONNX Runtime.

    python benchmarks/engines.py                          the shipped LeNet-5 in INT8, as exported here
    python benchmarks/engines.py --repository models --model resnet50 --threads 2 --save

For each engine that is installed: batches of 1, 8 and 32, run in this process by the bare engine and through an
EngineProcess whose batch comes from so many requests of one row. Both are loaded at once and take turns, run by run, so
that a machine that slows down slows both; medians are given, and the cost is the difference of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table
from serving import machine

from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.process import EngineProcess
from convoynet.server.repository import repository
from convoynet.server.spec import ModelSpec

BATCHES = (1, 8, 32)
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """Medians for one engine and batch size, in microseconds a batch."""

    model: str
    engine: str
    threads: int
    batch: int
    bare_us: float
    process_us: float

    @property
    def ratio(self) -> float:
        """Images per second of the process over those of the bare engine."""
        return self.bare_us / self.process_us


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, help="models that are exported already (default: export LeNet-5)")
    parser.add_argument("--model", help="one of them (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of each engine (default: 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each engine and batch size (default: 2)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/engines-MODEL.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convoy-bench-") as made:
        folder = arguments.repository or Path(made)
        if arguments.repository is None:
            convoy = str(Path(sys.executable).with_name("convoy"))
            export = ["export", "--arch", "lenet5", "--int8", "--max-batch", "32", "--model-repository", made, "--json"]
            subprocess.run([convoy, *export], check=True, stdout=subprocess.DEVNULL)
        found = [f for f in repository.scan(folder, repository.Defaults(1, arguments.threads)) if f.spec]
        specs = [f.spec for f in found if f.spec and arguments.model in (None, f.name)]
        rows = [row for spec in specs for row in uvloop.run(measure(spec, arguments.seconds))]
    show(rows)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"engines-{'-'.join(dict.fromkeys(r.model for r in rows))}.json"
        text = {"machine": machine(), "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
        file.write_text(json.dumps(text, indent=1) + "\n")


async def measure(spec: ModelSpec, seconds: float) -> list[Row]:
    """Every engine with every batch size that the model takes."""
    rows = []
    for engine in (name for name in ("onnxruntime", "openvino") if find_spec(name)):
        chosen = replace(spec, engine=replace(spec.engine, engine=engine))
        bare = engines.load(EngineSpec.of(chosen)).engine
        process = await EngineProcess.start(chosen)
        for batch in (b for b in BATCHES if b <= max(spec.batch.max_rows, 1)):
            times = await take_turns(bare, process, requests_for(chosen, batch), seconds)
            rows.append(Row(spec.name, engine, spec.engine.threads, batch, *times))
        await process.close()
        bare.close()
    return rows


def requests_for(spec: ModelSpec, batch: int) -> list[dict[str, np.ndarray]]:
    """Requests of one row each, of random numbers."""
    blank = EngineSpec.of(spec).blank(1)
    rng = np.random.default_rng(0)
    return [{n: rng.integers(0, 255, t.shape).astype(t.dtype) for n, t in blank.items()} for _ in range(batch)]


async def take_turns(
    bare: engines.Engine, process: EngineProcess, requests: list[dict[str, np.ndarray]], seconds: float
) -> tuple[float, float]:
    """Median microseconds of a batch: of the bare engine, on inputs that lie ready, and of the process."""
    inputs = {name: np.concatenate([r[name] for r in requests]) for name in requests[0]}
    alone, through = [], []
    until = time.perf_counter() + seconds
    while len(alone) < 5 or time.perf_counter() < until:
        begun = time.perf_counter()
        bare.run(inputs)
        between = time.perf_counter()
        await process.run(requests)
        alone.append(between - begun)
        through.append(time.perf_counter() - between)
    return statistics.median(alone) * 1e6, statistics.median(through) * 1e6


def show(rows: list[Row]) -> None:
    """One row an engine and batch size."""
    table = Table(title=f"microseconds a batch on {machine()}", box=None)
    for heading in ("model", "engine", "threads", "batch", "bare", "process", "cost", "process/bare", "images/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = f"{row.bare_us:,.0f}", f"{row.process_us:,.0f}", f"{row.process_us - row.bare_us:,.0f}"
        rate = f"{row.batch / row.process_us * 1e6:,.0f}"
        table.add_row(row.model, row.engine, str(row.threads), str(row.batch), *numbers, f"{row.ratio:.2f}", rate)
    Console(width=max(Console().width, 100)).print(table)


if __name__ == "__main__":
    main()
