"""A folder of models, or the folder of one model that is served under another name."""

from __future__ import annotations

from pathlib import Path

from convoynet.server.repository.layout import CONFIG_FILE, is_version, model_folders
from convoynet.server.repository.model_config import BACKENDS


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

    async def sync(self) -> None:
        """Brings the folder up to date with what it is a copy of; raises OSError where that fails."""

    def folders(self) -> dict[str, Path]:
        """The folders that are meant as models, by name.

        Raises:
            OSError: The root cannot be listed.
        """
        return {self.model: self.root} if self.model else {path.name: path for path in model_folders(self.root)}

    def find(self, name: str) -> Path | None:
        """The folder of one model, or None where it is not there."""
        if self.model:
            return self.root if name == self.model else None
        return self.root / name if (self.root / name).is_dir() else None


def _is_model(root: Path) -> bool:
    """Whether a folder is a model's: it has a config.pbtxt or a version. A model of a repository may be named 1."""
    files = {backend.file for backend in BACKENDS.values()}
    versions = (path for path in root.iterdir() if is_version(path.name))
    return (root / CONFIG_FILE).is_file() or any((path / file).is_file() for path in versions for file in files)
