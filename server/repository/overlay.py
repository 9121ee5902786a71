"""Model files that a load request brings along, in a private folder of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from convoynet.server.errors import InvalidModel
from convoynet.server.repository.hashes import REPORT_FILE
from convoynet.server.repository.layout import CONFIG_FILE, is_name, is_version

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
    folder = Path(tempfile.mkdtemp(prefix="convoy-model-"))
    try:
        for name, content in files.items():
            file = folder / names[name]
            file.parent.mkdir(mode=0o700, exist_ok=True)
            file.write_bytes(content)
    except BaseException:
        remove_overlay(folder)
        raise
    return folder


def remove_overlay(folder: Path) -> None:
    """Removes what write_overlay() wrote."""
    shutil.rmtree(folder, ignore_errors=True)


def _checked(name: str) -> str:
    """The relative path that a file's name stands for."""
    path = name.removeprefix("file:")
    version, slash, file = path.rpartition("/")
    if not is_name(file) or (slash and not is_version(version)):
        raise InvalidModel(f"the file {path[:200]!r} of a load request must be named <version>/<name> or <name>")
    if file in (CONFIG_FILE, REPORT_FILE):
        raise InvalidModel(f"a load request may not bring a {file}; it states its config in the parameter 'config'")
    return path
