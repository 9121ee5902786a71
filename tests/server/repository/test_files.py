"""Only regular files are opened, whatever lies in a model's folder; what killed servers left is removed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convoynet.server.errors import InvalidModel
from convoynet.server.repository import overlay, repository
from convoynet.server.repository.files import open_regular, read_regular
from tests.server.conftest import fake_model


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the current one: the path of a socket may not be long."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(file))


MAKERS: dict[str, Callable[[Path], None]] = {"a FIFO": os.mkfifo, "a socket": _socket, "a folder": Path.mkdir}


@pytest.mark.parametrize("what", MAKERS)
def test_what_is_no_file_is_named_and_not_waited_for(short: Path, what: str) -> None:
    MAKERS[what](short / "config.pbtxt")
    # A socket cannot even be opened, which is an error of the system's.
    with pytest.raises((InvalidModel, OSError), match=what if what != "a socket" else None):
        open_regular(short / "config.pbtxt")


def test_a_device_is_no_file() -> None:
    with pytest.raises(InvalidModel, match="zero is a device"):
        read_regular(Path("/dev/zero"))


@pytest.mark.parametrize("what", ["a FIFO", "a socket"])
@pytest.mark.parametrize("name", ["config.pbtxt", "report.json", "labels.txt", "1/model.json", "1/weights.bin"])
def test_a_model_with_one_is_refused_and_the_others_are_not(short: Path, what: str, name: str) -> None:
    fake_model(short, "good")
    fake_model(short, "odd")
    (short / "odd" / name).unlink(missing_ok=True)
    MAKERS[what](short / "odd" / name)
    found = {f.name: f for f in repository.scan(short, repository.Defaults(4, 1))}
    assert found["good"].spec is not None
    assert found["odd"].reason == f"'{name}' is {what}: a model's folder may hold files alone"


KILLED = """
import os, signal
from convoynet.server.repository.overlay import write_overlay
print(write_overlay({"1/model.json": b"{}"}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_left_is_removed_and_what_others_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay.tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", KILLED]
    left = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False).stdout.strip()
    assert Path(left).is_dir()
    own = overlay.write_overlay({"1/model.json": b"{}"})
    waiting = subprocess.Popen(
        [sys.executable, "-c", KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "input()")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    with waiting:
        assert waiting.stdout is not None
        others = Path(waiting.stdout.readline().strip())
        assert overlay.remove_leftovers() == 1
        assert not Path(left).exists()
        assert own.is_dir()
        assert others.is_dir()
        waiting.communicate("\n")
    overlay.remove_overlays()
    assert not own.exists()
