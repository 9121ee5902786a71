"""Export, quantize and verify every network of the zoo from random weights, one after another, each in a new process.

    make zoo                                     all of them: hours on 2 cores
    make zoo NAMES="resnet18 vgg16"              some; the others keep their lines
    python benchmarks/zoo.py --images DIR        photographs for the second part of the table

Each network is measured on images that are made here, the same on every machine; from these figures come the
thresholds of the regression tests (tests/exporter/studies/parity.json). Where there are photographs it is measured on
them as well, for docs/zoo.md. All figures go into benchmarks/results/zoo.json.

A network that breaks a promise is named at the end, and the exit code is 1: float32 further than 1e-4 from PyTorch (of
a detector: less than 99 % of the detections shared), more than 8 GB of memory, or an INT8 graph for GPUs that TensorRT
does not build.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from convoynet.exporter import archs, assets
from convoynet.exporter.errors import ExporterError
from convoynet.exporter.evidence import report
from convoynet.exporter.evidence.parity import Parity
from convoynet.exporter.progress import Terminal
from convoynet.exporter.recipe import DEFAULT_METHOD
from convoynet.exporter.studies import zoo

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
TABLE = ROOT / "docs" / "zoo.md"
THRESHOLDS = ROOT / "tests" / "exporter" / "studies" / "parity.json"
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_photos"
# Photographs to calibrate and to check, by the multiply-adds of an image: up to 8 G, up to 100 G, and more.
STATISTICS = 32
COUNTS = ((8e9, 32, 16), (100e9, 8, 8), (math.inf, 2, 2))
MAX_BYTES = 8e9
MIN_MATCHED = 0.99

_COLUMNS = (
    "network",
    "error ORT",
    "error OpenVINO",
    "SQNR cpu",
    "SQNR gpu",
    "agree cpu",
    "agree gpu",
    "size",
    "engine",
    "seconds",
    "GB",
)
_INTRODUCTION = """\
# Every network, measured

Random weights, batch statistics estimated on images, opset 20; what is exported is compared with PyTorch in float32 at
batch sizes 1, 2 and 5. INT8 is calibrated by {method} on {samples}
and compared on {checks} others, from {images}. `make zoo` makes this table again.

- **error**: largest difference of a float32 logit, as a share of the largest logit, in ONNX Runtime and OpenVINO; for
  detection, of a box's coordinate, as a share of the largest coordinate: 1e-1 and more is where random weights give
  several boxes a score of 1 (PyTorch's own float32 and float64 of `fasterrcnn_mobilenet_v3_large_fpn` are 2.5e-1 apart,
  and share 99.5 % of the detections). Segmentation networks run at 192x192 here, and
  detectors at 320x320 or their own size, if that is smaller. OpenVINO ran on made images, on which Inception v4 with
  random weights magnifies rounding a thousandfold: there PyTorch's own float32 is 3e-4 from its float64. Residual
  branches of EfficientNet, and of the ResNets under segmentation and detection, have a scale of 0.3 under random
  weights; without it they would do the same.
- **SQNR**: logits of PyTorch against the error of INT8, as a ratio of squares in dB. Higher is better.
- **agree**: share of images with the same first class; of pixels for segmentation; for detection, detections
  with a partner of the same label and IoU of at least 0.5. Random weights give logits that nearly tie, so agreement is
  far below that of trained networks ([measured](../README.md#measured)), and least for the detector whose random trunk
  of 101 layers magnifies every rounding: PyTorch's own float32 and float64 share 95 % of its detections on noise, and
  87 % of those of `retinanet_resnet50_fpn`, whose scores are all 1 on some of it.
- **size**: of the float32 and of the INT8 graph (for CPUs) in MB; **engine**: what TensorRT-RTX builds from the INT8
  graph for GPUs, in MB (built, not run).
- **seconds**, **GB**: of CPU time for all of this, one network in a process of its own, and the most memory that it had
  (of networks up to version 0.5 the seconds are those of the clock, on a machine that did nothing else). 8 GB are asked
  for, which three of the Faster R-CNNs do not keep.

`googlenet-2014` is the network of the paper's Table 1. `googlenet` is torchvision's, which has 3x3 kernels in the
branch of 5x5, batch normalisation and no response normalisation.
"""


def main() -> int:
    """Measure, write the three files, and say what broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks (default: all)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs, at any depth")
    arguments = parser.parse_args()
    folder = arguments.images or (PHOTOGRAPHS if PHOTOGRAPHS.is_dir() else None)
    names = arguments.names or archs.names()
    for name in names:
        archs.get(name)
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows: dict[str, Any] = {name: row for name, row in stored.get("networks", {}).items() if name in archs.names()}
    broken = []
    for name in Terminal().track(names, "networks", len(names)):
        # A process of its own: its memory is the network's, and what breaks breaks alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                rows[name] = pool.submit(measure, name, folder).result()
            except Exception as error:  # whatever it is, the others are still measured
                broken.append(f"{name}: {' '.join(str(error).split())}")
                continue
        problem = broken_promise(rows[name])
        if problem:
            broken.append(f"{name}: {problem}")
        sys.stderr.write(f"{name}: {_seconds(rows[name]):.0f} s, {rows[name]['peak_bytes'] / 1e9:.1f} GB\n")
        write(dict(sorted(rows.items())), name)
    for line in broken:
        sys.stderr.write(f"{line}\n")
    return 1 if broken else 0


def measure(name: str, folder: Path | None) -> dict[str, Any]:
    """Measure one network on made images and on photographs; runs in a process of its own."""
    pictures = zoo.pictures_for(name, None, zoo.TEST_SAMPLES, zoo.TEST_CHECKS)
    engine = folder is None
    found = {"made": asdict(zoo.measure(name, pictures, replace(zoo.REGRESSION, engine=engine)))}
    if folder is not None:
        macs = _macs(name)
        _, calibration, checks = next(row for row in COUNTS if macs <= row[0])
        pictures = zoo.pictures_for(name, folder, STATISTICS, checks)
        effort = zoo.Effort(calibration, batch=(1, 2), openvino=False, engine=True)
        measured = zoo.measure(name, pictures, effort)
        # Where the photographs lay is of this machine.
        named = measured.images.replace(str(folder), folder.name)
        found["photographs"] = asdict(replace(measured, images=named))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "peak_bytes": peak, "threads": torch.get_num_threads()}


def _macs(name: str) -> float:
    (row,) = (row for row in json.loads(assets.ZOO.read_text()) if row["name"] == name)
    return float(row["macs"])


def broken_promise(row: dict[str, Any]) -> str:
    """Say what a network should do and does not; empty where all is well."""
    best = _best(row)
    exact = best["parities"]["onnxruntime fp32"]
    error = exact["max_rel_error"]
    if exact["matched"] is not None:  # partners of two detections whose scores tie are anywhere
        if exact["matched"] < MIN_MATCHED:
            return f"float32 shares {exact['matched']:.1%} of PyTorch's detections, at least {MIN_MATCHED:.0%} asked"
    elif not error <= zoo.MAX_REL_ERROR:
        return f"float32 is {error:.1e} from PyTorch, allowed {zoo.MAX_REL_ERROR:.0e}"
    if row["peak_bytes"] > MAX_BYTES:
        return f"took {row['peak_bytes'] / 1e9:.1f} GB, allowed {MAX_BYTES / 1e9:.0f}"
    return "" if best["engine_bytes"] else "no engine was built"


def _best(row: dict[str, Any]) -> dict[str, Any]:
    """The measurement on photographs, where there is one."""
    found: dict[str, Any] = row.get("photographs") or row["made"]
    return found


def _seconds(row: dict[str, Any]) -> float:
    return sum(float(row[key]["seconds"]) for key in ("made", "photographs") if key in row)


def write(rows: dict[str, Any], measured: str) -> None:
    """Write results, thresholds and the table; the thresholds of all but the network measured now stay as they are."""
    machine = report.environment(0)
    stated = {key: machine[key] for key in ("cpu", "cpus", "python", "libraries")}
    RESULTS.write_text(json.dumps({"machine": stated, "networks": rows}, indent=1) + "\n")
    stored = json.loads(THRESHOLDS.read_text()) if THRESHOLDS.is_file() else {}
    limits = {
        name: stored[name] if name in stored and name != measured else zoo.thresholds(row["made"]["parities"])
        for name, row in rows.items()
    }
    THRESHOLDS.write_text(_json_by_line(limits))
    TABLE.write_text(table(rows))


def _json_by_line(limits: dict[str, Any]) -> str:
    """A line for each network, so that a change of one is a change of one line."""
    lines = [f" {json.dumps(name)}: {json.dumps(limit)}" for name, limit in limits.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table(rows: dict[str, Any]) -> str:
    """Return docs/zoo.md."""
    photographs = any("photographs" in row for row in rows.values())
    lines = [
        _INTRODUCTION.format(
            method=DEFAULT_METHOD,
            samples="32 images (8 for networks of more than 8 G multiply-adds, 2 of more than 100)",
            checks="16 (8, 2)",
            images="300 photographs",
        )
        if photographs
        else _INTRODUCTION.format(
            method=DEFAULT_METHOD,
            samples=f"{zoo.TEST_SAMPLES} images",
            checks=str(zoo.TEST_CHECKS),
            images="made ones (1/f noise)",
        ),
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for name, row in rows.items():
        best = _best(row)
        parities = best["parities"]
        cpu, gpu = (parities[f"onnxruntime int8 {target}"] for target in ("cpu", "gpu"))
        openvino = row["made"]["parities"].get("openvino fp32")
        sizes = f"{best['bytes']['fp32'] / 1e6:.1f} → {best['bytes']['int8 cpu'] / 1e6:.1f}"
        cells = [
            name,
            f"{parities['onnxruntime fp32']['max_rel_error']:.1e}",
            f"{openvino['max_rel_error']:.1e}" if openvino else "",
            *("" if side["sqnr_db"] is None else f"{side['sqnr_db']:.1f}" for side in (cpu, gpu)),
            *(f"{Parity.from_json(side).agreement:.0%}" for side in (cpu, gpu)),
            sizes,
            f"{best['engine_bytes'] / 1e6:.1f}" if best["engine_bytes"] else "none",
            f"{_seconds(row):.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [name for name in archs.names() if name not in rows]
    if missing:
        lines += ["", f"{zoo.UNMEASURED}: {', '.join(missing)}."]
    total = sum(_seconds(row) for row in rows.values())
    most = max(row["peak_bytes"] for row in rows.values())
    threads = " or ".join(str(number) for number in sorted({row["threads"] for row in rows.values()}))
    lines += [
        "",
        f"{len(rows)} networks in {total / 60:.0f} minutes, PyTorch threads: {threads}, at most {most / 1e9:.1f} GB, "
        f"the newest on {platform.machine()}: {report.environment(0)['cpu']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ExporterError as error:
        sys.exit(f"zoo: {error}")
