"""What the output `explanation` costs where it is asked for: the same graph with and without it, in turns.

    python benchmarks/explanation_cost.py --save
    python benchmarks/explanation_cost.py --archs resnet20 --batch 1 8
    python benchmarks/explanation_cost.py --all --counters --batch 8 --save

Each network has random weights, which do not change the time. Both graphs are loaded into one engine with one thread
and run in turns; a round's ratio is of the CPU time of the process, so that the machine may be busy. Given is the
median of the rounds and the middle half, and whether the scores are other bits than without the output. Beside it
stands what share of the time the engine's own counters see in the nodes that the output brings: no other work is in
that, nor what the nodes that were there have to do otherwise; `--counters` looks at these alone. Where nobody asks for
the output a server runs the graph that has none (docs/explaining.md), and there is nothing to measure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch

from convoynet.exporter import archs
from convoynet.exporter.archs import facts, weights
from convoynet.exporter.data.images import made_images
from convoynet.exporter.evidence import report
from convoynet.exporter.explaining.grad_cam import explained
from convoynet.exporter.graph.onnx_from_torch import OUTPUT_NAME, onnx_from_torch
from convoynet.exporter.graph.onnx_session import make_session, session_options
from convoynet.exporter.outputs_asked import EXPLAIN_CLASS, EXPLANATION
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.running.openvino import core, properties

RESULTS = Path(__file__).parent / "results"
FILE, COUNTERS = "explanation-cost.json", "explanation-counters.json"
ARCHS = ("resnet20", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50")
ENGINES = ("ONNX Runtime", "OpenVINO")
CALIBRATION = 8
MOST_MACS = 2e9
"""Of a network that `--all` measures: larger ones take minutes for a batch, of which the map has a smaller part."""
COUNTED = 12
"""Calls of which the engine counts the time of each node."""
LEAST_ROUND, ROUNDS, LONG_ENOUGH = 0.1, 21, 40.0
"""Seconds of a side of a round, rounds, and seconds after which there are no more than five of them."""
Run = Callable[[], list[np.ndarray]]


def main() -> None:
    """Measures, prints, and writes where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument("--all", action="store_true", help=f"all classifiers of up to {MOST_MACS / 1e9:g} G of MACs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--counters", action="store_true", help="the engines' counters alone")
    parser.add_argument(
        "--save", action="store_true", help=f"write benchmarks/results/{FILE} or {COUNTERS}, and the table beside it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    file = RESULTS / (COUNTERS if options.counters else FILE)
    for name in small_classifiers() if options.all else options.archs:
        rows += measure(name, options.batch, counters_alone=options.counters)
        sys.stderr.write(f"{name} is measured\n")
        if options.save:
            found = {"environment": report.environment(1), "rows": rows}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            file.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    sys.stdout.write(markdown(rows))


def small_classifiers() -> list[str]:
    """Of the zoo, those that `--all` means, the smallest first."""
    known = sorted(facts.recorded().values(), key=lambda each: each.macs)
    return [each.name for each in known if each.task == "classification" and each.macs <= MOST_MACS]


def measure(name: str, batches: Sequence[int], *, counters_alone: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each batch, precision and engine."""
    arch = archs.get(name)
    torch.manual_seed(0)
    module = arch.build(arch.num_classes)
    images = made_images(max(CALIBRATION, *batches), arch.preprocess.size, arch.preprocess.channels, 0)
    weights.load(module, arch, "random", seed=0, images=images[:CALIBRATION])
    exact = onnx_from_torch(arch.deploy(module), arch.preprocess, uint8_input=False)
    inputs = arch.preprocess.normalize(images)
    small = quantize(exact, calibrate(exact, [inputs[:CALIBRATION]], "minmax"), "cpu")
    for precision, plain in (("float32", exact), ("INT8", small)):
        asked = explained(plain)
        for batch, engine in itertools.product(batches, ENGINES):
            pair = [made(engine, graph, inputs[:batch]) for graph in (plain, asked)]
            without, beside = (run() for run in pair)
            counted = [counters(engine, graph, inputs[:batch]) for graph in (plain, asked)]
            row: dict[str, Any] = {"network": name, "batch": batch, "precision": precision, "engine": engine}
            row |= {"added": added_share(*counted), "equal": bool(np.array_equal(without[0], beside[0]))}
            if not counters_alone:
                once, ratios = in_turns(*pair)
                row |= {"milliseconds": once * 1e3, "ratio": float(np.median(ratios))}
                row["middle_half"] = [float(np.percentile(ratios, share)) for share in (25, 75)]
            yield row


def made(engine: str, graph: onnx.ModelProto, inputs: np.ndarray) -> Run:
    """A call of a graph, of which all outputs are asked; the class is the winner."""
    content = graph.SerializeToString()
    outputs = [OUTPUT_NAME, *(output.name for output in graph.graph.output if output.name == EXPLANATION)]
    taken = next(value.name for value in graph.graph.input if value.name != EXPLAIN_CLASS)
    if engine == ENGINES[0]:
        session = make_session(content, session_options(1), ["CPUExecutionProvider"])
        return lambda: list(session.run(outputs, {taken: inputs}))
    request = compiled(content, taken, inputs, {}).create_infer_request()
    wanted = {taken: inputs}

    def run() -> list[np.ndarray]:
        request.infer(wanted, share_inputs=True, share_outputs=True)
        return [request.get_tensor(output).data.copy() for output in outputs]

    return run


def compiled(content: bytes, taken: str, inputs: np.ndarray, more: dict[str, str]) -> openvino.CompiledModel:
    """OpenVINO's model for one size of batch, as in the server, which knows the rows of a batch."""
    network = core().read_model(content)
    network.reshape({taken: list(inputs.shape)})
    return core().compile_model(network, "CPU", dict(properties(1)) | more)


def counters(engine: str, graph: onnx.ModelProto, inputs: np.ndarray) -> dict[str, float]:
    """Seconds that each node took by the engine's counters: of several calls the least."""
    content = graph.SerializeToString()
    taken = next(value.name for value in graph.graph.input if value.name != EXPLAIN_CLASS)
    times: dict[str, list[float]] = defaultdict(list)
    if engine == ENGINES[0]:
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(1)
            options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
            session = make_session(content, options, ["CPUExecutionProvider"])
            for _ in range(COUNTED):
                session.run(None, {taken: inputs})
            for event in json.loads(Path(session.end_profiling()).read_text()):
                if event["name"].endswith("_kernel_time"):
                    times[event["name"]].append(event["dur"] * 1e-6)
    else:
        request = compiled(content, taken, inputs, {"PERF_COUNT": "YES"}).create_infer_request()
        for _ in range(COUNTED):
            request.infer({taken: inputs}, share_inputs=True)
            for node in request.get_profiling_info():
                times[node.node_name].append(node.real_time.total_seconds())
    return {name: min(each) for name, each in times.items()}


def added_share(plain: dict[str, float], asked: dict[str, float]) -> float:
    """The time of the explanation's own nodes, as a share of the plain graph's; each is named after the output."""
    return sum(taken for name, taken in asked.items() if EXPLANATION in name) / sum(plain.values())


def in_turns(plain: Run, asked: Run) -> tuple[float, list[float]]:
    """Seconds of CPU that a call without the output takes, and the ratio of each round."""
    begun = time.process_time()
    plain()
    calls = max(1, round(LEAST_ROUND / max(time.process_time() - begun, 1e-6)))
    times, ratios = [], []
    begun = time.process_time()
    for number in range(ROUNDS):
        if number >= 5 and time.process_time() - begun > LONG_ENOUGH:
            break
        order = (plain, asked) if number % 2 else (asked, plain)
        taken = {run: cpu_of(run, calls) for run in order}
        times.append(taken[plain] / calls)
        ratios.append(taken[asked] / taken[plain])
    return float(np.median(times)), ratios


def cpu_of(run: Run, calls: int) -> float:
    """Seconds of CPU of several calls."""
    begun = time.process_time()
    for _ in range(calls):
        run()
    return time.process_time() - begun


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each network and batch, a column for each precision and engine."""
    kinds = [(precision, engine) for precision in ("float32", "INT8") for engine in ENGINES]
    lines = ["| network, batch | " + " | ".join(f"{engine}, {precision}" for precision, engine in kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    by_kind = {(row["network"], row["batch"], row["precision"], row["engine"]): row for row in rows}
    for name, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        cells = []
        for kind in kinds:
            row = by_kind[name, batch, *kind]
            cell = f"added nodes {100 * row['added']:.1f} %" + ("" if row["equal"] else ", other bits")
            if "ratio" in row:
                low, high = (100 * (bound - 1) for bound in row["middle_half"])
                times = f"{row['milliseconds']:.2f} ms {100 * (row['ratio'] - 1):+.1f} % ({low:+.1f} to {high:+.1f})"
                cell = f"{times}, {cell}"
            cells.append(cell)
        lines.append(f"| {name}, {batch} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
