"""The model repository on disk (Triton's layout) to model specs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.engines.base import EngineSpec
from convoynet.server.engines.trials import TRIED, Trials, Verdict
from convoynet.server.errors import InvalidModel
from convoynet.server.host import available_cpus
from convoynet.server.repository import lone_files
from convoynet.server.repository.completion import Describe, complete_backend, complete_from_file, is_complete
from convoynet.server.repository.folder import Folder
from convoynet.server.repository.hashes import Marks
from convoynet.server.repository.layout import CONFIG_FILE, check_links, check_name, fingerprint
from convoynet.server.repository.model_config import (
    ENSEMBLE,
    Stated,
    check_config,
    config_from_json,
    ensemble_steps,
    name_config,
)
from convoynet.server.repository.specs import Defaults, Found, check_files, file_of, specs
from convoynet.server.supervision.threads import SECONDS, Threads


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
            versions, bad = await read(limit, check_files, home, stated.config, self._defaults)
            if versions and not is_complete(stated.config) and stated.config.platform != ENSEMBLE:
                await self._complete(stated, home, list(versions.items())[-1])
            lone = self._lone(name) if folder is None and lone_files.is_lone(home) else None
            if lone is not None and config is None:
                lone_files.add_preprocessing(stated.config, lone.preprocessing)
            labels = None if lone is None else lone.labels
            good = await read(limit, specs, home, versions, stated.config, self._defaults, labels)
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
        file, trials = file_of(folder, version[0], stated.config), self._trials
        if self._describe is None or stated.config.backend == "tensorrt":
            raise InvalidModel(f"its {CONFIG_FILE} has to state every input and output")
        async with self._looks:
            described = await self._describe(file, stated.config.backend)

        async def trial(config: pb.ModelConfig) -> Verdict:
            (found,) = await self.threads.run(SECONDS, specs, folder, dict([version]), config, self._defaults)
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
