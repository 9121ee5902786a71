"""EfficientNet-B0 in INT8: what the naive recipe loses, what ours does, and what `--max-drop 0.5` keeps in float.

    python benchmarks/efficientnet.py --train train/ --test test/

Both folders hold one folder for each of CIFAR-10's classes. The network is trained from random weights on the images
scaled to 48x48, and calibrated on some of the training images. Three kinds of INT8 for each target: ONNX Runtime's own
quantizer with one scale for each weight tensor and minmax ranges (the naive recipe), ours with minmax and with mse
ranges; then the search of `--max-drop` on every second test image, confirmed on the others. Speed is measured for the
graphs that are made for CPUs. Figures go into benchmarks/results/efficientnet.json; what is there already for the same
weights and images is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
import trained
from quantizers import RESULTS, TARGETS, Score, batches, ours, rival, row
from rich.console import Console
from rich.table import Table
from small_images import add_training, efficientnet_b0
from small_images import trained as train_it

from convoynet.exporter.compression.latency import seconds_of
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence import report
from convoynet.exporter.progress import Terminal
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.mixed_precision import Budget, search
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.quantization.sensitivity import sensitivity
from convoynet.exporter.recipe import Int8

NAIVE = {"gpu": "s8-minmax-tensor", "cpu": "u8-minmax-tensor"}
FILE = "efficientnet.json"


class Bench:
    """The float graph, inputs to calibrate on, and how graphs are scored."""

    def __init__(self, network: trained.Trained, options: argparse.Namespace) -> None:
        normalize = network.arch.preprocess.normalize
        self.options = options
        self.exact = network.graph
        self.inputs = normalize(network.images)
        tests = normalize(network.pictures)
        self.score = Score(network.graph, tests, network.labels, options.threads)
        self._halves = [
            partial(Score, network.graph, tests[part::2], network.labels[part::2], options.threads) for part in (0, 1)
        ]

    def mix(self, target: str) -> dict[str, Any]:
        """Search for the layers that have to stay in float."""
        began = time.perf_counter()
        ranges = calibrate(self.exact, batches(self.inputs), "mse")
        costs = sensitivity(self.exact, ranges, self.inputs, target, Terminal())
        build = partial(quantize, self.exact, ranges, target)
        budget = Budget(self.options.max_drop, *(half().accuracy for half in self._halves))
        try:
            found = search(self.exact, build, costs, budget, Terminal())
        except Refused as error:
            return {"refused": str(error), "seconds": round(time.perf_counter() - began, 1)}
        names = {cost.layer: cost.name for cost in costs}
        line = row(build(found.keep_float), time.perf_counter() - began, self.score)
        worst = sorted(costs, key=lambda cost: cost.sqnr_db)[:10]
        return line | {
            "kept_in_float": [names[layer] for layer in found.keep_float],
            "layers": len(costs),
            "worst_layers": {cost.name: round(cost.sqnr_db, 1) for cost in worst},
            "mix": found.to_json(),
        }

    def speed(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Images a second of the float graph, of INT8 and of the mix for CPUs, in turns."""
        ranges = calibrate(self.exact, batches(self.inputs), "mse")
        kept = rows["ours, cpu: max-drop"].get("mix", {}).get("keep_float", ())
        graphs: dict[str, onnx.ModelProto] = {
            "float32": self.exact,
            "ours, cpu: mse": quantize(self.exact, ranges, "cpu"),
            "ours, cpu: max-drop": quantize(self.exact, ranges, "cpu", kept),
        }
        found: dict[str, Any] = {"threads": self.options.threads}
        for batch in (1, 8):
            seconds = seconds_of(list(graphs.values()), batch=batch, threads=self.options.threads)
            found[f"batch {batch}"] = {name: round(batch / each, 1) for name, each in zip(graphs, seconds, strict=True)}
        return found


def measure(options: argparse.Namespace, former: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Train, quantize in every way, and score; yields what there is so far after each row."""
    torch.set_num_threads(options.threads)
    arch = efficientnet_b0()
    module, training = train_it(arch, options)
    network = trained.of_module(arch, module, training["weights_sha256"], options)
    bench = Bench(network, options)
    found: dict[str, Any] = {
        "arch": arch.name,
        "training": training,
        "calibration_images": len(network.images),
        "test_images": len(network.labels),
        "fp32_top1": round(bench.score.top1, 4),
        "max_drop": options.max_drop,
        "environment": report.environment(options.threads),
    }
    same = all(former.get(name) == value for name, value in found.items())
    rows = {line["quantizer"]: line for line in former["rows"]} if same else {}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    exact, inputs, score = bench.exact, bench.inputs, bench.score
    for target in TARGETS:
        jobs[f"naive, {target}"] = partial(rival, "onnxruntime", NAIVE[target], sys.executable, exact, inputs, score)
        for method in ("minmax", "mse"):
            jobs[f"ours, {target}: {method}"] = partial(ours, target, Int8(method=method), exact, inputs, score)
        jobs[f"ours, {target}: max-drop"] = partial(bench.mix, target)
    for name, job in jobs.items():
        if name not in rows:
            rows[name] = {"quantizer": name} | job()
        yield found | {"rows": [rows[each] for each in jobs if each in rows]}
    yield found | {"rows": [rows[each] for each in jobs], "images_per_second": bench.speed(rows)}


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    title = f"EfficientNet-B0, {found['test_images']} images, float32 top-1 {found['fp32_top1']:.2%}"
    table = Table(title=title)
    columns = ("quantizer", "top-1", "loss", "SQNR dB", "as TensorRT reads it", "in float", "multiply-adds in float")
    for column in columns:
        table.add_column(column, justify="left" if column == "quantizer" else "right")
    for line in found["rows"]:
        if "top1" not in line:
            table.add_row(line["quantizer"], line.get("refused") or line.get("left_out"))
            continue
        read = line["tensorrt"] if isinstance(line["tensorrt"], str) else f"{line['tensorrt']['top1']:.2%}"
        mix = line.get("mix")
        kept = (f"{len(mix['keep_float'])} of {line['layers']}", f"{mix['kept_macs']:.1%}") if mix else ("", "")
        figures = [f"{line['top1']:.2%}", f"{line['loss_points']:+.2f}", f"{line['sqnr_db']:.1f}", read]
        table.add_row(line["quantizer"], *figures, *kept)
    Console().print(table)
    Console().print(found["images_per_second"])


def main() -> None:
    """Measure, write the file after each row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, epochs=2, lr=0.04)
    parser.add_argument("--test", type=Path, required=True, metavar="DIR")
    parser.add_argument("--samples", type=int, default=448, help="training images to calibrate on (default 448)")
    parser.add_argument("--tests", type=int, default=5000, help="images to test on (default 5000)")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points of top-1 (default 0.5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.calibration = options.train
    path = RESULTS / FILE
    former = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for found in measure(options, former):
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
