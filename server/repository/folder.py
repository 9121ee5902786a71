"""A folder of models, or the folder of one model that is served under another name."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from convoynet.server.errors import printable
from convoynet.server.repository.layout import CONFIG_FILE, is_name, is_version, model_file
from convoynet.server.repository.model_config import BACKENDS

log = logging.getLogger(__name__)

MOST_FOLDERS = 100_000
_FILES = frozenset(backend.file for backend in BACKENDS.values())


class Folder:
    """Where models are on disk.

    Args:
        root: A folder of models' folders.
        model: Where the root is itself a model's folder, the name that the model is served under. Otherwise it has
            no effect.

    Attributes:
        root: The same folder.
        model: The same name; "" where the root is a folder of models.
    """

    def __init__(self, root: Path, model: str = "") -> None:
        self.root = root
        self.model = model if model and _is_model(root) else ""
        self._passed_over: set[str] = set()

    async def sync(self) -> None:
        """Brings the folder up to date with what it is a copy of; raises OSError where that fails."""

    def folders(self) -> dict[str, Path]:
        """The folders that are meant as models, by name, in order; a name that cannot be printed is escaped.

        A volume has folders of its own, such as lost+found, and people put others beside their models: what holds
        nothing of a model is passed over, which the log says once.

        Raises:
            OSError: The root cannot be listed, or holds more than MOST_FOLDERS folders.
        """
        if self.model:
            return {self.model: self.root}
        found: dict[str, Path] = {}
        others: set[str] = set()
        with os.scandir(self.root) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and Path(entry.path).is_dir():
                    if len(found) + len(others) >= MOST_FOLDERS:
                        raise OSError(errno.EFBIG, f"it holds more than {MOST_FOLDERS} folders")
                    if _is_meant(entry.path, entry.name):
                        found[printable(entry.name)] = Path(entry.path)
                    else:
                        others.add(printable(entry.name))
        if new := sorted(others - self._passed_over):
            log.warning("no models, since they hold no %s and no version (1, 2, ...): %s", CONFIG_FILE, _listed(new))
        self._passed_over = others
        return dict(sorted(found.items()))

    def find(self, name: str) -> Path | None:
        """The folder of one model, or None where it is not there."""
        if self.model:
            return self.root if name == self.model else None
        if not is_name(name):  # it may be an escaped one
            return self.folders().get(name)
        return self.root / name if (self.root / name).is_dir() else None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more


def _is_meant(path: str, name: str) -> bool:
    """Whether a folder is meant as a model, be it whole or not: it has a config.pbtxt, a version or a model's file."""
    if os.path.lexists(f"{path}/{CONFIG_FILE}"):
        return True
    try:
        with os.scandir(path) as entries:
            # A number that is no version is one that somebody got wrong.
            return any((e.name.isascii() and e.name.isdigit()) or e.name in _FILES for e in entries)
    except OSError:
        return is_name(name)  # then it cannot be read, which is to be seen


def _is_model(root: Path) -> bool:
    """Whether a folder is a model's: it has a config.pbtxt or a version. A model of a repository may be named 1."""
    versions = (path for path in root.iterdir() if is_version(path.name))
    return (root / CONFIG_FILE).is_file() or any(
        model_file(path / file).is_file() for path in versions for file in _FILES
    )
