"""What travels inside the server: numpy and dataclasses only, no protobuf and no engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[np.generic]
"""A tensor in C order; BYTES tensors have dtype object with `bytes` elements."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output that the client asks for; `classes` > 0 asks for its top classes as text instead."""

    name: str
    classes: int = 0


@dataclass(slots=True)
class InferRequest:
    """One ModelInfer call, decoded.

    Attributes:
        model: Name of the model.
        version: Version as text, "" for the newest.
        id: The client's own id, echoed in the answer.
        inputs: Tensors by input name, batch axis first where the model batches.
        datatypes: The datatype that the client declared for each input, such as "FP32".
        outputs: What the client asks for; empty asks for every output.
        deadline: time.monotonic() after which nobody wants the answer, or None.
    """

    model: str
    version: str
    id: str
    inputs: dict[str, Tensor]
    datatypes: dict[str, str]
    outputs: Sequence[RequestedOutput] = ()
    deadline: float | None = None


@dataclass(slots=True)
class Timings:
    """When one request passed each stage, in nanoseconds of time.perf_counter_ns(); 0 where it has not."""

    arrived: int = field(default_factory=time.perf_counter_ns)
    queued: int = 0
    started: int = 0
    input_ready: int = 0
    infer_done: int = 0


@dataclass(slots=True)
class InferResult:
    """The answer to one request: tensors by output name, in the model's order, and how long each stage took."""

    model: str
    version: str
    outputs: dict[str, Tensor]
    timings: Timings
