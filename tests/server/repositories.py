"""A model whose every step a test decides, what describes an ONNX file, and folders of ensembles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from prometheus_client import CollectorRegistry

from convoynet.server import datatypes
from convoynet.server.errors import Draining, InvalidModel
from convoynet.server.models.core import Core
from convoynet.server.models.ensemble import Ensemble
from convoynet.server.models.servable import State
from convoynet.server.observing.metrics import Metrics
from convoynet.server.observing.statistics import Statistics
from convoynet.server.repository.completion import Description
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.repository import Repository
from convoynet.server.repository.specs import Defaults
from convoynet.server.spec import ModelSpec, TensorSpec
from convoynet.server.types import InferRequest, InferResult, Timings

DEFAULTS = Defaults(max_queue=7, threads=1)


async def describe_onnx(file: Path, backend: str) -> Description:
    """What ONNX Runtime says of a file."""
    assert backend == "onnxruntime"
    types = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(int64)": "INT64"}
    try:
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InvalidModel(f"ONNX Runtime does not take {file.name}") from error

    def tensors(stated: list[ort.NodeArg]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                t.name,
                types[t.type],
                datatypes.numpy_dtype(types[t.type]),
                tuple(d if isinstance(d, int) else -1 for d in t.shape),
            )
            for t in stated
        )

    return tensors(session.get_inputs()), tensors(session.get_outputs())


class StagedModel:
    """Loads, answers and drains when a test lets it: the first input plus `version`, for each row.

    Attributes:
        loading, answering: Set to let load() and infer() go on.
        closed: Whether drain() is over.
        broken: The reason that load() fails with, if any.
    """

    def __init__(self, spec: ModelSpec, *, held: bool = False, broken: str = "") -> None:
        self.spec = spec
        self.state: State = "loading"
        self.reason = ""
        self.statistics = Statistics()
        self.queued = self.inflight = self.depth = 0
        self.runs = 1
        self.loading, self.answering, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.closed = False
        self.broken = broken
        self.answering.set()
        self._idle.set()
        if not held:
            self.loading.set()

    @property
    def labels(self) -> tuple[str, str]:
        return self.spec.name, self.spec.version

    def count(self, timings: Timings, rows: int, error: BaseException | None, *, late: bool) -> None:
        if error is None:
            self.statistics.add_success(timings, rows)
        else:
            self.statistics.add_failure(timings, error)

    async def load(self) -> None:
        await self.loading.wait()
        self.state, self.reason = ("failed", self.broken) if self.broken else ("ready", "")

    def abandon(self) -> None:
        """Does nothing, as most models: their loads end soon."""

    async def drain(self) -> None:
        self.state = "draining" if self.state == "ready" else self.state
        await self._idle.wait()
        self.closed = True

    async def infer(self, request: InferRequest) -> InferResult:
        if self.state != "ready":
            raise Draining
        self.spec.check(request)
        self.inflight += 1
        self._idle.clear()
        try:
            await self.answering.wait()
        finally:
            self.inflight -= 1
            if not self.inflight:
                self._idle.set()
        assert not self.closed, "an engine that is closed was asked"
        (value,) = request.inputs.values()
        outputs = {t.name: np.asarray(value + int(self.spec.version), t.dtype) for t in self.spec.outputs}
        return InferResult(self.spec.name, self.spec.version, outputs, Timings())


class Stage:
    """A core over a folder, whose models are staged ones.

    Attributes:
        made: Every model, in the order of their making.
        held: Whether models that are made now wait in load().
        broken: By name, why models that are made now fail.
        changes: The names that the core told of.
    """

    def __init__(self, root: Path, control: str = "explicit") -> None:
        self.made: list[StagedModel] = []
        self.held = False
        self.broken: dict[str, str] = {}
        self.changes: list[str] = []
        self.repository = Repository([Folder(root)], DEFAULTS)
        self.core = Core(self.repository, self._make, control, self.changes.append)

    def _make(self, spec: ModelSpec) -> StagedModel:
        model = StagedModel(spec, held=self.held, broken=self.broken.get(spec.name, ""))
        self.made.append(model)
        return model

    async def ask(self, name: str, value: float = 0.0, version: str = "") -> float:
        """The answer of a model to one row."""
        model = self.core.model(name, version)
        result = await model.infer(request(model.spec, value))
        return float(next(iter(result.outputs.values()))[0, 0])

    async def states(self, name: str) -> list[tuple[str, str]]:
        """What the index says of a model: versions and states."""
        return [(line.version, line.state) for line in await self.core.index() if line.name == name]


class EnsembleStage(Stage):
    """A stage whose ensembles are real ones over its staged models."""

    def _make(self, spec: ModelSpec) -> StagedModel | Ensemble:  # type: ignore[override]
        if not spec.steps:
            return super()._make(spec)
        return Ensemble(spec, self.core, Metrics(CollectorRegistry(), "test"))


def request(spec: ModelSpec, value: float = 0.0, rows: int = 1) -> InferRequest:
    """Rows of one value for the first input."""
    tensor = spec.inputs[0]
    values = np.full((rows, *tensor.dims), value, tensor.dtype)
    return InferRequest(spec.name, "", "", {tensor.name: values}, {tensor.name: tensor.datatype})


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something is so; the test's own time limit is the only one."""
    while not condition():
        await asyncio.sleep(0.001)


def write_plain(root: Path, name: str, *, versions: tuple[int, ...] = (1,), dims: int = 1, config: str = "") -> Path:
    """A model x [n, dims] -> y [n, dims] of the fake engine's backend."""
    folder = root / name
    for version in versions:
        (folder / str(version)).mkdir(parents=True, exist_ok=True)
        (folder / str(version) / "model.json").write_text("{}")
    tensor = f"data_type: TYPE_FP32 dims: [{dims}]"
    (folder / "config.pbtxt").write_text(
        f'backend: "fake" max_batch_size: 8 input {{ name: "x" {tensor} }} output {{ name: "y" {tensor} }} {config}'
    )
    return folder


def write_ensemble(root: Path, name: str, steps: list[tuple[str, str, str]], *, dims: int = 1, batch: int = 4) -> Path:
    """An ensemble x -> y of (model, the tensor for its x, the tensor that its y becomes)."""
    folder = root / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    tensor = f"data_type: TYPE_FP32 dims: [{dims}]"
    text = "".join(
        f'step {{ model_name: "{model}" model_version: -1 input_map {{ key: "x" value: "{source}" }} '
        f'output_map {{ key: "y" value: "{target}" }} }}\n'
        for model, source, target in steps
    )
    (folder / "config.pbtxt").write_text(
        f'platform: "ensemble" max_batch_size: {batch}\n'
        f'input {{ name: "x" {tensor} }} output {{ name: "y" {tensor} }}\n'
        f"ensemble_scheduling {{ {text} }}"
    )
    return folder
