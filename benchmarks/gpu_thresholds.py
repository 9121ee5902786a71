"""The thresholds of tests/test_gpu_parity.py, out of what the same graphs lose on a CPU: tests/gpu_parity.json.

    python benchmarks/gpu_thresholds.py                    all of its networks: about an hour on 2 cores
    python benchmarks/gpu_thresholds.py resnet20 vgg16     some; the others keep their lines

No GPU has a part in it, so each bound has a margin for what a GPU does otherwise; the file's `basis` states it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from convoynet.exporter.evidence import limits as gates
from convoynet.exporter.evidence import verify
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.runtime import Eager, Predictor, Session
from convoynet.exporter.studies.precisions import PRECISIONS, Network

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "gpu_parity.json"
NETWORKS = ("resnet20", "googlenet", "efficientnet_b0", "resnet50", "vgg16", "resnet101")
# Sums in another order: cuDNN's fast convolutions round some thirty times as much as direct sums.
FP32_FACTOR, FP32_LEAST = 30, 1e-5
MARGIN_DB = {"fp16": 10.0, "bf16": 6.0, "int8": 4.0, "int8+fp16": 4.0, "fp8": 4.0}
BASIS = {
    "fp32": f"measured on a CPU (ONNX Runtime): max_rel_error, times {FP32_FACTOR}, {FP32_LEAST:g} at least and the "
    f"export's own gate, {gates.FP32_MAX_REL_ERROR:g}, at most. Reasoned: cuDNN's fast convolutions round more",
    "tf32": "reasoned: TF32 has FP16's 10 bits of fraction, and sums in float32: the bound of fp16",
    "fp16": f"measured on a CPU (ONNX Runtime, which sums in float32), less {MARGIN_DB['fp16']:g} dB for sums in FP16",
    "bf16": f"measured on a CPU (OpenVINO), less {MARGIN_DB['bf16']:g} dB",
    "int8": f"measured on a CPU (ONNX Runtime, the graph for GPUs), less {MARGIN_DB['int8']:g} dB: rounding tips over",
    "int8+fp16": f"the same, less {MARGIN_DB['int8+fp16']:g} dB",
    "fp8": f"the same, less {MARGIN_DB['fp8']:g} dB",
}
# Optimisations of ONNX Runtime 1.31 make something else of FP8 and of FP16 scales.
_BASIC = frozenset({"fp8", "int8+fp16"})


def main(names: Sequence[str]) -> int:
    """Measures, and writes after each network."""
    stored = json.loads(FILE.read_text())["limits"] if FILE.is_file() else {}
    for name in names or NETWORKS:
        stored[name] = limits(name)
        ordered = {name: stored[name] for name in NETWORKS if name in stored}
        FILE.write_text(text(ordered))
    return 0


def limits(name: str) -> dict[str, dict[str, float]]:
    """The bounds of one network: "max_rel_error" at most, or "sqnr_db" at least, in decibels."""
    network = Network(name)
    checks = network.pictures.check
    eager = Eager(network.module, network.arch.preprocess)
    reference = verify.Reference(eager.name, network.arch.task, verify.outputs_of(eager, checks), untrained=True)
    found: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        parity = verify.measure_parity(reference, _on_cpu(network, precision), checks, (1, 5)).parity
        if precision == "fp32":
            bound = min(max(FP32_FACTOR * parity.max_rel_error, FP32_LEAST), gates.FP32_MAX_REL_ERROR)
            found["fp32"] = {"max_rel_error": float(f"{bound:.1e}")}
            continue
        assert parity.sqnr_db is not None
        found[precision] = {"sqnr_db": round(parity.sqnr_db - MARGIN_DB[precision], 1)}
        if precision == "fp16":
            found["tf32"] = found["fp16"]
    return found


def text(limits_of: dict[str, dict[str, dict[str, float]]]) -> str:
    """The file: a line a network, so that changes can be read."""
    basis = ",\n".join(f"  {json.dumps(key)}: {json.dumps(line)}" for key, line in BASIS.items())
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in limits_of.items())
    return f'{{\n "basis": {{\n{basis}\n }},\n "limits": {{\n{rows}\n }}\n}}\n'


def _on_cpu(network: Network, precision: str) -> Predictor:
    graph, arch = network.graph(precision).SerializeToString(), network.arch
    threads = torch.get_num_threads()
    if precision == "bf16":
        return OpenVino(graph, arch.preprocess, task=arch.task, threads=threads)
    return Session(
        graph, arch.preprocess, task=arch.task, target="cpu", threads=threads, optimized=precision not in _BASIC
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
