"""Builds the plan of a published model again, in place, and says so in its config.pbtxt and its report.

Imports neither torch nor onnx: a serving image may have only TensorRT.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from exporter.errors import BadInput
from exporter.progress import Progress
from exporter.repository import staging, versions, writing
from exporter.tensorrt.build import BuiltEngine, build
from exporter.tensorrt.layers import by_precision
from exporter.tensorrt.options import BuildOptions, from_parameters, to_parameters
from protos.inference import model_config_pb2 as pb

GRAPH_FILE, PLAN_FILE = "model.onnx", "model.plan"
_CONFIG_FILE, _REPORT_FILE, _TEXT_FILE = "config.pbtxt", "report.json", "report.md"
# A plan holds the weights again, in the kernels' own order, and twice where there are two profiles.
_ROOM = 3
_ENGINE_ROW = re.compile(r"^\| engine \|.*\|$", re.M)
# What says how an engine was built, of which nothing of the old one may stay.
_BUILD_PARAMETERS = re.compile(r"tensorrt_.*")


@dataclass(frozen=True)
class Rebuilt:
    """A plan that was built again: the engine, how, and the file that holds it."""

    engine: BuiltEngine
    options: BuildOptions
    plan: Path


def rebuild(model: Path, changed: Callable[[BuildOptions], BuildOptions], progress: Progress) -> Rebuilt:
    """Build the plan of a model's newest version again, from the ONNX graph beside it.

    Args:
        model: the model's folder in a repository.
        changed: what the caller wants otherwise than config.pbtxt states.
        progress: shows how far it is.

    Raises:
        BadInput: no such model, no graph beside the plan, or batches that are not the model's; nothing has changed.
        Missing: as `build` raises it.
    """
    model = model.resolve()
    found = versions(model)
    if not found:
        raise BadInput(f"{model}: no model's folder: it has no version, such as {model / '1' / GRAPH_FILE}")
    folder = model / str(found[-1])
    graph = folder / GRAPH_FILE
    if not graph.is_file():
        raise BadInput(f"{graph}: no such file, and a plan is built from it: export the model again")
    config = _read_config(model)
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    options = changed(from_parameters(parameters))
    _require_batches(config, options)
    room = _ROOM * graph.stat().st_size
    with staging(model.parent, model.name, found[-1], force=True, needed_bytes=room) as place:
        engine = build(graph, options, progress)
        with writing(model.parent):
            for file in folder.iterdir():
                if file.is_file() and file.name != PLAN_FILE:
                    _same_file(file, place.folder / file.name)
            (place.folder / PLAN_FILE).write_bytes(engine.content)
            _state(config, engine, options)
            (place.model / _CONFIG_FILE).write_text(text_format.MessageToString(config), encoding="utf-8")
            told = Told(engine, options)
            told.update(model, place.model, f"{place.version}/{PLAN_FILE}")
            told.update(folder, place.folder, f"{place.version}/{PLAN_FILE}")
        published = place.commit()
    return Rebuilt(engine, options, published / PLAN_FILE)


def _read_config(model: Path) -> pb.ModelConfig:
    file = model / _CONFIG_FILE
    try:
        config = text_format.Parse(file.read_text(encoding="utf-8"), pb.ModelConfig())
    except FileNotFoundError as error:
        raise BadInput(f"{model} has no {_CONFIG_FILE}: name an ONNX file and --output instead") from error
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from error
    if config.backend != "tensorrt" and config.platform != "tensorrt_plan":
        raise BadInput(
            f"{model.name} is served by {config.backend or config.platform or 'no backend that its config names'}, not "
            f"by tensorrt: export it with --format tensorrt, or build its {GRAPH_FILE} to a file with --output"
        )
    return config


def _require_batches(config: pb.ModelConfig, options: BuildOptions) -> None:
    largest = max(profile.largest for profile in options.profiles)
    if config.max_batch_size > largest:
        raise BadInput(
            f"{_CONFIG_FILE} promises batches up to {config.max_batch_size} (max_batch_size), and the profiles "
            f"{options.profiles_text} end at {largest}: give --batch 1:8:{config.max_batch_size}"
        )
    if options.refit == "strip":
        raise BadInput("a stripped plan has no weights to serve: build it from the ONNX file, with --output")


def _state(config: pb.ModelConfig, engine: BuiltEngine, options: BuildOptions) -> None:
    """Put into a config what a server compares before it loads the plan."""
    for key in [key for key in config.parameters if _BUILD_PARAMETERS.fullmatch(key)]:
        del config.parameters[key]
    config.default_model_filename = PLAN_FILE
    for key, value in plan_parameters(engine, options).items():
        config.parameters[key].string_value = value


def plan_parameters(engine: BuiltEngine, options: BuildOptions) -> dict[str, str]:
    """The parameters of config.pbtxt that say what a plan was built with, and how to build it again."""
    return {
        "tensorrt_library": engine.library,
        "tensorrt_version": engine.version,
        "compute_capability": engine.compute_capability,
        "driver_version": engine.driver_version,
        "version_compatible": json.dumps(options.version_compatible),
        "hardware_compatible": json.dumps(options.hardware_compatible),
        **to_parameters(options),
    }


def _same_file(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class Told:
    """What the report of a model says of its engine."""

    engine: BuiltEngine
    options: BuildOptions

    @property
    def line(self) -> str:
        """All of it for people."""
        engine = self.engine
        return (
            f"{engine.title} built it: {len(engine.content) / 1e6:.1f} MB in {engine.seconds:.1f} s for batches "
            f"{self.options.profiles_text}; {engine.runs_on}"
        )

    def update(self, source: Path, target: Path, plan: str) -> None:
        """Copy the report of the folder `source`, where it has one, to `target`, with the facts of this engine."""
        if (source / _REPORT_FILE).is_file():
            try:
                report = json.loads((source / _REPORT_FILE).read_text(encoding="utf-8"))
            except ValueError as error:
                raise BadInput(f"{source / _REPORT_FILE} is no JSON ({error}): mend or remove it") from error
            text = json.dumps(self._updated(report, plan), indent=2, allow_nan=False) + "\n"
            _replace(target / _REPORT_FILE, text)
        if (source / _TEXT_FILE).is_file():
            row = f"| engine | {self.line.replace('|', '/')} |"
            text = _ENGINE_ROW.sub(lambda _: row, (source / _TEXT_FILE).read_text(encoding="utf-8"))
            _replace(target / _TEXT_FILE, text)

    def _updated(self, report: Mapping[str, Any], plan: str) -> dict[str, Any]:
        engine = self.engine
        facts = {
            "library": engine.library,
            "version": engine.version,
            "compute_capability": engine.compute_capability,
            "driver_version": engine.driver_version,
            "profiles": [str(profile) for profile in self.options.profiles],
        }
        digest = hashlib.sha256(engine.content).hexdigest()
        entry = {"format": "tensorrt", "file": plan, **facts, "sha256": digest, "bytes": len(engine.content)}
        others = [found for found in report.get("formats", []) if found.get("format") != "tensorrt"]
        told = {
            **facts,
            "bytes": len(engine.content),
            "seconds": engine.seconds,
            "published": True,
            "deferred": False,
            # The figures of the report are those of the export, not of this engine.
            "ran": False,
            "precisions": by_precision(engine.layers),
            "layers": [asdict(layer) for layer in engine.layers],
            "line": self.line,
        }
        return {**report, "formats": [entry, *others], "engine": told}


def _replace(file: Path, text: str) -> None:
    # The name may be a second one of the published file, which stays as it is.
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")
