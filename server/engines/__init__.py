"""The engines, by the backend name of config.pbtxt; each is imported only when a model asks for it."""

from __future__ import annotations

from importlib import import_module

from server.engines.base import Engine
from server.errors import InvalidModel
from server.spec import ModelSpec

_ENGINES = {
    "fake": "server.engines.fake:FakeEngine",
    "onnxruntime": "server.engines.onnxrt:OnnxRuntimeEngine",
}


def load(spec: ModelSpec) -> Engine:
    """Makes the engine of a model. Called on the thread that will own it.

    Raises:
        InvalidModel: The engine is not installed, or does not take the model; the message says why.
    """
    module, _, name = _ENGINES[spec.engine.backend].partition(":")
    try:
        engine: Engine = getattr(import_module(module), name)(spec)
    except ModuleNotFoundError as error:
        raise InvalidModel(
            f"backend '{spec.engine.backend}' needs the module {error.name}: "
            "pip install 'convoy[cpu]' (or 'convoy[gpu]' on a machine with an NVIDIA GPU)"
        ) from error
    return engine
