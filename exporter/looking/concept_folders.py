"""Folders of pictures that show concepts, and of masks that say where in a picture one is.

Importable without torch, so that what is wrong with them is said at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from convoynet.exporter.data.folder import list_images
from convoynet.exporter.errors import BadInput, reason

_T = TypeVar("_T")

LEAST = 10
"""Pictures of a concept, and random ones."""
MOST_CONCEPTS = 64


@dataclass(frozen=True)
class Concept:
    """Pictures that show something.

    Attributes:
        name: of it, its folder's.
        pictures: those that are looked at.
        others: those that it is told from.
        held_against: which these are, in words.
        apart: whether they are those of no other concept.
    """

    name: str
    pictures: Sequence[Path]
    others: Sequence[Path]
    held_against: str
    apart: bool


@dataclass(frozen=True)
class Masks:
    """Where in pictures a concept is.

    Attributes:
        concept: its folder's name.
        by_picture: a picture -> its mask, of the same size; whatever is not black is the concept.
    """

    concept: str
    by_picture: Mapping[Path, Path]


def spread(files: Sequence[_T], most: int) -> list[_T]:
    """No more of them than `most`, evenly spread."""
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def concepts_in(folder: Path, random: Path | None, most: int) -> list[Concept]:
    """The concepts of a folder, each in a sub-folder of its own.

    Args:
        folder: theirs.
        random: pictures that show none of them, at any depth; None where each is held against the others.
        most: pictures of each that are looked at, and random ones.

    Raises:
        BadInput: there are too few pictures, or nothing to hold a concept against.
    """
    every = _by_folder(folder, "a concept's")
    for name, files in every.items():
        _require_enough(len(files), f"{folder / name}", "a concept")
    some = {name: spread(files, most) for name, files in every.items()}
    if random is not None:
        others = list_images(random)
        _require_enough(len(others), f"--random {random}", "what concepts are told from")
        _require_apart(every, random, others)
        chosen = spread(others, most)
        told = f"{len(chosen)} of the {len(others)} pictures in {random}"
        return [Concept(name, files, chosen, told, True) for name, files in some.items()]
    if len(some) == 1:
        raise BadInput(
            f"{folder} holds one concept, {next(iter(some))}, and nothing to tell it from: add --random DIR with "
            f"pictures of anything else, {LEAST} or more, or folders of other concepts"
        )
    made = []
    for name, files in some.items():
        rest = [file for other, each in some.items() if other != name for file in each]
        chosen = spread(rest, most)
        made.append(Concept(name, files, chosen, f"{len(chosen)} pictures of the other concepts", False))
    return made


def masks_in(folder: Path, images: Path, pictures: Sequence[Path]) -> list[Masks]:
    """The masks of a folder, each concept's in a sub-folder of its own, named as the pictures are.

    Args:
        folder: of the masks.
        images: the folder of the pictures.
        pictures: those of it that are looked at; masks of others are left out.

    Raises:
        BadInput: a mask is of no picture, or of another size, or of some concept none is left.
    """
    every = list_images(images)
    of: dict[Path, list[Path]] = {}
    for picture in every:
        of.setdefault(picture.relative_to(images).with_suffix(""), []).append(picture)
    looked_at, made = set(pictures), []
    for concept, files in _by_folder(folder, "a concept's").items():
        if not files:
            raise BadInput(f"{folder / concept}: holds no mask; put one there for each picture, or remove the folder")
        found: dict[Path, Path] = {}
        for mask in files:
            picture = _picture_of(mask, folder / concept, images, of)
            if picture in found:
                raise BadInput(f"{mask} and {found[picture]} are both of {picture}: keep one")
            found[picture] = mask
        found = {picture: mask for picture, mask in found.items() if picture in looked_at}
        if not found:
            raise BadInput(
                f"{folder / concept}: none of its {len(files)} masks is of one of the {len(pictures)} pictures that "
                "are looked at; raise --max-images"
            )
        for picture, mask in found.items():
            _require_same_size(mask, picture)
        made.append(Masks(concept, found))
    return made


def _by_folder(folder: Path, whose: str) -> dict[str, list[Path]]:
    """The image files below each sub-folder.

    Raises:
        BadInput: there are none, one lies in no sub-folder, or there are too many of these.
    """
    files = list_images(folder)
    names = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    found: dict[str, list[Path]] = {name: [] for name in names}
    for file in files:
        parts = file.relative_to(folder).parts
        if len(parts) < 2:
            raise BadInput(f"{file}: lies in no folder that has {whose} name; put it into {folder}/<concept>/")
        found[parts[0]].append(file)
    if len(found) > MOST_CONCEPTS:
        raise BadInput(f"{folder}: holds {len(found)} folders, and {MOST_CONCEPTS} concepts at a time are the most")
    return found


def _require_enough(count: int, where: str, what: str) -> None:
    if count < LEAST:
        pictures = "picture" if count == 1 else "pictures"
        raise BadInput(f"{where}: {count} {pictures}; {what} needs {LEAST} or more, as different ones as there are")


def _require_apart(concepts: Mapping[str, Sequence[Path]], random: Path, others: Sequence[Path]) -> None:
    """See that no random picture is one of a concept's."""
    there = {file.resolve() for file in others}
    for name, files in concepts.items():
        if both := [file for file in files if file.resolve() in there]:
            raise BadInput(
                f"--random {random}: holds {len(both)} of the pictures of {name} too, {both[0]} for one; it is for "
                "pictures that show none of the concepts"
            )


def _picture_of(mask: Path, folder: Path, images: Path, of: Mapping[Path, Sequence[Path]]) -> Path:
    name = mask.relative_to(folder).with_suffix("")
    found = of.get(name, ())
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{mask}: {len(found)} pictures in {images} have its name, {found[0].name} and {found[1].name}")
    near = difflib.get_close_matches(str(name), map(str, of), 1)
    said = f"did you mean {of[Path(near[0])][0]}?" if near else "a mask has its picture's name and folder"
    raise BadInput(f"{mask}: there is no picture {images / name} that it could be of; {said}")


def _require_same_size(mask: Path, picture: Path) -> None:
    (width, height), (wanted_width, wanted_height) = _size(mask), _size(picture)
    if (width, height) != (wanted_width, wanted_height):
        raise BadInput(
            f"{mask}: {width}x{height} pixels, and {picture} has {wanted_width}x{wanted_height}; a mask has a pixel "
            "for each of its picture"
        )


def _size(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadInput(f"{file}: cannot be read as an image ({reason(error)}); replace or remove it") from error
