"""How many engines and how many CPU threads each: measured when a model is loaded, where config.pbtxt is silent."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from server import engines
from server.engines.base import EngineSpec
from server.engines.process import EngineProcess
from server.errors import EngineFailed, InvalidModel
from server.host import available_cpus
from server.spec import ModelSpec

log = logging.getLogger(__name__)

_LIKELY_ROWS = 8
_SECONDS = 0.3
_SLOW_SECONDS = 0.5
_GAIN = 1.1
_COPIES_OF_FILE = 3
"""What an engine takes in memory, as a multiple of its file: measured, ResNet-50 FP32 takes 2 to 3."""


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        instances: Number of engines.
        threads: CPU threads of each.
        measured: (instances, threads, images per second) of each candidate that was measured; the first is one engine
            with every core. Empty where there was nothing to choose.
    """

    instances: int
    threads: int
    measured: tuple[tuple[int, int, float], ...] = ()

    def to_json(self) -> str:
        """As the config parameter `tuning` shows it."""
        return json.dumps(asdict(self))


async def tune(spec: ModelSpec, cache: Path | None = None) -> Tuned:
    """Chooses the number of engines and their threads by the images per second that they make together.

    Candidates share the cores evenly: one engine with all of them, two with half each, and so on to one core each, as
    far as memory goes. Each is measured for 0.3 s with every engine busy, at batches of 8 (or `max_batch_size` where
    that is less); what its processes take to start and load comes on top. A network whose batch takes longer than
    0.5 s in one engine with all cores is not measured further. More engines must be a tenth faster than fewer: one
    engine answers a single request sooner and needs less memory.

    Args:
        spec: The model; its `instances` and `engine.threads` are not looked at.
        cache: Folder that keeps what was measured, for the same file, engine and number of cores; None for
            $XDG_CACHE_HOME/convoy.

    Raises:
        InvalidModel: The engine does not take the model.
    """
    cores = available_cpus()
    if cores == 1 or spec.engine.device == "gpu":
        return Tuned(1, cores)
    file = (cache or _cache_folder()) / "tuning.json"
    key = _key(spec, cores)
    if (known := _read(file).get(key)) is not None:
        return known
    measured: list[tuple[int, int, float]] = []
    for instances in _candidates(cores, spec.engine.file.stat().st_size):
        try:
            rate, seconds = await _measure(spec, instances, cores // instances)
        except (EngineFailed, InvalidModel):
            if not measured:
                raise
            break  # as many as these the machine does not bear
        measured.append((instances, cores // instances, round(rate, 1)))
        if seconds > _SLOW_SECONDS:
            break
    tuned = _choose(measured)
    log.info("model %s version %s: %s", spec.name, spec.version, tuned.to_json())
    _write(file, key, tuned)
    return tuned


def _choose(measured: Sequence[tuple[int, int, float]]) -> Tuned:
    best = measured[0]
    for candidate in measured[1:]:
        if candidate[2] > best[2] * _GAIN:
            best = candidate
    return Tuned(best[0], best[1], tuple(measured))


def _candidates(cores: int, file_bytes: int) -> list[int]:
    """Numbers of engines: 1, 2, 4 ... and one for each core, as far as half of the free memory goes."""
    counts = sorted({*(1 << power for power in range(cores.bit_length()) if 1 << power <= cores), cores})
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [count for count in counts if count == 1 or count * file_bytes * _COPIES_OF_FILE <= free / 2]


async def _measure(spec: ModelSpec, instances: int, threads: int) -> tuple[float, float]:
    """Images per second of some engines that are all busy, and the seconds that a batch took at best."""
    rows = max(min(spec.batch.max_rows, _LIKELY_ROWS), 1)
    candidate = replace(spec, warmup=(rows,), engine=replace(spec.engine, threads=threads))
    request = EngineSpec.of(candidate).blank(rows)
    loaded = asyncio.Barrier(instances)

    async def keep_busy() -> tuple[float, float]:
        process = await EngineProcess.start(candidate)
        try:
            await loaded.wait()
            taken: list[float] = []
            begun = time.perf_counter()
            while not taken or time.perf_counter() < begun + _SECONDS:
                result = await process.run([request])
                taken.append((result.infer_done - result.started) / 1e9)
            return len(taken) * rows / (time.perf_counter() - begun), min(taken)
        finally:
            await process.close()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keep_busy()) for _ in range(instances)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return sum(t.result()[0] for t in tasks), min(t.result()[1] for t in tasks)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"


def _key(spec: ModelSpec, cores: int) -> str:
    """What a measurement holds for."""
    stat = spec.engine.file.stat()
    runtime = engines.choose(spec.engine)[0]
    try:
        release = version(runtime)
    except PackageNotFoundError:
        release = ""
    stated = (spec.engine.file.resolve(), stat.st_size, stat.st_mtime_ns, runtime, release, spec.batch.max_rows)
    return json.dumps([*map(str, stated), spec.engine.precision, spec.engine.graph_optimization, cores])


def _read(file: Path) -> dict[str, Tuned]:
    """What was measured before; nothing where the file cannot be read or is of another make."""
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: Tuned(
                int(t["instances"]), int(t["threads"]), tuple((int(i), int(n), float(r)) for i, n, r in t["measured"])
            )
            for key, t in stated.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(file: Path, key: str, tuned: Tuned) -> None:
    """Adds a measurement. Where several servers do so at once the last one wins: the others measure again."""
    known = {**_read(file), key: tuned}
    temporary = file.with_name(f".{secrets.token_hex(8)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({k: asdict(t) for k, t in known.items()}, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        log.warning("what was measured is not kept: %s", error.strerror)
