"""The image files of a folder, and what else there is in it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convoynet.exporter.errors import BadInput

# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# Reasons that a line names; the rest is counted together.
_MOST_REASONS = 8
_LONGEST_SUFFIX = 12


@dataclass(frozen=True)
class Listing:
    """What a folder of images holds.

    Attributes:
        images: the image files at any depth, sorted by path.
        left_out: how many of its other files and folders are left out, by reason.
    """

    folder: Path
    images: list[Path]
    left_out: Counter[str]

    @property
    def line(self) -> str:
        """What is left out, in one line; empty where nothing is."""
        reasons = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count} {_singular(reason) if count == 1 else reason}" for reason, count in reasons[:_MOST_REASONS]]
        if len(reasons) > _MOST_REASONS:
            parts.append(
                f"{sum(count for _, count in reasons[_MOST_REASONS:])} for {len(reasons) - _MOST_REASONS} more"
            )
        return f"left out of {self.folder}: {', '.join(parts)}" if parts else ""


def _singular(reason: str) -> str:
    """A reason of a single file or folder: its first noun comes first or, of a suffix, last."""
    for many, one in (("links", "link"), ("files", "file"), ("folders", "folder")):
        if many in reason:
            return reason.replace(many, one, 1)
    return reason


def survey(folder: Path) -> Listing:
    """Look for image files below `folder`, each folder once, and count what is none.

    Raises:
        BadInput: The folder is missing or holds no image.
    """
    left_out: Counter[str] = Counter()
    images = sorted(_images(folder, left_out))
    if not images:
        told = f" (left out: {', '.join(list(left_out)[:_MOST_REASONS])})" if left_out else ""
        raise BadInput(f"{folder}: holds no image; looked for {', '.join(IMAGE_SUFFIXES)} at any depth{told}")
    return Listing(folder, images, left_out)


def require_images(folder: Path) -> None:
    """See that there is an image file below `folder`, without looking for all of them.

    Raises:
        BadInput: The folder is missing or holds no image.
    """
    if next(_images(folder, Counter()), None) is None:
        survey(folder)  # says what there is instead


def _images(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The image files below a folder, in no order; what is left out is counted on the way."""
    try:
        there = folder.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise BadInput(f"{folder}: cannot be read: {error.strerror}") from error
    if not there:
        raise BadInput(f"{folder}: no such folder of images")
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            state, entries = current.stat(), list(current.iterdir())
        except OSError as error:
            if current == folder:
                raise BadInput(f"{folder}: cannot be read: {error.strerror or error}") from error
            left_out["folders that cannot be read"] += 1
            continue
        if (state.st_dev, state.st_ino) in seen:
            left_out["links to folders that are there already"] += 1
            continue
        seen.add((state.st_dev, state.st_ino))
        links = []
        for path in entries:
            try:
                reason = _why_not(path)
            except OSError:  # of a name that is too long, or in a folder that may be listed and no more
                reason = "files that cannot be looked at"
            if reason:
                left_out[reason] += 1
            elif not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                waiting.append(path)
        # A folder is walked under its own name before it is under another's.
        waiting[:0] = sorted(links)


def _why_not(path: Path) -> str:
    """Why a file or folder is no image and holds none; empty where it may."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        up = path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
        return "links to a folder above" if up else ""
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        if not suffix[:_LONGEST_SUFFIX].removeprefix(".").isalnum() or len(suffix) > _LONGEST_SUFFIX:
            return "files with an odd suffix" if suffix else "files without a suffix"
        return f"{suffix} files"
    return "" if path.is_file() else "links to nothing, or no files"


def list_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted by path; hidden files and folders are left out.

    Raises:
        BadInput: The folder is missing or holds no image.
    """
    return survey(folder).images
