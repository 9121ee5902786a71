"""Files that break the rules of ONNX: each command has one line for them, and never calls it a bug of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Files of one process: a library that takes its process down is found by the file and the command that came last.
CHUNK = 100
USABLE, NOT_USABLE, REFUSED, MISSING = 0, 2, 3, 4


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 40), *(pytest.param(first, CHUNK, marks=pytest.mark.slow) for first in range(0, 20 * CHUNK, CHUNK))],
)
def test_no_file_makes_a_command_speak_of_a_bug(tmp_path: Path, first: int, count: int) -> None:
    command = [sys.executable, "-m", "tests.exporter.commands.mutations", str(tmp_path), str(first), str(count)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0, (told[-1:], ran.stderr[-1000:])
    ended = [one for one in told if "code" in one]
    assert len(ended) == 4 * count
    for one in ended:
        assert one["code"] in {USABLE, NOT_USABLE, REFUSED, MISSING}, one
        assert "bug in Convoy" not in one["said"], one
        assert one["code"] in {USABLE, REFUSED} or one["said"].count("\n") == 1, one
    assert {one["code"] for one in ended} >= {USABLE, NOT_USABLE}
