"""Writes a file so that a reader sees the old one or the new one, also after a power cut."""

import contextlib
import fcntl
import glob
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from convoynet.exporter.errors import BadInput

_TRIES = 100


def write(path: Path, content: bytes) -> None:
    """Write `content` to a hidden file beside `path`, force it to the disk, and rename it.

    Raises:
        BadInput: the disk refuses; `path` is as it was.
    """
    try:
        with writing(path) as file:
            file.write(content)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path` that takes its name at the end of the block, unless that raises.

    What a process that was killed left of such files is removed.

    Raises:
        OSError: the disk refuses; `path` is as it was.
    """
    hidden, file = _begin(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            hidden.replace(path)
        sync_folder(path.parent)
        _clear(path)
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()


def _begin(path: Path) -> tuple[Path, BinaryIO]:
    """A new hidden file, locked: the system lets go of it when this process ends, however that ends."""
    for _ in range(_TRIES):
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        file = hidden.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process takes it for what was left
            file.close()
            continue
        except OSError:  # a file system without locks
            return hidden, file
        with contextlib.suppress(FileNotFoundError):  # removed before it was locked
            if os.path.samestat(os.fstat(file.fileno()), hidden.stat()):
                return hidden, file
        file.close()
    raise OSError(f"{path}: other processes keep removing what is written")


def _clear(path: Path) -> None:
    """Remove what was left of earlier writings of `path`: hidden files that no living process has locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if re.fullmatch(r"[0-9a-f]{16}", left.name.rpartition(".")[2]):
            with contextlib.suppress(OSError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
