"""What is found out about a model before it is served, in a process of its own, and kept for the next time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convoynet.processor import processor
from convoynet.server.engines.base import EngineSpec, file_hash, tensors_to_json
from convoynet.server.engines.kept import Kept
from convoynet.server.host import available_cpus, cache_folder, package_environment
from convoynet.server.supervision import ending, processes, tasks
from convoynet.server.supervision.threads import SECONDS, Threads

log = logging.getLogger(__name__)

_EDITION = 4
"""To be raised when a trial finds out more, or otherwise: what was kept before is then found out again."""
_SECONDS = 180.0
TRIED = ("onnxruntime", "openvino")
"""The backends whose models are tried."""


@dataclass(frozen=True)
class Verdict:
    """What is known of a model.

    Attributes:
        engine: The engine that would be preferred.
        uncompared: Why it was not compared with ONNX Runtime; "" where it was, or is ONNX Runtime.
        differs: How its answers differ from ONNX Runtime's; "" where they do not.
        finite_only: Whether they do where an input is NaN or infinite.
        probes: How many inputs it was tried with.
        mixed: How an answer shows that rows depend on each other, or are none; "" where none does.
        shown: Whether answers show that rows do not.
        named: How the names of dimensions in the file speak against a batch axis.
        shapes: Dims that were taken, of inputs that have free ones.
        blind: Whether no input that it was tried with was taken.
        ranks: The numbers of dimensions of outputs, as they came.
        died: Whether the process died, or took too long, before it was done.
    """

    engine: str = ""
    uncompared: str = ""
    differs: str = ""
    finite_only: bool = False
    probes: int = 0
    mixed: str = ""
    shown: bool = False
    named: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    blind: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    died: bool = False

    @classmethod
    def of(cls, findings: Mapping[str, Any]) -> Verdict:
        """The verdict that findings, or what asdict() made of one, add up to."""
        shapes = {name: tuple(dims) for name, dims in findings.get("shapes", {}).items()}
        return cls(**{**findings, "shapes": shapes})


class Trials:
    """Tries models, a few at a time, and remembers what came of it."""

    def __init__(self, cache: Path | None = None) -> None:
        """Args: the folder that keeps what was found out; None for $XDG_CACHE_HOME/convoy."""
        self._cache = cache
        self._turns = asyncio.Semaphore(available_cpus())
        self._known: dict[str, Verdict] = {}
        self._threads = Threads()

    async def verdict(self, spec: EngineSpec) -> Verdict:
        """What is known of a model. It is tried where nothing is.

        Raises:
            OSError: Its file cannot be read.
        """
        kept = Kept((self._cache or cache_folder()) / "trials.json")
        async with self._turns:
            key = await self._threads.run(_SECONDS, _key, spec)
            if (known := self._known.get(key)) is not None:
                return known
            found = _read(await self._threads.run(SECONDS, kept.read), key)
            if found is None:
                found = await _try(spec, self._threads)
                if not found.died:
                    await self._threads.run(SECONDS, kept.write, key, json.dumps(asdict(found)))
            if not found.died:
                self._known[key] = found
            return found


async def _try(spec: EngineSpec, threads: Threads) -> Verdict:
    """Tries a model in a process of its own. What it had found before it died or took too long counts."""
    # From this thread, since it ends with the one that starts it; by Popen, which does not copy this process.
    process = subprocess.Popen(  # noqa: S603 - this interpreter, with our own module
        processes.command("convoynet.server.engines.trial"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=package_environment(),
    )
    watch = tasks.start(ending.kill_when_stopped(process), f"the watch over process {process.pid}")
    try:
        lines, why = await threads.run(2 * _SECONDS, _findings, process, spec.to_json().encode())
    finally:
        watch.cancel()
        process.kill()
    findings: dict[str, Any] = {"died": bool(why)}
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line
            findings |= json.loads(line)
    if why:
        log.error("model %s version %s: the process that tried it %s", spec.name, spec.version, why)
    return Verdict.of(findings)


def _findings(process: subprocess.Popen[bytes], asked: bytes) -> tuple[list[bytes], str]:
    """The lines that a process wrote until it ended, and how that was not as it should be; waits for it."""
    try:
        written, _ = process.communicate(asked, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        written, _ = process.communicate()
        return written.splitlines(), f"took longer than {_SECONDS:g} s"
    return written.splitlines(), f"died (exit code {process.returncode})" if process.returncode else ""


def _key(spec: EngineSpec) -> str:
    """What a verdict holds for: the content of the files, the engines, the processor and what the config says."""
    hashes = {Path(name).name: content for name, _, content in spec.options.files}
    hashes = hashes or {spec.options.file.name: file_hash(spec.options.file)}
    options = spec.options
    stated = {
        "edition": _EDITION,
        "files": hashes,
        "engines": [release(name) for name in ("onnxruntime", "onnxruntime-gpu", "openvino")],
        "processor": processor(),
        "options": [options.backend, options.engine, options.device, options.precision, options.graph_optimization],
        "tensors": [tensors_to_json(spec.inputs), tensors_to_json(spec.outputs)],
        "allowed": [sorted(options.verified), sorted(options.excluded)],
        "rows": spec.max_rows,
        "warmup": [spec.warmup, dict(spec.shapes)],
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _read(kept: Mapping[str, str], key: str) -> Verdict | None:
    try:
        return Verdict.of(json.loads(kept[key]))
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def release(package: str) -> str:
    """A package and its version; its name alone where it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
