"""The steps that change the PyTorch module, in the order of the recipe, each followed by a look at what it did."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convoynet.exporter import archs
from convoynet.exporter.archs.auxiliary import with_auxiliaries
from convoynet.exporter.archs.wrapped import copy_of
from convoynet.exporter.compression import history
from convoynet.exporter.compression.data import TrainingImages, images_from_array, images_from_folder
from convoynet.exporter.compression.latency import seconds_of_module
from convoynet.exporter.compression.low_rank import factorize
from convoynet.exporter.compression.prune import prune
from convoynet.exporter.compression.separable import separate
from convoynet.exporter.compression.sparsity import sparsify
from convoynet.exporter.compression.teacher import teacher_from
from convoynet.exporter.compression.train import Settings, train
from convoynet.exporter.evidence import accuracy
from convoynet.exporter.pipeline.preflight import Task
from convoynet.exporter.pipeline.workbench import Workbench
from convoynet.exporter.recipe import Finetune, Int8, LowRank, Prune, Separable, Sparsify, Step
from convoynet.exporter.running.pictures import Pictures
from convoynet.exporter.running.runtime import Eager

# Images that a criterion or a factorization looks at.
_LOOKS = 64
_LOOK_BATCH = 16
# What trains.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Compressed:
    """A module on its way through the steps.

    Attributes:
        module: as the steps so far left it; on the CPU, in evaluation mode.
        done: for each step what it was and did.
        stages: for each step how close the module is to the one that was named.
        plots: file name -> what draws it.
        masks: what keeps zeros at zero: parameter name -> 1 where a weight stays.
    """

    module: nn.Module
    done: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    masks: dict[str, Tensor] | None = None


def compress(bench: Workbench) -> Compressed:
    """Do the steps of the recipe that change the module.

    Raises:
        BadInput: a step that does not suit the network, or has nothing to work with.
    """
    task = bench.task
    # What no step changes need not be copied, which not every network bears.
    compressed = Compressed(copy_of(bench.module) if task.config.of_the_module else bench.module)
    for place, step in task.config.of_the_module:
        compressed.done.append(_do(bench, compressed, place, step))
        compressed.stages.append(_look(bench, compressed.module, f"{place} {step.kind}"))
    return compressed


def _do(bench: Workbench, compressed: Compressed, place: int, step: Step) -> dict[str, Any]:
    """Change the module; returns what was done."""
    task, preprocess = bench.task, bench.task.arch.preprocess
    example = torch.zeros(1, preprocess.channels, *preprocess.size)
    if isinstance(step, Finetune):
        return _train(bench, compressed, place, step)
    if isinstance(step, Prune):
        compressed.module, done = prune(
            compressed.module,
            example,
            step,
            target=task.config.target,
            batches=_looks(bench, None if step.reconstruct else _LOOKS),
            seed=task.config.seed,
            latency=partial(seconds_of_module, preprocess=preprocess, task=task.arch.task, threads=task.threads),
            progress=task.progress,
        )
    elif isinstance(step, LowRank):
        compressed.module, done = factorize(
            compressed.module, example, step, images=_looks(bench), progress=task.progress
        )
    elif isinstance(step, Separable):
        compressed.module, done = separate(compressed.module, example, step)
    else:
        assert isinstance(step, Sparsify)
        compressed.module, compressed.masks, done = sparsify(compressed.module, step)
    return done


def _looks(bench: Workbench, most: int | None = _LOOKS) -> list[Tensor]:
    images = bench.pictures.calibration[:most]
    inputs = torch.from_numpy(bench.task.arch.preprocess.normalize(images))
    return [inputs[at : at + _LOOK_BATCH] for at in range(0, len(inputs), _LOOK_BATCH)]


def _train(bench: Workbench, compressed: Compressed, place: int, step: Finetune) -> dict[str, Any]:
    task, config = bench.task, bench.task.config
    data = training_images(task, bench.pictures)
    if config.finetune is not None and data.labels is None:
        task.caveats.append(f"step {place} (finetune) trained on {data.source}")
    teacher = None
    if step.distill:
        teacher = teacher_from(step.teacher, bench.module, task.arch.preprocess, len(task.labels))
    held_out = images_from_array(bench.pictures.check, task.arch.preprocess, bench.pictures.check_source)
    changed = any(not isinstance(earlier, Finetune) for earlier in config.steps[: place - 1])
    settings = Settings(
        seed=config.seed,
        device=DEVICE,
        checkpoint=checkpoint(bench, config.steps[:place]),
        mask=compressed.masks,
        reestimate=changed,
        held_out=held_out if len(held_out) > 1 else None,
    )
    student, settings, heads = _with_heads(bench, compressed.module, settings)
    happened = train(student, teacher, data, step, settings, task.progress)
    compressed.module.eval()
    compressed.plots[f"training-{place}.png"] = partial(history.plot, happened)
    epochs = [asdict(epoch) for epoch in happened.epochs]
    done = {"data": data.source, "epochs_done": epochs, "last_loss": happened.losses[-1]}
    return step.to_dict() | done | ({"auxiliary_heads": heads} if heads else {})


def _with_heads(bench: Workbench, module: nn.Module, settings: Settings) -> tuple[nn.Module, Settings, list[str]]:
    """What trains in the place of `module`: the same layers with auxiliary classifiers around, and their names."""
    arch = bench.task.arch
    if arch.auxiliaries is None:
        return module, settings, []
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        student = with_auxiliaries(
            module, arch.auxiliaries, arch.input_size, len(bench.task.labels), bench.weights.heads
        )
    if student is None:
        return module, settings, []
    mask = None if settings.mask is None else {f"network.{name}": tensor for name, tensor in settings.mask.items()}
    settings = replace(settings, mask=mask, auxiliary_weight=arch.auxiliaries.weight)
    return student, settings, sorted(student.heads)


def training_images(task: Task, pictures: Pictures) -> TrainingImages:
    """The images of --finetune or, where there are none, those of --calibration, without labels."""
    if task.config.finetune is None:
        return calibration_as_training(task, pictures)
    labels = task.labels if task.arch.task == "classification" else None
    return images_from_folder(task.config.finetune, task.arch.preprocess, labels, task.progress)


def calibration_as_training(task: Task, pictures: Pictures) -> TrainingImages:
    """The images of --calibration, without labels."""
    return images_from_array(pictures.calibration, task.arch.preprocess, pictures.calibration_source)


def checkpoint(bench: Workbench, steps: Sequence[Step]) -> Path:
    """The file of the training that is the last of `steps`: the same export resumes it, another does not find it."""
    config = bench.task.config
    told = [config.arch, config.weights, bench.weights.sha256, config.seed, len(bench.task.labels)]
    told += [config.input_size, config.target, config.finetune, config.calibration, config.calibration_samples]
    told += [step.to_dict() for step in steps]
    bench.checkpoints.mkdir(parents=True, exist_ok=True)
    return bench.checkpoints / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.pt"


def forget(bench: Workbench) -> None:
    """Remove the checkpoints of an export that is published, and their folder where no other has any."""
    steps = bench.task.config.steps
    for place, step in enumerate(steps, 1):
        if isinstance(step, Finetune | Int8):
            checkpoint(bench, steps[:place]).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        bench.checkpoints.rmdir()


def _look(bench: Workbench, module: nn.Module, stage: str) -> dict[str, Any]:
    """Compare a module with the one that was named."""
    task = bench.task
    eager = Eager(module, task.arch.preprocess)
    parity = bench.compare(eager).parity
    found: dict[str, Any] = {"stage": stage, "parity": asdict(parity)}
    if task.labelled:
        ((top1, _),) = accuracy.hit_rates((eager,), task.labelled, task.arch.preprocess, task.progress)
        found["top1"] = top1
    count = archs.count(module, task.arch.input_size)
    return found | {"parameters": count.parameters, "macs": count.macs}
