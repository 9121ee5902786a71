"""Accuracy and speed of what is published, in every engine that may serve it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from convoynet.exporter.archs.onnx_network import OnnxNetwork
from convoynet.exporter.auditing import in_export
from convoynet.exporter.auditing.in_export import Watched
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.errors import Refused
from convoynet.exporter.evidence import accuracy, engines, speed, verify
from convoynet.exporter.evidence.speed import FP32, GIVEN_FILE, REFERENCE, Side
from convoynet.exporter.graph.onnx_scores import PROBABILITIES, ending
from convoynet.exporter.outputs_asked import FEATURES
from convoynet.exporter.pipeline.engine import Engine, make_engine
from convoynet.exporter.pipeline.graph_steps import Lowered
from convoynet.exporter.pipeline.serving import TENSORRT, load
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.publishing.model_folder import PLAN_FILE
from convoynet.exporter.running.openvino import OpenVino
from convoynet.exporter.running.runtime import Eager, Session
from convoynet.exporter.tensorrt.runner import Plan

SMALL_PIXELS = 64 * 64
_SPEED_BATCH, _SPEED_BATCH_SMALL = 8, 32
Runner = Session | OpenVino | Plan


@dataclass
class Measured:
    """What was measured of the published file; `ran`, whether that is the engine."""

    engine: Engine | None = None
    ran: bool = False
    speed: dict[str, Any] = field(default_factory=dict)
    max_drop: dict[str, Any] | None = None
    answers: dict[str, Any] | None = None


def measure(bench: Workbench, lowered: Lowered, file: Path) -> Measured:
    """Measure accuracy and speed of what is published, in every engine that is left: TensorRT's where it can run here.

    Raises:
        Refused: top-1 falls by more than --max-drop in every one.
    """
    task, config = bench.task, bench.task.config
    measured = Measured()
    if config.target == "gpu":
        measured.engine = make_engine(task, file)
    plan = _plan(bench, lowered, file)
    measured.ran = plan is not None
    sessions: dict[str, Runner] = {
        one.name: plan if plan is not None else load(bench, one, file) for one in engines.passing(lowered.engines)
    }
    if task.labelled:
        _measure_accuracy(bench, lowered, sessions, measured)
    device = next(iter(sessions.values())).device
    if config.target == "gpu":
        task.caveats.extend(_not_measured(config, device))
    _measure_speed(bench, lowered, sessions, device, measured)
    return measured


def _measure_accuracy(bench: Workbench, lowered: Lowered, sessions: dict[str, Runner], measured: Measured) -> None:
    """Top-1, top-5 and what became of the answers, in every engine that is left and loses no more than --max-drop."""
    task, config = bench.task, bench.task.config
    high = config.batch_range(task.arch.task)[1]
    batch = min(accuracy.EVAL_BATCH, high) if measured.ran else accuracy.EVAL_BATCH
    left = engines.passing(lowered.engines)
    shares = ending(lowered.exact, lowered.exact.graph.output[0].name).operator in PROBABILITIES
    before = Watched(bench.eager, shares=shares)
    after = {one.name: Watched(sessions[one.name], shares=shares) for one in left}
    found = accuracy.measure_accuracy(
        before, list(after.values()), task.labelled, task.arch.preprocess, task.progress, batch
    )
    for one, result in zip(left, found, strict=True):
        one.accuracy = result
    if config.max_drop is not None:
        _check_drop(bench, lowered, measured)
    classes = [label for _, label in task.labelled]
    measured.answers = in_export.told(before, after[lowered.served.name], classes, task.labels)


def _check_drop(bench: Workbench, lowered: Lowered, measured: Measured) -> None:
    """Exclude the engines that lose more than --max-drop allows."""
    task, config = bench.task, bench.task.config
    assert config.max_drop is not None
    for one in engines.passing(lowered.engines):
        if one.accuracy is None:
            continue
        try:
            accuracy.check_drop(one.accuracy, config.max_drop)
        except Refused as refused:
            engines.exclude(one, refused)
    engines.require_one(lowered.engines)
    # The least sure of those that may serve.
    least = max(
        (one.accuracy for one in engines.passing(lowered.engines) if one.accuracy is not None),
        key=lambda one: one.drop_interval[1],
    )
    decision, said = accuracy.decide(least, config.max_drop), accuracy.verdict(least, config.max_drop)
    measured.max_drop = {
        "allowed": config.max_drop,
        "decision": decision,
        "images_needed": accuracy.images_needed(least, config.max_drop),
        "line": said,
    }
    if decision == "undecided":
        task.caveats.append(f"--max-drop {config.max_drop:g} is undecided: {said}")


def _measure_speed(
    bench: Workbench, lowered: Lowered, sessions: Mapping[str, Runner], device: str, measured: Measured
) -> None:
    """Time PyTorch, what is published and its float32 graph, in turn, in every engine that is left."""
    task, config, preprocess = bench.task, bench.task.config, bench.task.arch.preprocess
    low, high = config.batch_range(task.arch.task)
    small = preprocess.size[0] * preprocess.size[1] <= SMALL_PIXELS
    larger = max(low, min(high, _SPEED_BATCH_SMALL if small else _SPEED_BATCH))
    named = REFERENCE
    module = bench.module
    if isinstance(module, OnnxNetwork):
        named, module, device = GIVEN_FILE, module.optimized(task.threads), "cpu"
    sides = [Side(named, config.given, Eager(module, preprocess, device))]
    left = engines.passing(lowered.engines)
    exact = lowered.exact.SerializeToString() if lowered.graph is not lowered.exact and not measured.ran else None
    for one in left:
        if exact is not None and not one.stand_in:
            sides.append(Side(one.name, FP32, load(bench, one, exact)))
        sides.append(Side(one.name, config.precision, sessions[one.name]))
    timings = speed.measure_speed(sides, bench.pictures.check, (low, larger), task.threads, task.progress)
    for one in left:
        one.speed = speed.summary(timings, one.name, config.precision)
    first = lowered.served
    assert first.speed is not None
    measured.speed = {
        **first.speed,
        "reference": named,
        "engine": first.name,
        "precision": config.precision,
        "measured": speed.measured(timings),
    }
    now, before = first.speed["images_per_second"], first.speed["fp32_graph_images_per_second"]
    if now is not None and before is not None and now < before:
        task.caveats.append(
            f"{config.precision.upper()} is slower here than the float32 graph ({now:.0f} against {before:.0f} "
            f"images/s in {first.title}): without --{config.precision} this network serves faster"
        )


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
    beside = [FEATURES] if task.config.features else []
    plan = Plan(file, arch.preprocess, task=arch.task, version_compatible=compatible, beside=beside)
    compared = bench.compare(plan)
    verify.check_engine(lowered.compared.parity, compared.parity)
    lowered.stages.append({"stage": "engine", "bytes": file.stat().st_size, "parity": asdict(compared.parity)})
    parities = {**lowered.served.parities, "engine": compared.parity}
    lowered.engines = [engines.Engine(TENSORRT, plan.name, compared=compared, parities=parities)]
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
