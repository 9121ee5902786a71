"""From a classic ConvNet in PyTorch to a small, fast, measured model behind a gRPC server.

The names below are loaded when they are first used, so that `import convoynet` costs nothing, and neither torch nor
grpc is needed by who uses the other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convoynet.errors import ConvoyError
    from convoynet.exporter.archs import Arch
    from convoynet.exporter.commands.api import export
    from convoynet.exporter.pipeline.pipeline import Published
    from convoynet.server.api.loaded import LoadedModel, load
    from convoynet.server.api.running import NotStarted, Server, serve
    from convoynet.server.client.async_client import AsyncClient
    from convoynet.server.client.client import Client
    from convoynet.server.client.errors import ClientError, Unreachable
    from convoynet.server.client.results import Detection, Prediction, Segmentation

_MODULES = {
    "Arch": "convoynet.exporter.archs",
    "AsyncClient": "convoynet.server.client.async_client",
    "Client": "convoynet.server.client.client",
    "ClientError": "convoynet.server.client.errors",
    "ConvoyError": "convoynet.errors",
    "Detection": "convoynet.server.client.results",
    "LoadedModel": "convoynet.server.api.loaded",
    "NotStarted": "convoynet.server.api.running",
    "Prediction": "convoynet.server.client.results",
    "Published": "convoynet.exporter.pipeline.pipeline",
    "Segmentation": "convoynet.server.client.results",
    "Server": "convoynet.server.api.running",
    "Unreachable": "convoynet.server.client.errors",
    "export": "convoynet.exporter.commands.api",
    "load": "convoynet.server.api.loaded",
    "serve": "convoynet.server.api.running",
}

__all__ = [
    "Arch",
    "AsyncClient",
    "Client",
    "ClientError",
    "ConvoyError",
    "Detection",
    "LoadedModel",
    "NotStarted",
    "Prediction",
    "Published",
    "Segmentation",
    "Server",
    "Unreachable",
    "export",
    "load",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'convoynet' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
