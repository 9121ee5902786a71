"""One export from a name to a published, verified model: the order of the steps, which know nothing of each other."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from exporter import archs, model_config, report, repository, verify, weights
from exporter.archs import custom
from exporter.archs.dry_run import dry_run
from exporter.calibrate import calibrate
from exporter.config import ExportConfig
from exporter.errors import BadInput
from exporter.images import calibration_images, labelled_images, list_images, load_images
from exporter.lint import require_clean
from exporter.onnx_from_torch import onnx_from_torch
from exporter.parity import Comparison, Parity
from exporter.pictures import Pictures, divide, part_of
from exporter.progress import Progress
from exporter.quantize import quantize
from exporter.runtime import Array, Eager, Session
from exporter.trt_from_onnx import builder_name, trt_from_onnx

MODEL_FILE = "model.onnx"
# Images that only check the result; small inputs leave time for more.
_CHECKS, _CHECKS_SMALL = 32, 256
_SMALL_PIXELS = 64 * 64
_CALIBRATION_BATCH = 8
_OPTIMAL_BATCH = 8
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


@dataclass(frozen=True)
class _Size:
    """The bytes of a network's tensors, and the shapes of its outputs without the batch axis."""

    bytes: int
    outputs: list[list[int]]


@dataclass(frozen=True)
class _Task:
    """What the cheap checks found out, and what a person should keep in mind (grows on the way)."""

    config: ExportConfig
    arch: archs.Arch
    labels: list[str]
    labelled: list[tuple[Path, int]]
    size: _Size
    progress: Progress
    threads: int
    caveats: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Network:
    """The PyTorch model that the user named, and its outputs on the images that check."""

    module: torch.nn.Module
    weights: weights.Weights
    eager: Eager
    reference: verify.Reference


@dataclass
class _Evidence:
    """What the steps measured; `exact` is the float32 graph that the published one was quantized from."""

    compared: Comparison
    stages: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    compression: list[dict[str, Any]]
    exact: bytes | None = None
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
    task = _check(config, progress)
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
        network = _build(task, pictures)
        evidence = _export(task, network, pictures, staging.folder / MODEL_FILE)
        _measure(task, network, pictures, evidence, staging.folder / MODEL_FILE)
        result = _report(task, network, pictures, evidence, staging).finished(time.perf_counter() - began)
        with repository.writing(config.repository):
            report.write(result, staging.folder, evidence.compared)
            report.write(result, staging.model, evidence.compared)
            (staging.model / model_config.CONFIG_FILE).write_text(model_config.config_text(described))
            (staging.model / model_config.LABELS_FILE).write_text("".join(f"{label}\n" for label in task.labels))
        with task.progress.step("publish"):
            return Published(result, staging.commit())


def _check(config: ExportConfig, progress: Progress) -> _Task:
    """Look at everything that can be wrong and is quick to see."""
    arch = custom.resolve(config)
    if config.eval is not None and arch.task != "classification":
        raise BadInput(f"--eval {config.eval}: class folders say nothing about {arch.task}; {arch.name} goes without")
    if config.weights not in ("default", "random") and not Path(config.weights).is_file():
        raise BadInput(f"--weights {config.weights}: no such file; give a checkpoint, or default or random")
    labels = _labels(config, arch)
    if config.calibration is not None:
        list_images(config.calibration)
    labelled = labelled_images(config.eval, labels) if config.eval is not None else []
    return _Task(config, arch, labels, labelled, _size(arch, len(labels)), progress, torch.get_num_threads())


def _labels(config: ExportConfig, arch: archs.Arch) -> list[str]:
    if config.labels is None:
        classes = config.num_classes or arch.num_classes
        return arch.labels() if classes == arch.num_classes else [str(index) for index in range(classes)]
    try:
        lines = config.labels.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"--labels {config.labels} cannot be read: {reason}") from error
    labels = [line.strip() for line in lines]
    while labels and not labels[-1]:
        labels.pop()
    if not labels or not all(labels):
        raise BadInput(f"--labels {config.labels} must have one class name on every line, and at least one")
    if config.num_classes is not None and config.num_classes != len(labels):
        raise BadInput(
            f"--labels {config.labels} has {len(labels)} names and --num-classes is {config.num_classes}; "
            f"they must be equal"
        )
    return labels


def _size(arch: archs.Arch, classes: int) -> _Size:
    """Look at the network without computing anything."""
    with torch.device("meta"):
        module = arch.deploy(arch.build(classes))
    made = dry_run(module, arch.input_size)
    outputs = made if isinstance(made, tuple) else (made,)
    size = sum(int(tensor.nbytes) for tensor in module.state_dict().values())
    return _Size(size, [list(output.shape[1:]) for output in outputs])


def _note_changes(task: _Task, staging: repository.Staging, described: Any) -> None:
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


def _load_pictures(task: _Task) -> Pictures:
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


def _build(task: _Task, pictures: Pictures) -> _Network:
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
    return _Network(module, loaded, eager, verify.Reference(eager.name, task.arch.task, outputs))


def _export(task: _Task, network: _Network, pictures: Pictures, file: Path) -> _Evidence:
    """Make the graph, check each stage of it, and write the last one to `file`."""
    config = task.config
    with task.progress.step("export to ONNX"):
        graph = onnx_from_torch(
            network.module,
            task.arch.preprocess,
            task=task.arch.task,
            uint8_input=config.input == "uint8",
            opset=config.opset,
        )
    if not config.int8:
        compared = _check_graph(task, network, pictures, _write(task, graph, file))
        verify.check_fp32(compared.parity)
        return _Evidence(compared, [_stage("fp32", compared.parity, file.stat().st_size)], None, [])
    exact = graph.SerializeToString()
    parity = _check_graph(task, network, pictures, exact).parity
    verify.check_fp32(parity)
    stages = [_stage("fp32", parity, len(exact))]
    quantized, methods = _quantize(task, graph, pictures)
    compared = _check_graph(task, network, pictures, _write(task, quantized, file))
    parity = compared.parity
    verify.check_int8(parity)
    if parity.min_cosine is not None and parity.min_cosine < verify.INT8_DOUBTFUL_COSINE:
        task.caveats.append(
            f"INT8 moves the logits far (smallest cosine {parity.min_cosine:.3f}); measure the accuracy"
            + (" with --eval" if task.arch.task == "classification" else "")
        )
    stages.append(_stage("int8", parity, file.stat().st_size))
    samples, source = len(pictures.calibration), pictures.calibration_source
    calibration = {"method": config.method, "tensors": methods, "samples": samples, "source": source}
    step = {"step": "int8", "target": config.target, "weights": "int8, one scale per output channel"}
    step["activations"] = "uint8, asymmetric" if config.target == "cpu" else "int8, symmetric"
    return _Evidence(compared, stages, calibration, [step], exact)


def _quantize(task: _Task, graph: onnx.ModelProto, pictures: Pictures) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return the graph in INT8, and for how many tensors each calibration method chose the range."""

    def batches() -> Iterator[Array]:
        starts = range(0, len(pictures.calibration), _CALIBRATION_BATCH)
        for at in task.progress.track(starts, "calibrate", len(starts)):
            batch = pictures.calibration[at : at + _CALIBRATION_BATCH]
            yield batch if task.config.input == "uint8" else task.arch.preprocess.normalize(batch)

    ranges = calibrate(graph, batches(), task.config.method)
    with task.progress.step("quantize"):
        return quantize(graph, ranges, task.config.target), dict(Counter(span.method for span in ranges.values()))


def _write(task: _Task, graph: onnx.ModelProto, file: Path) -> Path:
    require_clean(graph, task.config.target)
    with repository.writing(task.config.repository):
        file.write_bytes(graph.SerializeToString())
    return file


def _check_graph(task: _Task, network: _Network, pictures: Pictures, graph: bytes | Path) -> Comparison:
    with task.progress.step("compare with PyTorch"):
        batch = task.config.batch_range(task.arch.task)
        return verify.measure_parity(network.reference, _session(task, graph), pictures.check, batch)


def _session(task: _Task, graph: bytes | Path) -> Session:
    return Session(graph, task.arch.preprocess, task=task.arch.task, target=task.config.target, threads=task.threads)


def _stage(name: str, parity: Parity, size: int) -> dict[str, Any]:
    return {"stage": name, "bytes": size, "parity": asdict(parity)}


def _measure(task: _Task, network: _Network, pictures: Pictures, evidence: _Evidence, file: Path) -> None:
    """Add engine, accuracy and speed to the evidence."""
    config, preprocess = task.config, task.arch.preprocess
    if config.target == "gpu":
        evidence.engine = _build_engine(task, file)
    session = _session(task, file)
    if task.labelled:
        evidence.accuracy = verify.measure_accuracy(network.eager, session, task.labelled, preprocess, task.progress)
        if config.max_drop is not None:
            verify.check_drop(evidence.accuracy, config.max_drop)
    if config.target == "gpu" and session.device == "cpu":
        task.caveats.append(
            "made for a GPU, measured on a CPU: there is no GPU that ONNX Runtime can use here, so speed says nothing"
        )
    small = preprocess.size[0] * preprocess.size[1] <= _SMALL_PIXELS
    low, high = config.batch_range(task.arch.task)
    larger = max(low, min(high, _SPEED_BATCH_SMALL if small else _SPEED_BATCH))
    eager = Eager(network.module, preprocess, session.device)
    speeds = verify.measure_speed(eager, session, pictures.check, (low, larger), task.progress)
    evidence.speed = verify.speed_summary(speeds)
    if evidence.exact is not None and config.target == session.device.replace("cuda", "gpu"):
        exact = _session(task, evidence.exact)
        batch = max(speeds, key=lambda speed: speed.images_per_second).batch
        (against,) = verify.measure_speed(exact, session, pictures.check, [batch], task.progress)
        evidence.speed["fp32_graph_images_per_second"] = against.reference_images_per_second
        if against.images_per_second < against.reference_images_per_second:
            task.caveats.append(
                f"INT8 is slower here than the float32 graph ({against.images_per_second:.0f} against "
                f"{against.reference_images_per_second:.0f} images/s): without --int8 this network serves faster"
            )


def _build_engine(task: _Task, file: Path) -> dict[str, Any]:
    """Let TensorRT's own parser and builder read the graph; the engine itself belongs to one GPU and is not kept."""
    builder = builder_name()
    if builder is None:
        line = "not tried: no TensorRT builder is installed here (pip install tensorrt or tensorrt-rtx)"
        task.caveats.append(f"TensorRT engine {line}")
        return {"builder": None, "bytes": None, "seconds": None, "line": line}
    low, high = task.config.batch_range(task.arch.task)
    began = time.perf_counter()
    with task.progress.step(f"build an engine with {builder}"):
        engine = trt_from_onnx(file, (low, max(low, min(high, _OPTIMAL_BATCH)), high))
    seconds = round(time.perf_counter() - began, 2)
    line = f"{builder} parses and builds it: {report.megabytes(len(engine))} in {seconds} s (built, not run)"
    return {"builder": builder, "bytes": len(engine), "seconds": seconds, "line": line}


def _report(
    task: _Task, network: _Network, pictures: Pictures, evidence: _Evidence, staging: repository.Staging
) -> report.Report:
    config, preprocess = task.config, task.arch.preprocess
    count = archs.count(network.module, task.arch.input_size)
    content = (staging.folder / MODEL_FILE).read_bytes()
    channels, (height, width) = preprocess.channels, preprocess.size
    return report.Report(
        name=config.model_name,
        version=staging.version,
        arch=task.arch.name,
        paper=task.arch.paper,
        weights=asdict(network.weights),
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
                "opset": config.opset,
            }
        ],
        reference_bytes=sum(tensor.nbytes for tensor in network.module.state_dict().values()),
        parameters={"before": count.parameters, "after": count.parameters},
        macs={"before": count.macs, "after": count.macs},
        images={"calibration": pictures.calibration_source, "check": pictures.check_source},
        parity=evidence.compared.parity,
        stages=evidence.stages,
        accuracy=evidence.accuracy,
        speed=evidence.speed,
        calibration=evidence.calibration,
        compression=evidence.compression,
        engine=evidence.engine,
        caveats=task.caveats,
        environment=report.environment(task.threads),
    )
