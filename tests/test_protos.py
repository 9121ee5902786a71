"""The generated code in protos/ is what the .proto files give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("protos/**/*.proto"))
    kinds = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *kinds, *sources], cwd=ROOT, check=True)
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*")}
    committed = {p.relative_to(ROOT): p.read_bytes() for p in ROOT.glob("protos/**/*_pb2*") if p.suffix != ".pyc"}
    committed = {p: text for p, text in committed.items() if "__pycache__" not in p.parts}
    assert committed == fresh, "run `make proto` and commit what it writes"
