"""What calibration takes beside a plain pass over the same images in the fastest runtime installed.

    python benchmarks/calibration_time.py --images photos/ mobilenet_v2 resnet50 resnet101

Networks of the zoo with random weights, default method. Loading of the images is no part of either; that of the graph
is one of calibration's. All run in turn, a few rounds, and the fastest of each counts; CPU seconds are those of all
threads, and say more where others use the machine as well. `times_from_files` is what a user waits for: both with the
seconds that reading and resizing the images takes. Figures are added to benchmarks/results/calibration-time.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from convoynet.exporter import archs
from convoynet.exporter.archs import weights
from convoynet.exporter.data.images import calibration_images
from convoynet.exporter.evidence import report
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.running.runtime import Array

FILE = Path(__file__).parent / "results" / "calibration-time.json"
BATCH = 8


def timed(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and CPU seconds of the fastest run of each."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began, cpu = time.perf_counter(), time.process_time()
            run()
            found[name].append((time.perf_counter() - began, time.process_time() - cpu))
    return {
        name: {"seconds": round(min(seconds), 2), "cpu_seconds": round(min(cpu_seconds), 2)}
        for name, (seconds, cpu_seconds) in ((name, zip(*times, strict=True)) for name, times in found.items())
    }


def plain_passes(content: bytes) -> Iterator[tuple[str, Callable[[Array], Any]]]:
    """What runs a batch, in each runtime."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    yield "ONNX Runtime", lambda batch: session.run(None, {name: batch})
    if importlib.util.find_spec("openvino"):
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        yield "OpenVINO", lambda batch: compiled([batch])


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both for one network."""
    arch = archs.get(name)
    began = time.perf_counter()
    images, _ = calibration_images(arch.preprocess, options.images, options.samples, 0, name)
    loading = time.perf_counter() - began
    torch.manual_seed(0)
    module = arch.build(arch.num_classes)
    weights.load(module, arch, "random", seed=0, images=images)
    model = onnx_from_torch(arch.deploy(module), arch.preprocess, uint8_input=True)
    parts = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    runs: dict[str, Callable[[], Any]] = {}
    for runtime, run in plain_passes(model.SerializeToString()):
        run(parts[0])
        runs[runtime] = lambda run=run: [run(part) for part in parts]
    plain = list(runs)
    runs["calibrate"] = lambda: calibrate(model, iter(parts), "mse")
    found: dict[str, Any] = {"images": len(images), "macs": archs.count(module, arch.input_size).macs}
    found |= timed(runs, options.repeats)
    for key, told in (("seconds", "times_a_plain_pass"), ("cpu_seconds", "cpu_times_a_plain_pass")):
        found[told] = round(found["calibrate"][key] / min(found[runtime][key] for runtime in plain), 2)
    fastest = min(found[runtime]["seconds"] for runtime in plain)
    found["loading_seconds"] = round(loading, 2)
    found["times_from_files"] = round((found["calibrate"]["seconds"] + loading) / (fastest + loading), 2)
    return found | {"environment": report.environment(torch.get_num_threads()) | {"load": os.getloadavg()[0]}}


def main() -> None:
    """Measure, print and add to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--samples", type=int, default=268)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    everything = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name in options.networks:
        found = everything[name] = measure(name, options)
        print(name, {key: value for key, value in found.items() if key != "environment"}, flush=True)
        FILE.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
