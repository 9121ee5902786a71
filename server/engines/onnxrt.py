"""ONNX Runtime: CPU, CUDA and TensorRT execution providers."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from convoynet.server import datatypes
from convoynet.server.engines.base import EngineSpec, check, check_optional, tensor_of
from convoynet.server.engines.onnx_file import read_onnx
from convoynet.server.engines.onnxrt_binding import BoundSession, can_bind
from convoynet.server.engines.onnxrt_options import CPU, CUDA, TENSORRT, providers
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import TensorSpec
from convoynet.server.types import Tensor

_DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(double)": "FP64",
    "tensor(uint8)": "UINT8",
    "tensor(int8)": "INT8",
    "tensor(uint16)": "UINT16",
    "tensor(int16)": "INT16",
    "tensor(uint32)": "UINT32",
    "tensor(int32)": "INT32",
    "tensor(uint64)": "UINT64",
    "tensor(int64)": "INT64",
    "tensor(bool)": "BOOL",
    "tensor(string)": "BYTES",
}
_BF16 = 16
"""TensorProto's number of bfloat16."""
_IN_32_BITS = "session.x64quantprecision"
_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
}


class OnnxRuntimeEngine:
    """One InferenceSession."""

    buckets = ()

    def __init__(self, spec: EngineSpec, *, quiet: bool = False, content: bytes = b"") -> None:
        """Loads the model.

        Args:
            spec: See Engine.
            quiet: Whether what a run fails with stays out of the log.
            content: Of the file, where it is not all of it.
        """
        self._spec = spec
        stated = spec.options
        options = ort.SessionOptions()
        options.intra_op_num_threads = stated.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4 if quiet else 3
        options.graph_optimization_level = _LEVELS[stated.graph_optimization]
        # Spinning idle threads take the cores from the front end: measured, ResNet-50 INT8 falls to a third.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without VNNI sums of 8-bit products overflow: the exporter, which measured the model, asks for the same.
        options.add_session_config_entry(_IN_32_BITS, "1")
        self._session = _session(spec, options, content)
        active = self._session.get_providers()
        found = self._session.get_inputs(), self._session.get_outputs()
        # ONNX Runtime shows a tensor of unknown rank as it does a scalar.
        unranked = read_onnx(stated.file).unranked if not all(t.shape for side in found for t in side) else set()
        self.inputs, self.outputs = (_tensors(side, unranked) for side in found)
        check(spec, self.inputs, self.outputs)
        check_optional(spec, _tensors(self._session.get_overridable_initializers(), ()))
        self._outputs = [t.name for t in spec.outputs]
        self._texts = [t.name for t in spec.inputs if t.datatype == "BYTES"]
        self._halves = any(t.datatype == "BF16" for t in (*spec.inputs, *spec.outputs))
        on_gpu, number = active[0] != CPU, stated.gpus[0] if stated.gpus else 0
        self._bound = BoundSession(self._session, spec, "cuda", number) if on_gpu and can_bind(spec) else None
        provider = active[0].removesuffix("ExecutionProvider")
        self.device = f"{provider} {number}" if on_gpu else f"CPU, {_threads(stated.threads)}"
        self.info = {
            "runtime": f"ONNX Runtime {ort.__version__}",
            "provider": provider,
            "threads": str(stated.threads),
            "graph_optimization": stated.graph_optimization,
        }

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        names = [name for name in self._outputs if name in outputs] if outputs else self._outputs
        if self._bound is not None:
            return self._bound.run(inputs, names)
        if self._texts:
            inputs = {**inputs, **{name: _decoded(inputs[name]) for name in self._texts}}
        if self._halves:
            return self._run_halves(inputs, names)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _run_halves(self, inputs: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
        """With tensors of BF16, which numpy does not have: ONNX Runtime takes and gives their bits."""
        types = {t.name: t.datatype for t in (*self._spec.inputs, *self._spec.optional)}
        values = {
            name: _bits(tensor) if types[name] == "BF16" else ort.OrtValue.ortvalue_from_numpy(tensor)
            for name, tensor in inputs.items()
        }
        found = self._session.run_with_ort_values(list(names), values)
        return {
            name: _widened(value) if value.element_type() == _BF16 else value.numpy()
            for name, value in zip(names, found, strict=True)
        }

    def close(self) -> None:
        """See Engine.close."""
        del self._bound, self._session


def _decoded(texts: Tensor) -> Tensor:
    """As `str`, which is all that ONNX Runtime takes: bytes that are not UTF-8 become U+FFFD."""
    elements = [text.decode(errors="replace") for text in texts.ravel().tolist()]
    return np.array(elements, object).reshape(texts.shape)


def _bits(values: Tensor) -> ort.OrtValue:
    """Float32 as bfloat16."""
    bits = np.frombuffer(datatypes.encode(values, "BF16"), "<u2").reshape(values.shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BF16)


def _widened(value: ort.OrtValue) -> Tensor:
    """Bfloat16 as float32, which holds each of its numbers."""
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return datatypes.decode("BF16", value.shape(), raw)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _session(spec: EngineSpec, options: ort.SessionOptions, content: bytes) -> ort.InferenceSession:
    """A session on the first provider that starts; on KIND_GPU that must be the preferred one.

    Raises:
        InvalidModel: It must, and does not; or the file is not one that ONNX Runtime takes.
    """
    file, wanted = spec.options.file, providers(spec, ort.get_available_providers())
    _load_libraries({name for name, _ in wanted})
    while True:
        try:
            session = _made(content or str(file), options, wanted)
        except Exception as error:  # onnxruntime's exceptions have no common base below Exception
            reason = _first_line(error, file)
            raise InvalidModel(f"ONNX Runtime does not take {file.name}: {reason}") from error
        first = wanted[0][0]
        if session.get_providers()[0] == first:
            return session
        if spec.options.device == "gpu":
            raise InvalidModel(
                f"ONNX Runtime could not start its {first} (no such device, driver or library? The log has its words): "
                "set KIND_CPU in config.pbtxt, or serve it where there is a GPU"
            )
        # Its own way back forgets the options of the others, and with them which GPU it was to be.
        wanted = wanted[1:]


def _made(source: bytes | str, options: ort.SessionOptions, wanted: Sequence[Any]) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, options, providers=wanted)
    except NoKernel:
        # Without VNNI it lacks the sums of 32 bits for a QLinearConv of signed numbers alone, whose others are right.
        options.add_session_config_entry(_IN_32_BITS, "0")
        return ort.InferenceSession(source, options, providers=wanted)


def _load_libraries(wanted: Collection[str]) -> None:
    """Loads what the providers need of CUDA, cuDNN and TensorRT from the packages of pip, where they are there."""
    if CUDA in wanted:
        ort.preload_dlls()
    if TENSORRT in wanted and find_spec("tensorrt"):
        import_module("tensorrt")


def _tensors(found: list[ort.NodeArg], unranked: Collection[str]) -> tuple[TensorSpec, ...]:
    """The tensors that the protocol can carry."""
    return tuple(
        tensor_of(
            t.name, _DATATYPES[t.type], [d if isinstance(d, int) else -1 for d in t.shape], t.name not in unranked
        )
        for t in found
        if t.type in _DATATYPES
    )


def _first_line(error: Exception, file: Path) -> str:
    lines = str(error).replace(str(file), file.name).strip().splitlines()
    return lines[0] if lines else type(error).__name__
