"""TensorRT and TensorRT-RTX: plans on an NVIDIA GPU, several batches at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from convoynet.server.engines.base import EngineSpec, check, tensor_of
from convoynet.server.engines.buffers import Table
from convoynet.server.engines.device import Device, DeviceError, OutOfMemory, Stream
from convoynet.server.engines.gpu_pipeline import Copy, GpuBatch, GpuPipeline
from convoynet.server.engines.plan_checks import check_gpu, check_memory, check_rows, library, rebuild
from convoynet.server.errors import InvalidModel
from convoynet.server.scheduling.buckets import Profile, candidates, choose_buckets, fitting, profile_of
from convoynet.server.spec import EngineOptions, PlanOptions, TensorSpec
from convoynet.server.types import Tensor

_DATATYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
}
_FINE = 16
"""From so many rows on there are buckets between the powers of two."""


class TensorRtEngine:
    """One plan on one GPU. Each slot has an execution context, and a CUDA graph of it, for every bucket.

    Contexts of one lane never run at once and share its block of device memory; nothing is allocated for a batch.
    """

    def __init__(self, spec: EngineSpec, module: Any = None, device: Device | None = None) -> None:
        """Loads the plan.

        Args:
            spec: See Engine.
            module: What runs it; by default the TensorRT that the spec asks for.
            device: The GPU; by default the one that the spec asks for.
        """
        self._spec, self._plan = spec, spec.options.plan or PlanOptions()
        self._lanes = max(spec.options.slots // 2, 1)
        self._trt, runtime = (module, "") if module is not None else library(self._plan, spec.name)
        self._device = device or _gpu(spec.options)
        check_gpu(self._plan, self._device, spec.name)
        self._contexts: list[Any] = []
        try:
            self._engine = self._deserialized()
            self._read_tensors()
            self._allocate()
            self.buckets, why = self._learn()
        except DeviceError as error:
            self.close()
            room = ": lower max_batch_size or the count of instance_group" if isinstance(error, OutOfMemory) else ""
            raise InvalidModel(f"{self._device.name} failed to load the plan: {error}{room}") from error
        except BaseException:
            self.close()
            raise
        largest = self.buckets[-1]
        self.largest = (self._size(self.inputs, largest), self._size(self.outputs, largest))
        self.device = f"GPU {_ordinal(spec.options)}, {self._device.name}"
        self.info = {
            "runtime": runtime,
            "execution_contexts": str(self._lanes),
            "buckets": ",".join(map(str, self.buckets)),
            "cuda_graphs": "no" if not self._plan.cuda_graphs else f"no: {why}" if why else "yes",
        }

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """See Engine.run. Uses the first slot."""
        wanted = self.answers(inputs, outputs)
        found = {name: np.empty(dims, self._tensors[name].dtype) for name, _, dims, _ in wanted}
        batch = self.prepare(0, inputs, found)
        batch.submit()
        batch.wait()
        return found

    def answers(
        self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()
    ) -> list[tuple[str, str, tuple[int, ...], int]]:
        """See PipelinedEngine.answers."""
        rows = len(next(iter(inputs.values()))) if self._spec.max_rows else 1
        named = [t.name for t in self._spec.outputs if not outputs or t.name in outputs]
        return self._layout([self._tensors[name] for name in named], rows)

    def pin(self, memory: Tensor) -> None:
        """See PipelinedEngine.pin."""
        try:
            self._device.pin(memory)
        except DeviceError as error:
            raise InvalidModel(
                f"{memory.nbytes} bytes of memory that the GPU is to copy from cannot be page-locked: {error}; lower "
                "max_batch_size or the count of instance_group"
            ) from error

    def prepare(self, slot: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> GpuBatch:
        """See PipelinedEngine.prepare."""
        rows = len(next(iter(inputs.values()))) if self._spec.max_rows else 1
        return self._pipeline.batch(slot, rows, _copies(inputs), _copies(outputs))

    def close(self) -> None:
        """See Engine.close."""
        self._contexts.clear()
        self._engine = None
        self._device.close()

    def _deserialized(self) -> Any:
        """The engine in the file."""
        content = self._spec.options.file.read_bytes()
        check_memory(self._device, len(content), "the plan")
        self._log = _logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        if self._plan.version_compatible:
            # Such a plan brings its own, lean runtime along: code, which the plan's hash vouches for.
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise InvalidModel(
                f"{self._trt.__name__} {self._trt.__version__} does not take {self._spec.options.file.name} "
                f"({self._log.last or 'no reason given'}): {rebuild(self._spec.name)}"
            )
        return engine

    def _read_tensors(self) -> None:
        """Inputs, outputs and profiles, held against the config."""
        engine, spec = self._engine, self._spec
        sides: dict[bool, list[TensorSpec]] = {True: [], False: []}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            datatype = _DATATYPES.get(engine.get_tensor_dtype(name).name)
            if datatype is None:
                kind = engine.get_tensor_dtype(name).name
                raise InvalidModel(f"'{name}' has the type {kind}, which no client can send or receive")
            is_input = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            sides[is_input].append(tensor_of(name, datatype, list(engine.get_tensor_shape(name))))
        self.inputs, self.outputs = tuple(sides[True]), tuple(sides[False])
        check(spec, self.inputs, self.outputs)
        self._tensors = {t.name: t for t in (*self.inputs, *self.outputs)}
        for tensor in self._tensors.values():
            if any(d < 0 for d in tensor.dims[1 if spec.max_rows else 0 :]):
                raise InvalidModel(
                    f"'{tensor.name}' has the free dimensions {list(tensor.dims)}, but a plan is served with a free "
                    "batch alone: export the model with fixed sizes, or serve its model.onnx"
                )
        self._profiles: list[Profile] = [(1, 1, 1)]
        if spec.max_rows:
            self._profiles = [
                (low[0], usual[0], high[0])
                for low, usual, high in (
                    engine.get_tensor_profile_shape(self.inputs[0].name, index)
                    for index in range(engine.num_optimization_profiles)
                )
            ]
            check_rows(spec.max_rows, self._profiles, spec.name)

    def _allocate(self) -> None:
        """Everything on the GPU but the weights."""
        (self._most,) = fitting([max(self._spec.max_rows, 1)], self._profiles)
        sizes = {name: self._nbytes(tensor, self._most) for name, tensor in self._tensors.items()}
        self._scratch_bytes = max(map(self._engine.get_device_memory_size_for_profile_v2, range(len(self._profiles))))
        needed = self._lanes * (self._scratch_bytes + 2 * sum(sizes.values()))
        check_memory(self._device, needed, f"with {self._lanes} execution contexts it")
        self._scratch = [self._device.allocate(max(self._scratch_bytes, 1)) for _ in range(self._lanes)]
        self._strategy = _strategy(self._trt, self._engine)
        self._pipeline = GpuPipeline(self._device, sizes, self._lanes)

    def _learn(self) -> tuple[tuple[int, ...], str]:
        """Makes what computes each bucket in each slot; the buckets, and why there are no graphs of them."""
        stated = fitting([*self._spec.buckets, self._most], self._profiles) if self._spec.buckets else ()
        why = ""
        most = max(self._spec.max_rows, 1)
        profiled = {size for profile in self._profiles for size in profile if size <= most}
        sizes = stated or fitting(candidates(most, _FINE) | profiled, self._profiles)
        for rows in reversed(sizes):
            why = self._teach(0, rows) or why
        buckets = stated or choose_buckets({rows: self._pipeline.seconds(0, rows) for rows in sizes})
        for rows in set(sizes) - set(buckets):
            self._pipeline.forget(0, rows)
        for slot in range(1, len(self._pipeline.slots)):
            for rows in buckets:
                why = self._teach(slot, rows) or why
        return buckets, why

    def _teach(self, slot: int, rows: int) -> str:
        return self._pipeline.learn(slot, rows, self._context(slot, rows), graph=self._plan.cuda_graphs)

    def _context(self, slot: int, rows: int) -> Callable[[Stream], None]:
        """Queues a batch of `rows` rows in a slot: an execution context whose shapes and addresses never change."""
        own = self._pipeline.slots[slot]
        context = self._engine.create_execution_context(self._strategy)
        if context is None:
            raise DeviceError(f"no execution context for a batch of {rows}: {self._log.last}")
        taken = context.set_optimization_profile_async(profile_of(rows, self._profiles), own.stream)
        for tensor in self.inputs:
            shape = (rows, *tensor.dims[1:]) if self._spec.max_rows else tensor.dims
            taken = context.set_input_shape(tensor.name, shape) and taken
        for name, address in own.addresses.items():
            taken = context.set_tensor_address(name, address) and taken
        context.set_device_memory(self._scratch[own.lane], self._scratch_bytes)
        if not taken or context.infer_shapes():
            raise DeviceError(f"a batch of {rows} cannot be set up: {self._log.last}")
        self._contexts.append(context)

        def enqueue(stream: Stream) -> None:
            if not context.execute_async_v3(stream):
                raise DeviceError(f"a batch of {rows} cannot be run: {self._log.last}")

        return enqueue

    def _layout(self, tensors: Sequence[TensorSpec], rows: int) -> list[tuple[str, str, tuple[int, ...], int]]:
        head = (rows,) if self._spec.max_rows else ()
        return [(t.name, t.datatype, (*head, *t.dims[len(head) :]), self._nbytes(t, rows)) for t in tensors]

    def _nbytes(self, tensor: TensorSpec, rows: int) -> int:
        dims = (rows, *tensor.dims[1:]) if self._spec.max_rows else tensor.dims
        return math.prod(dims) * tensor.dtype.itemsize

    def _size(self, tensors: Sequence[TensorSpec], rows: int) -> int:
        return Table.of(self._layout(tensors, rows)).size


def _gpu(options: EngineOptions) -> Device:
    if options.device == "cpu":
        raise InvalidModel("a TensorRT plan runs on a GPU: set KIND_GPU in config.pbtxt, or export with --target cpu")
    from convoynet.server.engines.cuda_device import CudaDevice

    try:
        return CudaDevice(_ordinal(options))
    except DeviceError as error:
        raise InvalidModel(
            f"a TensorRT plan runs on an NVIDIA GPU, and none can be used here: {error}; serve it where there is one, "
            "or export with --target cpu"
        ) from error


def _ordinal(options: EngineOptions) -> int:
    """The GPU's number."""
    return options.gpus[0] if options.gpus else 0


def _copies(tensors: Mapping[str, Tensor]) -> list[Copy]:
    return [Copy(name, values.ctypes.data, values.nbytes) for name, values in tensors.items()]


def _strategy(trt: Any, engine: Any) -> Any:
    """What create_execution_context() takes for contexts whose device memory is given to them."""
    own = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return own
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(own)
    # TensorRT-RTX would begin with kernels for any shape and compile better ones beside: a graph would keep the first.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    # What it compiles for one context serves the others.
    config.set_runtime_cache(config.create_runtime_cache())
    return config


def _logger(trt: Any) -> Any:
    """A logger that keeps the last error, and writes warnings and worse to the server's log."""
    levels = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self.last = message.strip().partition("\n")[0]
            if severity in (levels.INTERNAL_ERROR, levels.ERROR, levels.WARNING):
                sys.stderr.write(f"TensorRT: {message}\n")

    return Log()
