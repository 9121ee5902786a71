"""What a served model is and accepts, and the check of a request against it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convoynet.server.errors import InvalidRequest
from convoynet.server.types import InferRequest

if TYPE_CHECKING:  # an engine process imports this module, and decodes no image
    from convoynet.server.images.images import ImageInput


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `dims` leave out the batch axis, -1 stands for any size.

    Where a file does not say how many dimensions there are it is not `ranked`, and `dims` say nothing.
    """

    name: str
    datatype: str
    dtype: np.dtype[np.generic]
    dims: tuple[int, ...]
    ranked: bool = True


@dataclass(frozen=True)
class QueuePolicy:
    """How the requests of one priority level wait.

    Attributes:
        max_queue: The most requests that may wait; one more is refused.
        timeout_s: How long a request may wait, in seconds; 0 for as long as it takes.
        delays: A request that waited longer is served after all others of its level instead of being refused.
    """

    max_queue: int
    timeout_s: float = 0.0
    delays: bool = False


@dataclass(frozen=True)
class BatchPolicy:
    """How requests share a batch and how many may wait.

    Attributes:
        max_rows: The most rows in a batch; 0 where the model has no batch axis.
        max_delay_s: How long a request may wait for others while the engine is free, in seconds.
        max_queue: The most requests that may wait; one more is refused. With `levels` each level has its own.
        preferred: Rows at which a batch is closed although more might join it; ascending.
        levels: The policy of each priority level, highest first; empty for one level without a timeout.
        default_level: The level (1 is the highest) of requests that name none, or one that there is not.
        buckets: Rows to which a batch is padded up; ascending, empty for no padding.
        max_queue_bytes: The most bytes of inputs that may wait.
        latency_slo_s: The latency that admission keeps, in seconds; 0 for none.
    """

    max_rows: int
    max_delay_s: float
    max_queue: int
    preferred: tuple[int, ...] = ()
    levels: tuple[QueuePolicy, ...] = ()
    default_level: int = 1
    buckets: tuple[int, ...] = ()
    max_queue_bytes: int = 2**30
    latency_slo_s: float = 0.0


@dataclass(frozen=True)
class PlanOptions:
    """What config.pbtxt says of a TensorRT plan: what it was built with, or what it is to be built with.

    Attributes:
        library: "tensorrt" or "tensorrt_rtx"; "" for the one that is installed.
        version: Of that library, such as "10.13.2.6"; "" where nobody knows.
        compute_capability: Of the GPU that it was built on; "any" where it is compiled on the GPU at load, or "".
        profiles: The smallest, usual and largest batch of each optimization profile; empty where nobody knows.
        version_compatible: Whether later versions of the library run it.
        hardware_compatible: Whether GPUs of other compute capabilities run it.
        cuda_graphs: Whether batches are replayed as CUDA graphs.
        build: The flags of `convoy build` for a plan that the server is to build at load; None for one that is there.
    """

    library: str = ""
    version: str = ""
    compute_capability: str = ""
    profiles: tuple[tuple[int, int, int], ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    cuda_graphs: bool = True
    build: tuple[str, ...] | None = None


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs to load a model. JSON must be able to carry all of it to the engine process.

    Attributes:
        backend: The backend of config.pbtxt: "onnxruntime", "openvino" or "fake".
        file: The model's file.
        device: "cpu", "gpu", or "auto" for a GPU where there is one.
        threads: CPU threads.
        tensorrt: Whether ONNX Runtime may use its TensorRT provider.
        engine: What runs backend "onnxruntime": "onnxruntime", "openvino", or "" for the server's choice.
        graph_optimization: "all", or "basic" for graphs that ONNX Runtime's other optimizations make wrong.
        precision: What OpenVINO computes float layers in: "f32", "bf16" or "f16".
        gpus: The GPU that this engine has, by CUDA's number; empty for the runtime's choice.
        provider_options: Of ONNX Runtime's GPU providers, by the names of config.pbtxt's parameters.
        slots: Batches that the engine process takes at a time.
        plan: What is known of a TensorRT plan; None for other engines.
        files: The files that were checked, each with its mark and SHA-256: what is run must be the same. Empty where
            none were.
        finite_only: Whether the server's choice of engine computes finite numbers alone rightly.
        verified: What an export measured in the engines that passed its gates; empty where nobody knows.
        excluded: Why the others did not pass.
    """

    backend: str
    file: Path
    device: str
    threads: int
    tensorrt: bool = False
    engine: str = ""
    graph_optimization: str = "all"
    precision: str = "f32"
    gpus: tuple[int, ...] = ()
    provider_options: Mapping[str, str] = field(default_factory=dict)
    slots: int = 1
    plan: PlanOptions | None = None
    files: tuple[tuple[str, str, str], ...] = ()
    finite_only: bool = False
    verified: Mapping[str, str] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How long a model's engines may take, in seconds; one that takes longer is ended.

    Attributes:
        run_s: For a batch.
        measured: Whether a batch that takes far longer than such batches have taken is given up before that.
        load_s: For loading and warming up, and for the build of a plan.
    """

    run_s: float = 60.0
    measured: bool = True
    load_s: float = 1800.0


LIMITS = Limits()


@dataclass(frozen=True)
class Placement:
    """Where one engine of a model runs: `device` and `gpus` of its EngineOptions."""

    device: str
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """One model that an ensemble runs.

    Attributes:
        model: Its name.
        version: Its version, "" for the newest that is ready.
        inputs: Of each of its inputs, the ensemble's tensor that it gets.
        outputs: Of its outputs that are used, the ensemble's tensor that each becomes.
    """

    model: str
    version: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class ModelSpec:
    """One version of one model, as its folder states it. `platform` is the protocol's name for the engine.

    `response_cache` is whether equal requests may be answered from the cache; `instances` is 0 where it is to be
    measured. `placements` has one for each instance; it is empty where `engine` says it for all. `steps` are an
    ensemble's; it has no engine. `limits` are how long its engines may take. `shapes` are dims to warm up with of
    inputs that have free ones; `warmup_stated` is whether the config says how to warm up: then it must succeed.
    `optional` are inputs that a request may leave out, `values` the least and the most that an input may hold,
    `seldom` the outputs that few requests ask for.
    """

    name: str
    version: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: Mapping[str, list[str]]
    batch: BatchPolicy
    engine: EngineOptions
    instances: int
    warmup: tuple[int, ...]
    image: ImageInput | None
    response_cache: bool = False
    steps: tuple[Step, ...] = ()
    placements: tuple[Placement, ...] = ()
    limits: Limits = LIMITS
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    warmup_stated: bool = False
    optional: tuple[TensorSpec, ...] = ()
    values: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    seldom: tuple[str, ...] = ()

    def of_instances(self) -> list[ModelSpec]:
        """One spec for each instance, with that instance's own device and GPU."""
        places = self.placements or [Placement(self.engine.device, self.engine.gpus)] * self.instances
        return [replace(self, engine=replace(self.engine, device=p.device, gpus=p.gpus)) for p in places]

    def shape(self, tensor: TensorSpec) -> list[int]:
        """The shape as the protocol states it: -1 for the batch axis first, where there is one."""
        return [-1, *tensor.dims] if self.batch.max_rows else list(tensor.dims)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first input, any free dimension taken as 1."""
        return sum(math.prod(max(d, 1) for d in t.dims) * t.dtype.itemsize for t in self.inputs[:1])

    def check(self, request: InferRequest) -> int:
        """Checks names, datatypes, shapes and sizes, and the values of optional inputs.

        Returns:
            The number of rows of the request (1 where the model has no batch axis).

        Raises:
            InvalidRequest: The message is Triton's for the same mistake.
        """
        names: Collection[str] = self._expected
        if request.inputs.keys() != names:
            names = self._with_optional(request)
        datatypes, inputs = request.datatypes, request.inputs
        rows = [self.check_input(name, datatypes[name], inputs[name].shape) for name in names]
        count = rows[0] if rows else 1
        if rows.count(count) != len(rows):
            sizes = dict(zip(names, rows, strict=True))
            raise InvalidRequest(f"the inputs of model '{self.name}' have different batch sizes: {sizes}")
        if request.outputs:
            self._check_outputs(request)
        if self.batch.max_rows and not 1 <= count <= self.batch.max_rows:
            raise InvalidRequest(
                f"inference request batch-size must be <= {self.batch.max_rows} for '{self.name}'"
                if count
                else f"inference request batch-size must be >= 1 for '{self.name}'"
            )
        if self.values:
            self._check_values(request)
        return count

    def is_encoded(self, request: InferRequest) -> bool:
        """Whether the request carries encoded images instead of tensors."""
        return self.image is not None and request.datatypes[self.inputs[0].name] == "BYTES"

    def check_input(self, name: str, datatype: str, shape: Sequence[int]) -> int:
        """Checks one input as it is declared.

        Returns:
            Its rows (1 where the model has no batch axis).

        Raises:
            InvalidRequest: There is no such input, or it has another datatype or shape.
        """
        if name not in self._known:
            raise InvalidRequest(f"unexpected inference input '{name}' for model '{self.name}'")
        wanted, expected = self._known[name]
        if datatype == "BYTES" and self.image is not None and name in self._expected:
            if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
                raise InvalidRequest(
                    f"encoded images for input '{name}' of model '{self.name}' have shape [n] or [n,1], "
                    f"got {_text(shape)}"
                )
            return shape[0]
        if datatype != wanted:
            also = " or BYTES (encoded images)" if self.image is not None and name in self._expected else ""
            raise InvalidRequest(
                f"inference input '{name}' data-type is '{datatype}', but model '{self.name}' expects '{wanted}'{also}"
            )
        if not _fits(shape, expected):
            raise InvalidRequest(
                f"unexpected shape for input '{name}' for model '{self.name}'. Expected {_text(expected)}, "
                f"got {_text(shape)}"
            )
        return shape[0] if self.batch.max_rows else 1

    @cached_property
    def output_types(self) -> dict[str, str]:
        """The datatype of each output."""
        return {t.name: t.datatype for t in self.outputs}

    @cached_property
    def _expected(self) -> dict[str, tuple[str, list[int]]]:
        """Datatype and shape of each input that a request has to have."""
        return {t.name: (t.datatype, self.shape(t)) for t in self.inputs}

    @cached_property
    def _known(self) -> dict[str, tuple[str, list[int]]]:
        """Datatype and shape of each input that it may have."""
        return self._expected | {t.name: (t.datatype, self.shape(t)) for t in self.optional}

    def _with_optional(self, request: InferRequest) -> Collection[str]:
        """The inputs of a request, where these are all that it has to have and others that it may."""
        given = request.inputs.keys()
        if not self._expected.keys() <= given <= self._known.keys():
            self._refuse_names(request)
        return given

    def _check_values(self, request: InferRequest) -> None:
        for name, (least, most) in self.values.items():
            given = request.inputs.get(name)
            if given is not None and not self.batch.max_rows and self._known[name][1][:1] == [-1]:
                self._check_rows(request, name)
            if given is not None and given.size and not (given.min() >= least and given.max() <= most):
                wrong = next(value for value in given.ravel().tolist() if not least <= value <= most)
                raise InvalidRequest(
                    f"input '{name}' for model '{self.name}' holds {wrong}, {least} to {most} are allowed"
                )

    def _check_rows(self, request: InferRequest, name: str) -> None:
        """Of a model without a batch axis: OpenVINO would read beyond the rows that it has."""
        first = self.inputs[0]
        rows, images = (len(request.inputs[each]) for each in (name, first.name))
        if first.dims[:1] == (-1,) and rows not in (1, images):
            raise InvalidRequest(
                f"input '{name}' for model '{self.name}' has {rows} rows: one, or as many as input '{first.name}', "
                f"{images}, are allowed"
            )

    def _refuse_names(self, request: InferRequest) -> None:
        for name in request.inputs:
            if name not in self._known:
                raise InvalidRequest(f"unexpected inference input '{name}' for model '{self.name}'")
        missing = [t.name for t in self.inputs if t.name not in request.inputs]
        got = ",".join(f"'{n}'" for n in request.inputs)
        least, most = len(self.inputs), len(self._known)
        expected = f"{least} inputs" if least == most else f"number of inputs between {least} and {most}"
        raise InvalidRequest(
            f"expected {expected} but got {len(request.inputs)} inputs for model "
            f"'{self.name}'. Got input(s) [{got}], but missing required input(s) "
            f"[{','.join(repr(n) for n in missing)}]. Please provide all required input(s)."
        )

    def _check_outputs(self, request: InferRequest) -> None:
        seen: set[str] = set()
        for output in request.outputs:
            if output.name not in self.output_types:
                raise InvalidRequest(f"unexpected inference output '{output.name}' for model '{self.name}'")
            if output.name in seen:
                raise InvalidRequest(f"inference output '{output.name}' is asked for twice")
            seen.add(output.name)


def _fits(shape: Sequence[int], expected: list[int]) -> bool:
    if len(shape) != len(expected):
        return False
    for size, wanted in zip(shape, expected, strict=True):  # noqa: SIM110  # a third of the time of all()
        if wanted not in (-1, size):
            return False
    return True


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
