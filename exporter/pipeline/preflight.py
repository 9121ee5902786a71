"""What can be wrong with an export and is quick to see, looked at before any work starts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from convoynet.exporter import archs
from convoynet.exporter.archs import custom, facts
from convoynet.exporter.archs.data_dependent import DataDependent
from convoynet.exporter.archs.dry_run import dry_run, without_numbers
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.folder import survey
from convoynet.exporter.data.images import labelled_images
from convoynet.exporter.data.labels import read_labels
from convoynet.exporter.data.tensor_check import check_tensor
from convoynet.exporter.errors import BadInput
from convoynet.exporter.onnx_asked import is_onnx
from convoynet.exporter.pipeline import first_look, given
from convoynet.exporter.progress import Progress
from convoynet.exporter.recipe import Finetune


@dataclass(frozen=True)
class Size:
    """The bytes of a network's tensors, and the shapes of its outputs without the batch axis."""

    bytes: int
    outputs: list[list[int]]


@dataclass(frozen=True)
class Task:
    """What the cheap checks found out, and what a person should keep in mind (grows on the way).

    `checked` says what the preprocessing was compared with, where it was.
    """

    config: ExportConfig
    arch: archs.Arch
    labels: list[str]
    labelled: list[tuple[Path, int]]
    size: Size
    progress: Progress
    threads: int
    checked: str = ""
    caveats: list[str] = field(default_factory=list)


def check(config: ExportConfig, progress: Progress) -> Task:
    """Look at everything that can be wrong and is quick to see.

    Raises:
        BadInput: an argument or a file is not usable, or TensorRT cannot have such a network.
        Refused: our preprocessing is not that of the user's own pipeline.
        Missing: an engine is to be built, and there is no TensorRT.
    """
    first_look.check(config)
    notes: list[str] = []
    if is_onnx(config.arch):
        given.lint_file(Path(config.arch))
        arch = custom.resolve(config)
        config, notes = given.as_given(config, arch)
    else:
        arch = custom.resolve(config)
    if config.arch not in facts.recorded():
        # As resolved, a network that was made fully convolutional is one for segmentation.
        task = None if config.fully_convolutional else config.task
        asked = replace(config, fully_convolutional=False, task=task)
        first_look.require_suitable(asked, arch, config.num_classes)
    checked = ""
    if config.check_preprocessing is not None:
        checked = check_tensor(*config.check_preprocessing, arch.preprocess, takes_pixels=config.input == "uint8")
    labels = _labels(config, arch)
    folders = dict.fromkeys((config.calibration, config.finetune, config.eval))
    caveats = notes + [line for folder in folders if folder is not None and (line := survey(folder).line)]
    labelled = labelled_images(config.eval, labels) if config.eval is not None else []
    _require_labels(config, arch, labels)
    size = _size(arch, len(labels), engine=config.format == "tensorrt")
    return Task(config, arch, labels, labelled, size, progress, torch.get_num_threads(), checked, caveats)


def _labels(config: ExportConfig, arch: archs.Arch) -> list[str]:
    if config.labels is None:
        classes = config.num_classes or arch.num_classes
        return arch.labels() if classes == arch.num_classes else [str(index) for index in range(classes)]
    return read_labels(config.labels)


def _require_labels(config: ExportConfig, arch: archs.Arch, labels: list[str]) -> None:
    """See that a training that needs labels has them."""
    needing = [place for place, step in config.of_the_module if isinstance(step, Finetune) and not step.distill]
    if needing and config.finetune is not None and arch.task == "classification":
        try:
            labelled_images(config.finetune, labels)
        except BadInput as error:
            raise BadInput(f"step {needing[0]} (finetune) without distillation needs labels: {error}") from error


def _size(arch: archs.Arch, classes: int, *, engine: bool) -> Size:
    """Look at the network without computing anything; `engine` says whether TensorRT is to have it.

    Raises:
        BadInput: it is, and shapes within the network depend on the data.
    """
    module = without_numbers(lambda: arch.deploy(arch.build(classes)))
    made: Any = None
    with DataDependent() as seen:
        try:
            made = dry_run(module, arch.input_size, 2)
        except Exception:
            # On the meta device such operators fail, and not clearly.
            if not (engine and seen.found):
                raise
    if engine and seen.found:
        raise BadInput(
            f"--format tensorrt: {arch.name} uses {seen.found[0]}, which returns as many rows as the data says, so "
            "that a batch cannot be told apart; choose a fixed number with topk and mask the rest, or use --format onnx"
        )
    outputs = made if isinstance(made, tuple) else (made,)
    size = sum(int(tensor.nbytes) for tensor in module.state_dict().values())
    return Size(size, [list(output.shape[1:]) for output in outputs])
