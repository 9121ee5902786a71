"""What is wrong with an export and shows without PyTorch: in the flags, the network's name, and what files there are.

A command calls `check` before it imports what does the work, since that takes seconds; `preflight` begins with it too.
"""

from pathlib import Path

from convoynet.exporter import outputs_asked
from convoynet.exporter.archs import facts, libraries, names, own, preprocessing
from convoynet.exporter.archs.facts import Network
from convoynet.exporter.compression import teacher_choice
from convoynet.exporter.config import ExportConfig, is_factory, is_library, is_program
from convoynet.exporter.data.folder import require_images
from convoynet.exporter.data.labels import read_labels
from convoynet.exporter.engine_options import require_folder_of_cache
from convoynet.exporter.errors import BadInput, Missing
from convoynet.exporter.onnx_asked import is_onnx
from convoynet.exporter.publishing import repository
from convoynet.exporter.recipe import ORIGINAL, Finetune, Int8
from convoynet.exporter.tensorrt import library

_NO_CLASSIFIERS = ("segmentation", "detection")


def check(config: ExportConfig) -> None:
    """Look at what can be seen of an export without PyTorch; what the user's own code imports is theirs.

    Raises:
        BadInput: an argument or a file is not usable, or does not suit the network.
        Missing: an engine is to be built, and there is no TensorRT.
    """
    repository.choose_version(config.repository / config.model_name, config.version, config.force)
    check_network(config)
    require_folder_of_cache(config.timing_cache)
    if config.publishes_engine:
        _require_builder(config)


def check_network(config: ExportConfig) -> None:
    """Look at the network alone, and what is to be made of it: not at where it goes.

    Raises:
        BadInput: an argument or a file is not usable, or does not suit the network.
    """
    if is_library(config.arch):
        libraries.require_known(config.arch)
    own_kinds = (is_program, is_factory, is_library, is_onnx)
    network = None if any(is_kind(config.arch) for is_kind in own_kinds) else recorded(config.arch)
    classes = _classes(config)
    if network is not None:
        require_suitable(config, network, classes)
        _require_classes(config, network, classes)
        # Of the zoo, what is no classifier takes the whole image.
        pads = network.task != "classification"
        preprocessing.require_suitable(network.name, config, network.input_size[0], pads=pads)
    elif config.task in _NO_CLASSIFIERS:
        _require_task(config, config.arch, config.task)
        _require_several(config.arch, config.task, classes)
    _require_files(config)
    if is_factory(config.arch) and config.network is None:
        own.attribute(config.arch)


def recorded(name: str) -> Network | None:
    """What is recorded of a network of the zoo; None where it is registered alone, as a program of one's own can do.

    Raises:
        BadInput: there is no such network; the message names the close matches.
    """
    known = facts.recorded().get(name)
    if known is None and name not in names():
        raise facts.unknown(name, names())
    return known


def require_suitable(config: ExportConfig, network: Network, classes: int | None) -> None:
    """See that the flags suit the network.

    Args:
        config: the flags.
        network: the one that `config.arch` names.
        classes: the number that the flags ask for; None where they ask for none.

    Raises:
        BadInput: naming the flag, the network and the way out.
    """
    name, task = network.name, network.task
    _require_task(config, name, task)
    if config.weights == "default" and not network.published_weights:
        raise BadInput(
            f"{name} has no published weights: give your own with --weights FILE, or --weights random for a test"
        )
    if config.mean is not None and len(config.mean) != network.input_size[0]:
        raise BadInput(f"--mean has {len(config.mean)} numbers, and {name} takes {network.input_size[0]} channels")
    if classes not in (None, network.num_classes) and network.fixed_classes:
        raise BadInput(f"{name} with {classes} classes: {network.fixed_classes}")
    outputs_asked.require_suitable(name, task, config.outputs, config.task)
    _require_teachers(config, network, classes)


def _require_task(config: ExportConfig, name: str, task: str) -> None:
    """See that the flags suit what the network is for."""
    if config.fully_convolutional and task != "classification":
        raise BadInput(f"--fully-convolutional is for classification networks, and {name} is for {task}")
    if config.explain and (task != "classification" or config.fully_convolutional):
        what = task if task != "classification" else "segmentation"
        raise BadInput(f"--explain: {name} is for {what} here, and an explanation is of the one class of an image")
    if config.features and (task != "classification" or config.fully_convolutional):
        what = task if task != "classification" else "segmentation"
        raise BadInput(f"--features: {name} is for {what} here, and features are those of a classifier")
    if config.eval is not None and (task != "classification" or config.fully_convolutional):
        what = task if task != "classification" else "segmentation"
        raise BadInput(f"--eval {config.eval}: class folders say nothing about {what}; {name} goes without")
    if task == "detection":
        _require_steps_of_detectors(config)
    elif task == "segmentation":
        _require_teacher_of_dense(config, name)


def _require_steps_of_detectors(config: ExportConfig) -> None:
    for place, step in config.of_the_module:
        raise BadInput(f"step {place} ({step.kind}): detectors are not compressed so; use int8 alone")
    if isinstance(config.quantization, Int8) and config.quantization.qat_epochs:
        raise BadInput("--qat: detectors are not trained; use --int8 without it, or with --refine or --adaround")


def _require_teacher_of_dense(config: ExportConfig, name: str) -> None:
    for place, step in config.of_the_module:
        if isinstance(step, Finetune) and not step.distill:
            raise BadInput(
                f"step {place} (finetune) without distillation needs labels, and class folders say nothing about "
                f"segmentation, which {name} is for: add --distill (distill = true in a recipe)"
            )


def _require_teachers(config: ExportConfig, network: Network, classes: int | None) -> None:
    for _, step in config.of_the_module:
        if isinstance(step, Finetune) and step.distill and step.teacher != ORIGINAL:
            teacher = recorded(teacher_choice.split(step.teacher)[0])
            if teacher is not None:
                teacher_choice.require_teacher(
                    step.teacher, teacher, classes or network.num_classes, network.input_size[0]
                )


def _require_classes(config: ExportConfig, network: Network, classes: int | None) -> None:
    _require_several(network.name, network.task, classes)
    if config.weights == "default" and classes not in (None, network.num_classes):
        raise BadInput(
            f"{network.name}'s published weights know {network.num_classes} classes, and {classes} are asked for: give "
            "your own with --weights FILE, or --weights random for a test"
        )


def _require_several(name: str, task: str, classes: int | None) -> None:
    """See that there is something to detect, or to tell apart."""
    if classes == 1 and task == "detection":
        raise BadInput(f"1 class: {name} needs 2 or more, the first being the background")
    if classes == 1 and task == "segmentation":
        raise BadInput(f"1 class: of one class every pixel is it; {name} needs 2 or more")


def _classes(config: ExportConfig) -> int | None:
    """The number of classes that --labels and --num-classes ask for."""
    if config.labels is None:
        return config.num_classes
    count = len(read_labels(config.labels))
    if config.num_classes not in (None, count):
        raise BadInput(
            f"--labels {config.labels} has {count} names and --num-classes is {config.num_classes}; they must be equal"
        )
    return count


def _require_files(config: ExportConfig) -> None:
    if is_onnx(config.arch):
        if not Path(config.arch).is_file():
            raise BadInput(f"--onnx {config.arch}: no such file")
    elif is_program(config.arch):
        own.require_program(Path(config.arch), config.weights)
    elif config.weights not in ("default", "random") and not Path(config.weights).is_file():
        what = "is a folder" if Path(config.weights).is_dir() else "no such file"
        raise BadInput(f"--weights {config.weights}: {what}; give a checkpoint, or default or random")
    for file in config.check_preprocessing or ():
        if not file.is_file():
            raise BadInput(f"--check-preprocessing {file}: no such file; give the .npy file, then the image")
    for option in ("calibration", "finetune", "eval"):
        folder = getattr(config, option)
        if folder is None:
            continue
        try:
            require_images(folder)
        except BadInput as error:
            raise BadInput(f"--{option} {error}") from error


def _require_builder(config: ExportConfig) -> None:
    try:
        builder = library.require()
    except Missing as error:
        raise Missing(f"--format tensorrt: {error}; or add --defer-build, and the server builds the engine") from error
    if config.version_compatible and builder.compiles_at_load:
        raise Missing(
            f"--version-compatible: {builder.title} has no such engines; leave it out, pip install tensorrt on a "
            "machine with the GPU, or add --defer-build, and the server builds the engine"
        )
