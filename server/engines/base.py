"""What the server asks of an engine, and what it tells one about its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from convoynet.server import datatypes
from convoynet.server.errors import InvalidModel
from convoynet.server.spec import EngineOptions, ModelSpec, PlanOptions, TensorSpec
from convoynet.server.types import Tensor


@dataclass(frozen=True)
class EngineSpec:
    """What an engine process needs to know of its model; it travels there as JSON.

    Attributes:
        name, version: The model's.
        inputs, outputs: What config.pbtxt states, to be held against the file; empty where only the file is asked.
        max_rows: The most rows in a batch; 0 where the model has no batch axis.
        options: The file, and how to run it.
        warmup: The batch sizes to run before the first request.
        buckets: The batch sizes to fill batches up to, ascending; empty where the engine may choose.
        shapes: Dims to warm up with of inputs that have free ones, by name; 1 where it says nothing.
        warmup_stated: Whether the model is refused where its warm-up fails.
        optional: Inputs that a batch may come without: the file has a default for each.
        seldom: Outputs that few batches want: the others are worth a graph of their own.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_rows: int
    options: EngineOptions
    warmup: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    warmup_stated: bool = False
    optional: tuple[TensorSpec, ...] = ()
    seldom: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: ModelSpec) -> EngineSpec:
        """The part of a model's spec that its engine needs."""
        return cls(
            name=spec.name,
            version=spec.version,
            inputs=spec.inputs,
            outputs=spec.outputs,
            max_rows=spec.batch.max_rows,
            options=spec.engine,
            warmup=tuple(spec.warmup),
            buckets=spec.batch.buckets,
            shapes=spec.shapes,
            warmup_stated=spec.warmup_stated,
            optional=spec.optional,
            seldom=spec.seldom,
        )

    def to_json(self) -> str:
        """The spec as text, which `from_json` reads back to an equal one."""
        return json.dumps(
            {
                "name": self.name,
                "version": self.version,
                "inputs": tensors_to_json(self.inputs),
                "outputs": tensors_to_json(self.outputs),
                "max_rows": self.max_rows,
                "options": {**asdict(self.options), "file": str(self.options.file)},
                "warmup": self.warmup,
                "buckets": self.buckets,
                "shapes": dict(self.shapes),
                "warmup_stated": self.warmup_stated,
                "optional": tensors_to_json(self.optional),
                "seldom": self.seldom,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> EngineSpec:
        """The spec that `to_json` wrote."""
        stated = json.loads(text)
        options = {**stated["options"], "file": Path(stated["options"]["file"])}
        options["gpus"], options["files"] = tuple(options["gpus"]), _tuples(options["files"])
        if options["plan"] is not None:
            options["plan"] = PlanOptions(**{name: _tuples(value) for name, value in options["plan"].items()})
        return cls(
            stated["name"],
            stated["version"],
            tensors_from_json(stated["inputs"]),
            tensors_from_json(stated["outputs"]),
            stated["max_rows"],
            EngineOptions(**options),
            tuple(stated["warmup"]),
            tuple(stated["buckets"]),
            {name: tuple(dims) for name, dims in stated["shapes"].items()},
            stated["warmup_stated"],
            tensors_from_json(stated["optional"]),
            tuple(stated["seldom"]),
        )

    @property
    def usual(self) -> tuple[str, ...]:
        """The outputs that most batches want, where the others are seldom wanted; else empty, which is all."""
        return tuple(t.name for t in self.outputs if t.name not in self.seldom) if self.seldom else ()

    def blank(self, rows: int) -> dict[str, Tensor]:
        """Zeros (empty texts for BYTES) for each input: `rows` rows."""
        return {t.name: np.full(self.shape(t, rows), b"" if t.datatype == "BYTES" else 0, t.dtype) for t in self.inputs}

    def shape(self, tensor: TensorSpec, rows: int) -> list[int]:
        """The shape of an input with `rows` rows, its free dimensions as `shapes` says."""
        dims = self.shapes.get(tensor.name) or [max(d, 1) for d in tensor.dims]
        return [rows, *dims] if self.max_rows else list(dims)


class Engine(Protocol):
    """Runs batches of one model, in a process of its own.

    Its constructor takes the EngineSpec and raises InvalidModel where the file and the spec do not agree.
    """

    device: str
    """Where it runs, for people: "CPU, 2 threads", "CUDA"."""
    info: Mapping[str, str]
    """The runtime and its version, and what it was told: shown among the model's config parameters."""
    buckets: tuple[int, ...]
    """Batch sizes, ascending, up to which every batch is to be filled; empty where it is to be run as it is."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    """What the file states, in its order; `dims` have the batch axis first, where there is one, as -1."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()) -> dict[str, Tensor]:
        """Runs one batch.

        Args:
            inputs: One C-contiguous array an input, checked against the spec; the engine does not keep them. Optional
                ones may be left out.
            outputs: Names of the outputs that somebody wants; empty for all. The others are not copied out, and are
                not computed where the engine can leave them out.

        Returns:
            One array for each of these outputs, in the spec's order. They are valid until the next run.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


class Running(Protocol):
    """Batches of one layout in one place: each is begun, then waited for."""

    def submit(self) -> None:
        """Begins a batch whose inputs lie ready; does not wait for it."""

    def wait(self) -> None:
        """Waits, in any one thread, until the outputs of the batch begun last lie ready."""


@runtime_checkable
class PipelinedEngine(Engine, Protocol):
    """An engine that has `EngineOptions.slots` batches under way at a time, each in a slot of its own.

    What it raises once it has begun a batch ends its process: the state of a GPU after an error is not known.
    """

    largest: tuple[int, int]
    """Bytes of the inputs and of the outputs of the largest batch, laid out as buffers.Table does."""

    def pin(self, memory: Tensor) -> None:
        """Tells it of memory, UINT8 [n], that inputs and outputs will lie in; raises InvalidModel where it cannot."""
        ...

    def answers(
        self, inputs: Mapping[str, Tensor], outputs: Collection[str] = ()
    ) -> list[tuple[str, str, tuple[int, ...], int]]:
        """Name, datatype, dims and number of bytes of each output of a batch that is wanted, in the spec's order."""
        ...

    def prepare(self, slot: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Running:
        """Batches that read these arrays and write these; one at a time in a slot."""
        ...


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def tensors_to_json(tensors: Sequence[TensorSpec]) -> list[list[object]]:
    """Tensors as JSON can carry them."""
    return [[t.name, t.datatype, list(t.dims), t.ranked] for t in tensors]


def tensors_from_json(stated: Sequence[tuple[str, str, list[int], bool]]) -> tuple[TensorSpec, ...]:
    """The tensors that `tensors_to_json` wrote."""
    return tuple(tensor_of(*tensor) for tensor in stated)


def tensor_of(name: str, datatype: str, dims: Sequence[int], ranked: bool = True) -> TensorSpec:
    """A tensor as a file states it."""
    return TensorSpec(name, datatype, datatypes.numpy_dtype(datatype), tuple(dims), ranked)


def check(spec: EngineSpec, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Holds what the config states against what the file has.

    Raises:
        InvalidModel: They do not agree; the message names the tensor, and what each says of it.
    """
    for kind, stated, found in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        by_name = {t.name: t for t in found}
        for tensor in stated:
            if tensor.name not in by_name:
                names = ", ".join(sorted(by_name)) or "none of a type that this engine has"
                raise InvalidModel(f"config.pbtxt states the {kind} '{tensor.name}', but the file has {names}")
            _check_one(kind, tensor, by_name[tensor.name], spec.max_rows)


def check_optional(spec: EngineSpec, found: Sequence[TensorSpec]) -> None:
    """Holds the optional inputs that the config states against those for which the file has a default.

    Raises:
        InvalidModel: It has none for one, or they do not agree.
    """
    by_name = {t.name: t for t in found}
    for tensor in spec.optional:
        if tensor.name not in by_name:
            raise InvalidModel(
                f"config.pbtxt states the optional input '{tensor.name}', but the file has no default for it: an "
                "initializer of this name that is among the graph's inputs"
            )
        _check_one("input", tensor, by_name[tensor.name], spec.max_rows)


def _check_one(kind: str, tensor: TensorSpec, found: TensorSpec, max_rows: int) -> None:
    if found.datatype != tensor.datatype:
        raise InvalidModel(f"{kind} '{tensor.name}' is {found.datatype} in the file, {tensor.datatype} in config.pbtxt")
    if not found.ranked:
        return
    have, want = list(found.dims), [-1, *tensor.dims] if max_rows else list(tensor.dims)
    if len(have) != len(want) or any(h not in (-1, w) and w != -1 for h, w in zip(have, want, strict=True)):
        raise InvalidModel(f"{kind} '{tensor.name}' has shape {have} in the file, but {want} in config.pbtxt")
    if max_rows and have[0] != -1:
        raise InvalidModel(f"{kind} '{tensor.name}' has a fixed batch of {have[0]}: set max_batch_size 0")


def file_mark(file: Path) -> str:
    """What changes when a file is written to or another one takes its place.

    Raises:
        OSError: There is none.
    """
    stat = file.stat()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def file_hash(file: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        OSError: It cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_files(options: EngineOptions) -> None:
    """Checks that the files of a model are still those that were checked when it was read.

    One whose mark has changed is read again: some file systems give the same file another one.

    Raises:
        InvalidModel: One was changed, replaced or removed since.
    """
    for name, mark, digest in options.files:
        file = Path(name)
        try:
            same = file_mark(file) == mark or file_hash(file) == digest
        except OSError:
            same = False
        if not same:
            raise InvalidModel(f"{file.name} was changed after it had been checked: load the model again")
