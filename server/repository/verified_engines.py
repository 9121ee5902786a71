"""What an export found out about a model in each engine, from config.pbtxt."""

from __future__ import annotations

import json
from collections.abc import Mapping

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.repository.parameters import text

_ENGINES = ("onnxruntime", "openvino", "tensorrt")


def verified_engines(config: pb.ModelConfig, version: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The engines that an export of this version verified, and those that it excluded, each with what it measured.

    Both are empty where config.pbtxt tells of another version: it is the newest one's.

    Raises:
        InvalidModel: A parameter is no JSON object of texts, or names an engine that there is not.
    """
    if text(config, "verified_version") not in ("", version):
        return {}, {}
    return _stated(config, "verified_engines"), _stated(config, "excluded_engines")


def _stated(config: pb.ModelConfig, parameter: str) -> Mapping[str, str]:
    stated = text(config, parameter)
    if not stated:
        return {}
    try:
        found = json.loads(stated)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(told, str) for told in found.values()):
        raise InvalidModel(
            f'parameter \'{parameter}\' must be JSON like {{"openvino": "what was measured"}}, got {stated[:100]!r}'
        )
    for name in found:
        if name not in _ENGINES:
            raise InvalidModel(f"parameter '{parameter}' names the engine {name[:100]!r}: {' or '.join(_ENGINES)}")
    return found
