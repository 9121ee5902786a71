"""Folders on the disk: one put in the place of another in one step, locked, held while a process lives, and synced."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from convoynet.exporter.atomic_file import sync_folder

# A file system that cannot exchange two names keeps the old folder under this one for an instant.
_BEFORE = ".convoy-before-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_FIXED = (errno.EXDEV, errno.EBUSY)
# Seconds. Whoever has the lock renames folders, and copies them at worst.
_LOCK_WAIT, _LOCK_LOOK = 300.0, 0.02


def swap(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of the folder `old`, which is at `new` then.

    This is one step. Where the file system has no such step it is two, between which `put_back` brings `old` back.

    Raises:
        OSError: nothing has changed.
    """
    try:
        if _exchange(new, old):
            return
        before = old.with_name(_BEFORE + old.name)
        old.rename(before)
        try:
            sync_folder(old.parent)
            new.rename(old)
        except BaseException:
            before.rename(old)
            raise
        sync_folder(old.parent)
        before.rename(new)
    except OSError as error:
        if error.errno not in _FIXED:
            raise
        reason = "this folder cannot be renamed: it is a mount point, or part of a container's image"
        raise OSError(error.errno, reason, str(old)) from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one))


def put_back(root: Path) -> None:
    """Finish what a `swap` in `root` left that was killed: the old folder goes back, or away where the new one came."""
    for before in root.glob(f"{_BEFORE}*"):
        old = root / before.name.removeprefix(_BEFORE)
        if os.path.lexists(old):
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(old)


def clear(root: Path, prefix: str) -> None:
    """Remove the hidden folders "<prefix><16 hexadecimal digits>" in `root` that no living process holds."""
    for left in root.iterdir():
        if re.fullmatch(rf"{re.escape(prefix)}[0-9a-f]{{16}}", left.name) and left.is_dir() and not left.is_symlink():
            with contextlib.suppress(OSError), held(left):
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder as one's own; the system lets go of it when the process ends, however that ends.

    Raises:
        BlockingIOError: another one holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a living process holds a folder."""
    try:
        with held(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:  # it is gone
        return False


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time do what must not be done by two in `root`.

    Raises:
        TimeoutError: another one did not get done in five minutes.
    """
    with contextlib.ExitStack() as lock:
        end = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                lock.enter_context(held(root))
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    reason = f"another process has been publishing there for {_LOCK_WAIT:.0f} s"
                    raise TimeoutError(errno.ETIMEDOUT, reason, str(root)) from None
                time.sleep(_LOCK_LOOK)
        yield


def carry_over(source: Path, target: Path) -> None:
    """Give what is at `source` a second place at `target`: the same files, not their copies, where that is possible."""
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            carry_over(entry, target / entry.name)
        like(source, target)
    else:
        try:
            os.link(source, target)
        except OSError:  # a file system without such names, or another user's file
            shutil.copy2(source, target)


def like(source: Path, target: Path) -> None:
    """Give a folder the permissions, times and, as far as this user may, the owner of another."""
    shutil.copystat(source, target)
    state = source.stat()
    with contextlib.suppress(OSError):
        os.chown(target, state.st_uid, state.st_gid)


def sync(folder: Path) -> None:
    """Force every file and folder under `folder` to the disk: a rename must not outrun the data."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            continue
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
