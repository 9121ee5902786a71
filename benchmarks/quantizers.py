r"""Our INT8 beside ONNX Runtime's, NNCF's, ModelOpt's and onnxsim's own quantizers: same network, images and scores.

    python benchmarks/quantizers.py --weights resnet20.th --calibration train/ --test test/ \
        --nncf-python nncf/bin/python --modelopt-python modelopt/bin/python --onnxsim-python onnxsim/bin/python
    python benchmarks/quantizers.py --arch resnet56 --weights resnet56.th ...

Both folders hold one folder for each class. The tools' pins conflict, so each may have an interpreter of its own; one
that is not given is named as left out. All graphs run in ONNX Runtime on the CPU, those for GPUs too: their speed there
says nothing, their results do. `ms` is a batch of 8 in ONNX Runtime and in OpenVINO. What TensorRT would read
differently is scored once more as TensorRT reads it: it takes UINT8 for INT8 and does not parse zero points and INT32
biases. Figures go into benchmarks/results/quantizers.json, with one entry for each network, and the table beside it; a
run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import trained
from rich.console import Console

from convoynet.exporter import archs
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence import report
from convoynet.exporter.evidence.speed import seconds_of_call
from convoynet.exporter.graph.onnx_graph import Graph
from convoynet.exporter.progress import Terminal
from convoynet.exporter.quantization.calibrate import calibrate
from convoynet.exporter.quantization.quantize import quantize
from convoynet.exporter.quantization.refine import refine, sqnr_db
from convoynet.exporter.quantization.tensorrt_reading import as_tensorrt_reads
from convoynet.exporter.recipe import Int8
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.runtime import Array, Predictor, Session

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
WORKER = Path(__file__).with_name("quantizers_worker.py")
TARGETS = ("gpu", "cpu")
BATCH = 50
# What we make, for both targets.
OURS = {
    "mse": Int8(method="mse"),
    "auto": Int8(method="auto"),
    "mse, refined": Int8(method="mse", equalize=True, correct_bias=True),
    "mse, refined with adaround": Int8(method="mse", equalize=True, correct_bias=True, adaround=True),
}
RIVALS = {
    "onnxruntime": ("s8-minmax", "s8-entropy", "u8-minmax"),
    "nncf": ("default", "no-bias-correction"),
    "modelopt": ("max", "entropy"),
    "onnxsim": ("minmax", "mse"),
}
COLUMNS = (
    "quantizer", "top-1", "loss", "agreement", "SQNR dB", "as TensorRT reads it", "INT8 layers", "ms", "seconds",
)  # fmt: skip
SPEED_BATCH = 8
# All of the zoo's CIFAR networks take the same.
PIXELS, TASK = archs.get("resnet20").preprocess, archs.get("resnet20").task


class Score:
    """The test images, what float32 says of them, and how a graph differs."""

    def __init__(self, exact: onnx.ModelProto, inputs: Array, labels: Array, threads: int) -> None:
        self.inputs = inputs
        self._labels = labels
        self.threads = threads
        self._reference = self.logits(exact)
        self.top1 = self._top1(self._reference)

    def session(self, model: onnx.ModelProto) -> Session:
        """A graph in ONNX Runtime on the CPU."""
        return Session(model.SerializeToString(), PIXELS, task=TASK, target="cpu", threads=self.threads)

    def logits(self, model: onnx.ModelProto) -> Array:
        """Run a graph on the test images."""
        session = self.session(model)
        return np.concatenate([session(batch)[0] for batch in batches(self.inputs)])

    def __call__(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Compare a graph with float32."""
        found = self.logits(model)
        return {
            "top1": round(self._top1(found), 4),
            "loss_points": round(100 * (self.top1 - self._top1(found)), 2),
            "agreement": round(float((found.argmax(axis=1) == self._reference.argmax(axis=1)).mean()), 4),
            "sqnr_db": round(sqnr_db(self._reference, found), 2),
        }

    def accuracy(self, model: onnx.ModelProto) -> float:
        """The share of the test images that a graph gets right."""
        return self._top1(self.logits(model))

    def _top1(self, logits: Array) -> float:
        return float((logits.argmax(axis=1) == self._labels).mean())


def batches(images: Array, size: int = BATCH) -> Iterator[Array]:
    """Divide images, or inputs made of them."""
    return (images[at : at + size] for at in range(0, len(images), size))


def read_by_tensorrt(model: onnx.ModelProto) -> onnx.ModelProto | str:
    """The graph as TensorRT takes it, or why TensorRT does not parse it."""
    graph = Graph(model)
    dequantized = (graph.initializers.get(node.input[0]) for node in graph if node.op_type == "DequantizeLinear")
    if any(stored is not None and stored.data_type == onnx.TensorProto.INT32 for stored in dequantized):
        return "refused: INT32 bias"
    try:
        return as_tensorrt_reads(model)
    except BadInput:
        return "refused: zero point"


def milliseconds(model: onnx.ModelProto, score: Score) -> dict[str, float]:
    """A batch, in the median, in ONNX Runtime and in OpenVINO."""
    sides: dict[str, Predictor] = {
        "onnxruntime": score.session(model),
        "openvino": OpenVino(model.SerializeToString(), PIXELS, task=TASK, threads=score.threads),
    }
    seconds = seconds_of_call([(side, score.inputs[:SPEED_BATCH]) for side in sides.values()])
    return {name: round(1e3 * once, 2) for name, once in zip(sides, seconds, strict=True)}


def integer_layers(model: onnx.ModelProto) -> str:
    """How many of the layers with weights read integers on both sides."""
    graph = Graph(model)
    layers = [node for node in graph if node.op_type in {"Conv", "Gemm", "MatMul"}]
    whole = sum(all(graph.producer_type(name) == "DequantizeLinear" for name in node.input[:2]) for node in layers)
    return f"{whole} of {len(layers)}"


def row(model: onnx.ModelProto, seconds: float, score: Score) -> dict[str, Any]:
    """One line of the table."""
    read = read_by_tensorrt(model)
    if isinstance(read, str):
        tensorrt: Any = read
    else:
        tensorrt = "the same" if read == model else score(read)
    return {
        **score(model),
        "tensorrt": tensorrt,
        "int8_layers": integer_layers(model),
        "milliseconds": milliseconds(model, score),
        "seconds": round(seconds, 1),
    }


def ours(target: str, step: Int8, exact: onnx.ModelProto, inputs: Array, score: Score) -> dict[str, Any]:
    """Calibrate, refine as `step` says, quantize."""
    began = time.perf_counter()
    ranges = calibrate(exact, batches(inputs), step.method)
    refined = refine(exact, ranges, inputs, step, target, Terminal())
    made = quantize(refined.model, refined.ranges, target)
    line = row(made, time.perf_counter() - began, score)
    kept = [entry for entry in refined.log if entry["kept"]]
    return line | {"attempts": len(refined.log), "kept": len(kept), "log": refined.log}


def rival(
    tool: str, variant: str, python: str | None, exact: onnx.ModelProto, inputs: Array, score: Score
) -> dict[str, Any]:
    """Quantize by another tool, and score what it made."""
    with tempfile.TemporaryDirectory() as folder:
        made = run_rival(tool, variant, python, exact, inputs, Path(folder))
        if isinstance(made, str):
            return {"left_out": made}
        model, said = made
        return row(model, said["seconds"], score) | {"version": said["version"]}


def run_rival(
    tool: str, variant: str, python: str | None, exact: onnx.ModelProto, inputs: Array, folder: Path
) -> tuple[onnx.ModelProto, dict[str, Any]] | str:
    """Quantize by another tool, in the interpreter that has it: its graph and what it says, or why there is none."""
    if python is None:
        return f"no --{tool}-python was given"
    source, images, made = (folder / name for name in ("float.onnx", "images.npy", "made.onnx"))
    onnx.save(exact, source)
    np.save(images, inputs)
    command = [str(Path(python).absolute()), str(WORKER), tool, variant, str(source), str(images), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}, which is what a machine without memory does"
    if done.returncode or not made.is_file():
        return " ".join(done.stderr.strip().splitlines()[-1:])
    return onnx.load(made), json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace, former: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Export, quantize by every tool, and score; yields what there is so far after each row.

    Rows of `former`, from an earlier run on the same weights, images and machine, are not measured again. With
    `--again` those that are asked for are, on whatever machine, but for their speed and that machine's name.
    """
    network = trained.load(options)
    arch, images, pictures, labels, exact = (
        network.arch, network.images, network.pictures, network.labels, network.graph,
    )  # fmt: skip
    preprocess = arch.preprocess
    score = Score(exact, preprocess.normalize(pictures), labels, options.threads)
    inputs = preprocess.normalize(images)
    conditions: dict[str, Any] = {
        "arch": arch.name,
        "weights_sha256": network.sha256,
        "calibration_images": len(images),
        "test_images": len(labels),
        "fp32_top1": round(score.top1, 4),
        "environment": report.environment(options.threads),
    }
    if options.again and former:
        conditions["environment"] = former["environment"]
    same = all(former.get(name) == value for name, value in conditions.items())
    timed = former.get("fp32_milliseconds") if same else None
    conditions["fp32_milliseconds"] = timed or milliseconds(exact, score)
    rows = {line["quantizer"]: line for line in former["rows"] if "left_out" not in line} if same else {}
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for tool, variants in RIVALS.items():
        # What ships with the exporter needs no other interpreter.
        python = getattr(options, f"{tool}_python", sys.executable)
        jobs |= {f"{tool}: {name}": partial(rival, tool, name, python, exact, inputs, score) for name in variants}
    for method, step in OURS.items():
        jobs |= {f"ours, {target}: {method}": partial(ours, target, step, exact, inputs, score) for target in TARGETS}
    for name, job in jobs.items():
        if (options.again or name not in rows) and any(re.search(text, name) for text in options.only):
            known = {key: value for key, value in rows.get(name, {}).items() if key == "milliseconds"}
            rows[name] = {"quantizer": name} | job() | known
            yield conditions | {"rows": [rows[name] for name in jobs if name in rows]}


def speed(milliseconds: dict[str, float] | None) -> str:
    """In ONNX Runtime / in OpenVINO; rows of older runs have none."""
    return "" if milliseconds is None else f"{milliseconds['onnxruntime']:.2f} / {milliseconds['openvino']:.2f}"


def cells(line: dict[str, Any]) -> list[str]:
    """A row of the table as texts."""
    if "left_out" in line:
        return [line["quantizer"], f"left out: {line['left_out']}", *[""] * (len(COLUMNS) - 2)]
    read = line["tensorrt"]
    if isinstance(read, dict):
        read = f"{read['sqnr_db']:.1f} dB, {read['top1']:.2%}"
    return [
        f"{line['quantizer']} ({line['version']})" if "version" in line else line["quantizer"],
        f"{line['top1']:.2%}",
        f"{line['loss_points']:+.2f}",
        f"{line['agreement']:.2%}",
        f"{line['sqnr_db']:.1f}",
        read,
        line["int8_layers"],
        speed(line.get("milliseconds")),
        f"{line['seconds']:.0f}",
    ]


def markdown(name: str, found: dict[str, Any]) -> str:
    """One network's table; `loss` is in points of top-1, `agreement` with float32's first class."""
    title = (
        f"## {name}\n\n{found['calibration_images']} calibration images, {found['test_images']} test images, "
        f"float32 top-1 {found['fp32_top1']:.2%}; {found['environment']['cpu']}, {found['environment']['threads']} "
        "thread(s). Loss in points of top-1. `ms`: a batch of 8 in ONNX Runtime / OpenVINO; float32 "
        f"{speed(found.get('fp32_milliseconds'))}.\n\n"
    )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(line) for line in found["rows"])]
    return title + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Measure one network, and write the file and the table of all of them."""
    parser = trained.parser(__doc__, samples=448, tests=5000)
    for tool in ("nncf", "modelopt", "onnxsim"):
        parser.add_argument(f"--{tool}-python", metavar="PATH", help=f"interpreter that has {tool}")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PATTERN", help="only rows whose name matches one")
    parser.add_argument("--again", action="store_true", help="measure rows that are there again, but for their speed")
    parser.add_argument("--name", help="the entry in the results (default: the network's)")
    options = parser.parse_args()
    name = options.name or options.arch
    path = RESULTS / "quantizers.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for found in measure(options, results.get(name, {})):
        Console().print(f"{len(found['rows'])} rows", highlight=False)
        results[name] = found
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        tables = "\n".join(markdown(name, results[name]) for name in sorted(results))
        path.with_suffix(".md").write_text(f"# Quantizers side by side\n\n{tables}", encoding="utf-8")


if __name__ == "__main__":
    main()
