"""What can be wrong with an export and is quick to see, looked at before any work starts."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from exporter import archs
from exporter.archs import custom
from exporter.archs.dry_run import dry_run
from exporter.config import ExportConfig
from exporter.errors import BadInput
from exporter.images import labelled_images, list_images
from exporter.progress import Progress


@dataclass(frozen=True)
class Size:
    """The bytes of a network's tensors, and the shapes of its outputs without the batch axis."""

    bytes: int
    outputs: list[list[int]]


@dataclass(frozen=True)
class Task:
    """What the cheap checks found out, and what a person should keep in mind (grows on the way)."""

    config: ExportConfig
    arch: archs.Arch
    labels: list[str]
    labelled: list[tuple[Path, int]]
    size: Size
    progress: Progress
    threads: int
    caveats: list[str] = field(default_factory=list)


def check(config: ExportConfig, progress: Progress) -> Task:
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
    return Task(config, arch, labels, labelled, _size(arch, len(labels)), progress, torch.get_num_threads())


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


def _size(arch: archs.Arch, classes: int) -> Size:
    """Look at the network without computing anything."""
    with torch.device("meta"):
        module = arch.deploy(arch.build(classes))
    made = dry_run(module, arch.input_size)
    outputs = made if isinstance(made, tuple) else (made,)
    size = sum(int(tensor.nbytes) for tensor in module.state_dict().values())
    return Size(size, [list(output.shape[1:]) for output in outputs])
