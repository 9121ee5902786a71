"""Images per second of pruned and quantized networks, as multiples of PyTorch eager float32, each step's share shown.

    python benchmarks/compressed_speed.py                      ResNet-50 and VGG-16, random weights, on this CPU
    python benchmarks/compressed_speed.py --archs resnet50 --batch 8 --ratios 0.75

All variants of a network take turns in the same rounds. Random weights: this is about speed alone. Figures go into
benchmarks/results/compressed-speed.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.compression.prune import prune
from convoynet.exporter.data.images import made_images
from convoynet.exporter.evidence import report, speed
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Terminal
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.recipe import Prune
from convoynet.exporter.running.runtime import Array, Eager, Predictor, Session

RESULTS = Path(__file__).parent / "results" / "compressed-speed.json"
CALIBRATION = 32


def variants(arch: Arch, module: nn.Module, images: Array, ratios: Sequence[float]) -> Iterator[tuple[str, Any]]:
    """Yield name, and module or graph, of the network, and of the network pruned."""
    progress = Terminal()
    for ratio in (0.0, *ratios):
        name, one = "", module
        if ratio:
            name = f"pruned to {1 - ratio:.0%}"
            one, _ = prune(
                module,
                torch.zeros(1, arch.preprocess.channels, *arch.preprocess.size),
                Prune(ratio),
                target="cpu",
                batches=None,
                seed=0,
                latency=None,
                progress=progress,
            )
            weights.estimate_statistics(one, arch.preprocess.normalize(images[:16]))
        exact = onnx_from_torch(one, arch.preprocess, uint8_input=False)
        batches = (arch.preprocess.normalize(images[at : at + 8]) for at in range(0, len(images), 8))
        small = quantize(exact, calibrate(exact, batches, "minmax"), "cpu")
        yield " ".join(("PyTorch eager", name)).strip(), one
        yield " ".join(("float32", name)).strip(), exact
        yield " ".join(("INT8", name)).strip(), small


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make all variants of a network and time them in turn."""
    arch = archs.get(name)
    torch.manual_seed(0)
    module = arch.build(arch.num_classes)
    images = made_images(CALIBRATION, arch.preprocess.size, arch.preprocess.channels, 0)
    weights.load(module, arch, "random", seed=0, images=images)
    module = arch.deploy(module)
    rows: list[dict[str, Any]] = []
    predictors: list[Predictor] = []
    for label, made in variants(arch, module, images, options.ratios):
        row: dict[str, Any] = {"variant": label}
        if isinstance(made, onnx.ModelProto):
            content = made.SerializeToString()
            predictors.append(Session(content, arch.preprocess, task=arch.task, target="cpu", threads=options.threads))
            row["bytes"] = len(content)
        else:
            predictors.append(Eager(made, arch.preprocess))
            row["macs"] = archs.count(made, arch.input_size).macs
        rows.append(row)
    for batch in options.batch:
        chosen = images[np.arange(batch) % len(images)]
        seconds = speed.seconds_of_call([(one, one.prepare(chosen)) for one in predictors])
        for row, once in zip(rows, seconds, strict=True):
            row[f"images_per_second_{batch}"] = round(batch / once, 2)
            row[f"ratio_{batch}"] = round(seconds[0] / once, 3)
    return {"arch": name, "rows": rows}


def main() -> None:
    """Measure, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet50", "vgg16"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75], help="multiply-adds that go")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    networks = [measure(name, options) for name in options.archs]
    for network in networks:
        shown = Table(title=f"{network['arch']}, images/s and multiples of PyTorch eager")
        shown.add_column("variant")
        for batch in options.batch:
            shown.add_column(f"batch {batch}", justify="right")
        for row in network["rows"]:
            cells = [
                f"{row[f'images_per_second_{batch}']:.1f} ({row[f'ratio_{batch}']:.2f}x)" for batch in options.batch
            ]
            shown.add_row(row["variant"], *cells)
        Console().print(shown)
    found = {"networks": networks, "environment": report.environment(options.threads)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
