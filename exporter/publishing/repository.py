"""Writes a model repository (Triton's layout), so that a reader sees the old state or the new one and nothing between.

    NAME/config.pbtxt, labels.txt      describe the newest version
    NAME/report.json, report.md, *.png its evidence
    NAME/N/model.onnx                  version N, with a copy of its own evidence beside it

Everything is written and synced in a hidden folder inside the repository, hence on its file system. A new model is then
one rename. For a further version, the hidden folder gets the files of the versions that stay (the same files, under a
second name), and changes places with the model's folder in one step. A version below the newest leaves the model's
files as they are. A process that is killed outright leaves its hidden folder (.convoy-*) to the next one that
publishes, which removes it; the only copy of anything is never in there.
"""

import contextlib
import errno
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from convoynet.exporter.atomic_file import sync_folder
from convoynet.exporter.errors import BadInput
from convoynet.exporter.interrupts import interrupts_wait
from convoynet.exporter.publishing import swap

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

    @property
    def folder(self) -> Path:
        """Where to write the files of the version."""
        return self.model / str(self.version)

    @property
    def target(self) -> Path:
        """The model's folder once it is published."""
        return self.root / self.name

    def commit(self, fits: Callable[[], None] = lambda: None) -> Path:
        """Publish what was written; returns the folder of the version.

        Args:
            fits: raises where the version does not fit to what others may have published meanwhile.

        Raises:
            BadInput: the version appeared meanwhile, or the disk refused; the repository is as it was.
        """
        with writing(self.root):
            swap.sync(self.model)
            with swap.locked(self.root), interrupts_wait():
                swap.put_back(self.root)
                published = self.target / str(self.version)
                if published.exists() and not self.force:
                    raise BadInput(
                        f"version {self.version} of {self.name} appeared in {self.root} while this export ran; "
                        f"run it again for the next number"
                    )
                if self.target.exists():
                    fits()
                    self._complete()
                    swap.sync(self.model)
                    swap.swap(self.model, self.target)
                else:
                    self.model.rename(self.target)
                sync_folder(self.root)
        return published

    def _complete(self) -> None:
        """Take over from the published model whatever stays."""
        newest = max(versions(self.target), default=0)
        for current in self.target.iterdir():
            ours = self.model / current.name
            if not ours.exists():
                swap.carry_over(current, ours)
            elif current.is_dir() != ours.is_dir():
                raise OSError(errno.EEXIST, "something else has the name of what is to be published", str(current))
            elif ours.is_file() and self.version < newest:
                ours.unlink()
                swap.carry_over(current, ours)
        swap.like(self.target, self.model)


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
            temporary = root / f"{_STAGING_PREFIX}{secrets.token_hex(8)}"
            with swap.locked(root):
                swap.put_back(root)
                swap.clear(root, _STAGING_PREFIX)
                chosen = choose_version(root / name, version, force)
                undo.callback(shutil.rmtree, temporary, ignore_errors=True)
                result = Staging(root, name, chosen, temporary / name, force)
                result.folder.mkdir(parents=True)
                undo.enter_context(swap.locked(temporary))
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
        BadInput: it exists, or a living process is writing it, and `force` does not replace it; or a file or a link is
            where the model's folder should be.
    """
    if model.is_symlink():
        raise BadInput(f"{model} is a symbolic link, and servers take none for a model; choose another --name")
    if model.exists() and not model.is_dir():
        raise BadInput(f"{model} is a file, where the folder of the model should be; choose another --name")
    existing = versions(model)
    living = [other for other in model.parent.glob(f"{_STAGING_PREFIX}*") if other.is_dir() and swap.is_held(other)]
    begun = [number for other in living for number in versions(other / model.name)]
    if version is None:
        return max([*existing, *begun], default=0) + 1
    if version in [*existing, *begun] and not force:
        state = "exists" if version in existing else "is being written by another process"
        raise BadInput(
            f"version {version} of {model.name} {state} in {model.parent}; leave out --version for the next one, "
            f"or add --force to replace it"
        )
    return version
