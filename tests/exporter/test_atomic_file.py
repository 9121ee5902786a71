"""A file is the old one or the new one, and nothing is left beside it."""

import subprocess
import sys
from pathlib import Path

import pytest

from convoynet.exporter import atomic_file
from convoynet.exporter.errors import BadInput

KILLED = """
import os, signal, sys
from pathlib import Path
from convoynet.exporter import atomic_file
with atomic_file.writing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
AT_ONCE = """
import sys
from pathlib import Path
from convoynet.exporter import atomic_file
for number in range(100):
    atomic_file.write(Path(sys.argv[1]), sys.argv[2].encode() * 5000)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_process_that_is_killed_leaves_the_old_file_and_the_next_one_clears(tmp_path: Path) -> None:
    file = tmp_path / "a.[bin"
    atomic_file.write(file, b"old")
    assert subprocess.run([sys.executable, "-c", KILLED, file], check=False).returncode == -9
    assert file.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    (tmp_path / ".a.[bin.mine").write_text("not ours")
    atomic_file.write(file, b"new")
    assert file.read_bytes() == b"new"
    assert names(tmp_path) == [".a.[bin.mine", "a.[bin"]


def test_several_write_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    running = [subprocess.Popen([sys.executable, "-c", AT_ONCE, file, letter]) for letter in "xyz"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert file.read_bytes() in {letter * 5000 for letter in (b"x", b"y", b"z")}
    assert names(tmp_path) == ["a.bin"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    atomic_file.write(file, b"old")
    with pytest.raises(ValueError, match="closed file"), atomic_file.writing(file) as opened:
        opened.close()
    assert (file.read_bytes(), names(tmp_path)) == (b"old", ["a.bin"])
    with pytest.raises(BadInput, match=r"cannot write .*no/such\.bin: No such file"):
        atomic_file.write(tmp_path / "no" / "such.bin", b"new")
