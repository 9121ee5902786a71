"""One export from a name to a published, verified model: the order of the steps, which know nothing of each other."""

import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from convoynet.exporter import archs, recipe
from convoynet.exporter.archs import weights
from convoynet.exporter.archs.own_detector import require_plausible
from convoynet.exporter.archs.wrapped import state_weights
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import calibration_images, load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.evidence import report, verify, writing
from convoynet.exporter.evidence.limits import Kind
from convoynet.exporter.evidence.parity import who
from convoynet.exporter.evidence.told import Told
from convoynet.exporter.graph.onnx_given import opset_of
from convoynet.exporter.linting.lint import require_clean
from convoynet.exporter.pipeline import preflight
from convoynet.exporter.pipeline.engine import Engine
from convoynet.exporter.pipeline.explanation import add_outputs, require_addable
from convoynet.exporter.pipeline.graph_steps import Lowered, lower
from convoynet.exporter.pipeline.made_pictures import made_pictures
from convoynet.exporter.pipeline.measuring import SMALL_PIXELS, Measured, measure
from convoynet.exporter.pipeline.module_steps import Compressed, compress, forget
from convoynet.exporter.pipeline.preflight import Task
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.progress import Progress
from convoynet.exporter.publishing import model_config, repository
from convoynet.exporter.publishing.model_folder import GRAPH_FILE, PLAN_FILE
from convoynet.exporter.running.pictures import Pictures, divide, part_of
from convoynet.exporter.running.runtime import Eager

# Hidden from servers, as all that starts with a dot.
CHECKPOINTS = ".convoy-training"
# Images that only check the result; small inputs leave time for more.
_CHECKS, _CHECKS_SMALL = 32, 256
# Maps and boxes are many values an image.
_CHECKS_DENSE = 8
# An engine holds the weights again, in the order of its kernels, for two profiles twice.
_ENGINE_SIZES = 2
# Beside the float32 graph, which is the largest file without an engine: plots and text.
_SPARE_BYTES = 2**20


@dataclass(frozen=True)
class Published:
    """A finished export.

    Attributes:
        report: all that report.json says.
        folder: of the version.
    """

    report: report.Report
    folder: Path

    @property
    def path(self) -> Path:
        """The folder of the version."""
        return self.folder

    @property
    def name(self) -> str:
        """The model's name in the repository."""
        return self.report.name

    @property
    def version(self) -> int:
        """The number of the version."""
        return self.report.version


def run(config: ExportConfig, progress: Progress) -> Published:
    """Export, verify and publish; a failure leaves the repository as it was.

    Raises:
        BadInput: an argument or a file is not usable, or the repository cannot be written.
        Refused: the result is too far from the PyTorch model, or the linter has an error for its runtime.
        Missing: a library or device is not there.
    """
    began = time.perf_counter()
    task = preflight.check(config, progress)
    config = task.config  # a given file may have changed it
    with repository.staging(
        config.repository,
        config.model_name,
        config.version,
        force=config.force,
        needed_bytes=(1 + _ENGINE_SIZES * config.publishes_engine) * task.size.bytes + _SPARE_BYTES,
    ) as staging:
        described = model_config.model_config(config, task.arch, task.size.outputs)
        if not (adds := config.explain or config.features):  # their sizes are known with the graph
            _note_changes(task, staging, described)
        # What is wrong with a file of weights is said before the images are read.
        network = _network(task, None) if config.weights != "random" else None
        pictures = _load_pictures(task)
        bench = _build(task, pictures, network or _network(task, pictures))
        if adds and config.steps:
            require_addable(bench)
        compressed = compress(bench)
        lowered = lower(bench, compressed, _outputs_of(bench, compressed))
        model_config.say_activation(described, config.task, lowered.exact)
        added = add_outputs(bench, lowered, described)
        if adds:
            _note_changes(task, staging, described)
        file = _write(task, lowered, staging.folder / GRAPH_FILE)
        measured = measure(bench, lowered, file)
        if (engine := measured.engine) is not None and engine.published is not None:
            model_config.add_built(described, engine.options, engine.published)
        model_config.add_verified(described, lowered.engines, staging.version)
        result = replace(_report(bench, compressed, lowered, measured, staging), **added)
        result = result.finished(time.perf_counter() - began)
        plots = compressed.plots | lowered.plots
        with repository.writing(config.repository):
            for file in writing.write(result, staging.folder, lowered.compared, plots):
                shutil.copyfile(file, staging.model / file.name)
            (staging.model / model_config.CONFIG_FILE).write_text(model_config.config_text(described), "utf-8")
            labels = "".join(f"{label}\n" for label in task.labels)
            (staging.model / model_config.LABELS_FILE).write_text(labels, "utf-8")
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
    checks = _CHECKS_SMALL if preprocess.size[0] * preprocess.size[1] <= SMALL_PIXELS else _CHECKS
    if task.arch.task != "classification":
        checks = _CHECKS_DENSE
    with task.progress.step("load images"):
        images, source = calibration_images(
            preprocess, config.calibration, config.calibration_samples + checks, config.seed, task.arch.name
        )
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
        return module, loaded


def _build(task: Task, pictures: Pictures, network: tuple[torch.nn.Module, weights.Weights]) -> Workbench:
    config, (module, loaded) = task.config, network
    state_weights(module)
    module = task.arch.deploy(module)
    pictures = made_pictures(task, module, loaded, pictures)
    eager = Eager(module, task.arch.preprocess)
    with task.progress.step(f"{who(eager.name)}'s outputs"):
        outputs = verify.outputs_of(eager, pictures.check, task.config.batch_range(task.arch.task)[1])
    if not all(np.isfinite(output).all() for output in outputs):
        raise BadInput(f"the weights ({loaded.source}) give outputs that are not finite; choose others")
    if task.arch.task == "detection" and not outputs[-1].any():
        raise BadInput(
            f"{config.arch} detects nothing in the images that check it ({pictures.check_source}), so that nothing "
            "can be compared: give photographs of what it knows with --calibration DIR"
        )
    if task.arch.task == "detection" and task.arch.source == "user":
        checked = f"the images that check it ({pictures.check_source})"
        require_plausible(config.arch, outputs, len(task.labels), task.arch.preprocess.size, checked)
    reference = verify.Reference(
        eager.name,
        task.arch.task,
        outputs,
        kind=_kind(task),
        others=task.arch.outputs,
        # Accuracy, where it decides, says more than any error of the outputs.
        untrained=not loaded.trained or config.max_drop is not None,
    )
    return Workbench(task, module, loaded, eager, reference, pictures, config.repository / CHECKPOINTS)


def _kind(task: Task) -> Kind | None:
    """What the outputs mean, where it is told: by the network of the zoo, or by whoever speaks of classes."""
    config = task.config
    if config.task is not None and task.arch.task == "classification":
        return cast("Kind", config.task)
    told = task.arch.source != "user" or config.labels or config.eval or config.num_classes
    return "classification" if told else None


def _outputs_of(bench: Workbench, compressed: Compressed) -> verify.Reference | None:
    """The outputs of the module after its steps on the images that check; None where there were no steps."""
    if not compressed.done:
        return None
    task = bench.task
    eager = Eager(compressed.module, task.arch.preprocess)
    outputs = verify.outputs_of(eager, bench.pictures.check, task.config.batch_range(task.arch.task)[1])
    return replace(bench.reference, name=f"{eager.name}, compressed", outputs=outputs)


def _write(task: Task, lowered: Lowered, file: Path) -> Path:
    require_clean(lowered.graph, task.config.target)
    with repository.writing(task.config.repository):
        file.write_bytes(lowered.graph.SerializeToString())
    return file


def _formats(lowered: Lowered, staging: repository.Staging, engine: Engine | None) -> list[dict[str, Any]]:
    """The files of the version, the one that is served first."""
    content = (staging.folder / GRAPH_FILE).read_bytes()
    graph = {
        "format": "onnx",
        "file": f"{staging.version}/{GRAPH_FILE}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "opset": opset_of(lowered.graph),
    }
    if engine is None or engine.published is None:
        return [graph]
    return [Told(engine.published, engine.options).file(f"{staging.version}/{PLAN_FILE}"), graph]


def _report(
    bench: Workbench, compressed: Compressed, lowered: Lowered, measured: Measured, staging: repository.Staging
) -> report.Report:
    task, pictures = bench.task, bench.pictures
    config, preprocess = task.config, task.arch.preprocess
    before = after = archs.count(bench.module, task.arch.input_size)
    if compressed.done:
        after = archs.count(compressed.module, task.arch.input_size)
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
        formats=_formats(lowered, staging, measured.engine),
        reference_bytes=sum(tensor.nbytes for tensor in bench.module.state_dict().values()),
        parameters={"before": before.parameters, "after": after.parameters},
        macs={"before": before.macs, "after": after.macs},
        images={"calibration": pictures.calibration_source, "check": pictures.check_source},
        parity=lowered.compared.parity,
        stages=[*compressed.stages, *lowered.stages],
        accuracy=lowered.served.accuracy,
        max_drop=measured.max_drop,
        answers=measured.answers,
        speed=measured.speed,
        calibration=lowered.calibration,
        compression=[*compressed.done, *lowered.done],
        engine=None if measured.engine is None else measured.engine.to_json(ran=measured.ran),
        caveats=task.caveats,
        environment=report.environment(task.threads),
        recipe=recipe.to_toml(config.steps),
        seed=config.seed,
        engines=[one.to_json() for one in lowered.engines],
        parity_to_compressed=lowered.served.to_compressed,
        divergence=lowered.divergence,
        arithmetic=lowered.arithmetic,
        sensitivity=lowered.sensitivity,
    )
