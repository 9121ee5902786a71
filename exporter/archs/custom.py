"""From what the user asked for to an `Arch`: a network of the zoo or their own, at the size that they want.

A network of their own is "package.module:factory", which is imported and called, or a torch.export program in a file.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from convoynet.exporter import outputs_asked
from convoynet.exporter.archs import libraries, own, preprocessing, returned
from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS
from convoynet.exporter.archs.dry_run import dry_run, without_numbers
from convoynet.exporter.archs.fully_convolutional import fully_convolutional
from convoynet.exporter.archs.own_detector import Detector, require_detector
from convoynet.exporter.archs.registry import Arch, Task, get
from convoynet.exporter.archs.wrapped import bare, settle_lazy
from convoynet.exporter.config import ExportConfig, is_factory, is_library, is_program
from convoynet.exporter.data.images import Preprocess, pixels_text
from convoynet.exporter.data.labels import read_labels
from convoynet.exporter.errors import BadInput, reason
from convoynet.exporter.onnx_asked import is_onnx

PAPER = "The user's own network."
# How much more of one side than of the other a map of an image may keep: without padding its edges are left out.
_MOST_STRETCHED = 2.0
# A map that is finer than half of the image is one of its pixels, and may lack this share of a side, not more.
_LEAST_FINE, _MOST_CUT = 0.6, 0.05
_CLASSES = "num_classes"
_IN_MEMORY = "as they were in memory"
_PADDED = ", so the whole image is fitted into the input size, and the rest padded"
_UNKNOWN = "by default: {name} comes with no configuration" + preprocessing.RESIZED


def resolve(config: ExportConfig) -> Arch:
    """The network that `config` asks for, with the image size, the normalisation and the head that it asks for.

    Raises:
        BadInput: there is no such network, the user's code fails, or the network cannot be what is asked for.
    """
    if is_onnx(config.arch):
        from convoynet.exporter.archs.onnx_network import arch_from_onnx

        arch = arch_from_onnx(config)
        preprocess, source = preprocessing.asked(arch, config)
        return replace(arch, preprocess=preprocess, preprocess_source=source)
    if is_program(config.arch):
        arch = _arch_from_program(config)
    elif is_factory(config.arch):
        arch = _arch_from_factory(config)
    elif is_library(config.arch):
        arch = libraries.get(config.arch, config.input_size)
    else:
        arch = get(config.arch)
    native = arch.preprocess.size
    preprocess, source = preprocessing.asked(arch, config)
    resized = replace(arch, preprocess=preprocess, preprocess_source=source)
    if config.fully_convolutional:
        return _with_outputs(_spread(resized, native), config)
    if preprocess.size != native:
        _require_size(resized, native)
    return _with_outputs(resized, config)


def _with_outputs(arch: Arch, config: ExportConfig) -> Arch:
    """The network with the outputs that `--outputs` asks for, where it has not got them as the user's own."""
    if not config.outputs or isinstance(getattr(arch.build, "__self__", None), _Fixed):
        return arch
    outputs_asked.require_suitable(arch.name, arch.task, config.outputs, None)
    network = without_numbers(lambda: arch.deploy(arch.build(arch.num_classes)))
    outputs = returned.outputs_of(arch.name, network, arch.input_size, config.outputs)
    return replace(arch, deploy=partial(_deploy_outputs, arch.deploy, outputs), outputs=outputs.others)


def _deploy_outputs(
    before: Callable[[nn.Module], nn.Module], outputs: returned.Outputs, network: nn.Module
) -> nn.Module:
    return outputs.of(before(network))


def _require_size(arch: Arch, native: tuple[int, int]) -> None:
    """Check that a network takes images of another size than its own.

    Raises:
        BadInput: naming its own size and, where it helps, --fully-convolutional.
    """
    network = without_numbers(lambda: arch.build(arch.num_classes))
    why = "its head makes another number of outputs of them"
    try:
        output = dry_run(network, arch.input_size, 2)
        if arch.task != "classification" or _logits(output) == arch.num_classes:
            return
    except Exception as error:
        why = reason(error)
    hint = ""
    if arch.task == "classification" and min(n - o for n, o in zip(arch.preprocess.size, native, strict=True)) >= 0:
        try:
            fully_convolutional(network, (arch.preprocess.channels, *native))
            hint = ", or add --fully-convolutional for a map of logits"
        except BadInput:
            pass
    raise BadInput(
        f"--input-size {_size(arch.preprocess.size)}: {arch.name} is a network for {_size(native)} ({why}); "
        f"leave the option out{hint}"
    )


def _spread(arch: Arch, native: tuple[int, int]) -> Arch:
    """The network with its head as convolutions."""
    if arch.task != "classification":
        raise BadInput(f"--fully-convolutional is for classification networks, and {arch.name} is for {arch.task}")
    own_size = (arch.preprocess.channels, *native)
    network = without_numbers(lambda: arch.build(arch.num_classes))
    try:
        spread = fully_convolutional(arch.deploy(network), own_size)
    except BadInput as error:
        raise BadInput(f"{arch.name}: {error}") from error
    try:
        output = dry_run(spread, arch.input_size)
    except Exception as error:
        raise BadInput(
            f"--input-size {_size(arch.preprocess.size)} with --fully-convolutional: {arch.name} needs "
            f"{_size(native)} or more ({reason(error)})"
        ) from error
    assert isinstance(output, Tensor)
    return replace(arch, task="segmentation", deploy=partial(_deploy_spread, arch.deploy, own_size))


def _deploy_spread(
    before: Callable[[nn.Module], nn.Module], own_size: tuple[int, int, int], network: nn.Module
) -> nn.Module:
    return fully_convolutional(before(network), own_size)


def _arch_from_program(config: ExportConfig) -> Arch:
    from convoynet.exporter.archs.program import load_program

    path = config.arch
    own.require_program(Path(path), config.weights)
    program = load_program(Path(path))
    wanted = config.input_size or tuple(
        given or side for given, side in zip(program.size, IMAGENET_PREPROCESS.size, strict=True)
    )
    size = (wanted[0], wanted[1])
    if any(given not in (None, side) for given, side in zip(program.size, size, strict=True)):
        axes = "x".join("any" if given is None else str(given) for given in program.size)
        raise BadInput(
            f"--input-size {_size(size)}: {path} takes images of {axes} pixels; leave the option out, or export the "
            "program again at that size"
        )
    outputs = _own_outputs(path, program.network, (program.channels, *size), config)
    classes = outputs.classes
    program.network.measure((program.channels, *size))
    if config.num_classes not in (None, classes):
        raise BadInput(f"--num-classes {config.num_classes}: {path} has {classes} classes; leave the option out")
    # The folder is this machine's business.
    preprocess = preprocessing.default(size, program.channels), _UNKNOWN.format(name="the program")
    fixed = _Fixed(path, program.network, classes)
    weights = f"as the program has them{outputs.changed}"
    return _arch(Path(path).name, fixed, preprocess, weights, outputs)


@dataclass
class _Fixed:
    """A network that is there already, with its number of classes.

    Attributes:
        again: makes one for another number of classes; None where that is impossible.
    """

    name: str
    network: nn.Module
    classes: int
    again: Callable[[int], nn.Module] | None = None

    def build(self, classes: int) -> nn.Module:
        """The network for this number of classes; the same object as long as the number stays the same."""
        if classes != self.classes:
            if self.again is None:
                raise BadInput(f"{self.name} has {self.classes} classes, not {classes}; give as many --labels")
            self.network, self.classes = self.again(classes), classes
        return self.network

    def tensors(self) -> dict[str, Tensor]:
        """The weights that it was made with."""
        return self.network.state_dict()


@dataclass(frozen=True)
class _Boxes:
    """The outputs of the user's own detector, as `returned.Outputs` are those of other networks."""

    classes: int
    changed: str = ""
    others: tuple[str, ...] = ()
    of: Callable[[nn.Module], nn.Module] = Detector


def _arch(
    name: str, fixed: _Fixed, preprocess: tuple[Preprocess, str], weights: str, outputs: returned.Outputs | _Boxes
) -> Arch:
    task: Task = "classification"
    if isinstance(outputs, _Boxes):
        task = "detection"
    elif len(outputs.shape) == 4:
        task = "segmentation"
    found, source = preprocess
    if task != "classification":  # as those of the zoo: what is cut off is not found
        found = replace(found, resize=max(found.size), fit="pad")
        source = source.removesuffix(preprocessing.RESIZED) + _PADDED
    return Arch(
        name=name,
        paper=PAPER,
        source="user",
        num_classes=fixed.classes,
        preprocess=found,
        preprocess_source=source,
        task=task,
        build=fixed.build,
        labels=lambda: [str(index) for index in range(fixed.classes)],
        published=fixed.tensors,
        published_name=weights,
        deploy=outputs.of,
        outputs=outputs.others,
    )


def _arch_from_factory(config: ExportConfig) -> Arch:
    spec = config.arch
    factory = own.attribute(spec) if config.network is None else config.network
    parameters = _parameters(factory)
    takes_classes = _CLASSES in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wanted = config.num_classes
    must = _CLASSES in parameters and parameters[_CLASSES].default is inspect.Parameter.empty
    # What a detector was made for cannot be seen in its boxes, and so not be made again for the labels that there are.
    if wanted is None and (must or (_CLASSES in parameters and config.task == "detection" and config.labels)):
        if config.labels is None:
            raise BadInput(f"{spec} needs a number of classes: add --num-classes N or --labels FILE")
        wanted = len(read_labels(config.labels))
    if wanted is not None and not takes_classes and not isinstance(factory, Arch) and config.task != "detection":
        raise BadInput(
            f"--num-classes {wanted}: {spec} takes no parameter {_CLASSES}; leave the option out, or give it one"
        )
    made = _call(spec, factory, config.seed, wanted if takes_classes else None)
    if isinstance(made, Arch):
        return made
    if not isinstance(made, nn.Module):
        raise BadInput(f"{spec} returns {own.article(made)}; it must return a torch.nn.Module, or a convoynet.Arch")
    made, changed = bare(spec, made)
    stated = preprocessing.of_module(made)
    size = (stated[0] if stated else IMAGENET_PREPROCESS).size
    if config.input_size is not None and not config.fully_convolutional:
        size = config.input_size
    settle_lazy(spec, made, (len(config.mean or IMAGENET_PREPROCESS.mean), *size))
    channels = len(config.mean) if config.mean is not None else _channels(made, size)
    outputs = _own_outputs(spec, made, (channels, *size), config)
    classes = outputs.classes
    if wanted not in (None, classes):
        raise BadInput(f"{spec} was called with {_CLASSES}={wanted} and returns {classes} logits; they must be equal")

    def again(number: int) -> nn.Module:
        network = _call(spec, factory, config.seed, number)
        if isinstance(network, nn.Module):
            network = bare(spec, network)[0]
            settle_lazy(spec, network, (channels, *size))
        if (
            not isinstance(network, nn.Module)
            or _own_outputs(spec, network, (channels, *size), config).classes != number
        ):
            raise BadInput(f"{spec} was called with {_CLASSES}={number} and does not return as many logits")
        return network

    fixed = _Fixed(spec, made, classes, again if takes_classes else None)
    made_by = f"as {spec} builds it, seed {config.seed}" if config.network is None else _IN_MEMORY
    return _arch(
        spec,
        fixed,
        _preprocess(stated, size, channels, spec),
        "".join((made_by, *changed, outputs.changed)),
        outputs,
    )


def _preprocess(
    stated: tuple[Preprocess, str] | None, size: tuple[int, int], channels: int, spec: str
) -> tuple[Preprocess, str]:
    """The preprocessing that timm states of the user's network, or the default, and who says so."""
    default = preprocessing.default(size, channels)
    if stated is None or stated[0].channels != channels:
        return default, _UNKNOWN.format(name=spec)
    found, source = stated
    if found.size == size:
        return found, source
    kept = replace(found, size=size, resize=size)
    return kept, f"{source}, which says nothing of {pixels_text(size)}{preprocessing.RESIZED}"


def _parameters(factory: object) -> dict[str, inspect.Parameter]:
    if isinstance(factory, nn.Module | Arch) or not callable(factory):
        return {}
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # some that are written in C do not say
        return {}


def _call(spec: str, factory: object, seed: int, classes: int | None) -> object:
    if isinstance(factory, nn.Module | Arch):
        return factory
    assert callable(factory)
    torch.manual_seed(seed)
    try:
        # Whoever asks for shapes alone asks on the meta device, where pretrained weights could not be loaded.
        with torch.device("cpu"), own.nothing_on_stdout():
            made = factory(**({} if classes is None else {_CLASSES: classes}))
    except (Exception, SystemExit) as error:
        raise BadInput(f"--arch {spec}: calling it raised {own.told(error)} ({own.DEBUG})") from error
    on_a_device = isinstance(made, nn.Module) and not any(tensor.is_meta for tensor in made.parameters())
    return made.cpu() if on_a_device else made


def _channels(network: nn.Module, size: tuple[int, int]) -> int:
    """One where the network takes grey images and no others, else three."""
    for channels in (3, 1):
        try:
            dry_run(network, (channels, *size))
        except Exception:  # noqa: S112  the caller runs it again, and says what is wrong
            continue
        return channels
    return 3


def _own_outputs(
    spec: str, network: nn.Module, input_size: tuple[int, int, int], config: ExportConfig
) -> returned.Outputs | _Boxes:
    """The outputs of the user's own network, which are rows unless --task says otherwise."""
    if config.task == "detection":
        outputs_asked.require_suitable(spec, config.task, config.outputs, None)
        require_detector(spec, network, input_size)
        return _Boxes(_detected_classes(spec, config))
    outputs = returned.outputs_of(spec, network, input_size, config.outputs)
    if config.task == "segmentation":
        if len(outputs.shape) != 4:
            raise BadInput(
                f"--task segmentation: {spec} returns {list(outputs.shape)} for two images; it must return logits "
                "[2, classes, height, width], float32"
            )
        _require_maps(spec, outputs.shape[1:], input_size[1:])
    elif len(outputs.shape) != 2:
        raise BadInput(
            f"{spec} returns {list(outputs.shape)} for two images; it must return logits [2, classes], float32 "
            "(for maps of classes or boxes add --task segmentation or detection)"
        )
    return outputs


def _require_maps(spec: str, shape: Sequence[int], image: Sequence[int]) -> None:
    """See that a segmentation's logits have the classes first, two or more, and then the image's height and width.

    Raises:
        BadInput: they do not.
    """
    classes, *size = shape
    what = f"--task segmentation: {spec} returns {list(shape)} for an image of {image[0]} x {image[1]}"
    if classes < 2:
        raise BadInput(
            f"{what}: of one class every pixel is it; return the logits of two, torch.cat([torch.zeros_like(y), y], 1)"
        )
    across, along = (made / given for made, given in zip(size, image, strict=True))
    turned = image[0] != image[1] and size[0] * image[0] == size[1] * image[1]
    if turned or not 1 / _MOST_STRETCHED < across / along < _MOST_STRETCHED:
        raise BadInput(
            f"{what}, which is no map of it: the order is [classes, height, width], y.permute(0, 3, 1, 2) where the "
            "classes come last"
        )
    if any(_LEAST_FINE < share < 1 - _MOST_CUT for share in (across, along)):
        raise BadInput(
            f"{what}, without its borders, and would be stretched over all of it: pad the convolutions, or "
            f"F.interpolate a coarser map to the image's size"
        )


def _detected_classes(spec: str, config: ExportConfig) -> int:
    """How many a detector knows, which its boxes do not say; the background is the first."""
    if config.labels is not None:
        return len(read_labels(config.labels))
    if config.num_classes is None:
        raise BadInput(
            f"--task detection: {spec} does not say how many classes it knows: add --num-classes N or --labels FILE"
        )
    return config.num_classes


def _logits(output: object) -> int | None:
    """The number of classes in the logits of two images; None where these are no logits."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.dtype != torch.float32:
        return None
    return output.shape[1] if output.shape[0] == 2 and output.shape[1] else None


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
