"""What travels inside the server: numpy and dataclasses only, no protobuf and no engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[np.generic]
"""A tensor in C order, not always aligned; BYTES tensors have dtype object with `bytes` elements."""


@dataclass(slots=True)
class Call:
    """How a request came in, whatever the front end.

    Attributes:
        protocol: "grpc" or "http".
        deadline: time.monotonic() after which the client gives up, or None.
        metadata: Names in lower case with their values, as they came.
        identity: The name in the client's certificate; "" without one.
        management: Whether the listener that it came in by takes management calls.
        arrived: time.perf_counter_ns() at which it came.
        raw_inputs: The raw tensors of a ModelInferRequest that were left in the payload, views of it; empty where
            they are in the message.
        raw_outputs: Where large raw outputs are left for whoever serializes the answer; None where the message is to
            have them.
        served: The model that an inference was for; None where that is not known yet, or there is none.
        result: What an inference came to, once there is an answer.
        error: Why it failed; None while it has not.
        code: Name of the gRPC status that its client is told, once that is known; until then nobody waits for it.
        counted: Whether it was counted, which is done once.
        allowed: The RPC that its caller was found to be allowed; "" while nobody asked.
        number: In a front-end process: by which the core knows it while it waits to hear whether its answer was
            written; 0 where it does not.
        form: What is the same in every request like it, and the bytes of each raw tensor, where that is worth to be
            kept; see protocol/forms.py.
    """

    protocol: str
    deadline: float | None = None
    metadata: Sequence[tuple[str, str | bytes]] = ()
    identity: str = ""
    management: bool = True
    arrived: int = field(default_factory=time.perf_counter_ns)
    raw_inputs: tuple[memoryview, ...] = ()
    raw_outputs: list[bytes | memoryview] | None = None
    served: Counting | None = None
    result: InferResult | None = None
    error: BaseException | None = None
    code: str = "CANCELLED"
    counted: bool = False
    allowed: str = ""
    number: int = 0
    form: tuple[bytes, list[int]] | None = None

    @property
    def is_at_its_deadline(self) -> bool:
        """Whether a client that goes away now does so since its deadline is over."""
        return is_late(self.deadline)

    def header(self, name: str) -> str:
        """The first text value of that (lower-case) name, "" where there is none."""
        return next((value for key, value in self.metadata if key == name and isinstance(value, str)), "")


class Counting(Protocol):
    """A model, to which requests are counted when they are over."""

    @property
    def labels(self) -> tuple[str, str]:
        """Its name and version."""
        ...

    def count(self, timings: Timings, rows: int, error: BaseException | None, *, late: bool) -> None:
        """Counts one request, once it is over, by what its client was told.

        Args:
            timings: When it passed each stage.
            rows: Its rows; without meaning where it failed.
            error: Why it failed; None where it did not.
            late: Whether a client that went away did so at its deadline.
        """
        ...


class Place(Protocol):
    """Room for an output in memory of the client's: `size` bytes."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def where(self) -> tuple[object, int]:
        """What memory it is in, and its first byte there: places in the same memory may overlap."""
        ...

    def write(self, data: bytes | memoryview) -> None:
        """Puts an output there, which has no more than `size` bytes."""
        ...


@dataclass(slots=True)
class RequestedOutput:
    """One output that the client asks for.

    Attributes:
        name: Which.
        classes: Above 0 asks for so many top classes as text instead.
        place: Memory of the client's to write it to, instead of sending it.
    """

    name: str
    classes: int = 0
    place: Place | None = None


# gRPC rounds the time that a client gives it, so that the client may give up a little before its deadline here.
_ROUNDING_S = 0.05


def is_late(deadline: float | None) -> bool:
    """Whether the time of a client with that deadline is over."""
    return deadline is not None and time.monotonic() >= deadline - _ROUNDING_S


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
        deadline: time.monotonic() at which the client itself gives up, or None.
        timeout_us: The `timeout` parameter in microseconds, 0 for none.
        priority: The `priority` parameter: 1 is the highest, 0 the model's default.
        stage_times: Whether the reply tells how long each stage took.
        fits: The spec that it was found to fit, and its rows; None where nobody looked.
    """

    model: str
    version: str
    id: str
    inputs: dict[str, Tensor]
    datatypes: dict[str, str]
    outputs: Sequence[RequestedOutput] = ()
    deadline: float | None = None
    timeout_us: int = 0
    priority: int = 0
    stage_times: bool = False
    fits: tuple[object, int] | None = None

    @property
    def is_at_its_deadline(self) -> bool:
        """Whether a client that goes away now does so since its deadline is over."""
        return is_late(self.deadline)


@dataclass(slots=True)
class Timings:
    """When one request passed each stage, in nanoseconds of time.perf_counter_ns(); 0 where it has not.

    Attributes:
        looked_up: Nanoseconds that were spent on the response cache.
        hit: Whether the answer came from there; then nothing was queued and nothing ran.
    """

    arrived: int = field(default_factory=time.perf_counter_ns)
    queued: int = 0
    started: int = 0
    input_ready: int = 0
    infer_done: int = 0
    looked_up: int = 0
    hit: bool = False


@dataclass(slots=True)
class InferResult:
    """The answer to one request: tensors by output name, in the model's order, its rows, and its times."""

    model: str
    version: str
    outputs: dict[str, Tensor]
    timings: Timings
    rows: int = 1
