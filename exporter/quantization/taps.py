"""The inner values of a graph on images, from the fastest runtime that is installed: for what counts all of them.

Both runtimes compute float32 as float32; they add in different orders, so that their values differ by rounding.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import onnx

from convoynet.exporter.graph.onnx_graph import Graph, shapes
from convoynet.exporter.interrupts import interrupts_wait
from convoynet.exporter.running.openvino import core
from convoynet.exporter.running.runtime import inner_session

# Called with a tensor's name and some of its values, in no certain order, which are good until it returns; on several
# threads at a time.
Look = Callable[[str, np.ndarray], None]

# Values that leave ONNX Runtime at a time: what stays in a processor's caches is counted faster.
_PORTION_BYTES = 2**25
# OpenVINO computes one image at a time; several of a network whose tensors are smaller than this on the average, where
# every look takes notable time.
_SMALL_BYTES, _SEVERAL = 2**19, 4
# It computes so many portions at once, if the tensors of all are no larger than this.
_MOST_AT_ONCE, _AT_ONCE_BYTES = 8, 2**30
_IMAGE_RANK = 4
# Of the largest value: far more than rounding makes, far less than a wrong kernel does.
_DIFFERENCE, _LEAST = 1e-3, 1e-30


class Taps(Protocol):
    """Computes tensors of a graph on images."""

    def __call__(self, images: np.ndarray, look: Look) -> None:
        """Let `look` see all values of the tensors on images; what it raises is raised."""
        ...


def open_taps(model: onnx.ModelProto, tensors: Sequence[str]) -> Taps:
    """Prepare a graph with one input to compute some of its tensors, OpenVINO where it is installed and can."""
    known = shapes(model)
    image_bytes = max(1, 4 * sum(math.prod(size or 1 for size in known.get(name, ())) for name in tensors))
    slow = _OnnxTaps(model, tensors, max(1, _PORTION_BYTES // image_bytes))
    static = all(name in known and None not in known[name][1:] for name in tensors)
    if static and tensors and importlib.util.find_spec("openvino") is not None:
        # What OpenVINO cannot read or compile, it says with one of these.
        with contextlib.suppress(RuntimeError, KeyError), ThreadPoolExecutor(1) as pool:
            pool.submit(slow.session)
            return _Checked(_OpenVinoTaps(model, tensors, image_bytes), slow)
    return slow


class _Checked:
    """OpenVINO's, if the first image has in it the values that it has in ONNX Runtime; else ONNX Runtime's.

    OpenVINO 2026.4 answers some networks with response normalisations (LRN) with numbers near 1e38.
    """

    def __init__(self, fast: "_OpenVinoTaps", slow: "_OnnxTaps") -> None:
        self.chosen: Taps = fast
        self._pair: tuple[_OpenVinoTaps, _OnnxTaps] | None = (fast, slow)

    def __call__(self, images: np.ndarray, look: Look) -> None:
        if self._pair is not None and len(images):
            (fast, slow), self._pair = self._pair, None
            first, alone = images[:1], images[: fast.rows]
            with ThreadPoolExecutor(1) as pool:
                wanted = pool.submit(_facts, slow, first)
                # Copies of an image say the same of it, and need no graph for one.
                found = _facts(fast, first.repeat(fast.rows, axis=0))
            if not _alike(found, wanted.result()):
                self.chosen = slow
            # Before others come between: the first values that are seen decide how the others are counted.
            self.chosen(alone, look)
            images = images[len(alone) :]
        self.chosen(images, look)


_Facts = dict[str, list[float]]


def _facts(taps: Taps, images: np.ndarray) -> _Facts:
    """Of each tensor the extremes and moments of its values, on images that are all the same."""
    found: _Facts = {}

    def look(tensor: str, values: np.ndarray) -> None:
        if values.shape[:1] == images.shape[:1]:  # rows that are images: one says what the others do
            values = values[:1]
        with np.errstate(over="ignore", invalid="ignore"):
            moments = values.mean(), np.sqrt(np.mean(np.square(values)))
        found[tensor] = [float(fact) for fact in (values.min(), values.max(), *moments)]

    taps(images, look)
    return found


def _alike(found: _Facts, wanted: _Facts) -> bool:
    """Whether the values are the same in whatever order, as far as their extremes and moments tell."""
    return found.keys() == wanted.keys() and all(
        # What is not finite here is so there: it is for who counts to find.
        np.allclose(found[tensor], facts, rtol=0, atol=_tolerance(facts), equal_nan=True)
        for tensor, facts in wanted.items()
    )


def _tolerance(facts: Sequence[float]) -> float:
    return _DIFFERENCE * max([_LEAST, *map(abs, facts[:2])])


class _OnnxTaps:
    """One portion after the other, of whose tensors each is looked at on one of the cores."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str], rows: int) -> None:
        self._model, self._tensors, self._rows = model, list(tensors), rows
        self._session: Any = None

    def session(self) -> Any:
        """ONNX Runtime's, made when it is first asked for."""
        if self._session is None:
            self._session = inner_session(self._model, self._tensors)
        return self._session

    def __call__(self, images: np.ndarray, look: Look) -> None:
        if not self._tensors:  # ONNX Runtime wants at least one
            return
        session = self.session()
        name = session.get_inputs()[0].name
        with ThreadPoolExecutor(_cores()) as pool:
            for at in range(0, len(images), self._rows):
                found = session.run(self._tensors, {name: images[at : at + self._rows]})
                list(pool.map(look, self._tensors, found))


class _OpenVinoTaps:
    """Several portions at a time, whose tensors are looked at as soon as they are there."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str], image_bytes: int) -> None:
        from convoynet.exporter.quantization.tap_operator import Viewer

        self.rows = _SEVERAL if image_bytes < _SMALL_BYTES * len(tensors) else 1
        room = _AT_ONCE_BYTES // (self.rows * image_bytes)
        self._at_once = max(1, min(_cores(), _MOST_AT_ONCE // self.rows, room))
        self._content = model.SerializeToString()
        self._shape = [dim.dim_value for dim in _input_of(model).type.tensor_type.shape.dim][1:]
        self._tensors = tensors
        self._viewer = Viewer()
        self._requests = {self.rows: self._compile(self.rows)}

    def __call__(self, images: np.ndarray, look: Look) -> None:
        whole = len(images) // self.rows * self.rows
        portions = [images[at : at + self.rows] for at in range(0, whole, self.rows)] + [*images[whole:, None]]
        if whole < len(images) and 1 not in self._requests:
            self._requests[1] = self._compile(1)
        self._viewer.look = look
        try:
            with ThreadPoolExecutor(self._at_once) as pool:
                list(pool.map(self._run, portions))
        finally:
            self._viewer.look = None
        self._viewer.check()

    def _run(self, images: np.ndarray) -> None:
        idle = self._requests[len(images)]
        request = idle.get()
        try:
            request.infer([images], share_inputs=True)
        finally:
            idle.put(request)

    def _compile(self, rows: int) -> "SimpleQueue[Any]":
        """Requests for so many images that are idle.

        With its shapes known, and maps with their channels last as OpenVINO has them, nothing is copied or reordered.
        """
        from openvino import opset13

        from convoynet.exporter.quantization.tap_operator import Tap

        network = core().read_model(self._content)
        network.reshape([rows, *self._shape])
        made = {name: output for op in network.get_ops() for output in op.outputs() for name in output.get_names()}
        results = []
        for name in self._tensors:
            output = made[name]
            if output.get_partial_shape().rank.get_length() == _IMAGE_RANK:
                output = opset13.transpose(output, np.array([0, 2, 3, 1], np.int64)).output(0)
            results.append(opset13.result(Tap([output], name, self._viewer).output(0)))
        # Without the network's own results, which nobody wants, OpenVINO computes each tap right behind what it reads.
        # With them, all taps come last, when the values are in no cache any more.
        for result in network.get_results():
            network.remove_result(result)
        network.add_results(results)
        properties = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": self._at_once, "ENABLE_CPU_PINNING": False}
        # It calls operators in Python, and would swallow an interruption there.
        with interrupts_wait():
            compiled = core().compile_model(network, "CPU", properties)
        idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self._at_once):
            idle.put(compiled.create_infer_request())
        return idle


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _input_of(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    (name,) = Graph(model).inputs
    return next(value for value in model.graph.input if value.name == name)
