"""Waiting for the end of a process, never without a limit."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from contextlib import suppress
from typing import NoReturn

from convoynet.server.supervision import processes

log = logging.getLogger(__name__)

_KILL_SECONDS = 5.0
"""What a killed process may take to go; one that waits for a file system that is gone takes for ever."""
_LONGEST_LOOK = 0.05
_LOOK_SECONDS = 0.5


async def ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status of a process, or None where it still runs after so many seconds.

    It is looked at again and again: that takes neither a thread, which would hang with the process, nor a descriptor,
    of which there may be none.
    """
    loop = asyncio.get_running_loop()
    end, look = loop.time() + seconds, 0.001
    while (status := process.poll()) is None and loop.time() < end:
        await asyncio.sleep(min(look, max(end - loop.time(), 0)))
        look = min(2 * look, _LONGEST_LOOK)
    return status


async def end(process: subprocess.Popen[bytes], patience: float = 0.0) -> int | None:
    """Waits `patience` seconds for the end of a process, then kills it.

    Returns:
        Its exit status; None where even that does not end it, which is logged.
    """
    status = await ended(process, patience) if patience else process.poll()
    if status is None:
        with suppress(OSError):
            process.kill()
        status = await ended(process, _KILL_SECONDS)
    if status is None:
        log.error("process %d does not end although it was killed: it is left to the system", process.pid)
    return status


async def kill_when_stopped(process: subprocess.Popen[bytes] | asyncio.subprocess.Process) -> NoReturn:
    """Kills a process that a signal has stopped for STOPPED_SECONDS; to be cancelled once it has ended.

    Time is counted in looks: a machine that stands still for a while stands still for all.
    """
    stopped = 0.0
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        stopped = stopped + _LOOK_SECONDS if processes.is_stopped(process.pid) else 0.0
        if stopped > processes.STOPPED_SECONDS:
            log.error("process %d is ended, since a signal has stopped it for %g s", process.pid, stopped)
            with suppress(OSError):
                process.kill()
            stopped = 0.0
