"""What the native stack of a front end leaves in the temporary folder when it is killed: a folder with a socket."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from stat import S_ISDIR

PREFIX = "pygrpc-native-"
SOCKET = "fallback.sock"
_YOUNG_NS = 60 * 10**9
"""A folder without a socket may be about to get one."""


def remove_dead_sockets() -> int:
    """Removes the folders of this user whose sockets nobody listens on any more; how many."""
    count = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            found = folder.lstat()
            mine = S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            dead = mine and _is_dead(folder / SOCKET, found.st_mtime_ns)
        except OSError:
            continue
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
            count += 1
    return count


def _is_dead(file: Path, made_ns: int) -> bool:
    if not file.exists():
        return time.time_ns() - made_ns > _YOUNG_NS
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(str(file))
        except ConnectionRefusedError:
            return True
    return False
