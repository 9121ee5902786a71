"""A network that is looked into: a module whose layers are found by the names that `convoy inspect` shows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convoynet.exporter.archs import custom, preprocessing, weights
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import Preprocess, made_images
from convoynet.exporter.errors import BadInput, NoGradient, reason
from convoynet.exporter.graph.onnx_given import read_given
from convoynet.exporter.graph.onnx_read import reading
from convoynet.exporter.graph.onnx_to_torch import TorchGraph, last_readings
from convoynet.exporter.inspecting.inspection import Axes, Trace, axes_of
from convoynet.exporter.inspecting.seen import seen
from convoynet.exporter.inspecting.trace_from_onnx import trace_from_onnx
from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch

Images = NDArray[np.uint8]

BATCH = 8
_MAP_RANK = 4
_MOST_NAMES = 4
_STATISTICS = 16
_MOST_BYTES = 256 * 2**20  # of maps at a time


@dataclass(frozen=True)
class Box:
    """Pixels of an image, from the first to behind the last; a field may reach beyond it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    def within(self, size: tuple[int, int]) -> Box:
        """What of it lies in an image of (height, width)."""
        height, width = size
        return Box(max(self.top, 0), max(self.left, 0), min(self.bottom, height), min(self.right, width))


@dataclass(frozen=True)
class Layer:
    """A layer that has a map: channels, each with a number at each place.

    Attributes:
        name: as `convoy inspect` shows it, or of a module that holds others.
        module: makes it.
        tensor: in the trace.
        channels: the units.
        size: (height, width) of the map.
        axes: what its places see; None where that is not known.
    """

    name: str
    module: nn.Module
    tensor: str
    channels: int
    size: tuple[int, int]
    axes: Axes

    @property
    def middle(self) -> tuple[int, int]:
        """(row, column) of the place in the middle."""
        return self.size[0] // 2, self.size[1] // 2


class _Reached(Exception):
    """Ends a forward at the layer that is looked at."""


@dataclass(frozen=True)
class Opened:
    """A network that is looked into.

    Attributes:
        name: as it was named.
        weights: which ones, in words.
        network: in evaluation mode, without gradients for its weights.
        modules: a layer's name -> what makes it.
        trace: of one image of the size that it is looked at.
        preprocess: how a picture becomes what it takes.
        preprocess_source: who says so.
        labels: its classes; empty where it is no classifier.
        takes_pixels: whether it takes pixels of 0 to 255 and normalises them itself.
        channels_last: whether it takes [n, h, w, channels].
        batch: how many images it takes at a time.
    """

    name: str
    weights: str
    network: nn.Module
    modules: Mapping[str, nn.Module]
    trace: Trace
    preprocess: Preprocess
    preprocess_source: str = ""
    labels: list[str] = field(default_factory=list)
    takes_pixels: bool = False
    channels_last: bool = False
    batch: int = BATCH

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.preprocess.size

    @cached_property
    def axes(self) -> Mapping[str, Axes]:
        """What the places of each tensor see."""
        return axes_of(self.trace, self.trace.image_size)

    def layer(self, name: str) -> Layer:
        """The layer of this name.

        Raises:
            BadInput: there is none, or it has no map.
        """
        if name not in self.trace.modules or name not in self.modules:
            used, _, use = name.rpartition(":")
            if used in self.trace.modules and use.isdecimal():
                raise BadInput(
                    f"{name} of {self.name} is a further use of {used}, and the first alone is looked into: say {used}"
                )
            near = difflib.get_close_matches(name, self.trace.modules, _MOST_NAMES, 0.4)
            near += [each for each in self.trace.modules if name and name in each and each not in near]
            said = f"did you mean {', '.join(near[:_MOST_NAMES])}?" if near else "`convoy inspect` lists them"
            raise BadInput(f"{self.name} has no layer {name!r}: {said}")
        shape = self.trace.shapes.get(self.trace.modules[name], ())
        if (found := self._map(name)) is None:
            told = "x".join(map(str, shape[1:])) or "something else"
            raise BadInput(
                f"{name} of {self.name} has no map of channels over places (it returns {told} for an image): choose a "
                f"layer that has one{f', such as {self._last}' if self._last else ''}"
            )
        return found

    def last_map(self) -> Layer:
        """The last layer that has a map.

        Raises:
            BadInput: there is none.
        """
        if (last := self._last) is None:
            raise BadInput(
                f"{self.name} has no feature map: no layer of it returns channels over places, so there is nothing to "
                "look at"
            )
        return self.layer(last)

    @property
    def _last(self) -> str | None:
        return next((name for name in reversed(list(self.trace.modules)) if self._map(name) is not None), None)

    def _map(self, name: str) -> Layer | None:
        tensor = self.trace.modules[name]
        shape = self.trace.shapes.get(tensor, ())
        if name not in self.modules or len(shape) != _MAP_RANK or shape[2] * shape[3] < 2:
            return None
        if shape[0] != self.trace.shapes[self.trace.image][0]:  # of boxes, say
            return None
        axes = self.axes.get(tensor)
        if axes is not None and (axes[0].dim, axes[1].dim) != (2, 3):
            return None  # the channels come last
        return Layer(name, self.modules[name], tensor, shape[1], (shape[2], shape[3]), axes)

    def box(self, layer: Layer, place: tuple[int, int]) -> Box | None:
        """The pixels that a place can depend on, also those beyond the image; None where that is not known."""
        found = seen(self.trace, self.axes, layer.tensor, place)
        if found is None:
            return None
        (top, bottom), (left, right) = found
        return Box(top, left, bottom + 1, right + 1)

    def inputs(self, pixels: Images) -> Tensor:
        """What the network takes of pictures [n, h, w, channels]."""
        if not self.takes_pixels:
            made = torch.from_numpy(self.preprocess.normalize(pixels))
            return made.permute(0, 2, 3, 1).contiguous() if self.channels_last else made
        made = torch.from_numpy(pixels.astype(np.float32))
        return made if self.channels_last else made.permute(0, 3, 1, 2).contiguous()

    def in_places(self, values: Tensor) -> Tensor:
        """What has the shape of the input, as [n, channels, h, w]."""
        return values.permute(0, 3, 1, 2) if self.channels_last else values

    def maps(self, layer: Layer, inputs: Tensor) -> Tensor:
        """[n, channels, height, width] of a layer; what comes behind it does not run."""
        made: list[Tensor] = []

        def stop(_: nn.Module, __: object, output: Tensor) -> None:
            made.append(output)
            raise _Reached

        with _hooked(layer.module, stop), self._running():
            try:
                self.network(inputs)
            except _Reached:
                return made[0]
        raise self._not_reached(layer)

    def _not_reached(self, layer: Layer) -> BadInput:
        return BadInput(f"{self.name} does not reach {layer.name} on these images")

    def behind(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, object]:
        """[n, channels, height, width] of a layer, and what the network makes of it, with a gradient back to there."""
        made: list[Tensor] = []

        def begin(output: Tensor) -> Tensor:
            made.append(output.detach().clone().requires_grad_())
            return made[0]

        with making(layer.module, begin):
            output = self.run(inputs)
        if not made:
            raise self._not_reached(layer)
        return made[0], output

    def starts(self, layer: Layer, count: int) -> range:
        """Where batches of images begin, so that the layer's maps of one fit into memory."""
        bytes_each = layer.channels * layer.size[0] * layer.size[1] * 8
        return range(0, count, max(1, min(self.batch, _MOST_BYTES // bytes_each)))

    def run(self, inputs: Tensor) -> object:
        """What the network returns.

        Raises:
            BadInput: it does not run.
        """
        with self._running():
            made: object = self.network(inputs)
            return made

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except NoGradient as error:
            raise _no_gradient(error) from error
        except (RuntimeError, ValueError, AssertionError) as error:
            raise BadInput(f"{self.name} does not run on these images: {reason(error)}") from error


@contextmanager
def making(module: nn.Module, other: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module's first call return something else, for all that read it and for nobody else.

    Args:
        module: returns a tensor.
        other: of what it returned, what stands in its place.
    """
    versions: list[int] = []

    def called(_: nn.Module, given: tuple[object, ...], named: dict[str, object]) -> None:
        if not versions:
            versions.extend(_versions(given, named))

    def returned(_: nn.Module, given: tuple[object, ...], named: dict[str, object], output: Tensor) -> Tensor | None:
        handles.pop().remove()
        if _versions(given, named) == versions:
            return other(output).clone()  # what comes behind may work in place
        # The module has changed what it read, and others may read that; a copy, or what is kept is written over.
        output.copy_(other(output.clone()))
        return None

    handles = [module.register_forward_hook(returned, with_kwargs=True)]
    before = module.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield
    finally:
        before.remove()
        for handle in handles:
            handle.remove()


def _versions(given: tuple[object, ...], named: dict[str, object]) -> list[int]:
    """How often each tensor was written to; of those of inference mode PyTorch does not count it."""
    tensors = (each for each in (*given, *named.values()) if isinstance(each, Tensor))
    return [each._version for each in tensors if not each.is_inference()]


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def open_network(config: ExportConfig) -> Opened:
    """A network by its name, or of the user's own, with its weights.

    Raises:
        BadInput: there is no such network, or no such weights, or it takes no images of this size.
    """
    arch = custom.resolve(config)
    torch.manual_seed(config.seed)
    network = arch.build(config.num_classes or arch.num_classes)
    images = made_images(_STATISTICS, arch.preprocess.size, arch.preprocess.channels, config.seed)
    loaded = weights.load(network, arch, config.weights, seed=config.seed, images=images)
    network.requires_grad_(False)
    trace = trace_from_torch(arch.name, network, arch.input_size)
    classes = arch.labels() if arch.task == "classification" else []
    if config.num_classes not in (None, len(classes)) and classes:
        classes = [str(index) for index in range(config.num_classes or 0)]
    modules = dict(network.named_modules())
    return Opened(arch.name, loaded.source, network, modules, trace, arch.preprocess, arch.preprocess_source, classes)


class _Step(nn.Module):
    """One node of a graph, so that it can be hooked."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *given: Any) -> Any:
        """What the node computes."""
        return self.run(*given)


def _same(made: Tensor) -> Tensor:
    return made


class _Steps(TorchGraph):
    """A graph whose nodes are modules."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.by_output: dict[str, _Step] = {}
        steps = []
        for run, inputs, outputs in self._steps:
            name, *others = outputs
            if others:  # a layer is what makes the first of them alone
                steps.append((run, inputs, [made := f"{name} of {len(outputs)}", *others]))
            step = self.by_output[name] = _Step(_same if others else run)
            steps.append((step, [made] if others else inputs, [name]))
        self._steps = steps
        self._last = last_readings(steps, self.wanted)


def _no_gradient(error: NoGradient) -> BadInput:
    return BadInput(f"{error.node} has no gradient here, which looking inside needs")


def _steps(model: Any) -> _Steps:
    try:
        return _Steps(model)
    except NoGradient as error:
        raise _no_gradient(error) from error


def open_graph(
    name: str, file: Path, size: tuple[int, int] | None, known: tuple[Preprocess, list[str]] | None
) -> Opened:
    """An ONNX file: of an exported model, or of any exporter.

    Args:
        name: as it was named.
        file: the graph.
        size: (height, width) of the image where the file leaves it open.
        known: the preprocessing and the class names of an exported model; None where nothing says them.

    Raises:
        BadInput: it cannot be read, takes no images, or has an operator without a gradient here.
    """
    given = read_given(file)
    with reading(str(file), given.model):
        trace = trace_from_onnx(name, given.model, size or (known[0].size if known else None), keep_size=True)
        network = _steps(given.model).requires_grad_(False).eval()
    named = {operation.name: operation.writes[0] for operation in trace.operations if operation.writes}
    modules = {key: network.by_output[tensor] for key, tensor in named.items() if tensor in network.by_output}
    source = f"those of {file.name}"
    if known is not None:
        preprocess, labels, said = known[0], known[1], "that of the export"
    else:
        preprocess = preprocessing.default(trace.image_size, given.channels or 3)
        labels, said = [], "by default, as an ONNX file says nothing of it"
    return Opened(
        name,
        source,
        network,
        modules,
        replace(trace, modules=named),
        replace(preprocess, size=trace.image_size),
        said,
        labels,
        takes_pixels=given.takes_pixels,
        channels_last=given.channels_last,
        batch=min(given.batch or BATCH, BATCH),
    )
