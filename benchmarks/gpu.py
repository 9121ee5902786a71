"""What a GPU does with the networks: bare engines by batch size and precision, served over gRPC, latency under load.

    make bench-gpu                                        everything; benchmarks/gpu.md says how to read it
    python benchmarks/gpu.py --only resnet50 --minutes 9  what fits; called again it goes on where it ended
    python benchmarks/gpu.py --list                       the rows, and which of them there are
    python benchmarks/gpu.py --device cpu --networks lenet5 --work /tmp/work   a smoke test, of which nothing is kept

Every case (a network, an engine, a precision) runs in a process of its own, and each of its rows is stored in
benchmarks/results/gpu-DEVICE.json as it comes. A row that fails is stored with the reason, and the rest goes on;
--again measures failed ones again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NETWORKS = ("resnet50", "resnet101", "vgg16", "googlenet", "efficientnet_b0")
BATCHES = ("1", "2", "4", "8", "16", "32", "64", "128")
BARE = {
    "cuda": {
        "pytorch eager": ("fp32",),
        "pytorch eager exact": ("fp32",),
        "pytorch channels-last": ("fp16",),
        "pytorch compile": ("fp16",),
        "onnxruntime cuda": ("fp32", "fp16", "int8"),
        "onnxruntime tensorrt": ("fp16", "int8"),
        "plan": ("fp32", "fp16", "bf16", "int8", "int8+fp16", "fp8"),
    },
    "cpu": {"pytorch eager": ("fp32",), "pytorch channels-last": ("bf16",), "onnxruntime cpu": ("fp32", "int8")},
}
SERVED = {
    "cuda": {"tensorrt": ("fp16", "int8+fp16"), "onnx": ("fp16",)},
    "cpu": {"onnx": ("int8",)},
}
WAYS = ("uint8 x1", "uint8 x32", "jpeg x1", "jpeg x8", "shm x1", "shm x32")
SHARES = ("50%", "90%", "99%")
FRONT_ENDS = ("1", "2", "4", "8")
# A case that takes longer is stuck: a build of TensorRT takes minutes, a row seconds.
_CASE_SECONDS = 900
_ROW = "ROW "


@dataclass(frozen=True)
class Case:
    """What runs in one process: `kind` is "bare", "served", "latency" or "frontends"; `rows` are what it measures."""

    kind: str
    network: str
    engine: str
    precision: str
    rows: tuple[str, ...]

    def key(self, row: str) -> str:
        """The row's name in the results."""
        return " | ".join((self.kind, self.network, self.engine, self.precision, row))


def cases(networks: Sequence[str], device: str) -> Iterator[Case]:
    """Everything, the most telling first: each network's bare engines, then what is served."""
    for network in networks:
        for engine, precisions in BARE[device].items():
            for precision in precisions:
                yield Case("bare", network, engine, precision, BATCHES)
        for kind, rows in (("served", WAYS), ("latency", SHARES)):
            for engine, precisions in SERVED[device].items():
                for precision in precisions:
                    yield Case(kind, network, engine, precision, rows)
    yield Case("frontends", "tiny", "fake", "fp32", FRONT_ENDS)


def main() -> int:
    """Parses, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has all of these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: 2)")
    parser.add_argument("--again", action="store_true", help="rows that failed as well")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu" / "bench", help="graphs, plans, models")
    parser.add_argument(
        "--results", type=Path, help="(default: benchmarks/results/gpu-DEVICE.json, or cpu.json in --work)"
    )
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        child(json.loads(arguments.case), arguments)
        return 0
    chosen = list(cases(arguments.networks, arguments.device))
    if arguments.only:
        chosen = [Case(**{**asdict(case), "rows": _matching(case, arguments.only)}) for case in chosen]
    store = Store(arguments.results or default_results(arguments.device, arguments.work), arguments.device)
    if arguments.list:
        for case in chosen:
            for row in case.rows:
                print(f"{'there' if store.has(case.key(row), failed=True) else '-':<6}{case.key(row)}")
        return 0
    run(chosen, store, arguments)
    failed = [key for key, row in store.rows.items() if "error" in row]
    print(f"{len(store.rows)} rows in {store.file}, of which {len(failed)} failed")
    if arguments.device == "cuda":
        gpu_report.write(store.stated, store.file.with_suffix(".png"))
    return 0


def _matching(case: Case, words: Sequence[str]) -> tuple[str, ...]:
    return tuple(row for row in case.rows if all(word in case.key(row) for word in words))


class Store:
    """The rows of one device, on disk after each."""

    def __init__(self, file: Path, device: str) -> None:
        self.file = file
        stated = json.loads(file.read_text()) if file.is_file() else {}
        self.rows: dict[str, dict[str, Any]] = stated.get("rows", {})
        self.stated = {"device": name_of(device), "environment": environment(device), "rows": self.rows}

    def has(self, key: str, *, failed: bool) -> bool:
        """Whether a row is there; one that failed counts where `failed` says so."""
        return key in self.rows and (failed or "error" not in self.rows[key])

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[key] = {name: _rounded(value) for name, value in row.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.stated, indent=1, allow_nan=False) + "\n")
        partial.replace(self.file)
        print(f"{key}: {json.dumps(self.rows[key])}", flush=True)


def run(chosen: Sequence[Case], store: Store, arguments: argparse.Namespace) -> None:
    """Every case that has rows to measure, until the time is up."""
    end = time.monotonic() + 60 * arguments.minutes
    for case in chosen:
        rows = tuple(row for row in case.rows if not store.has(case.key(row), failed=not arguments.again))
        if rows and time.monotonic() < end:
            run_case(Case(**{**asdict(case), "rows": rows}), store, arguments, end)


def run_case(case: Case, store: Store, arguments: argparse.Namespace, end: float) -> None:
    """One case in a process; what it does not come to before `end` is left for the next time, or else has failed."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--seconds", str(arguments.seconds)]
    command += ["--device", arguments.device, "--work", str(arguments.work)]
    arguments.work.mkdir(parents=True, exist_ok=True)
    until = min(time.monotonic() + _CASE_SECONDS, end)
    came = set()
    log_file = arguments.work / "case.log"
    # A session of its own, so that the server that it started ends with it.
    with (
        log_file.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True) as process,
    ):
        assert process.stdout is not None
        for line in _lines(process.stdout.fileno(), until):
            row, figures = json.loads(line)
            store.put(case.key(row), figures)
            came.add(row)
        late = time.monotonic() >= until
        if late:
            os.killpg(process.pid, signal.SIGKILL)
    said = [line.strip() for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    if late and until == end:
        return
    reason = f"took longer than {_CASE_SECONDS} s" if late else (said or [f"ended with {process.returncode}"])[-1]
    for row in case.rows:
        if row not in came:
            store.put(case.key(row), {"error": reason[:300]})


def _lines(descriptor: int, until: float) -> Iterator[str]:
    """The rows that a process prints, until it closes its output or the time is up."""
    begun = b""
    while (left := until - time.monotonic()) > 0 and select.select([descriptor], [], [], left)[0]:
        block = os.read(descriptor, 2**16)
        if not block:
            return
        *whole, begun = (begun + block).split(b"\n")
        for line in whole:
            text = line.decode(errors="replace")
            if text.startswith(_ROW):  # libraries print too
                yield text.removeprefix(_ROW)


def child(case: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Measure one case and print each row, as the parent reads it."""
    import gpu_engines
    import gpu_served

    kinds = {
        "bare": gpu_engines.measure,
        "served": gpu_served.measure,
        "latency": gpu_served.latency,
        "frontends": gpu_served.front_ends,
    }
    arguments.work.mkdir(parents=True, exist_ok=True)
    for row, figures in kinds[case["kind"]](case, arguments.seconds, arguments.device, arguments.work):
        print(_ROW + json.dumps([row, figures]), flush=True)


def name_of(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cpu":
        return platform.processor() or platform.machine()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no NVIDIA GPU that torch can use; --device cpu tries the benchmark itself")
    return torch.cuda.get_device_name()


def default_results(device: str, work: Path) -> Path:
    """Where a device's rows are; those of a CPU, which measure nothing, are no part of the project."""
    if device == "cpu":
        return work / "cpu.json"
    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name_of(device).lower()).strip('-')}.json"


def environment(device: str) -> dict[str, Any]:
    """What else the figures depend on."""
    import onnxruntime
    import torch

    from convoynet.exporter.tensorrt.library import find

    library = find()
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "tensorrt": library.title if library else None,
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"compute_capability": f"{major}.{minor}", "memory_bytes": torch.cuda.mem_get_info()[1]}
    return found


def _rounded(value: Any) -> Any:
    """Four digits; what is no number, such as the latency where nothing succeeded, as null."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    sys.exit(main())
