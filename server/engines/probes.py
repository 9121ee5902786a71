"""Inputs that tell engines apart: the numbers that one of them may narrow, saturate, round or swallow."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convoynet.server.engines.base import EngineSpec
from convoynet.server.spec import TensorSpec
from convoynet.server.types import Tensor

_FEW = 2
"""The least rows of a probe, where the model takes as many."""
_ENOUGH = 2048
"""Elements that a probe should have: rows of small inputs are many, since each of them is a chance to differ."""
_MOST_ROWS = 16
_TEXTS = (b"", b"a", b"\xc3\xa9", b"two words", b"7", b"-1.5")
_NUDGE = 1e-6
"""How far off the usual numbers are the second time, relative to each: what differs then follows from chance."""


@dataclass(frozen=True)
class Probe:
    """Inputs of one batch.

    Attributes:
        style: Which kind of numbers it has.
        inputs: By name.
        nudged: The same, a little off, where the answer is expected to be nearly the same; else None.
    """

    style: str
    inputs: Mapping[str, Tensor]
    nudged: Mapping[str, Tensor] | None = None


def styles_of(spec: EngineSpec) -> list[str]:
    """The kinds of numbers that a model is to be tried with; probe() says what each is."""
    kinds = {t.dtype.kind for t in spec.inputs}
    integers, floats = bool(kinds & set("iu")), "f" in kinds
    return ["usual", "unit", "ties", "wide", *(["extreme"] if integers else []), *(["special"] if floats else [])]


def rows_of(spec: EngineSpec) -> int:
    """The rows of a probe; 1 where the model has no batch axis."""
    if not spec.max_rows:
        return 1
    row = max((int(np.prod(spec.shape(t, 1))) for t in spec.inputs), default=1)
    return min(max(_FEW, min(_ENOUGH // max(row, 1), _MOST_ROWS)), spec.max_rows)


def probe(spec: EngineSpec, style: str, rows: int, draw: int = 0) -> Probe:
    """The probe of a style: the same one in every process.

    Args:
        spec: Of the model.
        style: usual: numbers around 0, and small ones where they may be indices. unit: 0 to 1, integers of the whole
            range. ties: small whole numbers, many of them equal. wide: of every magnitude. extreme: the ends of the
            type, and what lies beyond 2^24, 2^31 and 2^53. special: usual ones, and among them NaN and infinities.
        rows: Its rows.
        draw: Which of several; the later ones of ties are 0 and 1 alone.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{style} {draw}".encode()).digest()[:8]))
    style = "bits" if draw and style == "ties" else style
    # Scalars stay scalars: numpy makes numbers of arrays without dimensions.
    inputs = {t.name: np.asarray(_values(t, style, tuple(spec.shape(t, rows)), rng), order="C") for t in spec.inputs}
    nudged = None
    if style in ("usual", "unit") and any(v.dtype.kind == "f" for v in inputs.values()):
        nudged = {n: _nudged(v, rng) if v.dtype.kind == "f" else v for n, v in inputs.items()}
    return Probe(style, inputs, nudged)


def part(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch as a batch of its own."""
    return {name: values[row : row + 1].copy() for name, values in inputs.items()}


def _values(tensor: TensorSpec, style: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    dtype = tensor.dtype
    if tensor.datatype == "BYTES":
        chosen = np.empty(math.prod(shape), object)
        chosen[:] = [_TEXTS[i] for i in rng.integers(0, len(_TEXTS), chosen.size)]
        return chosen.reshape(shape)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind == "f":
        values = _floats(style, shape, rng, dtype)
        return values if tensor.datatype != "BF16" else (values.view("<u4") & np.uint32(0xFFFF0000)).view("<f4")
    return _integers(style, shape, rng, dtype)


def _floats(style: str, shape: tuple[int, ...], rng: np.random.Generator, dtype: np.dtype[Any]) -> Tensor:
    values = np.asarray(rng.standard_normal(shape))
    if style == "unit":
        values = np.asarray(rng.random(shape))
    elif style == "ties":
        values = np.asarray(rng.integers(-2, 4, shape), np.float64)
    elif style == "bits":
        values = np.asarray(rng.integers(0, 2, shape), np.float64)
    elif style in ("wide", "extreme"):
        # Of half precision 65504 is the largest; of the others, what their sums and squares still hold.
        most = 4 if dtype.itemsize == 2 else 12
        values = np.sign(values) * 10 ** rng.uniform(-3, most, shape)
        values = np.trunc(values) if style == "extreme" else values
    elif style == "special":
        for number in (np.nan, np.inf, -np.inf):
            values = np.where(rng.random(shape) < 0.02, number, values)
        values.flat[:1] = np.nan
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype)


def _integers(style: str, shape: tuple[int, ...], rng: np.random.Generator, dtype: np.dtype[Any]) -> Tensor:
    info = np.iinfo(dtype)
    if style in ("unit", "wide") or (style in ("usual", "special") and dtype.itemsize == 1):
        return rng.integers(info.min, info.max, shape, dtype.type, endpoint=True)
    if style in ("usual", "special"):
        return np.asarray(rng.integers(0, 10, shape), dtype)
    if style in ("ties", "bits"):
        return np.asarray(rng.integers(max(info.min, -3) if style == "ties" else 0, 4, shape), dtype)
    ends = [0, 1, 2, 127, 128, 254, 255, 32767, 32768, 65535, 2**24 + 1, 2**31 - 1, 2**31, 2**40 + 5, 2**53 + 1]
    ends += [info.max, info.max - 1, *(-end for end in ends), info.min, info.min + 1]
    return rng.choice(np.array([end for end in ends if info.min <= end <= info.max], dtype), shape)


def _nudged(values: Tensor, rng: np.random.Generator) -> Tensor:
    factors: Tensor = 1 + _NUDGE * np.asarray(rng.standard_normal(values.shape))
    return np.asarray(np.multiply(values, factors), values.dtype)
