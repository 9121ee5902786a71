"""The exporter's OpenVINO."""

import subprocess
import sys
from pathlib import Path

import pytest

from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from tests.exporter.small_nets import PREPROCESS, small_net

pytest.importorskip("openvino", reason="needs OpenVINO")

SIGNAL_AFTER_TWO = """
import gc, os, signal, sys
from pathlib import Path
from convoynet.exporter.running.openvino import OpenVino
from tests.exporter.small_nets import PREPROCESS

signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
graph = Path(sys.argv[1])
older, younger = (OpenVino(graph, PREPROCESS, task="classification", threads=1) for _ in range(2))
for name in ("older", "younger"):
    del globals()[name]
    gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_compiled_graphs_have_gone_is_handled(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(onnx_from_torch(small_net(), PREPROCESS, uint8_input=False, opset=20).SerializeToString())
    command = [sys.executable, "-c", SIGNAL_AFTER_TWO, str(file)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "handled\n"), ran.stderr
