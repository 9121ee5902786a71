"""How long ONNX Runtime takes for a graph on this machine's CPU."""

import statistics
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from torch import nn

from convoynet.exporter.data.images import Preprocess
from convoynet.exporter.errors import BadInput, reason
from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
from convoynet.exporter.graph.onnx_session import make_session, session_options

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_WARM_UP = 3
_ROUNDS = 15
# A turn lasts about so long at least: a layer of microseconds needs many calls.
_ROUND_SECONDS = 2e-3


def seconds_of(
    models: Sequence[bytes | onnx.ModelProto], *, batch: int = 1, threads: int = 0, rounds: int = _ROUNDS
) -> list[float]:
    """Time graphs on the CPU, as the server runs them.

    The graphs take turns in each round, so that what else the machine does hits them alike; and each call is timed by
    itself, so that a call which lost its processor in the middle is one of many, and the median forgets it.

    Args:
        models: graphs of one input; its dynamic dimensions become `batch`.
        batch: images of one call.
        threads: CPU threads of one call; 0 leaves the number to ONNX Runtime.
        rounds: turns; in each a graph is called once, or for milliseconds where it is fast.

    Returns:
        Median seconds of one call, for each graph.

    Raises:
        BadInput: ONNX Runtime cannot run a graph.
    """
    calls = [_Call(model, batch, threads) for model in models]
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, found, strict=True):
            times.extend(call.seconds())
    return [statistics.median(times) for times in found]


def seconds_of_module(
    module: nn.Module, preprocess: Preprocess, *, task: str, batch: int = 1, threads: int = 0
) -> float:
    """Export a network and time it: what `Prune` with of = "latency" asks for."""
    exported = onnx_from_torch(module, preprocess, uint8_input=False, task=task)
    return seconds_of([exported], batch=batch, threads=threads)[0]


class _Call:
    """A graph and its input."""

    def __init__(self, model: bytes | onnx.ModelProto, batch: int, threads: int) -> None:
        content = model if isinstance(model, bytes) else model.SerializeToString()
        try:
            self._session = make_session(content, session_options(threads))
            self._inputs = _inputs(self._session, batch)
            fastest = min(self._once() for _ in range(_WARM_UP))
        # The runtime's exceptions have no common base but this one.
        except Exception as error:
            raise BadInput(f"ONNX Runtime cannot time this graph: {reason(error)}") from error
        self._calls = 1 + int(_ROUND_SECONDS / max(fastest, 1e-7))

    def seconds(self) -> list[float]:
        """Seconds of each call of one turn."""
        return [self._once() for _ in range(self._calls)]

    def _once(self) -> float:
        began = time.perf_counter()
        self._session.run(None, self._inputs)
        return time.perf_counter() - began


def _inputs(session: onnxruntime.InferenceSession, batch: int) -> dict[str, npt.NDArray[np.generic]]:
    (signature,) = session.get_inputs()
    shape = [size if isinstance(size, int) else batch for size in signature.shape]
    kind = _TYPES[signature.type]
    generator = np.random.default_rng(0)
    if kind is np.uint8:
        return {signature.name: generator.integers(0, 256, shape, np.uint8)}
    return {signature.name: generator.standard_normal(shape, np.float32).astype(kind)}
