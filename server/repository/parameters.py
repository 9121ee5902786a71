"""The parameters of config.pbtxt by type."""

from __future__ import annotations

from dataclasses import replace

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import Limits


def text(config: pb.ModelConfig, parameter: str) -> str:
    """The value of a parameter; "" where it is absent."""
    return config.parameters[parameter].string_value if parameter in config.parameters else ""


def integer(config: pb.ModelConfig, parameter: str, default: int, most: int) -> int:
    """The value of a parameter as a number; 0 stands for the default, as with Triton's backends.

    Raises:
        InvalidModel: It is none, or above `most`.
    """
    if parameter not in config.parameters:
        return default
    stated = text(config, parameter).strip()
    if not (stated.isascii() and stated.isdecimal() and len(stated) < 10 and int(stated) <= most):
        raise InvalidModel(f"parameter '{parameter}' must be a whole number of 0 to {most}, got {stated[:100]!r}")
    return int(stated) or default


def seconds(config: pb.ModelConfig, parameter: str) -> float | None:
    """The value of a parameter as seconds; None where it is absent.

    Raises:
        InvalidModel: It is no number in 1 to 86400.
    """
    if parameter not in config.parameters:
        return None
    stated = text(config, parameter)
    try:
        value = float(stated)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86400:
        raise InvalidModel(f"parameter '{parameter}' must be seconds in 1 to 86400, got {stated!r}")
    return value


def choice(config: pb.ModelConfig, parameter: str, allowed: tuple[str, ...]) -> str:
    """The value of a parameter; the first one allowed where it is absent.

    Raises:
        InvalidModel: It is none of `allowed`.
    """
    if parameter not in config.parameters:
        return allowed[0]
    stated = text(config, parameter)
    if stated not in allowed:
        raise InvalidModel(f"parameter '{parameter}' must be {' or '.join(filter(None, allowed))}, got {stated!r}")
    return stated


def limits_of(config: pb.ModelConfig, default: Limits) -> Limits:
    """The server's limits, or the time for a batch that the config states itself."""
    stated = seconds(config, "engine_timeout_seconds")
    return default if stated is None else replace(default, run_s=stated, measured=False)
