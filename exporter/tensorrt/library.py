"""The one place that imports TensorRT: `tensorrt` 10.12 and later where it can build, else `tensorrt_rtx`.

Both have the same API. TensorRT builds on the GPU that will run the engine; TensorRT-RTX builds anywhere, and compiles
the engine on the GPU that loads it.
"""

import importlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from convoynet.exporter.errors import Missing

# In the order of preference, with their names for people.
_MODULES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# The first with every call that is made here, of those that were looked at.
_OLDEST = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 2)}
_INSTALL = "pip install tensorrt on a machine with the GPU, or tensorrt-rtx, whose builder needs none"


@dataclass(frozen=True)
class Library:
    """A TensorRT that is installed here.

    Attributes:
        name: of its module, "tensorrt" or "tensorrt_rtx".
        version: as the library writes it, "10.13.2.6".
        module: the module itself.
    """

    name: str
    version: str
    module: Any

    @property
    def title(self) -> str:
        """Name and version for people."""
        return library_title(self.name, self.version)

    @property
    def compiles_at_load(self) -> bool:
        """Whether its engines become code for one GPU only when that GPU loads them."""
        return self.name == "tensorrt_rtx"


def library_title(name: str, version: str) -> str:
    """Name and version of a library for people."""
    return f"{_MODULES.get(name, name)} {version}"


@cache
def find() -> Library | None:
    """The library that builds engines on this machine; None where there is none."""
    return next((library for name in _MODULES if (library := _load(name)) and _obstacle(library) is None), None)


def require() -> Library:
    """The library that builds engines on this machine.

    Raises:
        Missing: there is none; the message says why, and what to install.
    """
    library = find()
    if library is not None:
        return library
    installed = [library for name in _MODULES if (library := _load(name))]
    if not installed:
        raise Missing(f"TensorRT is not installed: {_INSTALL}")
    raise Missing(f"{installed[0].title} {_obstacle(installed[0])}: {_INSTALL}")


@cache
def recorder(library: Library) -> Any:
    """The one logger of this process, since TensorRT keeps the first that it is given: collects `errors` in silence."""

    class Recorder(library.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in {"ERROR", "INTERNAL_ERROR"}:
                self.errors.append(message)

    return Recorder()


@cache
def _load(name: str) -> Library | None:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None  # PyPI's `tensorrt` is installed in many places where its libraries are not
    if not (hasattr(module, "Builder") and hasattr(module, "OnnxParser")):
        return None
    return Library(name, module.__version__, module)


def _obstacle(library: Library) -> str | None:
    """Why a library that is installed builds no engines here; None where it does."""
    oldest = _OLDEST.get(library.name, ())
    if tuple(int(number) for number in re.findall(r"\d+", library.version)[:2]) < oldest:
        return f"is older than {'.'.join(map(str, oldest))}"
    logger = recorder(library)
    try:
        library.module.Builder(logger)
    except (TypeError, RuntimeError):  # TensorRT's own builder asks the driver first
        return "builds only where there is an NVIDIA GPU with its driver, and none is found here"
    return None
