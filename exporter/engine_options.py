"""How an engine is to be built, from the flags of a command or from the parameters of a model's config.pbtxt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convoynet.exporter.errors import BadInput

Refit = Literal["no", "refit", "strip"]
OPTIMIZATION_LEVELS = range(6)
# The batch that an engine is tuned for where nothing says which.
USUAL_BATCH = 8
MAX_BATCH = 4096
MIB = 2**20


@dataclass(frozen=True)
class Profile:
    """The batches that an engine takes: the smallest, the one that it is tuned for, and the largest.

    Raises:
        BadInput: they do not rise from 1.
    """

    smallest: int
    usual: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.usual <= self.largest:
            raise BadInput(f"batch {self}: give smallest, usual and largest, rising from 1, like 1:8:64")

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Read "1:8:64"; "1:64", where the usual one is chosen; or "8", which is the only one.

        Raises:
            BadInput: it is none of these.
        """
        try:
            sizes = [int(size) for size in text.split(":")]
        except ValueError:
            sizes = []
        if len(sizes) == 1:
            sizes *= 3
        elif len(sizes) == 2:
            sizes.insert(1, max(sizes[0], min(sizes[1], USUAL_BATCH)))
        if len(sizes) != 3:
            raise BadInput(f"batch {text!r} is not smallest:usual:largest, like 1:8:64")
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.smallest}:{self.usual}:{self.largest}"


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine; what is None is left to TensorRT.

    Attributes:
        profiles: the optimization profiles, in the order that the engine numbers them.
        optimization_level: how long to search for fast kernels, 0 to 5.
        workspace_bytes: scratch memory that one layer may take.
        timing_cache: file that keeps what was measured for the next build; made where it is missing.
        version_compatible: an engine that later versions of TensorRT load too.
        hardware_compatible: an engine for every GPU from Ampere on, and not only for the kind that builds it.
        sparse_weights: use the kernels for weights of which two in four are zero.
        refit: whether the weights can be exchanged later ("refit"), and are left out of the plan ("strip").

    Raises:
        BadInput: a value that TensorRT does not have.
    """

    profiles: tuple[Profile, ...]
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    sparse_weights: bool = False
    refit: Refit = "no"

    def __post_init__(self) -> None:
        if not self.profiles:
            raise BadInput("an engine needs the batches that it is to take: --batch 1:8:64")
        if self.optimization_level is not None and self.optimization_level not in OPTIMIZATION_LEVELS:
            raise BadInput(f"optimization level {self.optimization_level} is not in 0..{OPTIMIZATION_LEVELS.stop - 1}")
        if self.workspace_bytes is not None and self.workspace_bytes < MIB:
            raise BadInput(f"a workspace of {self.workspace_bytes} bytes is too little: give 1 MiB or more")

    @property
    def profiles_text(self) -> str:
        """The profiles as config.pbtxt has them: "1:8:64", several joined by ","."""
        return ",".join(map(str, self.profiles))


def require_folder_of_cache(file: Path | None) -> None:
    """See that TensorRT's measurements can be kept in this file, before minutes of them.

    Raises:
        BadInput: its folder is not there.
    """
    if file is not None and not file.parent.is_dir():
        raise BadInput(f"--timing-cache {file}: there is no folder {file.parent}")


# What config.pbtxt says of a build that is to be done again; a parameter is left out where its value is the default.
_PREFIX = "tensorrt_"
_FLAGS = ("version_compatible", "hardware_compatible", "sparse_weights")


def to_parameters(options: BuildOptions) -> dict[str, str]:
    """The parameters of config.pbtxt from which `from_parameters` makes the same options, but for the timing cache."""
    found = {"profiles": options.profiles_text}
    if options.optimization_level is not None:
        found["optimization_level"] = str(options.optimization_level)
    if options.workspace_bytes is not None:
        found["workspace_mib"] = str(options.workspace_bytes // MIB)
    found |= {flag: "true" for flag in _FLAGS if getattr(options, flag)}
    if options.refit != "no":
        found["refit"] = options.refit
    return {_PREFIX + key: value for key, value in found.items()}


def from_parameters(parameters: Mapping[str, str]) -> BuildOptions:
    """Read the options that a model's config.pbtxt states.

    Raises:
        BadInput: no profiles, or a value that cannot be read.
    """
    found = {key.removeprefix(_PREFIX): value for key, value in parameters.items() if key.startswith(_PREFIX)}
    if not found.get("profiles"):
        raise BadInput(f"config.pbtxt has no parameter {_PREFIX}profiles, like 1:8:64: give --batch")
    # Of a plan that was built, the contract's own names say it as well.
    flags: dict[str, Any] = {flag: parameters.get(flag, found.get(flag, "")) == "true" for flag in _FLAGS}
    workspace = _number(found, "workspace_mib")
    refit = found.get("refit", "no")
    if refit not in ("no", "refit", "strip"):
        raise BadInput(f"config.pbtxt: {_PREFIX}refit {refit!r} is not refit or strip")
    return BuildOptions(
        profiles=tuple(Profile.parse(text) for text in found["profiles"].split(",")),
        optimization_level=_number(found, "optimization_level"),
        workspace_bytes=None if workspace is None else workspace * MIB,
        refit=refit,  # type: ignore[arg-type]
        **flags,
    )


def _number(found: Mapping[str, str], key: str) -> int | None:
    if key not in found:
        return None
    try:
        return int(found[key])
    except ValueError as error:
        raise BadInput(f"config.pbtxt: {_PREFIX}{key} {found[key]!r} is no number") from error
