"""What is written of an explained picture: the heat over it, and the numbers."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoynet.server.client.pictures import encoded_picture, explanation_picture, is_free
from convoynet.server.client.views import where_most
from convoynet.server.explaining.asking import Explained
from convoynet.server.explaining.masks import Map
from convoynet.server.images.images import Region

_SUFFIXES = (".png", ".npy")


@dataclass(frozen=True)
class Written:
    """One image: what was explained and the files of it, or the error in one line."""

    image: Path
    found: Explained | None = None
    evidence: str = ""
    picture: Path | None = None
    map: Path | None = None
    error: str = ""

    def as_json(self, method: str, seed: int | None) -> dict[str, Any]:
        """The object in the list that --json prints."""
        if self.found is None:
            return {"image": str(self.image), "error": self.error}
        target = self.found.target
        return {
            "image": str(self.image),
            "method": method,
            "seed": seed,
            "label": target.label,
            "index": target.class_index,
            "score": target.score,
            "box": None if target.box is None else [round(edge, 2) for edge in target.box],
            "evidence": self.evidence,
            "most": float(np.nanmax(self.found.evidence)),
            "masks": self.found.done,
            "of": self.found.count,
            "seconds": round(self.found.seconds, 3),
            "picture": str(self.picture),
            "map": str(self.map),
        }


def paths(images: Sequence[Path], folder: Path) -> list[Path]:
    """Where each image's files go, without their suffix: its stem, or <stem>-2 and so on, in the folder.

    No two images share a name, and only what an earlier run made is replaced.
    """
    taken: set[str] = set()
    found = []
    for image in images:
        for number in count(1):
            stem = image.stem if number == 1 else f"{image.stem}-{number}"
            if stem.casefold() not in taken and _is_ours(folder / stem):
                break
        taken.add(stem.casefold())
        found.append(folder / stem)
    return found


def _is_ours(path: Path) -> bool:
    """Whether both files may be written: neither is there, or both are of an earlier run."""
    picture, numbers = (path.with_name(path.name + suffix) for suffix in _SUFFIXES)
    return is_free(picture) and (os.path.lexists(picture) or not os.path.lexists(numbers))


def write(image: Path, data: bytes, found: Explained, region: Region, path: Path) -> Written:
    """Write both files of an image, neither of them in part.

    Raises:
        OSError: one cannot be written.
    """
    shown = region.map_in_image(heat(found.evidence, found.lowest))
    numbers = io.BytesIO()
    np.save(numbers, found.evidence)
    contents = (encoded_picture(explanation_picture(data, shown)), numbers.getvalue())
    made = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    # Of two commands that write the same file each has a part of its own.
    parts = [file.with_name(f".{secrets.token_hex(8)}.part") for file in made]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for part, content in zip(parts, contents, strict=True):
            part.write_bytes(content)
        for part, file in zip(parts, made, strict=True):
            part.replace(file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    picture, numbers_file = made
    return Written(image, found, where_most(shown), picture, numbers_file)


def heat(evidence: Map, lowest: float) -> NDArray[np.int32]:
    """Evidence as 0 to 255, from `lowest` to the most that there is; -1 where nothing is known."""
    known = np.isfinite(evidence)
    above = np.where(known, evidence - np.float32(lowest), 0).clip(0)
    share = above / max(float(above.max()), 1e-30)
    return np.where(known, np.rint(255 * share), -1).astype(np.int32)
