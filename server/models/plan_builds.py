"""TensorRT plans that the server has built at the first load of a model, by `convoy build` in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convoynet.server.errors import InvalidModel
from convoynet.server.host import package_environment
from convoynet.server.spec import EngineOptions, ModelSpec
from convoynet.server.supervision import ending, processes, tasks
from convoynet.server.supervision.threads import SECONDS, Threads

log = logging.getLogger(__name__)

_PACKAGES = ("tensorrt", "tensorrt-rtx")
_LINE_BYTES = 1 << 22
_KILL_SECONDS, _TOOL_SECONDS = 5.0, 30.0
_STEP = 0.1
"""The part of a phase of the build after which the log tells of it again."""


@dataclass(frozen=True)
class _Build:
    """One build: what of, for whom, and the files in the cache that it makes."""

    label: str
    source: Path
    flags: tuple[str, ...]
    plan: Path
    facts: Path


class PlanBuilds:
    """Builds plans, one at a time, and keeps them. Lives on the event loop.

    A plan is found again for the same ONNX file, flags, TensorRT, GPU and driver; a change of one of them builds anew.
    """

    def __init__(self, cache: Path) -> None:
        """Args: the folder that keeps the plans; made when the first one is built."""
        self._cache = cache
        self._one = asyncio.Lock()
        self._threads = Threads()

    async def built(self, spec: ModelSpec) -> EngineOptions:
        """What the engine of a model with a deferred plan is to load; builds the plan where it is not there.

        A caller that is cancelled ends the build.

        Raises:
            InvalidModel: It cannot be built; one line says why.
        """
        options = spec.engine
        if options.plan is None or options.plan.build is None:
            raise AssertionError("only a plan that is to be built is built")
        limit = spec.limits.load_s
        gpu = await _gpu(options.gpus[0] if options.gpus else 0)
        key = await self._threads.run(limit, _key, options.file, options.plan.build, gpu)
        build = _Build(
            f"model {spec.name} version {spec.version}",
            options.file,
            options.plan.build,
            self._cache / f"{key}.plan",
            self._cache / f"{key}.json",
        )
        async with self._one:
            if not build.plan.exists():
                try:
                    await asyncio.wait_for(self._run(build), limit)
                except TimeoutError:
                    raise InvalidModel(f"its plan was not built within {limit:g} s (--load-timeout-seconds)") from None
        facts = await self._threads.run(SECONDS, _read, build.facts)
        plan = replace(
            options.plan,
            library=facts["library"],
            version=facts["version"],
            compute_capability=facts["compute_capability"],
            version_compatible="--version-compatible" in build.flags,
            hardware_compatible="--hardware-compatible" in build.flags,
            build=None,
        )
        return replace(options, file=build.plan, plan=plan)

    async def _run(self, build: _Build) -> None:
        try:
            self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidModel(f"its plan cannot be kept: the engine cache: {error.strerror}") from error
        made = self._cache / f".{secrets.token_hex(8)}.plan"
        log.info("%s: its TensorRT plan is built now; that takes up to minutes", build.label)
        process = await asyncio.create_subprocess_exec(
            *processes.command("convoynet.server.cli", "build", str(build.source), "--output", str(made), *build.flags),
            "--progress", "json", "--json",
            env=package_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )  # fmt: skip
        if process.stdout is None or process.stderr is None:
            raise AssertionError("both are pipes")
        watch = tasks.start(ending.kill_when_stopped(process), f"the watch over process {process.pid}")
        try:
            told, said = await asyncio.gather(process.stdout.read(), _follow(process.stderr, build.label))
            if await process.wait():
                reason = (
                    said.removeprefix("convoy build: ").replace(f"{build.source.parent}/", "").replace(str(made), "")
                )
                raise InvalidModel(f"its plan cannot be built: {reason or f'exit code {process.returncode}'}")
            facts = json.loads(told)
            log.info("%s: its plan is built, in %.0f s", build.label, facts["seconds"])
            await self._threads.run(SECONDS, _keep, facts, made, build)
        finally:
            watch.cancel()
            if process.returncode is None:
                process.kill()
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _KILL_SECONDS)
            made.unlink(missing_ok=True)


async def _follow(lines: asyncio.StreamReader, label: str) -> str:
    """Tells the log of a build's progress; the last line that is none."""
    last, phase, due = "", "", 0.0
    async for line in lines:
        text = line.decode(errors="replace").strip()
        try:
            progress = json.loads(text)
            now, fraction = progress["phase"], progress["fraction"]
        except (ValueError, TypeError, KeyError):
            last = text or last
            continue
        if now != phase or fraction >= due:
            log.info("%s: building its plan: %s, %.0f %%", label, now, fraction * 100)
            phase, due = now, fraction + _STEP
    return last


async def _gpu(ordinal: int) -> str:
    """A GPU's name, compute capability and driver, by the driver's own tool; "" where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    process = await asyncio.create_subprocess_exec(
        tool, f"--id={ordinal}", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found, _ = await asyncio.wait_for(process.communicate(), _TOOL_SECONDS)
    except TimeoutError:  # a driver that hangs
        process.kill()
        return ""
    return found.decode(errors="replace").strip() if process.returncode == 0 else ""


def _key(source: Path, flags: tuple[str, ...], gpu: str) -> str:
    """Names a plan by all that it depends on; weights in files beside the graph are part of the model."""
    digest = hashlib.sha256(repr((flags, gpu, *map(_release, _PACKAGES))).encode())
    for file in sorted(source.parent.glob(f"{source.name}*")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(facts: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise InvalidModel(f"the engine cache cannot be read ({type(error).__name__}): empty it") from error


def _keep(facts: dict[str, Any], made: Path, build: _Build) -> None:
    """The plan comes last: where it is, all of it is."""
    build.facts.write_text(json.dumps(facts), encoding="utf-8")
    made.replace(build.plan)
