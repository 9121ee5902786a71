"""Writes a model repository (Triton's layout), so that a reader sees the old state or the new one and nothing between.

    NAME/config.pbtxt, labels.txt      describe the newest version
    NAME/report.json, report.md, *.png its evidence
    NAME/N/model.onnx                  version N, with a copy of its own evidence beside it

Everything is written and synced in a hidden folder inside the repository, hence on its file system. A new model is then
one rename. For a further version, the files of the model are replaced one by one and the rename of the version's folder
is the commit; whatever fails before it, the saved files go back. A version below the newest leaves the model's files as
they are. A process that is killed outright may leave its hidden folder (.convoy-*), which is safe to delete.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from convoynet.exporter.errors import BadInput

# Servers skip names that start with a dot.
_STAGING_PREFIX = ".convoy-"


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn a failure to write under `root` into one line.

    Raises:
        BadInput: for any OSError of the block, with the system's words.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(root) else ""
        raise BadInput(
            f"cannot write to the model repository {root}: {error.strerror or error}{where}; nothing was published. "
            f"Choose another --model-repository or make room there"
        ) from error


def versions(model: Path) -> list[int]:
    """Return the version numbers that a model's folder holds, ascending; empty where there is no such folder."""
    if not model.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in model.iterdir()
        if entry.is_dir() and entry.name.isascii() and entry.name.isdigit() and not entry.name.startswith("0")
    )


@dataclass
class Staging:
    """A hidden folder in the repository that becomes a version of a model, or disappears.

    Attributes:
        root: the model repository.
        name: the model's name.
        version: the number that will be published.
        model: folder in which to write the model's own files (config.pbtxt, labels.txt, the report).
        force: whether an existing `version` is replaced.
    """

    root: Path
    name: str
    version: int
    model: Path
    force: bool
    _saved: Path = field(init=False)

    def __post_init__(self) -> None:
        self._saved = self.model.parent / "saved"

    @property
    def folder(self) -> Path:
        """Where to write the files of the version."""
        return self.model / str(self.version)

    @property
    def target(self) -> Path:
        """The model's folder once it is published."""
        return self.root / self.name

    def commit(self) -> Path:
        """Publish what was written; returns the folder of the version.

        Raises:
            BadInput: the version appeared meanwhile, or the disk refused; the repository is as it was.
        """
        with writing(self.root), _locked(self.root):
            _sync(self.model)
            published = self.target / str(self.version)
            if published.exists() and not self.force:
                raise BadInput(
                    f"version {self.version} of {self.name} appeared in {self.root} while this export ran; "
                    f"run it again for the next number"
                )
            if self.target.exists():
                self._add_version(published)
            else:
                self.model.rename(self.target)
            _sync_folder(self.root)
        return published

    def _add_version(self, published: Path) -> None:
        newest = max(versions(self.target), default=0)
        files = [path for path in self.model.iterdir() if path.is_file()] if self.version >= newest else []
        self._saved.mkdir()
        replaced: list[str] = []
        try:
            for path in files:
                current = self.target / path.name
                if current.exists():
                    os.link(current, self._saved / path.name)
                replaced.append(path.name)
                path.replace(current)
            if published.exists():
                published.rename(self._saved / published.name)
            self.folder.rename(published)
        except BaseException:
            self._restore(replaced, published)
            raise
        _sync_folder(self.target)

    def _restore(self, replaced: list[str], published: Path) -> None:
        for name in replaced:
            if (self._saved / name).exists():
                (self._saved / name).replace(self.target / name)
            else:
                (self.target / name).unlink(missing_ok=True)
        if (self._saved / published.name).exists() and not published.exists():
            (self._saved / published.name).rename(published)


@contextlib.contextmanager
def staging(root: Path, name: str, version: int | None, *, force: bool, needed_bytes: int) -> Iterator[Staging]:
    """Open a hidden folder in the repository and remove it at the end, whatever happens.

    Args:
        root: the model repository; made where it is missing, and removed again if nothing gets published.
        name: the model's name.
        version: the number to publish, or None for the next one.
        force: whether an existing version may be replaced.
        needed_bytes: room that the export will take, to be told now rather than after the work.

    Raises:
        BadInput: the version exists, the repository cannot be written, or there is too little room.
    """
    with contextlib.ExitStack() as undo:
        with writing(root):
            _make_folder(root, undo)
            chosen = choose_version(root / name, version, force)
            temporary = root / f"{_STAGING_PREFIX}{secrets.token_hex(8)}"
            undo.callback(shutil.rmtree, temporary, ignore_errors=True)
            result = Staging(root, name, chosen, temporary / name, force)
            result.folder.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
        if free < needed_bytes:
            raise BadInput(
                f"the model repository {root} has {free / 1e6:.0f} MB of free space and this export needs about "
                f"{needed_bytes / 1e6:.0f} MB; make room or choose another --model-repository"
            )
        yield result


def _make_folder(root: Path, undo: contextlib.ExitStack) -> None:
    """Make `root` and its missing parents; `undo` removes those that are still empty."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def choose_version(model: Path, version: int | None, force: bool) -> int:
    """The number that a model's next version gets: `version`, or the next one where it is None.

    Raises:
        BadInput: it exists and `force` does not replace it, or a file is where the model's folder should be.
    """
    existing = versions(model)
    if model.exists() and not model.is_dir():
        raise BadInput(f"{model} is a file, where the folder of the model should be; choose another --name")
    chosen = version if version is not None else max(existing, default=0) + 1
    if chosen in existing and not force:
        raise BadInput(
            f"version {chosen} of {model.name} exists in {model.parent}; leave out --version for the next one, "
            f"or add --force to replace it"
        )
    return chosen


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one export at a time publish into `root`."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Force every file and folder under `folder` to the disk: a rename must not outrun the data."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot sync a folder; the files themselves are synced.
        pass
    finally:
        os.close(descriptor)
