"""An ensemble: models whose tensors feed each other, behind one name. Nothing leaves memory between the steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from convoynet.server.errors import Draining, InvalidModel, ModelNotReady, ServerError
from convoynet.server.models.nesting import MOST_DEPTH, MOST_RUNS, too_deep, too_many
from convoynet.server.models.servable import Servable, State
from convoynet.server.observing.metrics import Levels, Metrics, ModelMetrics
from convoynet.server.observing.statistics import Statistics
from convoynet.server.spec import ModelSpec, Step, TensorSpec
from convoynet.server.types import InferRequest, InferResult, RequestedOutput, Tensor, Timings


class Models(Protocol):
    """Where an ensemble finds the models of its steps: ModelTable."""

    def ready_model(self, name: str, version: str = "") -> Servable:
        """One that may be asked; raises UnknownModel or ModelNotReady."""

    def held_model(self, name: str, version: str = "") -> Servable:
        """One that is held, also while it is being unloaded."""

    def hold(self, names: frozenset[str]) -> AbstractContextManager[object]:
        """Keeps models from being unloaded."""


class Ensemble:
    """The face of a Model over the models of its steps. Lives on the event loop.

    It is ready while all of its steps' models are, and while they fit together: they may be unloaded and replaced at
    any time, and are looked up again for each request.
    """

    def __init__(self, spec: ModelSpec, models: Models, metrics: Metrics) -> None:
        self.spec = spec
        self.statistics = Statistics()
        self.runs = self.depth = 0
        self._models = models
        self._names = frozenset(step.model for step in spec.steps)
        self._waves: list[list[Step]] = []
        self._fitting: tuple[ModelSpec, ...] = ()
        self._state: State = "loading"
        self._reason = ""
        self._inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._metrics = ModelMetrics(metrics, (spec.name, spec.version), Levels(inflight=lambda: self._inflight))
        self._metrics.set_state(self._state)

    @property
    def state(self) -> State:
        """Where it stands now, its steps' models included."""
        return "failed" if self._state == "ready" and self._problem() else self._state

    @property
    def reason(self) -> str:
        """Why it is not ready; "" otherwise."""
        return self._reason or (self._problem() if self._state == "ready" else "")

    @property
    def info(self) -> dict[str, str]:
        """Nothing: what runs the steps is said of their models."""
        return {}

    @property
    def queued(self) -> int:
        """Always 0: requests wait at the steps' models."""
        return 0

    @property
    def inflight(self) -> int:
        """Requests being worked on."""
        return self._inflight

    @property
    def labels(self) -> tuple[str, str]:
        """Name and version of its series; empty once they are gone."""
        return self._metrics.labels

    def count(self, timings: Timings, rows: int, error: BaseException | None, *, late: bool) -> None:
        """Counts one request (convoynet.server.types.Counting)."""
        self._metrics.over(self.statistics, timings, rows, error, late=late)

    async def load(self) -> None:
        """Orders the steps and checks that they fit together; ends in state ready or failed."""
        try:
            self._waves = _waves(self.spec)
            self._reason = self._problem()
        except InvalidModel as error:
            self._reason = str(error)
        self._state = "failed" if self._reason else "ready"
        self._metrics.set_state(self._state)
        self._metrics.loaded(0)

    def abandon(self) -> None:
        """Nothing: loading is over at once."""

    async def drain(self) -> None:
        """Admits nothing more and waits until everything admitted was answered."""
        if self._state == "ready":
            self._state = "draining"
            self._metrics.set_state(self._state)
        await self._idle.wait()

    async def infer(self, request: InferRequest) -> InferResult:
        """Answers one request: the steps in the order of their tensors, those that can run side by side so.

        Raises:
            InvalidRequest: It does not fit the ensemble or a step's model.
            ModelNotReady, UnknownModel, Draining: It was not admitted.
            ServerError: What a step's model raises.
            asyncio.CancelledError: The client went away.
        """
        timings = Timings()
        self._inflight += 1
        self._idle.clear()
        try:
            rows = self._admit(request)
            timings.queued = timings.started = timings.input_ready = timings.arrived
            with self._models.hold(self._names):
                outputs = await self._run(request)
            timings.infer_done = time.perf_counter_ns()
        finally:
            self._inflight -= 1
            if not self._inflight:
                self._idle.set()
        self.statistics.add_batch(rows, timings)
        return InferResult(self.spec.name, self.spec.version, outputs, timings, rows)

    def _admit(self, request: InferRequest) -> int:
        if self._state == "draining":
            raise Draining
        if self.state != "ready":
            raise ModelNotReady(f"model '{self.spec.name}' version {self.spec.version} is not ready: {self.reason}")
        return self.spec.check(request)

    async def _run(self, request: InferRequest) -> dict[str, Tensor]:
        if request.timeout_us:
            # It counts from here on for all steps together.
            ends = time.monotonic() + request.timeout_us / 1e6
            request = replace(request, timeout_us=0, deadline=min(ends, request.deadline or ends))
        tensors = dict(request.inputs)
        datatypes = dict(request.datatypes)

        async def run(step: Step) -> None:
            model = self._models.held_model(step.model, step.version)
            part = replace(
                request,
                model=step.model,
                version=model.spec.version,
                inputs={name: tensors[of] for name, of in step.inputs.items()},
                datatypes={name: datatypes[of] for name, of in step.inputs.items()},
                outputs=tuple(RequestedOutput(name) for name in step.outputs),
            )
            timings = Timings()
            try:
                result = await model.infer(part)
            except BaseException as error:
                model.count(timings, 0, error, late=part.is_at_its_deadline)
                raise
            model.count(result.timings, result.rows, None, late=False)
            declared = {t.name: t.datatype for t in model.spec.outputs}
            for name, of in step.outputs.items():
                tensors[of], datatypes[of] = result.outputs[name], declared[name]

        for wave in self._waves:
            if len(wave) == 1:
                await run(wave[0])
                continue
            async with _failing_alone() as group:
                for step in wave:
                    group.create_task(run(step))
        wanted = {output.name for output in request.outputs} or {t.name for t in self.spec.outputs}
        return {t.name: tensors[t.name] for t in self.spec.outputs if t.name in wanted}

    def _problem(self) -> str:
        """Why the steps' models cannot be asked now; "" where they can. Checked again where one was replaced."""
        steps = [(step.model, step.version) for step in self.spec.steps]
        try:
            found = {step: self._models.ready_model(*step) for step in dict.fromkeys(steps)}
        except ServerError as error:
            return f"a step's model cannot be asked: {error}"
        models = [found[step] for step in steps]
        self.runs, self.depth = sum(model.runs for model in models), 1 + max(model.depth for model in models)
        if self.depth > MOST_DEPTH:
            return str(too_deep())
        if self.runs > MOST_RUNS:
            return str(too_many(self.runs))
        specs = tuple(model.spec for model in models)
        if len(specs) != len(self._fitting) or any(a is not b for a, b in zip(specs, self._fitting, strict=True)):
            try:
                _check_fit(self.spec, specs)
            except InvalidModel as error:
                return str(error)
            self._fitting = specs
        return ""


@asynccontextmanager
async def _failing_alone() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks that end together: the first failure cancels the others and is raised as itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except* ServerError as errors:
        error = errors.exceptions[0]
    else:
        return
    raise error


def _waves(spec: ModelSpec) -> list[list[Step]]:
    """The steps in an order in which each finds its tensors; those of one wave do not need each other.

    Raises:
        InvalidModel: A tensor comes from nowhere, from two places, or from itself.
    """
    made: dict[str, int] = {}
    for name in (of for step in spec.steps for of in step.outputs.values()):
        made[name] = made.get(name, 0) + 1
    known = {t.name for t in spec.inputs}
    for name, times in made.items():
        if times > 1 or name in known:
            raise InvalidModel(f"the ensemble's tensor '{name}' has two sources: each needs exactly one")
    for name in [*(of for step in spec.steps for of in step.inputs.values()), *(t.name for t in spec.outputs)]:
        if name not in made and name not in known:
            raise InvalidModel(f"the ensemble's tensor '{name}' is no input of it and no output of a step")
    if idle := next((step.model for step in spec.steps if not step.outputs), None):
        raise InvalidModel(f"output_map of step '{idle}' is empty: nothing would come of the step")
    waves: list[list[Step]] = []
    left = list(spec.steps)
    while left:
        wave: list[Step] = []
        rest: list[Step] = []
        for step in left:
            (wave if known.issuperset(step.inputs.values()) else rest).append(step)
        if not wave:
            raise InvalidModel(f"the ensemble's steps wait for each other: {', '.join(step.model for step in rest)}")
        waves.append(wave)
        known.update(of for step in wave for of in step.outputs.values())
        left = rest
    return waves


def _check_fit(spec: ModelSpec, models: tuple[ModelSpec, ...]) -> None:
    """Compares names, datatypes, shapes and batch sizes on both ends of each tensor.

    Raises:
        InvalidModel: The message names the model and the tensor.
    """
    tensors = {t.name: (t.datatype, spec.shape(t)) for t in spec.inputs}
    for step, model in zip(spec.steps, models, strict=True):
        if spec.batch.max_rows > (model.batch.max_rows or spec.batch.max_rows):
            raise InvalidModel(
                f"the ensemble's max_batch_size {spec.batch.max_rows} is above that of its step '{model.name}', "
                f"{model.batch.max_rows}"
            )
        _check_names(step.outputs, model.outputs, f"output of step '{model.name}'")
        for output in model.outputs:
            if output.name in step.outputs:
                tensors[step.outputs[output.name]] = (output.datatype, model.shape(output))
    for step, model in zip(spec.steps, models, strict=True):
        _check_names(step.inputs, (*model.inputs, *model.optional), f"input of step '{model.name}'")
        for tensor in (*model.inputs, *model.optional):
            if tensor.name not in step.inputs:
                if tensor in model.optional:
                    continue
                raise InvalidModel(f"input_map of step '{model.name}' leaves out its input '{tensor.name}'")
            datatype, shape = tensors[step.inputs[tensor.name]]
            where = f"input '{tensor.name}' of step '{model.name}'"
            if datatype == "BYTES" and model.image is not None and tensor in model.inputs:
                if shape not in ([-1], [-1, 1]):
                    raise InvalidModel(f"encoded images for {where} have shape [-1,1], the ensemble's have {shape}")
                continue
            _check_same(where, (tensor.datatype, model.shape(tensor)), (datatype, shape))
    for tensor in spec.outputs:
        _check_same(f"output '{tensor.name}'", (tensor.datatype, spec.shape(tensor)), tensors[tensor.name])


def _check_names(named: Mapping[str, str], known: tuple[TensorSpec, ...], what: str) -> None:
    names = [t.name for t in known]
    if strange := next((name for name in named if name not in names), None):
        raise InvalidModel(f"'{strange}' is no {what}; it has {', '.join(names)}")


def _check_same(where: str, wants: tuple[str, list[int]], gets: tuple[str, list[int]]) -> None:
    if wants[0] != gets[0]:
        raise InvalidModel(f"{where} is {wants[0]}, but what the ensemble connects to it is {gets[0]}")
    fits = len(wants[1]) == len(gets[1]) and all(-1 in (a, b) or a == b for a, b in zip(wants[1], gets[1], strict=True))
    if not fits:
        raise InvalidModel(f"{where} has shape {wants[1]}, but what the ensemble connects to it has {gets[1]}")
