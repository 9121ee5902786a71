"""OpenVINO, which reads the ONNX file itself, on the CPU."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import openvino

from convoynet.processor import adds_in_16_bits
from convoynet.server.engines.base import EngineSpec, check, check_optional, tensor_of
from convoynet.server.errors import InvalidModel
from convoynet.server.scheduling.buckets import candidates, choose_buckets
from convoynet.server.spec import EngineOptions, TensorSpec
from convoynet.server.types import Tensor

_DATATYPES = {
    "f32": "FP32",
    "f16": "FP16",
    "f64": "FP64",
    "u8": "UINT8",
    "i8": "INT8",
    "u16": "UINT16",
    "i16": "INT16",
    "u32": "UINT32",
    "i32": "INT32",
    "u64": "UINT64",
    "i64": "INT64",
    "boolean": "BOOL",
}


_FINE = 2
_FIXED_SECONDS = 3.0
_LARGE_SECONDS = 0.02
_GAIN = 0.9
_TRIALS, _TRIAL_SECONDS = 5, 0.2
_INEXACT = (
    "OpenVINO adds products of 8 bits in 16 bits on this processor, which has no VNNI: INT8 can be further from what "
    'was measured elsewhere; backend: "onnxruntime" adds them in 32'
)


class OpenVinoEngine:
    """One model compiled for any batch, and again for some sizes where that is faster.

    For a fixed batch OpenVINO plans its memory and its kernels ahead. Small networks gain by it (LeNet-5: less than
    half the time), of large ones nothing is to be seen. So it is tried, smallest size first, until one gains less than
    a tenth, a batch takes more than 20 ms, or 3 s are over. Batches between are filled up where that takes less time.
    """

    def __init__(self, spec: EngineSpec, fixed: Collection[int] | None = None, content: bytes = b"") -> None:
        """Loads the model.

        Args:
            spec: See Engine.
            fixed: The batch sizes to compile it for, whether that is faster or not; None to find out.
            content: Of the file, where it is not all of it.
        """
        stated = spec.options
        if stated.device == "gpu":
            raise InvalidModel("OpenVINO runs on the CPU here: set KIND_CPU in config.pbtxt, or backend onnxruntime")
        core = openvino.Core()
        try:
            model = core.read_model(content or stated.file)
            _refuse_what_it_misreads(model)
            self.inputs = _tensors(model.inputs, (t.name for t in spec.inputs))
            self.outputs = _tensors(model.outputs, (t.name for t in spec.outputs))
            check(spec, self.inputs, self.outputs)
            self._defaults = _opened(model, spec) if spec.optional else {}
            self._outputs = [t.name for t in spec.outputs]
            self._any = _Request(core, model, spec.options, self._defaults)
            self._fixed: dict[int, _Request] = {}
            if fixed is None:
                seconds = self._compile_fixed(core, model, spec)
                self.buckets = spec.buckets or choose_buckets(seconds)
                self._fixed = {rows: request for rows, request in self._fixed.items() if rows in self.buckets}
            else:
                self.buckets = ()
                self._fixed = {rows: _fixed(core, model, spec, rows, self._defaults) for rows in fixed}
        except RuntimeError as error:
            raise InvalidModel(f"OpenVINO does not take {stated.file.name}: {_reason(error)}") from error
        inexact = adds_in_16_bits() and any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
        self.device = f"CPU, {stated.threads} thread{'s' if stated.threads > 1 else ''}"
        self.info = {
            "runtime": f"OpenVINO {openvino.__version__.partition('-')[0]}",
            "threads": str(stated.threads),
            "inference_precision": stated.precision,
            "fixed_batches": " ".join(map(str, self._fixed)),
            **({"inexact": _INEXACT} if inexact else {}),
        }

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run."""
        request = self._any
        if self._fixed:
            request = self._fixed.get(len(next(iter(inputs.values()))), request)
        request.run(inputs)
        return {name: request.output(name) for name in self._outputs if not outputs or name in outputs}

    def close(self) -> None:
        """See Engine.close."""
        del self._fixed, self._any

    def _compile_fixed(self, core: Any, model: Any, spec: EngineSpec) -> dict[int, float]:
        """Fills `_fixed`, requests by the rows that they are for; seconds by the rows of a batch, if there are any."""
        if not spec.max_rows or any(d < 0 for t in spec.inputs for d in t.dims):
            return {}
        plain: dict[int, float] = {}
        seconds: dict[int, float] = {}
        until = time.perf_counter() + _FIXED_SECONDS
        for rows in sorted(spec.buckets or candidates(spec.max_rows, _FINE)):
            inputs = spec.blank(rows)
            try:
                plain[rows] = _seconds(self._any, inputs)
                if plain[rows] > _LARGE_SECONDS or time.perf_counter() > until:
                    break
                request = _fixed(core, model, spec, rows, self._defaults)
                taken = _seconds(request, inputs)
            except RuntimeError:  # some networks do not take every batch
                break
            if taken > _GAIN * plain[rows]:
                break
            self._fixed[rows], seconds[rows] = request, taken
        if not seconds:
            return {}
        # What was not compiled takes longer by the row.
        every = range(1, spec.max_rows + 1)
        return dict(zip(every, np.interp(every, list(plain), list(plain.values())), strict=True)) | seconds


class _Request:
    """A compiled model that runs one batch at a time; what a batch leaves out of its inputs is as by default."""

    def __init__(self, core: Any, model: Any, options: EngineOptions, defaults: Mapping[str, Tensor]) -> None:
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": options.threads,
                # One batch runs at a time: a second stream would only halve its threads.
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                # Each engine process would pin its threads to the same cores.
                "ENABLE_CPU_PINNING": False,
                # Where the processor has bfloat16, it would be used for what the graph states as float32.
                "INFERENCE_PRECISION_HINT": options.precision,
            },
        )
        self._request = compiled.create_infer_request()
        self._bound: dict[str, Tensor] = {}
        self._defaults = defaults

    def run(self, inputs: Mapping[str, Tensor]) -> None:
        """Runs a batch. The same arrays as last time stay bound: a fifth of a tiny network's time."""
        if self._defaults:
            inputs = {**self._defaults, **inputs}
        if len(self._bound) != len(inputs) or any(self._bound.get(n) is not values for n, values in inputs.items()):
            for name, values in inputs.items():
                # It shares only what it might write to, though it does not.
                shared = values if values.flags.writeable else values.copy()
                self._request.set_tensor(name, openvino.Tensor(shared, shared_memory=True))
            self._bound = dict(inputs)
        self._request.infer(share_outputs=True)

    def output(self, name: str) -> Tensor:
        """One output of the last batch, valid until the next."""
        values: Tensor = self._request.get_tensor(name).data
        return values


def _fixed(core: Any, model: Any, spec: EngineSpec, rows: int, defaults: Mapping[str, Tensor]) -> _Request:
    """The model compiled for batches of `rows` rows alone."""
    mine = model.clone()
    mine.reshape({t.name: spec.shape(t, rows) for t in (*spec.inputs, *spec.optional)})
    filled = {
        t.name: np.ascontiguousarray(np.broadcast_to(defaults[t.name], spec.shape(t, rows))) for t in spec.optional
    }
    return _Request(core, mine, spec.options, filled)


def _opened(model: Any, spec: EngineSpec) -> dict[str, Tensor]:
    """Makes inputs of the optional ones, which OpenVINO reads as the constants that they are by default; these.

    Raises:
        InvalidModel: The file has no such constant, or it has another type or shape.
    """
    constants = {o.get_friendly_name(): o for o in model.get_ops() if o.get_type_name() == "Constant"}
    there = [(t, constants[t.name]) for t in spec.optional if t.name in constants]
    shapes = {t.name: [-1, *t.dims] if spec.max_rows else list(t.dims) for t in spec.optional}
    types = {t.name: _DATATYPES.get(c.get_element_type().get_type_name()) for t, c in there}
    # The batch axis of a default is that of one row, which stands for all.
    found = {t.name: list(c.shape) for t, c in there}
    opened = {name: [-1, *dims[1:]] if spec.max_rows and dims[:1] == [1] else dims for name, dims in found.items()}
    check_optional(spec, [tensor_of(name, kind, opened[name]) for name, kind in types.items() if kind])
    for tensor, constant in there:
        parameter = openvino.opset13.parameter(shapes[tensor.name], constant.get_element_type(), tensor.name)
        parameter.output(0).tensor.set_names({tensor.name})
        constant.output(0).replace(parameter.output(0))
        model.add_parameters([parameter])
    model.validate_nodes_and_infer_types()
    return {t.name: np.array(c.data) for t, c in there}


def _seconds(request: _Request, inputs: Mapping[str, Tensor]) -> float:
    """The time of a batch at best, after a first one that does not count."""
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) <= _TRIALS and sum(taken) < _TRIAL_SECONDS):
        begun = time.perf_counter()
        request.run(inputs)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def _tensors(ports: list[Any], stated: Any) -> tuple[TensorSpec, ...]:
    """The tensors that the protocol can carry. A port has all names that the graph gave it: the stated one is taken."""
    wanted = set(stated)
    found = []
    for port in ports:
        datatype = _DATATYPES.get(port.element_type.get_type_name())
        if datatype is not None:
            name = next((n for n in sorted(port.names) if n in wanted), port.any_name)
            ranked = not port.partial_shape.rank.is_dynamic
            dims = [-1 if d.is_dynamic else d.get_length() for d in port.partial_shape] if ranked else []
            found.append(tensor_of(name, datatype, dims, ranked))
    return tuple(found)


def _refuse_what_it_misreads(model: Any) -> None:
    """INT8 with scales in bfloat16 becomes something else (measured with 2026.4: zeros and noise)."""
    operators = model.get_ops()
    quantized = any(o.get_type_name() == "FakeQuantize" for o in operators)
    if quantized and any(p.element_type.get_type_name() == "bf16" for o in operators for p in o.outputs()):
        raise InvalidModel("OpenVINO computes INT8 with scales in bfloat16 wrongly: export it without bfloat16")


def _reason(error: Exception) -> str:
    """What OpenVINO says, without the places in its source and the model's folder."""
    lines = [re.sub(r"(/\S*)?/([^/\s]+)", r"\2", line).strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Exception from", "Check ", "src"))]
    return (telling or lines or [type(error).__name__])[-1]
