"""One export from a name to a published, verified model: the order of the steps, which know nothing of each other."""

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter import archs, evidence, model_config, preflight, recipe, report, repository, verify, weights
from exporter.config import ExportConfig
from exporter.errors import BadInput
from exporter.graph_steps import Lowered, lower
from exporter.images import calibration_images, load_images
from exporter.lint import require_clean
from exporter.module_steps import Compressed, compress, forget
from exporter.pictures import Pictures, divide, part_of
from exporter.preflight import Task
from exporter.progress import Progress
from exporter.runtime import Eager
from exporter.tensorrt import library
from exporter.tensorrt.build import build as build_engine
from exporter.tensorrt.options import USUAL_BATCH, BuildOptions, Profile
from exporter.workbench import Workbench

MODEL_FILE = "model.onnx"
# Hidden from servers, as all that starts with a dot.
CHECKPOINTS = ".convoy-training"
# Images that only check the result; small inputs leave time for more.
_CHECKS, _CHECKS_SMALL = 32, 256
_SMALL_PIXELS = 64 * 64
_SPEED_BATCH, _SPEED_BATCH_SMALL = 8, 32
# Maps and boxes are many values an image.
_CHECKS_DENSE = 8
# Beside the float32 graph, which is the largest file: plots and text.
_SPARE_BYTES = 2**20


@dataclass(frozen=True)
class Published:
    """A finished export: the report, and the folder of the version."""

    report: report.Report
    folder: Path


@dataclass
class _Measured:
    """What was measured of the published file."""

    engine: dict[str, Any] | None = None
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
        needed_bytes=task.size.bytes + _SPARE_BYTES,
    ) as staging:
        described = model_config.model_config(config, task.arch, task.size.outputs)
        _note_changes(task, staging, described)
        pictures = _load_pictures(task)
        bench = _build(task, pictures)
        compressed = compress(bench)
        lowered = lower(bench, compressed, _outputs_of(bench, compressed))
        file = _write(task, lowered, staging.folder / MODEL_FILE)
        measured = _measure(bench, lowered, file)
        result = _report(bench, compressed, lowered, measured, staging).finished(time.perf_counter() - began)
        plots = compressed.plots | lowered.plots
        with repository.writing(config.repository):
            evidence.write(result, staging.folder, lowered.compared, plots)
            evidence.write(result, staging.model, lowered.compared, plots)
            (staging.model / model_config.CONFIG_FILE).write_text(model_config.config_text(described))
            (staging.model / model_config.LABELS_FILE).write_text("".join(f"{label}\n" for label in task.labels))
        with task.progress.step("publish"):
            published = Published(result, staging.commit())
        forget(bench)
        return published


def _note_changes(task: Task, staging: repository.Staging, described: Any) -> None:
    """Say what clients of an earlier version will notice.

    Raises:
        BadInput: an older version than the newest would not match the one config of the model.
    """
    differences = model_config.changes(staging.target, described)
    newest = max(repository.versions(staging.target), default=0)
    if differences and staging.version < newest:
        raise BadInput(
            f"version {staging.version} is older than version {newest} of {staging.name}, whose config it would have "
            f"to fit: {differences[0]}; publish it as a new version or under another --name"
        )
    task.caveats.extend(differences)


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


def _build(task: Task, pictures: Pictures) -> Workbench:
    config = task.config
    with task.progress.step(f"build {config.arch}"):
        torch.manual_seed(config.seed)
        module = task.arch.build(len(task.labels))
        loaded = weights.load(module, task.arch, config.weights, seed=config.seed, images=pictures.calibration)
        module = task.arch.deploy(module)
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
    """Measure engine, accuracy and speed of the file."""
    task, config, preprocess = bench.task, bench.task.config, bench.task.arch.preprocess
    measured = _Measured()
    if config.target == "gpu":
        measured.engine = _build_engine(task, file)
    session = bench.session(file)
    if task.labelled:
        measured.accuracy = verify.measure_accuracy(bench.eager, session, task.labelled, preprocess, task.progress)
        if config.max_drop is not None:
            verify.check_drop(measured.accuracy, config.max_drop)
    if config.target == "gpu" and session.device == "cpu":
        task.caveats.append(
            "made for a GPU, measured on a CPU: there is no GPU that ONNX Runtime can use here, so speed says nothing"
        )
    small = preprocess.size[0] * preprocess.size[1] <= _SMALL_PIXELS
    low, high = config.batch_range(task.arch.task)
    larger = max(low, min(high, _SPEED_BATCH_SMALL if small else _SPEED_BATCH))
    eager = Eager(bench.module, preprocess, session.device)
    speeds = verify.measure_speed(eager, session, bench.pictures.check, (low, larger), task.progress)
    measured.speed = verify.speed_summary(speeds)
    if lowered.graph is not lowered.exact and config.target == session.device.replace("cuda", "gpu"):
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


def _build_engine(task: Task, file: Path) -> dict[str, Any]:
    """Let TensorRT's own parser and builder read the graph; the engine itself belongs to one GPU and is not kept."""
    found = library.find()
    if found is None:
        line = "not tried: no TensorRT builder is installed here (pip install tensorrt or tensorrt-rtx)"
        task.caveats.append(f"TensorRT engine {line}")
        return {"builder": None, "bytes": None, "seconds": None, "line": line}
    low, high = task.config.batch_range(task.arch.task)
    profile = Profile(low, max(low, min(high, USUAL_BATCH)), high)
    built = build_engine(file, BuildOptions((profile,)), task.progress)
    size = len(built.content)
    line = f"{found.title} parses and builds it: {report.megabytes(size)} in {built.seconds} s (built, not run)"
    return {"builder": f"{found.name} {found.version}", "bytes": size, "seconds": built.seconds, "line": line}


def _report(
    bench: Workbench, compressed: Compressed, lowered: Lowered, measured: _Measured, staging: repository.Staging
) -> report.Report:
    task, pictures = bench.task, bench.pictures
    config, preprocess = task.config, task.arch.preprocess
    before, after = (archs.count(module, task.arch.input_size) for module in (bench.module, compressed.module))
    content = (staging.folder / MODEL_FILE).read_bytes()
    channels, (height, width) = preprocess.channels, preprocess.size
    return report.Report(
        name=config.model_name,
        version=staging.version,
        arch=task.arch.name,
        paper=task.arch.paper,
        weights=asdict(bench.weights),
        target=config.target,
        precision=config.precision,
        input={
            "dtype": config.input,
            "shape": [height, width, channels] if config.input == "uint8" else [channels, height, width],
            "batch": list(config.batch_range(task.arch.task)),
            "preprocess": preprocess.to_json(),
        },
        classes=len(task.labels),
        formats=[
            {
                "format": config.format,
                "file": f"{staging.version}/{MODEL_FILE}",
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "opset": config.onnx_opset,
            }
        ],
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
        engine=measured.engine,
        caveats=task.caveats,
        environment=report.environment(task.threads),
        recipe=recipe.to_toml(config.steps),
        seed=config.seed,
        parity_to_compressed=lowered.to_compressed,
        divergence=lowered.divergence,
        sensitivity=lowered.sensitivity,
    )
