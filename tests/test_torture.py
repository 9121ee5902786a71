"""The campaign of faults, shortened: one stack, two front ends, some rounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("stack", "frontends"), [("grpcio", "2"), ("native", "1")])
def test_a_server_stays_alive_and_right_under_faults(stack: str, frontends: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "torture.py"), "--minutes", "0.3"]
    done = subprocess.run(
        [*command, "--stacks", stack, "--frontends", frontends], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
