"""Processes end with the one that started them, and are waited for no longer than is said."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convoynet.server.host import package_environment
from convoynet.server.supervision import ending, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")

PARENT = """
import os, signal, subprocess, sys
from convoynet.server.supervision import processes
child = processes.spawn("http.server", "--bind", "127.0.0.1", "0", stdout=subprocess.DEVNULL)
if sys.argv[1] == "stopped":
    os.kill(child.pid, signal.SIGSTOP)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_process_goes_with_its_parent_at_whatever_moment_that_dies(state: str) -> None:
    """Here at once: the child has hardly begun."""
    parent = subprocess.run(
        [sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True, env=package_environment(), check=False
    )
    assert parent.returncode == -signal.SIGKILL
    child = int(parent.stdout)
    if state == "stopped":  # before it could ask for its end: it looks when it goes on
        os.kill(child, signal.SIGCONT)
    end = time.monotonic() + 60
    while _alive(child):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_a_signal_has_stopped_is_told_from_what_waits() -> None:
    with subprocess.Popen(["/bin/sleep", "1000"]) as process:
        try:
            assert not processes.is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            _until(lambda: processes.is_stopped(process.pid))
            process.send_signal(signal.SIGCONT)
            _until(lambda: not processes.is_stopped(process.pid))
        finally:
            process.kill()
    assert not processes.is_stopped(process.pid)


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_run_as_by_the_interpreter(tmp_path: Path) -> None:
    command = processes.command("json.tool", "--no-indent")
    done = subprocess.run(
        command, input='{"a":\n1}', capture_output=True, text=True, env=package_environment(), check=True
    )
    assert done.stdout == '{"a": 1}\n'


async def test_a_process_that_does_not_end_by_itself_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    assert await ending.ended(process, 0.01) is None
    assert await ending.end(process, 0.01) == -signal.SIGKILL
    quick = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert await ending.end(quick, 60) == 3


async def test_a_process_that_a_signal_stopped_is_killed_and_one_that_waits_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "STOPPED_SECONDS", 0.1)
    monkeypatch.setattr(ending, "_LOOK_SECONDS", 0.02)
    process = subprocess.Popen(["/bin/sleep", "1000"])
    watch = asyncio.ensure_future(ending.kill_when_stopped(process))
    assert await ending.ended(process, 0.5) is None
    process.send_signal(signal.SIGSTOP)
    assert await ending.ended(process, 60) == -signal.SIGKILL
    assert not watch.done()
    watch.cancel()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
