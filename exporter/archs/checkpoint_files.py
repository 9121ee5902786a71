"""Files of weights: what torch.save or safetensors wrote, in one part or several, read without running their code."""

import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from convoynet.exporter.errors import BadInput, short_reason

_INDEX = ".index.json"
_SAFETENSORS, _TORCH = ".safetensors", (b"PK", b"\x80")
_SAVE = "save the tensors alone with torch.save(model.state_dict(), FILE)"
# Classes of others in one file; trainers keep a dozen beside the weights.
_MOST_UNREAD = 100
# What PyTorch says of what it does not load: a class or function; one whose module it never loads; one that is made of
# others; and of what stands for one, where that is filled like a dictionary or a list.
_BLOCKED = re.compile(r"Unsupported global: GLOBAL (\S+)")
_NEVER = re.compile(r"unsupported GLOBAL (\S+) whose|Unsupported class (\S+)")
_FILLED = re.compile(r"Can only (SETITEM|extend|append).*<class 'unread\.(\S+)'>")
_BUILT_IN = frozenset({
    "bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "slice", "str",
    "tuple",
})  # fmt: skip
# What files are that are taken for checkpoints, by how they begin or by what is in an archive, and the way out.
_HEADS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull brings it"),
    (b"<", "is a web page, not what was to be downloaded"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it"),
    (b"\x89HDF", "is an HDF5 file, as Keras and MATLAB write them; give what PyTorch wrote"),
)
_ENTRIES = (
    ("constants.pkl", "is a TorchScript archive; load it, and torch.save its state_dict()"),
    ("archive_format", "is a torch.export program; give it as --arch FILE.pt2, with its weights"),
    (".npy", "holds NumPy arrays; make them tensors, and torch.save those by their names"),
)


class Unread:
    """What stands for an object of a class that is not loaded: it takes whatever it is given, and does nothing.

    PyTorch fills plain dictionaries and lists alone; `plain` is which of them stands for such an object.
    """

    name = ""
    plain: type = object

    def __new__(cls, *_: object, **__: object) -> Any:
        """Stand for an object."""
        return super().__new__(cls) if cls.plain is object else cls.plain()

    def __setstate__(self, _: object) -> None:
        """Take no state."""

    def refusal(self, path: Path) -> BadInput:
        """What to say where it is what was wanted."""
        return _pickled(path, self.name)


@dataclass(frozen=True)
class Content:
    """What a file holds; `tied` as safetensors notes it, name -> the name whose tensor it shares; what to say of it."""

    content: object
    tied: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_file(path: Path) -> Content:
    """Read a file of weights, or all the files that an index names.

    Raises:
        BadInput: it is missing, damaged, or cannot be read without running code from it.
    """
    if path.is_dir():
        raise BadInput(f"weights {path}: is a folder; give the file in it that holds the weights")
    if not path.is_file():
        raise BadInput(f"weights {path}: no such file; give a file, or `default` or `random`")
    if path.name.endswith(_INDEX):
        return _read_parts(path)
    if path.suffix.lower() == ".onnx":
        raise BadInput(f"weights {path}: is an ONNX file, a network with its weights; give it alone: --onnx {path}")
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError as error:
        raise BadInput(f"weights {path}: cannot be read: {error.strerror or error}") from error
    # The length of JSON, and JSON: the length alone may look like the start of anything.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return _safetensors(path)
    if what := next((what for begin, what in _HEADS if head.lstrip().startswith(begin)), ""):
        raise BadInput(f"{path}: {what}")
    named = path.suffix.lower() == _SAFETENSORS
    return _safetensors(path) if named and not head.startswith(_TORCH) else _torch(path)


def _read_parts(index: Path) -> Content:
    """The tensors of several files, of which an index says where each is."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.with_name(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index}: is no index of weights ({short_reason(error)}); give the files' own") from error
    tensors: dict[object, object] = {}
    tied: dict[str, str] = {}
    for file in files:
        part = read_file(file)
        if not isinstance(part.content, Mapping):
            raise BadInput(f"{file}: holds no tensors by name, as a part of {index} must")
        tensors.update(part.content)
        tied.update(part.tied)
    return Content(tensors, tied)


def _safetensors(path: Path) -> Content:
    try:
        with safe_open(path, "pt") as file:
            stated = file.metadata() or {}
        return Content(load_file(path), stated)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: is no safetensors file or is damaged ({short_reason(error)})") from error


def _torch(path: Path) -> Content:
    """What torch.save wrote. Objects that are no tensors or plain data, such as a trainer's options, stay unread."""
    unread: dict[str, type[Unread]] = {}
    while True:
        known: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (kind, name) for name, kind in unread.items()
        ]
        try:
            # From the file: of a path PyTorch looks at the suffix.
            with warnings.catch_warnings(), torch.serialization.safe_globals(known), path.open("rb") as file:
                warnings.simplefilter("ignore")  # of what PyTorch no longer likes; old files have it
                content = torch.load(file, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            if not _stand_in(str(error), unread):
                raise _unusable(path, error, list(unread)) from error
        # A damaged archive or pickle stream can fail in almost any way inside torch.load.
        except Exception as error:
            raise _unusable(path, error, list(unread)) from error
    left = f"left unread beside the weights, since what is no plain data takes code: {', '.join(unread)}"
    return Content(content, notes=(left,) if unread else ())


def _stand_in(said: str, unread: dict[str, type[Unread]]) -> bool:
    """Let something stand for what PyTorch did not load; False where nothing can."""
    kind: type
    if (filled := _FILLED.search(said)) and unread[filled[2]].plain is object:
        kind, name = OrderedDict if filled[1] == "SETITEM" else list, filled[2]
    elif blocked := _BLOCKED.search(said):
        kind, name = object, blocked[1]
        if "." not in name:  # a function of Python's own is nothing that a trainer keeps
            if name not in _BUILT_IN:
                return False
            name = f"builtins.{name}"
        if name in unread or len(unread) == _MOST_UNREAD or "qtensor" in name or "Uninitialized" in name:
            return False
    else:
        return False
    unread[name] = type(name, (Unread,), {"name": name, "plain": kind, "__module__": "unread"})
    return True


def _unusable(path: Path, error: Exception, unread: list[str]) -> BadInput:
    """What is wrong with a file that PyTorch did not read."""
    said = str(error)
    found = _BLOCKED.search(said) or _NEVER.search(said)
    name = next(filter(None, found.groups()), "") if found else next(iter(unread), "")
    if "qtensor" in name:
        return BadInput(f"{path}: holds quantized tensors; give the weights in float: convoy quantizes")
    if "Uninitialized" in name:
        return BadInput(
            f"{path}: holds tensors of lazy layers that never saw an image; run the network once, and save it again"
        )
    if name:
        return _pickled(path, name)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        entries = []
    if what := next((what for end, what in _ENTRIES if any(entry.endswith(end) for entry in entries)), ""):
        return BadInput(f"{path}: {what}")
    if "Unsupported operand" in said and (entries or path.read_bytes()[:1] == b"\x80"):
        return BadInput(f"{path}: is a pickle of another form than torch.save's own, which is never run; {_SAVE}")
    # PyTorch's advice is to load it with `weights_only=False`, which is never done here.
    why = "" if said.startswith("Weights only load failed") else f" ({short_reason(error)})"
    return BadInput(f"{path}: is no PyTorch checkpoint or is damaged{why}; save it again")


def _pickled(path: Path, name: str) -> BadInput:
    return BadInput(f"{path}: holds pickled code ({name}), which is never run; {_SAVE}")
