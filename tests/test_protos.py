"""The generated code in protos/ is what the .proto files give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
PROTOS = SOURCE / "convoynet" / "protos" / "inference"


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    sources = sorted(str(p.relative_to(SOURCE)) for p in PROTOS.glob("*.proto"))
    assert sources
    kinds = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *kinds, *sources], cwd=SOURCE, check=True)
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*")}
    committed = {p.relative_to(SOURCE): p.read_bytes() for p in PROTOS.glob("*_pb2*")}
    assert committed == fresh, "run `make proto` and commit what it writes"
