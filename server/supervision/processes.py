"""Processes below the server's: they end with it, whatever ends it, and none is waited for without a limit.

`python -P -m convoynet.server.supervision.processes PID MODULE ARGUMENTS...` runs a module as `python -m` does, in a
process that is killed when the one that started it, PID, is gone.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence

from convoynet.server.host import package_environment

_PR_SET_PDEATHSIG = 1
STOPPED_SECONDS = 5.0
"""How long a process may be stopped by a signal before it is given up."""


def command(module: str, *arguments: str) -> list[str]:
    """What starts a module of this package in a process that ends with this one."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments]


def spawn(
    module: str, *arguments: str, descriptors: Sequence[int] = (), stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """Starts a module of this package in a process that ends with this one.

    Args:
        module: Its name.
        *arguments: Its command line.
        descriptors: What it inherits beside the standard ones.
        stdout: Where its standard output goes; None for where this process's goes.

    Raises:
        OSError: The system has no room for it.
    """
    return subprocess.Popen(  # noqa: S603 - this interpreter, with our own module
        command(module, *arguments),
        pass_fds=tuple(descriptors),
        env=package_environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
    )


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP) has stopped a process, which does nothing then until another lets it go on.

    No load is slow in this state, whatever it waits for. That it uses no processor says less: so does one that waits
    for a disk, a file system of the network, or a GPU. False where nobody tells.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123  # half the time of a Path
            return file.read().rpartition(b")")[2].split()[:1] == [b"T"]
    except OSError:
        return False


def die_with(parent: int) -> None:
    """Has the system kill this process when the one that started it is gone; it ends here where that has happened."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before that was asked for.
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Runs the module that the command line names."""
    die_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # As the main module of this process this one is to be forgotten: what runs now is another.
    main()
