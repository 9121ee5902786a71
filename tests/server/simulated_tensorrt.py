"""A TensorRT whose plans are JSON, on a simulated GPU: output = 2 * input summed over all but the rows, plus the row.

It has nothing that the real module lacks (test_gpu_calls.py), and is as strict about the order of calls.
"""

from __future__ import annotations

import json
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from tests.server.simulated_gpu import SimulatedGpu

__version__ = "11.0.0.1"
__all__ = ["of"]


class DataType(Enum):
    FLOAT = 0
    UINT8 = 1
    FP8 = 2


class TensorIOMode(Enum):
    INPUT = 0
    OUTPUT = 1


class ILogger:
    Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"])

    def __init__(self) -> None:
        pass


class Context:
    """One execution context; everything must be set before it runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._memory = 0
        self._profile = -1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.plan["profiles"][self._profile]
        self._shape = shape
        return low <= shape[0] <= high

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % 256 == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.get_device_memory_size_for_profile_v2(self._profile)
        self._memory = memory

    def infer_shapes(self) -> list[str]:
        return [] if self._shape else ["x"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, plan = self._engine.gpu, self._engine.plan
        assert self._memory
        given, made = self._addresses["x"], self._addresses["y"]

        def work() -> None:
            x = gpu.array(given, plan["dtype"], self._shape)
            rows = 2 * x.reshape(len(x), -1).sum(axis=1, dtype=np.float32)
            gpu.array(made, np.float32, (len(x), 1))[:] = rows[:, None]

        touched = frozenset({made, self._memory})
        gpu.compute(stream_handle, work, frozenset({given}), touched)  # type: ignore[arg-type]
        return not plan.get("fails")


class Engine:
    """What a plan says of itself."""

    names: ClassVar = ["x", "y"]
    num_io_tensors = 2

    def __init__(self, plan: dict[str, Any], gpu: SimulatedGpu) -> None:
        self.plan, self.gpu = plan, gpu
        self.num_optimization_profiles = len(plan["profiles"])
        self.contexts = 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.plan.get("types", {}).get(name, "FLOAT")]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        shape: list[int] = self.plan["x"] if name == "x" else [self.plan["x"][0], 1]
        return shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [[rows, *self.plan["x"][1:]] for rows in self.plan["profiles"][profile_index]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 100 * (1 + profile_index)

    def create_execution_context(self, strategy: object) -> Context:
        assert strategy == "user managed"
        self.contexts += 1
        return Context(self)


def of(gpu: SimulatedGpu) -> Any:
    """The module, over one GPU."""

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            if not serialized_engine.startswith(b"{"):
                self._logger.log(ILogger.Severity.ERROR, "Serialization assertion failed: magic tag\nmore")
                return None
            return Engine({"dtype": "float32", **json.loads(serialized_engine)}, gpu)

    return SimpleNamespace(
        __name__="tensorrt",
        __version__=__version__,
        DataType=DataType,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=TensorIOMode,
    )
