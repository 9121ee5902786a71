"""`python tests/busy.py COMMAND...` runs a command while every core has other work too; its status is the command's."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time

LONGEST_S = 2 * 3600.0


def spin(until: float, parent: int) -> None:
    """Computes something of no use, at most until a moment and as long as its parent lives."""
    while time.monotonic() < until and os.getppid() == parent:
        sum(range(100_000))


def main(command: list[str]) -> int:
    """Runs the command beside one such process a core."""
    until = time.monotonic() + LONGEST_S
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    others = [context.Process(target=spin, args=(until, os.getpid()), daemon=True) for _ in range(cores)]
    for other in others:
        other.start()
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        for other in others:
            other.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
