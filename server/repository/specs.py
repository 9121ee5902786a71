"""From a config that is complete, and files that are what they should be, to specs of a model's versions."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from convoynet.protos.inference import model_config_pb2 as pb
from convoynet.server.engines.onnxrt_options import provider_options
from convoynet.server.engines.trials import TRIED
from convoynet.server.errors import InvalidModel
from convoynet.server.gpus import visible_gpus
from convoynet.server.repository import lone_files
from convoynet.server.repository.batch_config import batch_policy
from convoynet.server.repository.completion import fill_defaults
from convoynet.server.repository.hashes import Marks, checked_files
from convoynet.server.repository.instance_groups import placements
from convoynet.server.repository.labels import LabelFiles, complete_labels
from convoynet.server.repository.layout import CONFIG_FILE, fingerprint, inside, model_file
from convoynet.server.repository.model_config import BACKENDS, ENSEMBLE, ensemble_steps
from convoynet.server.repository.parameters import choice, integer, limits_of
from convoynet.server.repository.plan_config import of_plans, plan_options
from convoynet.server.repository.tensors import allowed_values, image_input, input_specs, seldom_outputs, tensor_spec
from convoynet.server.repository.verified_engines import verified_engines
from convoynet.server.repository.warmup import warmup_shapes, warmup_sizes
from convoynet.server.spec import LIMITS, EngineOptions, Limits, ModelSpec

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


def check_files(folder: Path, config: pb.ModelConfig, defaults: Defaults) -> tuple[dict[str, Marks], list[Found]]:
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
                file = file_of(folder, version, config)
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


def file_of(folder: Path, version: str, config: pb.ModelConfig) -> Path:
    """The file of a version; raises InvalidModel where there is none."""
    if lone_files.is_lone(folder):
        return folder
    file = model_file(inside(folder, f"{version}/{config.default_model_filename}", "default_model_filename"))
    if not file.is_file():
        raise InvalidModel(f"version {version} has no file {config.default_model_filename}")
    return file


def specs(
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
    required, optional = input_specs(config)
    return ModelSpec(
        name=config.name,
        version=version,
        platform=config.platform,
        inputs=required,
        outputs=tuple(tensor_spec(t) for t in config.output),
        labels={t.name: labels.of(t) for t in config.output if t.label_filename},
        batch=batch,
        engine=EngineOptions(
            backend=config.backend,
            file=folder / version if ensemble else file_of(folder, version, config),
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
        optional=optional,
        values=allowed_values(config, optional),
        seldom=seldom_outputs(config),
    )


def _is_measured(config: pb.ModelConfig, defaults: Defaults) -> bool:
    """Whether the number of engines is to be found by measuring."""
    if not defaults.tune or len(config.instance_group) != 1 or "intra_op_thread_count" in config.parameters:
        return False
    (group,) = config.instance_group
    on_cpus = config.backend in ("onnxruntime", "openvino") and group.kind != pb.ModelInstanceGroup.KIND_GPU
    return on_cpus and not (group.count or group.gpus)
