"""One export from a name to a published, verified model: the order of the steps, which know nothing of each other."""

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convoynet.exporter import archs, recipe
from convoynet.exporter.archs import weights
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import calibration_images, load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence import report, verify, writing
from convoynet.exporter.evidence.told import Told
from convoynet.exporter.linting.lint import require_clean
from convoynet.exporter.pipeline import preflight
from convoynet.exporter.pipeline.engine import Engine, make_engine
from convoynet.exporter.pipeline.graph_steps import Lowered, lower
from convoynet.exporter.pipeline.module_steps import Compressed, compress, forget
from convoynet.exporter.pipeline.preflight import Task
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.progress import Progress
from convoynet.exporter.publishing import model_config, repository
from convoynet.exporter.publishing.model_folder import GRAPH_FILE, PLAN_FILE
from convoynet.exporter.running.pictures import Pictures, divide, part_of
from convoynet.exporter.running.runtime import Eager, OpenVino, Session
from convoynet.exporter.tensorrt.runner import Plan

# Hidden from servers, as all that starts with a dot.
CHECKPOINTS = ".convoy-training"
# Images that only check the result; small inputs leave time for more.
_CHECKS, _CHECKS_SMALL = 32, 256
_SMALL_PIXELS = 64 * 64
_SPEED_BATCH, _SPEED_BATCH_SMALL = 8, 32
# Maps and boxes are many values an image.
_CHECKS_DENSE = 8
# An engine holds the weights again, in the order of its kernels, for two profiles twice.
_ENGINE_SIZES = 2
# Beside the float32 graph, which is the largest file without an engine: plots and text.
_SPARE_BYTES = 2**20


@dataclass(frozen=True)
class Published:
    """A finished export: the report, and the folder of the version."""

    report: report.Report
    folder: Path


@dataclass
class _Measured:
    """What was measured of the published file; `ran`, whether that is the engine."""

    engine: Engine | None = None
    ran: bool = False
    accuracy: verify.Accuracy | None = None
    speed: dict[str, Any] = field(default_factory=dict)


def run(config: ExportConfig, progress: Progress) -> Published:
    """Export, verify and publish; a failure leaves the repository as it was.

    Raises:
        BadInput: an argument or a file is not usable, or the repository cannot be written.
        Refused: the result is too far from the PyTorch model, or the linter has an error for its runtime.
        Missing: a library or device is not there.
    """
    began = time.perf_counter()
    task = preflight.check(config, progress)
    with repository.staging(
        config.repository,
        config.model_name,
        config.version,
        force=config.force,
        needed_bytes=(1 + _ENGINE_SIZES * config.publishes_engine) * task.size.bytes + _SPARE_BYTES,
    ) as staging:
        described = model_config.model_config(config, task.arch, task.size.outputs)
        _note_changes(task, staging, described)
        # What is wrong with a file of weights is said before the images are read.
        network = _network(task, None) if config.weights != "random" else None
        pictures = _load_pictures(task)
        bench = _build(task, pictures, network or _network(task, pictures))
        compressed = compress(bench)
        lowered = lower(bench, compressed, _outputs_of(bench, compressed))
        model_config.say_activation(described, lowered.exact)
        file = _write(task, lowered, staging.folder / GRAPH_FILE)
        measured = _measure(bench, lowered, file)
        if (engine := measured.engine) is not None and engine.published is not None:
            model_config.add_built(described, engine.options, engine.published)
        result = _report(bench, compressed, lowered, measured, staging).finished(time.perf_counter() - began)
        plots = compressed.plots | lowered.plots
        with repository.writing(config.repository):
            for file in writing.write(result, staging.folder, lowered.compared, plots):
                shutil.copyfile(file, staging.model / file.name)
            (staging.model / model_config.CONFIG_FILE).write_text(model_config.config_text(described))
            (staging.model / model_config.LABELS_FILE).write_text("".join(f"{label}\n" for label in task.labels))
        with task.progress.step("publish"):
            folder = staging.commit(fits=partial(_require_fit, staging, described))
        published = Published(result, folder)
        forget(bench)
        return published


def _note_changes(task: Task, staging: repository.Staging, described: Any) -> None:
    """Say what clients of an earlier version will notice.

    Raises:
        BadInput: an older version than the newest would not match the one config of the model.
    """
    _require_fit(staging, described)
    task.caveats.extend(model_config.changes(staging.target, described))


def _require_fit(staging: repository.Staging, described: Any) -> None:
    differences = model_config.changes(staging.target, described)
    newest = max(repository.versions(staging.target), default=0)
    if differences and staging.version < newest:
        raise BadInput(
            f"version {staging.version} is older than version {newest} of {staging.name}, whose config it would have "
            f"to fit: {differences[0]}; publish it as a new version or under another --name"
        )


def _load_pictures(task: Task) -> Pictures:
    """Choose images to calibrate on and, as far as there are enough, others to check with."""
    config, preprocess = task.config, task.arch.preprocess
    checks = _CHECKS_SMALL if preprocess.size[0] * preprocess.size[1] <= _SMALL_PIXELS else _CHECKS
    if task.arch.task != "classification":
        checks = _CHECKS_DENSE
    with task.progress.step("load images"):
        images, source = calibration_images(
            preprocess, config.calibration, config.calibration_samples + checks, config.seed, task.arch.name
        )
        if config.calibration is None:
            task.caveats.append(f"no --calibration folder was given: {source}")
        pictures = divide(images, source, config.calibration_samples, checks)
        if task.labelled:
            chosen = task.labelled[:: -(-len(task.labelled) // checks)]
            check = load_images([path for path, _ in chosen], preprocess)
            used = images[: config.calibration_samples]
            check_source = f"{len(check)} of the {len(task.labelled)} images in {config.eval}"
            return Pictures(used, check, part_of(used, source), check_source)
    if len(images) == 1:
        task.caveats.append("the one calibration image is also the one that checks the result")
    return pictures


def _network(task: Task, pictures: Pictures | None) -> tuple[torch.nn.Module, weights.Weights]:
    """The network with its weights; random ones take their statistics from pictures."""
    config, preprocess = task.config, task.arch.preprocess
    none = np.empty((0, *preprocess.size, preprocess.channels), np.uint8)
    images = none if pictures is None else pictures.calibration
    with task.progress.step(f"build {config.arch}"):
        torch.manual_seed(config.seed)
        module = task.arch.build(len(task.labels))
        loaded = weights.load(module, task.arch, config.weights, seed=config.seed, images=images, ema=config.ema)
        task.caveats.extend(loaded.notes)
        return task.arch.deploy(module), loaded


def _build(task: Task, pictures: Pictures, network: tuple[torch.nn.Module, weights.Weights]) -> Workbench:
    config, (module, loaded) = task.config, network
    eager = Eager(module, task.arch.preprocess)
    with task.progress.step("PyTorch's outputs"):
        outputs = verify.outputs_of(eager, pictures.check, task.config.batch_range(task.arch.task)[1])
    if not all(np.isfinite(output).all() for output in outputs):
        raise BadInput(f"the weights ({loaded.source}) give outputs that are not finite; choose others")
    if task.arch.task == "detection" and not outputs[-1].any():
        raise BadInput(
            f"{config.arch} detects nothing in the images that check it ({pictures.check_source}), so that nothing "
            "can be compared: give photographs of what it knows with --calibration DIR"
        )
    reference = verify.Reference(eager.name, task.arch.task, outputs)
    return Workbench(task, module, loaded, eager, reference, pictures, config.repository / CHECKPOINTS)


def _outputs_of(bench: Workbench, compressed: Compressed) -> verify.Reference | None:
    """The outputs of the module after its steps on the images that check; None where there were no steps."""
    if not compressed.done:
        return None
    task = bench.task
    eager = Eager(compressed.module, task.arch.preprocess)
    outputs = verify.outputs_of(eager, bench.pictures.check, task.config.batch_range(task.arch.task)[1])
    return verify.Reference(f"{eager.name}, compressed", task.arch.task, outputs)


def _write(task: Task, lowered: Lowered, file: Path) -> Path:
    require_clean(lowered.graph, task.config.target)
    with repository.writing(task.config.repository):
        file.write_bytes(lowered.graph.SerializeToString())
    return file


def _measure(bench: Workbench, lowered: Lowered, file: Path) -> _Measured:
    """Measure accuracy and speed of what is published: the engine where it can run here, else the graph."""
    task, config, preprocess = bench.task, bench.task.config, bench.task.arch.preprocess
    measured = _Measured()
    if config.target == "gpu":
        measured.engine = make_engine(task, file)
    session: Session | OpenVino | Plan | None = _plan(bench, lowered, file)
    measured.ran = session is not None
    low, high = config.batch_range(task.arch.task)
    session = session or bench.session(file)
    if task.labelled:
        most = min(verify.EVAL_BATCH, high) if measured.ran else verify.EVAL_BATCH
        measured.accuracy = verify.measure_accuracy(
            bench.eager, session, task.labelled, preprocess, task.progress, most
        )
        if config.max_drop is not None:
            verify.check_drop(measured.accuracy, config.max_drop)
    if config.target == "gpu":
        task.caveats.extend(_not_measured(config, session.device))
    small = preprocess.size[0] * preprocess.size[1] <= _SMALL_PIXELS
    larger = max(low, min(high, _SPEED_BATCH_SMALL if small else _SPEED_BATCH))
    eager = Eager(bench.module, preprocess, session.device)
    speeds = verify.measure_speed(eager, session, bench.pictures.check, (low, larger), task.progress)
    measured.speed = verify.speed_summary(speeds)
    at_home = config.target == session.device.replace("cuda", "gpu") and not measured.ran
    if lowered.graph is not lowered.exact and at_home:
        exact = bench.session(lowered.exact.SerializeToString())
        batch = max(speeds, key=lambda speed: speed.images_per_second).batch
        (against,) = verify.measure_speed(exact, session, bench.pictures.check, [batch], task.progress)
        measured.speed["fp32_graph_images_per_second"] = against.reference_images_per_second
        if against.images_per_second < against.reference_images_per_second:
            name = config.precision
            task.caveats.append(
                f"{name.upper()} is slower here than the float32 graph ({against.images_per_second:.0f} against "
                f"{against.reference_images_per_second:.0f} images/s): without --{name} this network serves faster"
            )
    return measured


def _plan(bench: Workbench, lowered: Lowered, graph: Path) -> Plan | None:
    """The engine beside the graph, compared with PyTorch in the graph's place; None where it cannot run.

    Raises:
        Refused: it is not the graph that it was built from.
    """
    file = graph.with_name(PLAN_FILE)
    if not file.exists() or not torch.cuda.is_available():
        return None
    task = bench.task
    arch, compatible = task.arch, task.config.version_compatible
    plan = Plan(file, arch.preprocess, task=arch.task, version_compatible=compatible)
    compared = bench.compare(plan)
    verify.check_engine(lowered.compared.parity, compared.parity)
    lowered.stages.append({"stage": "engine", "bytes": file.stat().st_size, "parity": asdict(compared.parity)})
    lowered.compared = compared
    return plan


def _not_measured(config: ExportConfig, device: str) -> list[str]:
    """What to keep in mind of figures that come from this device, of a model for GPUs."""
    if config.format == "tensorrt" and config.defer_build:
        told = "the engine is the server's to build: the figures are those of its graph, as TensorRT reads it"
    elif config.format == "tensorrt" and device == "cpu":
        told = (
            "the engine was built, not run, for want of a GPU: the figures are those of its graph, as TensorRT reads it"
        )
    elif device == "cpu":
        told = "made for a GPU: there is none here that ONNX Runtime can use"
    else:
        return []
    return [f"{told}; measured on a CPU, so speed says nothing" if device == "cpu" else told]


def _formats(config: ExportConfig, staging: repository.Staging, engine: Engine | None) -> list[dict[str, Any]]:
    """The files of the version, the one that is served first."""
    content = (staging.folder / GRAPH_FILE).read_bytes()
    graph = {
        "format": "onnx",
        "file": f"{staging.version}/{GRAPH_FILE}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "opset": config.onnx_opset,
    }
    if engine is None or engine.published is None:
        return [graph]
    return [Told(engine.published, engine.options).file(f"{staging.version}/{PLAN_FILE}"), graph]


def _report(
    bench: Workbench, compressed: Compressed, lowered: Lowered, measured: _Measured, staging: repository.Staging
) -> report.Report:
    task, pictures = bench.task, bench.pictures
    config, preprocess = task.config, task.arch.preprocess
    before, after = (archs.count(module, task.arch.input_size) for module in (bench.module, compressed.module))
    channels, (height, width) = preprocess.channels, preprocess.size
    return report.Report(
        name=config.model_name,
        version=staging.version,
        arch=task.arch.name,
        paper=task.arch.paper,
        weights={"source": bench.weights.source, "sha256": bench.weights.sha256},
        target=config.target,
        precision=config.precision,
        input={
            "dtype": config.input,
            "shape": [height, width, channels] if config.input == "uint8" else [channels, height, width],
            "batch": list(config.batch_range(task.arch.task)),
            "preprocess": preprocess.to_json(),
            "preprocessing": task.arch.preprocessing,
            **({"preprocessing_check": task.checked} if task.checked else {}),
        },
        classes=len(task.labels),
        formats=_formats(config, staging, measured.engine),
        reference_bytes=sum(tensor.nbytes for tensor in bench.module.state_dict().values()),
        parameters={"before": before.parameters, "after": after.parameters},
        macs={"before": before.macs, "after": after.macs},
        images={"calibration": pictures.calibration_source, "check": pictures.check_source},
        parity=lowered.compared.parity,
        stages=[*compressed.stages, *lowered.stages],
        accuracy=measured.accuracy,
        speed=measured.speed,
        calibration=lowered.calibration,
        compression=[*compressed.done, *lowered.done],
        engine=None if measured.engine is None else measured.engine.to_json(ran=measured.ran),
        caveats=task.caveats,
        environment=report.environment(task.threads),
        recipe=recipe.to_toml(config.steps),
        seed=config.seed,
        parity_to_compressed=lowered.to_compressed,
        divergence=lowered.divergence,
        sensitivity=lowered.sensitivity,
    )
