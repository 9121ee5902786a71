"""The TensorRT engine of an export: built from the graph that is published, and published with --format tensorrt.

Every graph for a GPU is given to TensorRT's parser and builder, so that one that it does not take is never published.
Where no engine is asked for, or the server is to build it, that is a trial: built fast, and thrown away.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convoynet.exporter.config import ExportConfig
from convoynet.exporter.engine_options import BuildOptions
from convoynet.exporter.evidence.report import megabytes
from convoynet.exporter.evidence.told import Told
from convoynet.exporter.pipeline.preflight import Task
from convoynet.exporter.publishing import repository
from convoynet.exporter.publishing.model_folder import PLAN_FILE
from convoynet.exporter.tensorrt import library
from convoynet.exporter.tensorrt.build import BuiltEngine, build

_FIELDS = (
    "library", "version", "compute_capability", "driver_version", "profiles", "bytes", "seconds", "precisions",
    "inspected", "layers",
)  # fmt: skip
_NOT_TRIED = "not tried: no TensorRT builder is installed here (pip install tensorrt or tensorrt-rtx)"


@dataclass(frozen=True)
class Engine:
    """What became of the engine.

    Attributes:
        config: of the export.
        options: how it was built, or the server is to build it.
        built: the engine; None where there is no builder.
    """

    config: ExportConfig
    options: BuildOptions
    built: BuiltEngine | None

    @property
    def published(self) -> BuiltEngine | None:
        """The engine, where it is a file of the version and no trial."""
        return self.built if self.config.publishes_engine else None

    @property
    def line(self) -> str:
        """What became of it and, where it is published, where it runs."""
        if self.published is not None:
            return Told(self.published, self.options).line
        deferred = "left to the server, which builds it for its own GPU at first load; here " * self.config.defer_build
        if self.built is None:
            return deferred + _NOT_TRIED
        size = f"{megabytes(len(self.built.content))} in {self.built.seconds:.1f} s"
        return f"{deferred}{self.built.title} parses and builds it: {size} (a trial: not published, not run)"

    def to_json(self, *, ran: bool) -> dict[str, Any]:
        """What report.json says of it; `ran`, whether the figures of the report are the engine's own."""
        if self.built is None:
            told = dict.fromkeys(_FIELDS) | {"profiles": [str(profile) for profile in self.options.profiles]}
        else:
            made = Told(self.built, self.options)
            told = {**made.facts, **made.measures}
        state = {"published": self.published is not None, "deferred": self.config.defer_build, "ran": ran}
        return {**told, **state, "line": self.line}


def make_engine(task: Task, graph: Path) -> Engine:
    """Build the engine of a graph and, where it is to be published, write it beside the graph.

    Raises:
        BadInput: TensorRT does not take the graph, or the repository cannot be written.
        Missing: TensorRT cannot build here.
    """
    config = task.config
    options = config.build_options(task.arch.task)
    if library.find() is None:
        task.caveats.append(f"TensorRT engine {_NOT_TRIED}")
        return Engine(config, options, None)
    built = build(graph, options if config.publishes_engine else BuildOptions(options.profiles, 0), task.progress)
    task.caveats.extend(built.notes)
    if config.publishes_engine:
        with repository.writing(config.repository):
            graph.with_name(PLAN_FILE).write_bytes(built.content)
    return Engine(config, options, built)
