"""What each calibration method keeps of a trained network's accuracy, for both targets.

    python benchmarks/calibration.py --weights resnet20.th --calibration train/ --test test/
    python benchmarks/calibration.py --arch resnet56 --weights resnet56.th --calibration train/ --test test/

Both folders hold one folder for each class. The quantized graphs run in ONNX Runtime on the CPU, that for GPUs too:
its speed there says nothing, its results do. Figures go into benchmarks/results/calibration-ARCH.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trained
from rich.console import Console
from rich.table import Table

from convoynet.exporter.evidence import report
from convoynet.exporter.quantization.calibrate import METHODS, calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.running.runtime import Array, Session

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TARGETS = ("cpu", "gpu")
BATCH = 50


def batches(images: Array) -> Iterator[Array]:
    """Divide images, or inputs made of them."""
    return (images[at : at + BATCH] for at in range(0, len(images), BATCH))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate by every method, quantize for both targets, and compare with the float32 graph."""
    network = trained.load(options)
    arch, images, pictures, labels, exact = (
        network.arch, network.images, network.pictures, network.labels, network.graph,
    )  # fmt: skip
    preprocess = arch.preprocess

    def logits(graph: bytes, target: str) -> Array:
        session = Session(graph, preprocess, task="classification", target=target, threads=options.threads)
        return np.concatenate([session(session.prepare(batch))[0] for batch in batches(pictures)])

    reference = logits(exact.SerializeToString(), "cpu")
    rows = []
    for method in METHODS:
        began = time.perf_counter()
        ranges = calibrate(exact, batches(preprocess.normalize(images)), method)
        row: dict[str, Any] = {"method": method, "seconds": round(time.perf_counter() - began, 1)}
        row["tensors"] = dict(Counter(span.method for span in ranges.values()))
        for target in TARGETS:
            found = logits(quantize(exact, ranges, target).SerializeToString(), target)
            noise = np.square(reference - found).sum() / np.square(reference).sum()
            top1 = float((found.argmax(axis=1) == labels).mean())
            row[target] = {"sqnr_db": round(float(-10 * np.log10(noise)), 2), "top1": top1}
        rows.append(row)
    return {
        "arch": arch.name,
        "weights_sha256": network.sha256,
        "calibration_images": len(images),
        "test_images": len(labels),
        "fp32_top1": float((reference.argmax(axis=1) == labels).mean()),
        "methods": rows,
        "environment": report.environment(options.threads),
    }


def main() -> None:
    """Measure, print the table and write the file."""
    options = trained.parser(__doc__, samples=256, tests=1000).parse_args()
    found = measure(options)
    table = Table(title=f"{found['arch']}, {found['test_images']} images, float32 top-1 {found['fp32_top1']:.2%}")
    for column in ("method", *(f"{figure} {target}" for target in TARGETS for figure in ("SQNR", "top-1")), "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in found["methods"]:
        figures = [text for t in TARGETS for text in (f"{row[t]['sqnr_db']:.1f} dB", f"{row[t]['top1']:.2%}")]
        table.add_row(row["method"], *figures, f"{row['seconds']:.1f}")
    Console().print(table)
    path = RESULTS / f"calibration-{found['arch']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
