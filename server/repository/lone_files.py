"""Models that are one ONNX file each, without a folder and a config: `convoy serve FILE.onnx`, or a folder of them.

Such a model has one version, 1, and what config.pbtxt would say is completed from the file. The files are read where
they lie, and nothing is written beside them.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel, printable
from convoynet.server.repository import model_config
from convoynet.server.repository.folder import MOST_FOLDERS, Folder
from convoynet.server.repository.layout import is_name, is_remote
from convoynet.server.repository.model_config import Stated

log = logging.getLogger(__name__)

SUFFIX = ".onnx"
VERSION = "1"
_STRANGE = re.compile(r"[^A-Za-z0-9._-]+")
_MOST_SIDE = 2**16
_USUAL_SIDE = 224
_CHANNELS = (1, 3)
# ImageNet's, and for grey their averages.
_MEAN = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
_STD = {3: (0.229, 0.224, 0.225), 1: (0.226,)}


@dataclass(frozen=True)
class Preprocessing:
    """How encoded images become the input of a file, as flags say; "" is what nobody said.

    Attributes:
        mean, std: R,G,B or one number, on the scale of 0 to 1.
        input_size, resize: H or HxW, in pixels.
        interpolation, channel_order: as settings.
    """

    mean: str = ""
    std: str = ""
    input_size: str = ""
    resize: str = ""
    interpolation: str = ""
    channel_order: str = ""

    def __post_init__(self) -> None:
        """Checks the texts.

        Raises:
            ValueError: One is none of its kind; the message names it.
        """
        if bool(self.mean) != bool(self.std):
            raise ValueError("--mean and --std belong together")
        if self.mean and len(_numbers("--mean", self.mean)) != len(_numbers("--std", self.std)):
            raise ValueError(
                f"--mean {self.mean} has other numbers than --std {self.std}: as many in one as in the other"
            )
        if self.std and min(_numbers("--std", self.std)) <= 0:
            raise ValueError(f"--std {self.std} must be above 0")
        for flag, text in (("--input-size", self.input_size), ("--resize", self.resize)):
            if text:
                _sides(flag, text)

    @property
    def asked(self) -> bool:
        """Whether anything was said."""
        return self != Preprocessing()


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in _CHANNELS or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{flag} {text!r} is not R,G,B or one number, like 0.485,0.456,0.406")
    return values


def _sides(flag: str, text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    try:
        sides = int(height), int(width if cross else height)
    except ValueError:
        sides = 0, 0
    if not all(1 <= side <= _MOST_SIDE for side in sides):
        raise ValueError(f"{flag} {text!r} is not H or HxW, like 256 or 256x320")
    return sides


class LoneFiles(Folder):
    """A file, or the files of a folder, each a model that is called after it.

    Args:
        root: The file, or the folder.
        name: What a single file is called, where not after itself.
        preprocessing: How images become the input, where that was said.
        labels: A file with a class name a line.
    """

    def __init__(
        self, root: Path, name: str = "", preprocessing: Preprocessing | None = None, labels: Path | None = None
    ) -> None:
        super().__init__(root)
        self._name = name
        self.preprocessing, self.labels = preprocessing or Preprocessing(), labels
        self._told: set[str] = set()

    def folders(self) -> dict[str, Path]:
        """The files by the names of their models; raises OSError where the folder cannot be listed."""
        if not self.root.is_dir():
            return {self._name or model_name(self.root): self.root.resolve()} if self.root.exists() else {}
        found: dict[str, Path] = {}
        with os.scandir(self.root) as entries:
            files = sorted(entry.name for entry in entries if _is_meant(entry))
        if len(files) > MOST_FOLDERS:
            raise OSError(errno.EFBIG, f"it holds more than {MOST_FOLDERS} files")
        for file in files:
            name = model_name(Path(file))
            if name in found and file not in self._told:
                self._told.add(file)
                log.error(
                    "%s is not served: %s has the name of its model, '%s'", printable(file), found[name].name, name
                )
            found.setdefault(name, (self.root / file).resolve())
        return dict(sorted(found.items()))

    def find(self, name: str) -> Path | None:
        """The file of one model, or None where it is not there."""
        return self.folders().get(name)


def _is_meant(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.is_file()


def model_name(file: Path) -> str:
    """What the model of a file is called: its stem, with _ for what no name may hold."""
    name = _STRANGE.sub("_", file.stem)[:128].lstrip("._-")
    return name if is_name(name) else "model"


def split(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths that somebody gave to be served: repositories, and ONNX files or folders of such."""
    repositories, files = [], []
    for path in paths:
        if not is_remote(path) and path.endswith(SUFFIX):
            files.append(path)
            continue
        lone = not is_remote(path) and Path(path).is_dir() and bool(LoneFiles(Path(path)).folders())
        if lone:
            files.append(path)
        if not lone or Folder(Path(path)).folders():
            repositories.append(path)
    return repositories, files


def is_lone(folder: Path) -> bool:
    """Whether what stands for a model's folder is its file."""
    return folder.suffix == SUFFIX and folder.is_file()


def read_config(folder: Path) -> Stated | None:
    """As of model_config; of a file what is known before it is looked into."""
    if not is_lone(folder):
        return model_config.read_config(folder)
    backend = "onnxruntime"
    platform = model_config.BACKENDS[backend].platform
    return Stated(pb.ModelConfig(backend=backend, platform=platform, default_model_filename=folder.name), batch=False)


def chosen_versions(folder: Path, config: pb.ModelConfig) -> list[str]:
    """As of model_config."""
    return [VERSION] if is_lone(folder) else model_config.chosen_versions(folder, config)


def place(folder: Path, version: str) -> Path:
    """Where the files of a version are."""
    return folder if is_lone(folder) else folder / version


def add_preprocessing(config: pb.ModelConfig, asked: Preprocessing) -> None:
    """Says how images become the input, in a config that was completed from the file.

    Raises:
        InvalidModel: The input is no batch of images, or the file does not take what was asked for.
    """
    if not asked.asked:
        return
    if len(config.input) != 1:
        raise InvalidModel(
            f"--mean, --resize and the like are for one input, the images, and it has {len(config.input)}"
        )
    (tensor,) = config.input
    dims = list(tensor.dims)
    if not config.max_batch_size and len(dims) == 4:
        raise InvalidModel(
            f"its input '{tensor.name}' {dims} has no free batch axis, which encoded images need: "
            "`convoy export --onnx FILE.onnx` makes a graph that takes any number"
        )
    if len(dims) != 3 or tensor.data_type not in (pb.TYPE_FP32, pb.TYPE_UINT8):
        kind = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        raise InvalidModel(
            f"its input '{tensor.name}' is {kind} {dims}, and encoded images become FP32 or UINT8 [C,H,W] or [H,W,C]"
        )
    last = dims[0] not in _CHANNELS and dims[2] in _CHANNELS
    channels = dims[2 if last else 0]
    given = [len(_numbers("--mean", asked.mean))] if asked.mean else []
    channels = channels if channels != -1 else (given or [3])[0]
    if channels not in _CHANNELS or given not in ([], [channels]):
        raise InvalidModel(f"its input '{tensor.name}' has {channels} channels, and --mean {given[0] if given else 3}")
    own = dims[:2] if last else dims[1:]
    wanted = (
        _sides("--input-size", asked.input_size) if asked.input_size else tuple(max(d, 0) or _USUAL_SIDE for d in own)
    )
    if any(have not in (-1, side) for have, side in zip(own, wanted, strict=True)):
        raise InvalidModel(
            f"--input-size {asked.input_size}: its input '{tensor.name}' takes images of {own[0]}x{own[1]}"
        )
    told = _told(asked, channels, wanted, normalised=tensor.data_type == pb.TYPE_FP32)
    tensor.format = pb.ModelInput.FORMAT_NHWC if last else pb.ModelInput.FORMAT_NCHW
    tensor.dims[:] = [*wanted, channels] if last else [channels, *wanted]
    config.parameters["preprocess"].string_value = json.dumps(told)
    log.info("model %s: encoded images become its input so: %s", config.name, json.dumps(told))


def _told(asked: Preprocessing, channels: int, size: Sequence[int], *, normalised: bool) -> dict[str, object]:
    if asked.mean and not normalised:
        raise InvalidModel("it takes UINT8, and normalises pixels itself: leave --mean and --std out")
    resize: object = list(size)
    if asked.resize:
        sides = _sides("--resize", asked.resize)
        resize = list(sides) if "x" in asked.resize else sides[0]
    told: dict[str, object] = {
        "color": "L" if channels == 1 else (asked.channel_order or "rgb").upper(),
        "resize": resize,
        "size": list(size),
        "interpolation": asked.interpolation or "bilinear",
    }
    if normalised:
        told["mean"] = list(_numbers("--mean", asked.mean) if asked.mean else _MEAN[channels])
        told["std"] = list(_numbers("--std", asked.std) if asked.std else _STD[channels])
    return told
