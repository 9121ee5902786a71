"""What it takes a command to start: seconds of CPU and of the clock until it has said what it has to say.

    python benchmarks/startup.py                                   this source
    python benchmarks/startup.py --before OTHER/src --save         beside another checkout's

Every command is a process of its own; each round runs all of them, of both sources in turn. Given are the median and
the least, which is nearest to what a quiet machine takes. The last two need PyTorch: they show that a network brings
its own libraries and no others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from convoynet.exporter.data.images import made_images
from convoynet.exporter.evidence import report

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "--help",
    "export --help",
    "archs",
    "export --arch resnet-101",
    "export --arch resnet50 --weights absent.pt",
    "inspect model.onnx",
    "lint model.onnx",
    "build absent.onnx --output a.plan --batch 1",
    "compare resnet999",
    "sweep --arch resnet-101 --calibration .",
    "predict --model m absent.jpg --url 127.0.0.1:1",
    "serve --model-repository absent",
    "token camera infer",
    "inspect resnet20",
    "inspect xception",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="SRC", help="the folder src/ of another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/startup.json")
    options = parser.parse_args(argv)
    sources = {"after": ROOT / "src"} if options.before is None else {"before": options.before, "after": ROOT / "src"}
    found = {
        "environment": report.environment(1),
        "rounds": options.rounds,
        "commands": measure(sources, options.rounds),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text if options.json else table(found["commands"]), end="")
    if options.save:
        (ROOT / "benchmarks" / "results" / "startup.json").write_text(text, encoding="utf-8")


def measure(sources: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each command from each source."""
    taken: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    with tempfile.TemporaryDirectory(prefix="convoy-startup-") as name:
        folder = Path(name)
        _write_model(folder / "model.onnx")
        _write_image(folder / "image.png")
        for _ in range(rounds):
            for command in COMMANDS:
                for source, path in sources.items():
                    taken.setdefault((command, source), []).append(_run(command, path.resolve(), folder))
    return {
        command: {
            source: {
                "exit_code": taken[command, source][0][2],
                "cpu_s": round(statistics.median(cpu for cpu, _, _ in taken[command, source]), 3),
                "least_cpu_s": round(min(cpu for cpu, _, _ in taken[command, source]), 3),
                "wall_s": round(statistics.median(wall for _, wall, _ in taken[command, source]), 3),
                "least_wall_s": round(min(wall for _, wall, _ in taken[command, source]), 3),
            }
            for source in sources
        }
        for command in COMMANDS
    }


def _run(command: str, source: Path, folder: Path) -> tuple[float, float, int]:
    """Seconds of CPU, seconds of the clock, and the exit code of `convoy COMMAND`."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "convoynet.server.cli", *command.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began, process.returncode


def _write_model(file: Path) -> None:
    """One convolution."""
    weights = numpy_helper.from_array(made_images(8, (3, 3), 3, 0).transpose(0, 3, 1, 2).astype("float32"), "weights")
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 32, 32])
    maps = helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", 8, 30, 30])
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "weights"], ["maps"])], "one", [image], [maps], [weights]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)


def _write_image(file: Path) -> None:
    from PIL import Image

    Image.fromarray(made_images(1, (32, 32), 3, 0)[0]).save(file)


def table(commands: dict[str, dict[str, Any]]) -> str:
    """Rows of docs/architecture.md."""
    lines = ["| `convoy …` | CPU, s | wall (least), s | exit code |", "|---|---|---|---|"]
    for command, found in commands.items():
        cells = (" → ".join(f"{figures[key]:.2f}" for figures in found.values()) for key in ("cpu_s", "least_wall_s"))
        codes = " → ".join(dict.fromkeys(str(figures["exit_code"]) for figures in found.values()))
        lines.append(f"| `{command}` | {' | '.join(cells)} | {codes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
