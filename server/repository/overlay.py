"""Model files that a load request brings along, in a private folder of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISDIR

from convoynet.server.errors import InvalidModel
from convoynet.server.repository.hashes import REPORT_FILE
from convoynet.server.repository.layout import CONFIG_FILE, is_name, is_version

_PREFIX = "convoy-model-"
_NEW = ".convoy-model-"
"""How a folder is called until it is whole."""
_YOUNG_NS = 60 * 10**9
"""It may be about to be locked."""
_locks: dict[Path, int] = {}
"""A lock for each folder, which goes with the process however it ends; so a later one knows what is left over."""
MAX_BYTES = 2**30
MAX_FILES = 256


def write_overlay(files: Mapping[str, bytes]) -> Path:
    """Writes the files into a new temporary folder that only this user may enter.

    Args:
        files: Content by `<version>/<name>` or `<name>`, as in the request's parameters; a leading `file:` is dropped.

    Returns:
        The folder, in the layout of a model's folder; remove_overlay() removes it.

    Raises:
        InvalidModel: A name is no such name, or the files are too many or too large.
        OSError: There is no room for them.
    """
    if len(files) > MAX_FILES:
        raise InvalidModel(f"a load request may bring {MAX_FILES} files, got {len(files)}")
    size = sum(map(len, files.values()))
    if size > MAX_BYTES:
        raise InvalidModel(f"the files of a load request may have {MAX_BYTES} bytes together, got {size}")
    names = {name: _checked(name) for name in files}
    # mkdtemp makes it with mode 0700.
    new = Path(tempfile.mkdtemp(prefix=_NEW))
    lock = None
    try:
        lock = _lock(new)
        if lock is None:
            raise OSError("somebody else has locked a new folder")
        for name, content in files.items():
            file = new / names[name]
            file.parent.mkdir(mode=0o700, exist_ok=True)
            file.write_bytes(content)
        folder = new.with_name(new.name.removeprefix("."))
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        raise
    _locks[folder] = lock
    return folder


def remove_overlay(folder: Path) -> None:
    """Removes what write_overlay() wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    if (lock := _locks.pop(folder, None)) is not None:
        os.close(lock)


def remove_overlays() -> None:
    """Removes all that this process wrote: it ends."""
    for folder in list(_locks):
        remove_overlay(folder)


def remove_leftovers() -> int:
    """Removes what servers of this user left behind that did not end in order; how many folders."""
    count, root = 0, Path(tempfile.gettempdir())
    for folder in [*root.glob(f"{_PREFIX}*"), *root.glob(f"{_NEW}*")]:
        try:
            stat = folder.lstat()
            young = folder.name.startswith(".") and time.time_ns() - stat.st_mtime_ns < _YOUNG_NS
            mine = S_ISDIR(stat.st_mode) and stat.st_uid == os.getuid()
            lock = None if young or not mine or folder in _locks else _lock(folder)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            count += 1
    return count


def _lock(folder: Path) -> int | None:
    """The lock of a folder; None where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _checked(name: str) -> str:
    """The relative path that a file's name stands for."""
    path = name.removeprefix("file:")
    version, slash, file = path.rpartition("/")
    if not is_name(file) or (slash and not is_version(version)):
        raise InvalidModel(f"the file {path[:200]!r} of a load request must be named <version>/<name> or <name>")
    if file in (CONFIG_FILE, REPORT_FILE):
        raise InvalidModel(f"a load request may not bring a {file}; it states its config in the parameter 'config'")
    return path
