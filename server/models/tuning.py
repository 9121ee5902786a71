"""Which engine, how many of them and how many CPU threads each: measured where config.pbtxt is silent."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from convoynet.server import engines
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.kept import Kept
from convoynet.server.engines.patience import Patience
from convoynet.server.engines.process import EngineProcess
from convoynet.server.engines.trials import release
from convoynet.server.errors import EngineFailed, InvalidModel
from convoynet.server.host import available_cpus, available_memory, cache_folder, memory_bytes
from convoynet.server.models.service_load import Beside, BesideFailed
from convoynet.server.spec import EngineOptions, ModelSpec
from convoynet.server.supervision import tasks

log = logging.getLogger(__name__)

_LIKELY_ROWS = 8
_SECONDS = 0.3
_SLOW_SECONDS = 0.5
_BUDGET_SECONDS = 10.0
_GAIN = 1.1
_MOST_BESIDE = 16
"""Processes that are busy beside the engines ..."""
_BESIDE_BYTES, _COPIES_OF_ROW = 60 * 2**20, 8
"""... and the memory that each takes, with what it takes of a row's size."""
_TURN_SECONDS = 120.0
"""How long a model waits while others are measured."""
_COPIES_OF_FILE = 3
"""What an engine takes in memory, as a multiple of its file: measured, ResNet-50 FP32 takes 2 to 3."""


class Measured(NamedTuple):
    """Images per second of some engines that are all busy."""

    instances: int
    threads: int
    images_per_s: float
    runtime: str


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        instances: Number of engines.
        threads: CPU threads of each.
        engine: What `EngineOptions.engine` is to be: "onnxruntime" where it is faster than what the server would
            take, else as it was.
        beside: Processes that did the work of front ends and decoders meanwhile.
        measured: Each candidate; the first is one engine with every core. Empty where there was nothing to choose.
    """

    instances: int
    threads: int
    engine: str = ""
    beside: int = 0
    measured: tuple[Measured, ...] = ()

    def __str__(self) -> str:
        """For people: as `2 engines of 1 thread; images/s of engines x threads: 1 x 2 OpenVINO 310, ...`."""
        engines = "1 engine" if self.instances == 1 else f"{self.instances} engines"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        beside = f" beside {self.beside} busy as front ends are" if self.beside else ""
        measured = ", ".join(f"{m.instances} x {m.threads} {m.runtime} {m.images_per_s:.0f}" for m in self.measured)
        return f"{engines} of {threads}" + (f"; images/s of engines x threads{beside}: {measured}" if measured else "")

    def to_json(self) -> str:
        """As the config parameter `tuning` shows it."""
        stated = asdict(self)
        return json.dumps({**stated, "measured": [m._asdict() for m in self.measured]})

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        """What `to_json` wrote."""
        stated = json.loads(text)
        return cls(**{**stated, "measured": tuple(Measured(**m) for m in stated["measured"])})


async def tune(
    spec: ModelSpec, cache: Path | None = None, frontends: int = 0, turn: asyncio.Lock | None = None
) -> Tuned:
    """Chooses the engine, the number of engines and their threads by the images per second that they make together.

    Meanwhile as many processes as there are front ends do for every row what those do for a request; for a model that
    takes encoded images one for each core decodes an image for every row.

    Candidates share the cores evenly: one engine with all of them, two with half each, and so on to one core each, as
    far as memory goes; and one engine with as many cores as the front ends leave. Each is measured for 0.3 s with every
    engine busy, at batches of 8 (or `max_batch_size` where that is less); what its processes take to start and load
    comes on top. A network whose batch takes longer than 0.5 s in one engine with all cores is not measured further,
    nor is any when 10 s are over. More engines, or fewer threads, must be a tenth faster: one engine answers a single
    request sooner and needs less memory. Where OpenVINO is the server's choice, ONNX Runtime is measured too, and must
    be a tenth faster as well.

    Args:
        spec: The model; its `instances` and `engine.threads` are not looked at.
        cache: Folder that keeps what was measured, for the same file, engine and number of cores; None for
            $XDG_CACHE_HOME/convoy.
        frontends: How many there are, the server's own process among them; 0 to measure engines alone.
        turn: Held while it is measured, since models that are measured at once measure each other. One whose turn does
            not come soon is served by one engine with all cores, and measured when it is loaded again.

    Raises:
        InvalidModel: The engine does not take the model.
    """
    cores = available_cpus()
    choice = engines.choose(spec.engine)
    if spec.engine.device == "gpu" or (cores == 1 and len(choice) == 1) or not spec.warmup:
        return Tuned(1, cores, spec.engine.engine)
    kept = Kept((cache or cache_folder()) / "tuning.json")
    count = min(cores if spec.image is not None and frontends else frontends, _MOST_BESIDE)
    key = _key(spec, choice, cores, count)
    if (known := _read(kept.read(), key)) is not None:
        return known
    turn = turn or asyncio.Lock()
    try:
        async with asyncio.timeout(_TURN_SECONDS):
            await turn.acquire()
    except TimeoutError:
        log.warning("the engines of model %s are not measured: those of others still are", spec.name)
        return Tuned(1, cores, spec.engine.engine)
    try:
        tuned = await _measured(spec, cores, count, cores - frontends)
    except EngineFailed:  # it may not take zeros
        return Tuned(1, cores, spec.engine.engine)
    except (BesideFailed, OSError) as error:  # no room for a process, or the file is gone: what loads it next says so
        beside = f"the work beside them fails: {error}"
        why = beside if isinstance(error, BesideFailed) else error.strerror or error
        log.warning("the engines of model %s are not measured: %s", spec.name, why)
        return Tuned(1, cores, spec.engine.engine)
    finally:
        turn.release()
    log.info("model %s version %s: %s", spec.name, spec.version, tuned)
    kept.write(key, tuned.to_json())
    return tuned


async def _measured(spec: ModelSpec, cores: int, count: int, left: int) -> Tuned:
    beside = await _beside(spec, count)
    try:
        tuned = await _compare(spec, cores, beside, left)
    finally:
        if beside is not None:
            await beside.close()
    return replace(tuned, beside=count if beside is not None else 0)


async def _beside(spec: ModelSpec, count: int) -> Beside | None:
    """The processes that are busy beside the engines; None for none, and where they do not start."""
    if not count:
        return None
    row_bytes = sum(tensor.nbytes for tensor in EngineSpec.of(spec).blank(1).values())
    if count * (_BESIDE_BYTES + _COPIES_OF_ROW * row_bytes) > _free_bytes() / 2:
        log.warning(
            "the engines of model %s are measured alone: there is no memory for the work beside them", spec.name
        )
        return None
    try:
        return await Beside.start(count, row_bytes, spec.image)
    except BesideFailed as error:
        log.warning("the engines of model %s are measured alone: the work beside them fails: %s", spec.name, error)
        return None


async def _compare(spec: ModelSpec, cores: int, beside: Beside | None, left: int) -> Tuned:
    until = time.monotonic() + _BUDGET_SECONDS
    patience = Patience(spec.limits)  # what the first takes is what the others are judged by
    first, seconds = await _measure(spec, 1, cores, beside, patience)
    counts = [(count, cores // count) for count in _candidates(cores, _file_bytes(spec.engine))[1:]]
    if beside is not None and left > 0:
        counts.insert(0, (1, left))
    candidates = [(spec, count) for count in counts]
    if len(engines.choose(spec.engine)) > 1 and first.runtime.startswith("OpenVINO"):
        plain = replace(spec, engine=replace(spec.engine, engine="onnxruntime"))
        candidates = [(plain, (1, cores)), *candidates, *((plain, count) for count in counts)]
    measured, best, chosen = [first], first, spec
    for tried, (instances, threads) in candidates if seconds <= _SLOW_SECONDS else ():
        if tried is not chosen and (instances, threads) != (1, cores):
            continue  # the other engine is the faster one
        if time.monotonic() > until:
            break
        try:
            candidate, _ = await _measure(tried, instances, threads, beside, patience)
        except (EngineFailed, InvalidModel, OSError):
            continue  # another engine may not take the model, and the machine may not bear so many
        measured.append(candidate)
        if candidate.images_per_s > best.images_per_s * _GAIN:
            best, chosen = candidate, tried
    return Tuned(best.instances, best.threads, chosen.engine.engine, measured=tuple(measured))


def _file_bytes(options: EngineOptions) -> int:
    """What a model takes on disk, with the weights that it has in files of their own."""
    files = [Path(name) for name, _, _ in options.files] or [options.file]
    return sum(file.stat().st_size for file in files)


def _candidates(cores: int, file_bytes: int) -> list[int]:
    """Numbers of engines: 1, 2, 4 ... and one for each core, as far as half of the free memory goes."""
    counts = sorted({*(1 << power for power in range(cores.bit_length())), cores})
    return [count for count in counts if count == 1 or count * file_bytes * _COPIES_OF_FILE <= _free_bytes() / 2]


def _free_bytes() -> float:
    """What is free, or all that a container may have where that is less."""
    return min(memory_bytes()[1] or math.inf, available_memory())


async def _measure(
    spec: ModelSpec, instances: int, threads: int, beside: Beside | None = None, patience: Patience | None = None
) -> tuple[Measured, float]:
    """What some engines do that are all busy, and the seconds that a batch took at best.

    Beside each batch the work of front ends for as many rows is done; the next one waits for both.
    """
    rows = max(min(spec.batch.max_rows, _LIKELY_ROWS), 1)
    # No time for other batch sizes.
    batch = replace(spec.batch, buckets=(rows,))
    candidate = replace(spec, warmup=(rows,), batch=batch, engine=replace(spec.engine, threads=threads))
    request = EngineSpec.of(candidate).blank(rows)
    loaded = asyncio.Barrier(instances)

    async def keep_busy() -> tuple[float, float, str]:
        process = await EngineProcess.start(candidate, patience)
        try:
            await loaded.wait()
            taken: list[float] = []
            begun = time.perf_counter()
            while not taken or time.perf_counter() < begun + _SECONDS:
                if beside is None:
                    result = await process.run([request])
                else:
                    result, _ = await tasks.together(process.run([request]), beside.serve(rows))
                taken.append((result.infer_done - result.started) / 1e9)
            return len(taken) * rows / (time.perf_counter() - begun), min(taken), process.info["runtime"]
        finally:
            await process.close()

    rates, times, runtimes = zip(*await tasks.together(*(keep_busy() for _ in range(instances))), strict=True)
    return Measured(instances, threads, round(sum(rates), 1), runtimes[0]), min(times)


def _key(spec: ModelSpec, choice: Sequence[str], cores: int, beside: int) -> str:
    """What a measurement holds for."""
    stat, options = spec.engine.file.stat(), spec.engine
    stated = options.file.resolve(), stat.st_size, stat.st_mtime_ns, spec.batch.max_rows, cores, beside
    return " ".join(map(str, (*stated, options.precision, options.graph_optimization, *map(release, choice))))


def _read(kept: Mapping[str, str], key: str) -> Tuned | None:
    """What was measured before; None where it is not there, or of another make."""
    try:
        return Tuned.from_json(kept[key])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
