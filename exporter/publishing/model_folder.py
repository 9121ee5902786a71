"""Builds the plan of a published model again, in place, and says so in its config.pbtxt and its report.

Imports neither torch nor onnx: a serving image may have only TensorRT.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format

from convoynet.exporter.engine_options import BuildOptions, from_parameters, to_parameters
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence.told import Told
from convoynet.exporter.progress import Progress
from convoynet.exporter.publishing.repository import staging, versions, writing
from convoynet.exporter.publishing.swap import carry_over
from convoynet.exporter.tensorrt.build import BuiltEngine, build
from convoynet.protos.inference import model_config_pb2 as pb

GRAPH_FILE, PLAN_FILE = "model.onnx", "model.plan"
_CONFIG_FILE = "config.pbtxt"
# A plan holds the weights again, in the kernels' own order, and twice where there are two profiles.
_ROOM = 3
# What says how an engine was built and what it was found to be, of which nothing of the old one may stay.
_BUILD_PARAMETERS = re.compile(r"tensorrt_.*|verified_.*|excluded_engines")


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
                    carry_over(file, place.folder / file.name)
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
