"""From a classic ConvNet in PyTorch to a small, fast, measured model behind a gRPC server.

The names below are loaded when they are first used, so that `import convoynet` costs nothing, and neither torch nor
grpc is needed by who uses the other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convoynet.exporter.archs import Arch
    from convoynet.server.client.async_client import AsyncClient
    from convoynet.server.client.client import Client
    from convoynet.server.client.errors import ClientError, Unreachable
    from convoynet.server.client.results import Detection, Prediction, Segmentation

__all__ = ["Arch", "AsyncClient", "Client", "ClientError", "Detection", "Prediction", "Segmentation", "Unreachable"]

_MODULES = {
    "Arch": "convoynet.exporter.archs",
    "AsyncClient": "convoynet.server.client.async_client",
    "Client": "convoynet.server.client.client",
    "ClientError": "convoynet.server.client.errors",
    "Detection": "convoynet.server.client.results",
    "Prediction": "convoynet.server.client.results",
    "Segmentation": "convoynet.server.client.results",
    "Unreachable": "convoynet.server.client.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'convoynet' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
