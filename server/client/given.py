"""What a program gives the client: what cannot be sent is refused here, in one line that says what can."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from convoynet.server.client.errors import ClientError
from convoynet.server.datatypes import Array

_SHOWN = 40
# What gRPC's clock holds: a century.
_MOST_SECONDS = 3.2e9


def refusal(name: str, value: object, wanted: str) -> ClientError:
    """The error for a value that cannot be sent: what it is called, what it is, and what to give."""
    text = repr(value) if isinstance(value, str | bytes | Real | None) else ""
    shown = f"{text} ({type(value).__name__})" if 0 < len(text) <= _SHOWN else f"of the type {type(value).__name__}"
    return ClientError(f"{name} is {shown}: give {wanted}", grpc.StatusCode.INVALID_ARGUMENT)


def text(name: str, value: object, *, empty: bool = True) -> str:
    """A name or a version; None is the empty one where that is allowed."""
    if value is None and empty:
        return ""
    if not isinstance(value, str) or not (value or empty):
        raise refusal(name, value, "a text" + (f", '{value}'" if isinstance(value, Integral) else ""))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal(name, value, "a text that UTF-8 can hold") from None
    return value


def texts(name: str, value: object) -> Sequence[str]:
    """A list of names."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise refusal(name, value, "a list of names" + (f", [{value!r}]" if isinstance(value, str) else ""))
    return [text(f"{name}[{index}]", each, empty=False) for index, each in enumerate(value)]


def whole(name: str, value: object, least: int, bits: int = 63) -> int:
    """A whole number from `least` on that the protocol's field of so many bits holds."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**bits:
        raise refusal(name, value, f"a whole number from {least} on")
    return int(value)


def share(name: str, value: object) -> float:
    """A number from 0 to 1."""
    if not 0 <= (number := _number(value)) <= 1:
        raise refusal(name, value, "a number from 0 to 1")
    return number


def seconds(name: str, value: object) -> float | None:
    """A time to wait."""
    if value is None:
        return None
    if not 0 <= (number := _number(value)) <= _MOST_SECONDS:
        raise refusal(name, value, "seconds, or None")
    return number


def _number(value: object) -> float:
    """NaN for what is none, or is too large."""
    try:
        return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        return math.nan


def mapping(name: str, value: object, wanted: str) -> Mapping[str, Any]:
    """Values by name."""
    if not isinstance(value, Mapping):
        raise refusal(name, value, wanted)
    for key in value:
        text(f"a name in {name}", key, empty=False)
    return value


def options(stated: Mapping[str, Any], kind: type) -> Mapping[str, Any]:
    """Keyword arguments, whose names a TypedDict lists."""
    if unknown := sorted(set(stated) - set(kind.__annotations__)):
        raise ClientError(
            f"unknown option '{unknown[0]}', expected one of {', '.join(kind.__annotations__)}",
            grpc.StatusCode.INVALID_ARGUMENT,
        )
    return stated


def parameter(name: str, value: object) -> bool | int | float | str:
    """The value of a request parameter."""
    own = value.item() if isinstance(value, np.generic) else value
    if isinstance(own, bool | float):
        return own
    if isinstance(own, int):
        return whole(name, own, -(2**63))
    if isinstance(own, str):
        return text(name, own)
    raise refusal(name, value, "a bool, a whole number, a float or a text")


def array(name: str, value: object) -> Array:
    """What is to be a tensor: an array, of whatever library, or a list of `bytes`, which becomes [n, 1]."""
    if isinstance(value, np.ma.MaskedArray):
        raise refusal(name, value, "an array without a mask, as .filled(value) makes it")
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str | bytes | bytearray | memoryview):
        raise refusal(name, value, "an array, or a list of encoded images: [data], also for one image")
    if hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except Exception as error:  # of another library, which knows why: on a GPU, or part of a training
            reason = " ".join(str(error).split())
            raise refusal(name, value, f"an array; this one does not become one ({reason})") from error
    if not isinstance(value, list | tuple) or not all(isinstance(each, str | bytes) for each in value):
        made = "numpy.asarray(values, numpy.float32), with the type that the input has"
        kind = made if isinstance(value, list | tuple) else "an array"
        raise refusal(name, value, f"{kind}, or a list of encoded images as bytes")
    return bytes_array(value).reshape(-1, 1)


def bytes_array(elements: Sequence[bytes | str]) -> NDArray[np.object_]:
    """An array [n] that keeps its elements as they are, trailing zeros included."""
    result = np.empty(len(elements), np.object_)
    result[:] = elements
    return result


def encoded(images: object) -> list[bytes]:
    """The bytes of image files, given as they are or as paths.

    Raises:
        ClientError: no list of such, or a file cannot be read.
    """
    if isinstance(images, str | bytes | bytearray | PathLike):
        raise refusal("images", images, "a list, also for one image: [image]")
    if not isinstance(images, Iterable):
        raise refusal("images", images, "a list of paths, or of what the files hold")
    return [_file(f"images[{index}]", image) for index, image in enumerate(images)]


def _file(name: str, image: object) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, str | PathLike):
        raise refusal(name, image, "a path, or the bytes of an image file; pixels as an array go through infer")
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClientError(f"cannot read image '{image}': {reason}", grpc.StatusCode.INVALID_ARGUMENT) from error
