"""The model repository on disk (Triton's layout) to model specs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.onnxrt_options import provider_options
from convoynet.server.engines.trials import TRIED, Trials, Verdict
from convoynet.server.errors import InvalidModel
from convoynet.server.gpus import visible_gpus
from convoynet.server.host import available_cpus
from convoynet.server.repository import lone_files
from convoynet.server.repository.batch_config import batch_policy
from convoynet.server.repository.completion import (
    Describe,
    complete_backend,
    complete_from_file,
    fill_defaults,
    is_complete,
)
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.hashes import Marks, checked_files
from convoynet.server.repository.instance_groups import placements
from convoynet.server.repository.labels import LabelFiles, complete_labels
from convoynet.server.repository.layout import CONFIG_FILE, check_links, check_name, fingerprint, inside, model_file
from convoynet.server.repository.model_config import (
    BACKENDS,
    ENSEMBLE,
    Stated,
    check_config,
    config_from_json,
    ensemble_steps,
    name_config,
)
from convoynet.server.repository.parameters import choice, integer, limits_of
from convoynet.server.repository.plan_config import of_plans, plan_options
from convoynet.server.repository.tensors import image_input, tensor_spec
from convoynet.server.repository.verified_engines import verified_engines
from convoynet.server.repository.warmup import warmup_shapes, warmup_sizes
from convoynet.server.spec import LIMITS, EngineOptions, Limits, ModelSpec
from convoynet.server.supervision.threads import SECONDS, Threads

log = logging.getLogger(__name__)

ModelConfig = pb.ModelConfig
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Defaults:
    """What the server decides where config.pbtxt is silent.

    Attributes:
        max_queue: Requests that may wait for a model.
        threads: CPU threads of each engine.
        max_batch_size: Of a model whose file has a free batch axis and whose config states no batch size.
        strict_config: Refuses a model whose config would have to be completed from its file.
        require_report: Refuses a file whose hash no report.json states.
        latency_slo_s: The latency that admission keeps, in seconds; 0 for none.
        tune: Leaves the number of engines open where the config does.
        limits: How long engines may take, and reading a model.
    """

    max_queue: int
    threads: int
    max_batch_size: int = 32
    strict_config: bool = False
    require_report: bool = False
    latency_slo_s: float = 0.0
    tune: bool = False
    limits: Limits = LIMITS


@dataclass(frozen=True)
class Found:
    """One version in the repository: a spec and its complete config, or the reason why it can't be served.

    Attributes:
        name, version: The model; version is "" where the whole folder cannot be read.
        spec, config: None where it cannot be served.
        reason: Why not, for people and clients: it carries no path of the server's.
        fingerprint: Changes with the files of the version.
    """

    name: str
    version: str
    spec: ModelSpec | None = None
    config: pb.ModelConfig | None = None
    reason: str = ""
    fingerprint: str = ""


class Repository:
    """The models of several sources under one set of names. Reads files in threads of its own, never on the loop.

    Attributes:
        threads: Where files are read and written, for whoever has to do with the repository's.
    """

    def __init__(
        self,
        sources: Sequence[Folder],
        defaults: Defaults,
        describe: Describe | None = None,
        trials: Trials | None = None,
    ) -> None:
        self.threads = Threads()
        self._sources = sources
        self._defaults = defaults
        self._describe = describe
        self._trials = trials
        # Each look into a file may be a process with an engine of its own.
        self._looks = asyncio.Semaphore(available_cpus())

    async def sync(self) -> None:
        """Brings every source up to date.

        Raises:
            OSError: One cannot be reached.
        """
        await asyncio.gather(*(source.sync() for source in self._sources))

    async def fingerprints(self) -> dict[str, str]:
        """The models that there are, each with what changes when one of its files does.

        Raises:
            OSError: A folder cannot be listed.
        """

        def look() -> dict[str, str]:
            return {name: fingerprint(path) for source in self._sources for name, path in source.folders().items()}

        return await self.threads.run(SECONDS, look)

    async def fingerprint(self, name: str) -> str:
        """That of one model of names(); "" where it is not there.

        Raises:
            OSError: The file system does not answer.
        """
        marks = (fingerprint(path) for s in reversed(self._sources) if (path := s.find(name)) is not None)
        return await self.threads.run(SECONDS, next, marks, "")

    async def names(self) -> set[str]:
        """The folders that are meant as models, whether they can be read or not.

        Raises:
            OSError: A repository cannot be listed.
        """
        return await self.threads.run(SECONDS, lambda: {n for source in self._sources for n in source.folders()})

    async def steps(
        self, name: str, config: Mapping[str, Any] | None = None, folder: Path | None = None
    ) -> frozenset[str]:
        """The models of an ensemble's steps; none where the model is no ensemble, or read() says why it is none.

        Args: as of read().
        """

        def look() -> frozenset[str]:
            home = folder or self._folder(name)
            stated = lone_files.read_config(home) if config is None else config_from_json(config)
            return frozenset() if stated is None else frozenset(s.model for s in ensemble_steps(stated.config))

        try:
            check_name(name)
            return await self.threads.run(SECONDS, look)
        except (InvalidModel, OSError):
            return frozenset()

    async def read(self, name: str, config: Mapping[str, Any] | None = None, folder: Path | None = None) -> list[Found]:
        """The versions of one model that its version policy chooses, oldest first; checks their files' hashes.

        Args:
            name: The model.
            config: Takes the place of its config.pbtxt.
            folder: Takes the place of its folder.

        Raises:
            InvalidModel: There is no such model, or nothing of it can be read. A single version that cannot be served
                is in the list with its reason.
        """
        try:
            check_name(name)
            read, limit = self.threads.run, self._defaults.limits.load_s
            home = await read(SECONDS, self._folder, name) if folder is None else folder
            stated = await read(SECONDS, self._stated, home, name, config)
            versions, bad = await read(limit, _check_files, home, stated.config, self._defaults)
            if versions and not is_complete(stated.config) and stated.config.platform != ENSEMBLE:
                await self._complete(stated, home, list(versions.items())[-1])
            lone = self._lone(name) if folder is None and lone_files.is_lone(home) else None
            if lone is not None and config is None:
                lone_files.add_preprocessing(stated.config, lone.preprocessing)
            labels = None if lone is None else lone.labels
            good = await read(limit, _specs, home, versions, stated.config, self._defaults, labels)
        except OSError as error:
            raise InvalidModel(f"its folder cannot be read: {error.strerror}") from error
        return sorted([*bad, *good], key=lambda found: int(found.version))

    def _folder(self, name: str) -> Path:
        have = [path for source in self._sources if (path := source.find(name)) is not None]
        if len(have) > 1:
            raise InvalidModel(f"{len(have)} model repositories hold a model '{name}': rename all but one")
        if not have:
            raise InvalidModel(f"no model repository holds a folder '{name}'")
        if have[0].is_symlink() and not self._is_root(have[0]):
            raise InvalidModel(
                "its folder is a symbolic link, which the server does not follow: copy or mount the folder"
            )
        check_links(have[0])
        return have[0]

    def _lone(self, name: str) -> lone_files.LoneFiles | None:
        """The source of a model that is a file."""
        sources = (source for source in self._sources if isinstance(source, lone_files.LoneFiles))
        return next((source for source in sources if source.find(name) is not None), None)

    def _is_root(self, folder: Path) -> bool:
        """Whether a model's folder was given as a repository: its name, and a link to it, are the user's business."""
        return any(source.model and source.root == folder for source in self._sources)

    def _stated(self, folder: Path, name: str, override: Mapping[str, Any] | None) -> Stated:
        """The config as it is written, checked, with its backend found out."""
        stated = lone_files.read_config(folder) if override is None else config_from_json(override)
        if stated is None:
            if self._defaults.strict_config:
                raise InvalidModel(f"it has no {CONFIG_FILE}, which --strict-model-config asks for")
            stated = Stated(pb.ModelConfig(), batch=False)
        config = stated.config
        if override is None and self._is_root(folder):
            config.name = name
        name_config(config, name)
        check_config(config)
        if config.platform != ENSEMBLE:
            if self._defaults.strict_config and not is_complete(config):
                raise InvalidModel(
                    f"its {CONFIG_FILE} does not state every input and output, which --strict-model-config asks for"
                )
            complete_backend(config, folder, lone_files.chosen_versions(folder, config)[-1])
        return stated

    async def _complete(self, stated: Stated, folder: Path, version: tuple[str, Marks]) -> None:
        file, trials = _file(folder, version[0], stated.config), self._trials
        if self._describe is None or stated.config.backend == "tensorrt":
            raise InvalidModel(f"its {CONFIG_FILE} has to state every input and output")
        async with self._looks:
            described = await self._describe(file, stated.config.backend)

        async def trial(config: pb.ModelConfig) -> Verdict:
            (found,) = await self.threads.run(SECONDS, _specs, folder, dict([version]), config, self._defaults)
            if trials is None or found.spec is None:
                raise InvalidModel(found.reason)
            return await trials.verdict(EngineSpec.of(found.spec))

        tried = trials is not None and stated.config.backend in TRIED
        await complete_from_file(stated, described, self._defaults.max_batch_size, trial if tried else None)


def scan(root: Path, defaults: Defaults) -> list[Found]:
    """Every version that the version policies choose, in order of name and version, of models with whole configs.

    A folder that cannot be served is in the list with its reason: it never hides the others.
    """

    async def read() -> list[Found]:
        folder = Folder(root)
        repository = Repository([folder], defaults)
        found: list[Found] = []
        for name in folder.folders():
            try:
                found += await repository.read(name)
            except InvalidModel as error:
                found.append(Found(name, "", reason=str(error)))
        return found

    with ThreadPoolExecutor(1) as thread:  # whoever asks may run a loop
        return thread.submit(asyncio.run, read()).result()


def _check_files(folder: Path, config: pb.ModelConfig, defaults: Defaults) -> tuple[dict[str, Marks], list[Found]]:
    """The versions whose files are what they should be, with these files, and the others with their reasons."""
    good: dict[str, Marks] = {}
    bad: list[Found] = []
    chosen = lone_files.chosen_versions(folder, config)
    if absent := [v for v in config.version_policy.specific.versions if str(v) not in chosen]:
        log.warning("model %s: version_policy asks for versions that are not there: %s", config.name, absent[:10])
    for version in chosen:
        try:
            marks: Marks = ()
            if config.platform != ENSEMBLE:
                file = _file(folder, version, config)
                marks = checked_files(folder, version, file, required=_why_a_report(file, defaults))
            good[version] = marks
        except InvalidModel as error:
            bad.append(
                Found(
                    config.name, version, reason=str(error), fingerprint=fingerprint(lone_files.place(folder, version))
                )
            )
    return good, bad


def _why_a_report(file: Path, defaults: Defaults) -> str:
    if file.suffix == Path(BACKENDS["tensorrt"].file).suffix:
        return "which a TensorRT plan needs, since it may hold code"
    return "which --require-report asks for" if defaults.require_report else ""


def _file(folder: Path, version: str, config: pb.ModelConfig) -> Path:
    if lone_files.is_lone(folder):
        return folder
    file = model_file(inside(folder, f"{version}/{config.default_model_filename}", "default_model_filename"))
    if not file.is_file():
        raise InvalidModel(f"version {version} has no file {config.default_model_filename}")
    return file


def _specs(
    folder: Path, versions: dict[str, Marks], config: pb.ModelConfig, defaults: Defaults, names: Path | None = None
) -> list[Found]:
    """Specs of versions whose files were checked, from the config that is complete now; `names` is a file of labels."""
    labels = LabelFiles(folder, names)
    if versions:
        complete_labels(config, labels)
        fill_defaults(labels, config)
    found = []
    for version, marks in versions.items():
        mark = fingerprint(lone_files.place(folder, version))
        try:
            spec = _spec(folder, version, config, defaults, labels)
            spec = replace(spec, engine=replace(spec.engine, files=marks))
            found.append(Found(config.name, version, spec, config, fingerprint=mark))
        except InvalidModel as error:
            found.append(Found(config.name, version, reason=str(error), fingerprint=mark))
    return found


def _spec(folder: Path, version: str, config: pb.ModelConfig, defaults: Defaults, labels: LabelFiles) -> ModelSpec:
    ensemble = config.platform == ENSEMBLE
    # A graph of ONNX may have no input: its answer is always the same.
    if not config.output or not (config.input or config.backend in TRIED):
        raise InvalidModel(f"its {CONFIG_FILE} states no {'output' if config.input else 'input'}")
    groups = config.instance_group or [pb.ModelInstanceGroup(count=1)]
    measured = _is_measured(config, defaults)
    # What is to be measured keeps its count of 0.
    places = placements([pb.ModelInstanceGroup(kind=groups[0].kind)] if measured else groups, visible_gpus())
    places, slots = of_plans(places) if config.backend == "tensorrt" else (places, 1)
    batch = batch_policy(config, defaults.max_queue, defaults.latency_slo_s)
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    verified, excluded = verified_engines(config, version)
    return ModelSpec(
        name=config.name,
        version=version,
        platform=config.platform,
        inputs=tuple(tensor_spec(t) for t in config.input),
        outputs=tuple(tensor_spec(t) for t in config.output),
        labels={t.name: labels.of(t) for t in config.output if t.label_filename},
        batch=batch,
        engine=EngineOptions(
            backend=config.backend,
            file=folder / version if ensemble else _file(folder, version, config),
            device=places[0].device,
            threads=integer(config, "intra_op_thread_count", defaults.threads, _MOST_THREADS),
            tensorrt=any(a.name == "tensorrt" for a in accelerators),
            engine=choice(config, "engine", ("", "onnxruntime", "openvino")),
            graph_optimization=choice(config, "graph_optimization", ("all", "basic")),
            precision=choice(config, "inference_precision", ("f32", "bf16", "f16")),
            gpus=places[0].gpus,
            provider_options=provider_options({n: p.string_value for n, p in config.parameters.items()}),
            slots=slots,
            plan=plan_options(config) if config.backend == "tensorrt" else None,
            verified=verified,
            excluded=excluded,
        ),
        instances=0 if measured else len(places),
        warmup=warmup_sizes(config, batch.max_queue_bytes),
        warmup_stated=bool(config.model_warmup),
        shapes=warmup_shapes(config),
        image=image_input(config),
        response_cache=config.response_cache.enable,
        steps=ensemble_steps(config) if ensemble else (),
        placements=() if measured else places,
        limits=limits_of(config, defaults.limits),
    )


def _is_measured(config: pb.ModelConfig, defaults: Defaults) -> bool:
    """Whether the number of engines is to be found by measuring."""
    if not defaults.tune or len(config.instance_group) != 1 or "intra_op_thread_count" in config.parameters:
        return False
    (group,) = config.instance_group
    on_cpus = config.backend in ("onnxruntime", "openvino") and group.kind != pb.ModelInstanceGroup.KIND_GPU
    return on_cpus and not (group.count or group.gpus)
