"""What each layer of a trained network costs in INT8, and which layers `search` keeps in float for a given budget.

    python benchmarks/mixed_precision.py --weights resnet20.th --calibration train/ --test test/
    python benchmarks/mixed_precision.py --arch resnet56 --weights resnet56.th --calibration train/ --test test/

Both folders hold one folder for each class. Every second image of the test folder searches, the others confirm. The
budget is in points of agreement: of images whose class is that of the float32 network. It is stricter than accuracy,
where an image that is lost and one that is won cancel out. Figures go into
benchmarks/results/mixed-precision-ARCH.json, the plots of the sensitivity beside them.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import trained
from rich.console import Console
from rich.table import Table

from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence import report
from convoynet.exporter.progress import Terminal
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.float16 import to_bf16, to_fp16
from convoynet.exporter.quantization.mixed_precision import Budget, Score, search
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.quantization.sensitivity import LayerCost, plot, sensitivity
from convoynet.exporter.running import openvino
from convoynet.exporter.running.runtime import Array, Session

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TARGETS = ("cpu", "gpu")
BATCH = 50
OPSET = 22  # the first in which a Conv has bfloat16


def sqnr_db(exact: Array, found: Array) -> float:
    """Signal-to-noise ratio in decibels."""
    return round(float(10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum())), 2)


class Network:
    """The float32 graph of a trained network, images for it, and what it says of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        network = trained.load(options, OPSET)
        self.arch, self.sha256, self.graph = network.arch, network.sha256, network.graph
        self.pictures, self.labels = network.pictures, network.labels
        self.threads = options.threads
        self.preprocess = self.arch.preprocess
        self.inputs = self.preprocess.normalize(network.images)
        batches = (self.inputs[at : at + BATCH] for at in range(0, len(self.inputs), BATCH))
        self.ranges = calibrate(self.graph, batches, "mse")
        self.exact = self.logits(self.graph, self.pictures)

    def logits(self, graph: onnx.ModelProto, pictures: Array) -> Array:
        """What a graph says of some of the pictures, in ONNX Runtime on the CPU."""
        session = Session(
            graph.SerializeToString(), self.preprocess, task="classification", target="cpu", threads=self.threads
        )
        parts = [session(session.prepare(pictures[at : at + BATCH]))[0] for at in range(0, len(pictures), BATCH)]
        return np.concatenate(parts)

    def agreement(self, part: int) -> Score:
        """The share of every second picture, beginning with number `part`, whose class is that of the float graph."""
        classes = self.exact[part::2].argmax(axis=1)
        return lambda graph: float((self.logits(graph, self.pictures[part::2]).argmax(axis=1) == classes).mean())

    def figures(self, graph: onnx.ModelProto) -> dict[str, float]:
        """Noise and accuracy of a graph on all pictures."""
        found = self.logits(graph, self.pictures)
        return {"sqnr_db": sqnr_db(self.exact, found), "top1": float((found.argmax(axis=1) == self.labels).mean())}


def mixes(network: Network, target: str, costs: list[LayerCost], budgets: list[float]) -> list[dict[str, Any]]:
    """Search at each budget."""
    build = partial(quantize, network.graph, network.ranges, target)
    rows = []
    for points in budgets:
        began = time.perf_counter()
        row: dict[str, Any] = {"budget_points": points}
        try:
            budget = Budget(points, network.agreement(0), network.agreement(1))
            mix = search(network.graph, build, costs, budget, Terminal())
        except Refused as error:
            row["refused"] = str(error)
        else:
            row |= {"mix": mix.to_json()} | network.figures(build(mix.keep_float))
        rows.append(row | {"seconds": round(time.perf_counter() - began, 1)})
    return rows


def halves(network: Network) -> dict[str, Any]:
    """What half precision costs, and INT8 with it. ONNX Runtime has no bfloat16 on the CPU; OpenVINO has."""
    int8 = quantize(network.graph, network.ranges, "gpu")
    found: dict[str, Any] = {
        "fp16": network.figures(to_fp16(network.graph, network.ranges)),
        "int8 + fp16": network.figures(to_fp16(int8, network.ranges)),
    }
    if openvino.installed():
        model = to_bf16(network.graph).SerializeToString()
        runner = openvino.OpenVino(model, network.preprocess, task="classification", threads=network.threads)
        some = network.pictures[: 4 * BATCH]
        parts = [runner(runner.prepare(some[at : at + BATCH]))[0] for at in range(0, len(some), BATCH)]
        found["bf16"] = {"sqnr_db": sqnr_db(network.exact[: len(some)], np.concatenate(parts)), "images": len(some)}
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one network."""
    network = Network(options)
    name = network.arch.name
    targets: dict[str, Any] = {}
    for target in TARGETS:
        began = time.perf_counter()
        costs = sensitivity(network.graph, network.ranges, network.inputs, target, Terminal())
        seconds = round(time.perf_counter() - began, 1)
        plot(costs, RESULTS / f"sensitivity-{name}-{target}.png", f"{name} for {target}")
        targets[target] = {
            "int8": network.figures(quantize(network.graph, network.ranges, target)),
            "sensitivity_seconds": seconds,
            "layers": [cost.to_json() for cost in costs],
            "mixes": mixes(network, target, costs, options.budgets),
        }
    return {
        "arch": name,
        "weights_sha256": network.sha256,
        "calibration_images": len(network.inputs),
        "test_images": len(network.labels),
        "fp32_top1": float((network.exact.argmax(axis=1) == network.labels).mean()),
        "half_precision": halves(network),
        "targets": targets,
        "environment": report.environment(options.threads),
    }


def show(found: dict[str, Any]) -> None:
    """Print the searches."""
    table = Table(title=f"{found['arch']}, {found['test_images']} images, float32 top-1 {found['fp32_top1']:.2%}")
    for column in ("target", "budget", "layers kept", "multiply-adds kept", "SQNR", "top-1", "trials", "seconds"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for target, of_target in found["targets"].items():
        int8 = of_target["int8"]
        table.add_row(target, "none", "0", "0.0%", f"{int8['sqnr_db']:.1f} dB", f"{int8['top1']:.2%}")
        for row in of_target["mixes"]:
            if "refused" in row:
                table.add_row(target, f"{row['budget_points']:g}", "refused")
                continue
            mix = row["mix"]
            kept = f"{len(mix['keep_float'])} of {len(of_target['layers'])}"
            figures = [f"{row['sqnr_db']:.1f} dB", f"{row['top1']:.2%}", str(len(mix["trials"])), str(row["seconds"])]
            table.add_row(target, f"{row['budget_points']:g}", kept, f"{mix['kept_macs']:.1%}", *figures)
    Console().print(table)


def main() -> None:
    """Measure, print the table and write the file."""
    parser = trained.parser(__doc__, samples=256, tests=1000, tests_for="search and to confirm on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 1.0], help="points (default 2 and 1)")
    options = parser.parse_args()
    found = measure(options)
    show(found)
    path = RESULTS / f"mixed-precision-{found['arch']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
