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


def cpu_ticks(pid: int) -> int | None:
    """The processor time that a process has had, in ticks of the system's clock; None where nobody tells."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123  # half the time of a Path
            user, system = file.read().rpartition(b")")[2].split()[11:13]
    except (OSError, ValueError):
        return None
    return int(user) + int(system)


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
