"""Names and files of a model repository on disk: what may be there, and that nothing leads out of it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from convoynet.server.errors import InvalidModel
from convoynet.server.repository.files import kind_of

CONFIG_FILE = "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


def is_remote(repository: str) -> bool:
    """Whether a repository is named by a URL, such as s3://bucket/models."""
    return "://" in repository


def is_name(text: str) -> bool:
    """Whether a model or a file in its folder may be called so."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether a folder of this name is a version: a positive number of at most 18 digits without leading zeros."""
    return _VERSION.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Checks the name of a model.

    Raises:
        InvalidModel: It is none.
    """
    if not is_name(name):
        raise InvalidModel(
            f"the name {name[:200]!r} may hold letters, digits, '.', '_' and '-' alone, 128 at most, and begins "
            "with a letter or a digit"
        )


def model_file(path: Path) -> Path:
    """A model's file, or where a folder has its name, as Triton has models of several files, that of its name in it."""
    return path / path.name if path.is_dir() else path


def inside(folder: Path, name: str, what: str) -> Path:
    """The file that a config names within its model's folder.

    Args:
        folder: What the file must lie in, symbolic links resolved.
        name: A relative path.
        what: Where the name comes from, for the message.

    Raises:
        InvalidModel: It leads out of the folder.
    """
    file = folder / name
    if "\0" in name or not file.resolve().is_relative_to(folder.resolve()):
        raise InvalidModel(f"{what} leads out of the model's folder")
    return file


def check_links(folder: Path) -> None:
    """Checks that no symbolic link in a model's folder leads out of it, and that all in it are regular files.

    Raises:
        InvalidModel: The message names the link, or what is no file.
    """
    real = folder.resolve()
    for path in _walk(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(real):
            raise InvalidModel(f"'{path.relative_to(folder)}' is a symbolic link that leads out of the model's folder")
        if not path.is_dir() and path.exists() and (what := kind_of(path.stat().st_mode)):
            raise InvalidModel(f"'{path.relative_to(folder)}' is {what}: a model's folder may hold files alone")


def fingerprint(folder: Path) -> str:
    """Changes when a file in the folder is added, removed, replaced or written: by name, size, time and inode.

    Of a model that is one file, it changes with that.

    Hidden files do not count. A file that goes away while this looks is left out.
    """
    digest = hashlib.sha256()
    for path in [folder] if folder.is_file() else _walk(folder):
        try:
            stat = path.stat()
        except OSError:
            continue
        digest.update(repr((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns, stat.st_ino)).encode())
    return digest.hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is not hidden, sorted; folders behind links are named, not entered."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        links = [f for f in folders if (Path(root) / f).is_symlink()]
        yield from (Path(root) / name for name in sorted([*files, *links]) if not name.startswith("."))
