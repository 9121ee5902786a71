"""Measure one network of the zoo from random weights: parity in float32 and INT8, for both targets.

`benchmarks/zoo.py` runs it over the whole registry; the regression tests run it against the thresholds recorded there.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from convoynet.exporter import archs
from convoynet.exporter.archs import Arch, weights
from convoynet.exporter.data.images import calibration_images
from convoynet.exporter.engine_options import BuildOptions, Profile
from convoynet.exporter.evidence import verify
from convoynet.exporter.evidence.parity import Parity
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.progress import Quiet
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.recipe import DEFAULT_METHOD
from convoynet.exporter.running import openvino
from convoynet.exporter.running.pictures import Pictures, divide
from convoynet.exporter.running.runtime import Eager, Images, Session
from convoynet.exporter.tensorrt import library
from convoynet.exporter.tensorrt.build import build as build_engine

# Begins the line of docs/zoo.md that owns up to networks without figures.
UNMEASURED = "Not measured yet"
# Images of the regression tests. Batch statistics of fewer than 32 make deep networks magnify every rounding.
TEST_SAMPLES, TEST_CHECKS = 32, 8
SEED = 0
_CALIBRATION_BATCH = 4
# Square inputs of at most so many pixels a side. At 800 pixels five images of a detector would take 12 GB in three
# runtimes, and at 520 those of a segmentation network an hour; their layers are the same.
_SIDES = {"segmentation": 192, "detection": 320}
# Float32 of any network and any processor.
MAX_REL_ERROR = 1e-4
# Between processors. Errors of float32 sums in another order, with and without fused multiply-add, differ by a few
# times. Where there is no VNNI, products of eight bits are added in pairs to 16 bits, and saturate: that costs up to
# half of the decibels (in OpenVINO LeNet-5 falls from 95 to 75, VGG for CIFAR from 19 to 10).
_ERROR_MARGIN = 10.0
_SQNR_MARGIN_DB = 6.0
_SQNR_SHARE = 0.5
# Of detections with random weights few survive INT8, and a graph that is broken keeps none of them.
_MATCHED_MARGIN = 0.2
_MATCHED_SHARE = 0.25
# PyTorch's side of the check, whose size must not matter.
_REFERENCE_BATCH = 4


@dataclass(frozen=True)
class Measured:
    """What one network came to on one set of images.

    Attributes:
        images: where those that check came from.
        parities: with PyTorch: "onnxruntime fp32", "onnxruntime int8 cpu", "onnxruntime int8 gpu", and where OpenVINO
            was asked for and is installed "openvino fp32" and "openvino int8 cpu".
        bytes: size of the graph: "fp32", "int8 cpu", "int8 gpu".
        engine_bytes: of the TensorRT engine built from the graph for a GPU; None where none was asked for, or there is
            no builder.
        builder: what built it.
        seconds: of CPU time, for everything.
    """

    name: str
    task: str
    images: str
    parities: dict[str, Parity]
    bytes: dict[str, int]
    engine_bytes: int | None
    builder: str | None
    seconds: float


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        calibration: images to calibrate on; batch statistics are estimated on up to 32 in any case.
        batch: smallest and largest batch; see verify.batch_plan.
        openvino: whether to compare in OpenVINO as well, where it is installed.
        engine: whether to let TensorRT build the graph for a GPU, where it is installed.
        side: of square inputs, in pixels; None for the size at which the zoo is measured.
    """

    calibration: int
    batch: tuple[int, int]
    openvino: bool
    engine: bool
    side: int | None = None


# Batch sizes 1, 2 and 5, each once.
REGRESSION = Effort(calibration=32, batch=(1, 5), openvino=True, engine=False)


def pictures_for(name: str, folder: Path | None, samples: int, checks: int, side: int | None = None) -> Pictures:
    """Images of a folder, or where there is none the same on every machine: made ones, packaged digits for LeNet-5."""
    preprocess = network(name, side).preprocess
    images, source = calibration_images(preprocess, folder, samples + checks, SEED, name)
    return divide(images, source, samples, checks)


def network(name: str, side: int | None = None) -> Arch:
    """A network of the zoo at the size at which it is measured, or with square inputs of `side` pixels."""
    arch = archs.get(name)
    own = max(arch.preprocess.size)
    side = side or min(_SIDES.get(arch.task, own), own)
    if side == own:
        return arch
    return replace(arch, preprocess=replace(arch.preprocess, size=(side, side), resize=side))


def measure(name: str, pictures: Pictures, effort: Effort) -> Measured:
    """Export, quantize for both targets and compare with PyTorch.

    Raises:
        BadInput: the network cannot be exported, or TensorRT does not take its graph.
    """
    began = time.process_time()
    arch = network(name, effort.side)
    torch.manual_seed(SEED)
    module = arch.build(arch.num_classes)
    weights.load(module, arch, "random", seed=SEED, images=pictures.calibration)
    eager = Eager(module, arch.preprocess)
    outputs = verify.outputs_of(eager, pictures.check, _REFERENCE_BATCH)
    reference = verify.Reference(eager.name, arch.task, outputs, untrained=True)
    exact = onnx_from_torch(module, arch.preprocess, task=arch.task, uint8_input=False)
    del module, eager
    gc.collect()
    graphs = _graphs(arch, exact, pictures.calibration[: effort.calibration])
    del exact
    builder = library.find() if effort.engine else None
    return Measured(
        name=name,
        task=arch.task,
        images=pictures.check_source,
        parities=_parities(arch, graphs, pictures, reference, effort),
        bytes={label: len(graph) for label, graph in graphs.items()},
        engine_bytes=_engine_bytes(graphs["int8 gpu"]) if builder else None,
        builder=f"{builder.name} {builder.version}" if builder else None,
        seconds=round(time.process_time() - began, 1),
    )


def _engine_bytes(graph: bytes) -> int:
    return len(build_engine(graph, BuildOptions((Profile(1, 2, 5),)), Quiet()).content)


def _graphs(arch: Arch, exact: onnx.ModelProto, images: Images) -> dict[str, bytes]:
    batches = (images[at : at + _CALIBRATION_BATCH] for at in range(0, len(images), _CALIBRATION_BATCH))
    ranges = calibrate(exact, (arch.preprocess.normalize(batch) for batch in batches), DEFAULT_METHOD)
    quantized = {f"int8 {target}": quantize(exact, ranges, target) for target in ("cpu", "gpu")}
    return {label: graph.SerializeToString() for label, graph in {"fp32": exact, **quantized}.items()}


def _parities(
    arch: Arch, graphs: dict[str, bytes], pictures: Pictures, reference: verify.Reference, effort: Effort
) -> dict[str, Parity]:
    found = {}
    for label, graph in graphs.items():
        target = "gpu" if label.endswith("gpu") else "cpu"
        session = Session(graph, arch.preprocess, task=arch.task, target=target, threads=torch.get_num_threads())
        found[f"onnxruntime {label}"] = verify.measure_parity(reference, session, pictures.check, effort.batch).parity
        del session
        if effort.openvino and target == "cpu" and openvino.installed():
            compiled = openvino.OpenVino(graph, arch.preprocess, task=arch.task, threads=torch.get_num_threads())
            found[f"openvino {label}"] = verify.measure_parity(reference, compiled, pictures.check, effort.batch).parity
    return found


def thresholds(parities: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What a later measurement of the same network must reach, from the figures of this one.

    Returns:
        By runtime and graph: "max_rel_error" at most, "sqnr_db" at least, or "matched" at least.
    """
    limits: dict[str, dict[str, float]] = {}
    for label, parity in parities.items():
        if parity["task"] == "detection":
            measured = parity["matched"]
            limits[label] = {"matched": round(max(measured - _MATCHED_MARGIN, measured * _MATCHED_SHARE), 2)}
        elif "int8" in label:
            measured = parity["sqnr_db"]
            limits[label] = {"sqnr_db": round(min(measured - _SQNR_MARGIN_DB, measured * _SQNR_SHARE), 1)}
        else:
            error = parity["max_rel_error"]
            # What is within the promise is held to it; beyond it are networks that amplify PyTorch's own rounding.
            allowed = _ERROR_MARGIN * error if error > MAX_REL_ERROR else min(MAX_REL_ERROR, _ERROR_MARGIN * error)
            limits[label] = {"max_rel_error": float(f"{allowed:.1e}")}
    return limits


def violations(parities: Mapping[str, Mapping[str, Any]], limits: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Name what does not reach its threshold; runtimes that are not installed here are passed over."""
    found = []
    for label, limit in limits.items():
        for figure, bound in limit.items():
            value = parities.get(label, {}).get(figure)
            if label not in parities and label.startswith("openvino"):
                continue
            within = value is not None and (value <= bound if figure == "max_rel_error" else value >= bound)
            if not within:
                found.append(f"{label}: {figure} {value}, threshold {bound}")
    return found
