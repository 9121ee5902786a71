"""Networks by the names that libraries have for them: "timm:NAME", "torchvision:NAME" and "hf-hub:OWNER/NAME".

Which there are is read from the libraries' source, where their builders are registered: importing them, to list them
or to answer a slip, takes seconds. Imports no PyTorch.
"""

import difflib
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.exporter.archs import facts
from convoynet.exporter.config import split_library
from convoynet.exporter.errors import BadInput, Missing

if TYPE_CHECKING:
    from convoynet.exporter.archs.registry import Arch

LIBRARIES = ("timm", "torchvision")
# torchvision's decorator may give the name; other decorators may stand between it and the function.
_BUILDER = re.compile(r'^@register_model(?:\((?:name="(\w+)")?\))?\n(?:@.*\n)*def (\w+)\(', re.MULTILINE)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@cache
def known(library: str) -> Mapping[str, str]:
    """The image classifiers, and networks without a head, of timm or torchvision: name to the module that defines it.

    Raises:
        Missing: the library is not installed.
    """
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{library} is not installed; pip install 'convoynet[export]' brings it")
    names: dict[str, str] = {}
    # Not the folders below: detection, segmentation, video and integer kernels.
    for file in sorted(Path(spec.submodule_search_locations[0], "models").glob("*.py")):
        for match in _BUILDER.finditer(file.read_text(encoding="utf-8")):
            names[match[1] or match[2]] = file.stem
    return dict(sorted(names.items()))


def matching(pattern: str) -> dict[str, str]:
    """Each network whose "LIBRARY:NAME" has `pattern` in it, or matches it where it has wildcards, and its module.

    Raises:
        BadInput: there is none.
        Missing: a library is not installed.
    """
    wanted = (pattern if set(pattern) & set("*?[") else f"*{pattern}*").lower()
    found = {f"{library}:{name}": module for library in LIBRARIES for name, module in known(library).items()}
    matches = {name: module for name, module in found.items() if fnmatchcase(name, wanted)}
    if not matches:
        raise BadInput(f"--all {pattern}: none of {len(found)} names has that in it; `*` stands for any letters")
    return matches


def require_known(arch: str) -> None:
    """See that a library has a network of this name; timm's may end in the tag of its weights.

    Raises:
        BadInput: it has not; the message names the close matches.
        Missing: the library is not installed.
    """
    library, name = split_library(arch)
    if library == "hf-hub":
        if not _REPOSITORY.fullmatch(name):
            raise BadInput(f"--arch {arch}: must be hf-hub:OWNER/NAME, a repository of timm's on Hugging Face's hub")
        known("timm")
        return
    names = known(library)
    plain = name.partition(".")[0] if library == "timm" else name
    if plain not in names:
        close = difflib.get_close_matches(plain.lower(), names, n=3)
        hint = f"did you mean {' or '.join(f'{library}:{other}' for other in close)}? " if close else ""
        if plain in facts.recorded():
            raise BadInput(f"--arch {arch}: {library}:NAME is for classifiers; use --arch {plain}")
        raise BadInput(
            f"--arch {arch}: {library} has no network {name!r}: {hint}`convoy archs --all PATTERN` lists its names"
        )


def get(arch: str, size: tuple[int, int] | None) -> "Arch":
    """The network that a library's name means, with the weights, labels and preprocessing of the library's own config.

    Args:
        arch: "timm:NAME", "timm:NAME.TAG", "torchvision:NAME" or "hf-hub:OWNER/NAME".
        size: (height, width) that is asked for, where timm builds a network for one size; None: the network's own.

    Raises:
        BadInput: there is no such network, or it classifies nothing.
        Missing: the library is not installed.
    """
    require_known(arch)
    library, name = split_library(arch)
    if library == "torchvision":
        from convoynet.exporter.archs import from_torchvision

        return from_torchvision.named(name)

    from convoynet.exporter.archs import from_timm

    return from_timm.named(f"hf-hub:{name}" if library == "hf-hub" else name, size)
