"""The TensorRT engine of an export: built from the graph that is published, and published with --format tensorrt.

Every graph for a GPU is given to TensorRT's parser and builder, so that one that it does not take is never published.
Where no engine is asked for, or the server is to build it, that is a trial: built fast, and thrown away.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter import repository
from exporter.config import ExportConfig
from exporter.model_config import PLAN_FILE
from exporter.preflight import Task
from exporter.report import megabytes
from exporter.tensorrt import library
from exporter.tensorrt.build import BuiltEngine, build
from exporter.tensorrt.layers import by_precision
from exporter.tensorrt.options import BuildOptions, Profile

_NOT_TRIED = "not tried: no TensorRT builder is installed here (pip install tensorrt or tensorrt-rtx)"


@dataclass(frozen=True)
class Engine:
    """What became of the engine.

    Attributes:
        built: the engine; None where there is no builder.
        profiles: the batches that it takes.
        published: whether the engine is a file of the version; what is not was a trial.
        deferred: whether the server is to build its own.
        line: all of it for people.
    """

    built: BuiltEngine | None
    profiles: Sequence[Profile]
    published: bool
    deferred: bool
    line: str

    def to_json(self, *, ran: bool) -> dict[str, Any]:
        """What report.json says of it; `ran`, whether the figures of the report are the engine's own."""
        built = self.built
        return {
            "library": built and built.library,
            "version": built and built.version,
            "compute_capability": built and built.compute_capability,
            "driver_version": built and built.driver_version,
            "bytes": built and len(built.content),
            "seconds": built and round(built.seconds, 2),
            "profiles": [str(profile) for profile in self.profiles],
            "published": self.published,
            "deferred": self.deferred,
            "ran": ran,
            "precisions": by_precision(built.layers) if built else None,
            "inspected": built and built.inspected,
            "layers": [asdict(layer) for layer in built.layers] if built else None,
            "line": self.line,
        }


def make_engine(task: Task, graph: Path) -> Engine:
    """Build the engine of a graph and, where it is to be published, write it beside the graph.

    Raises:
        BadInput: TensorRT does not take the graph, or the repository cannot be written.
        Missing: TensorRT cannot build here.
    """
    config = task.config
    options = config.build_options(task.arch.task)
    found = library.find()
    if found is None:
        task.caveats.append(f"TensorRT engine {_NOT_TRIED}")
        return Engine(None, options.profiles, False, config.defer_build, _line(config, "", None))
    built = build(graph, options if config.publishes_engine else BuildOptions(options.profiles, 0), task.progress)
    task.caveats.extend(built.notes)
    if config.publishes_engine:
        with repository.writing(config.repository):
            graph.with_name(PLAN_FILE).write_bytes(built.content)
    return Engine(
        built, options.profiles, config.publishes_engine, config.defer_build, _line(config, found.title, built)
    )


def _line(config: ExportConfig, title: str, built: BuiltEngine | None) -> str:
    """What became of the engine, what `title` built, and where it runs."""
    deferred = "left to the server, which builds it for its own GPU at first load; here " if config.defer_build else ""
    if built is None:
        return deferred + _NOT_TRIED
    size = f"{megabytes(len(built.content))} in {built.seconds:.1f} s"
    if not config.publishes_engine:
        return f"{deferred}{title} parses and builds it: {size} (a trial: not published, not run)"
    return f"{title} built it: {size}; {built.runs_on}"
