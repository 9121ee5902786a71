"""An ONNX file of any exporter as a network: `convoy export --onnx FILE`.

What the file computes in ONNX Runtime, without its optimisations, is what everything is compared with.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from convoynet.exporter.archs import preprocessing, returned
from convoynet.exporter.archs.datasets import IMAGENET_PREPROCESS
from convoynet.exporter.archs.registry import Arch, Task
from convoynet.exporter.config import ExportConfig
from convoynet.exporter.data.images import Preprocess, pixels_text
from convoynet.exporter.errors import BadInput, short_reason
from convoynet.exporter.graph.onnx_given import GivenGraph, for_any_batch, read_given
from convoynet.exporter.graph.onnx_session import make_session, session_options

Array = npt.NDArray[Any]

PAPER = "The user's own ONNX file."
_PIXEL = 255
# Images of a trial, and how far answers may be apart, as a share of the largest: rounding, and that of the numbers
# that were made float32.
_TRIED, _ALIKE, _ALIKE_WIDENED = 3, 1e-4, 3e-2
_MAP = 4


class OnnxNetwork(nn.Module):
    """A given graph as a module that returns what the file computes.

    Args:
        given: the graph.
        run: the file in ONNX Runtime: the graph's input -> its outputs.
        together: how many images the file takes at a time; None for any number.
        notes: what a person should know of it.

    Attributes:
        title: who computes.
        picks: the outputs that are returned; none of them for all, by name.
    """

    def __init__(
        self,
        given: GivenGraph,
        run: Callable[[Array], Sequence[Array]],
        together: int | None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.given, self.notes = given, tuple(notes)
        widened = ", its float16 numbers as float32," * given.widened
        self.title = f"the given ONNX file{widened} in ONNX Runtime {onnxruntime.__version__} without optimizations"
        self.picks: tuple[returned.Pick, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.macs = 0
        self._run, self._together = run, together
        statistics = {
            name for node in given.model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]
        }
        for index, tensor in enumerate(given.model.graph.initializer):
            value = _tensor(tensor)
            if value is None:
                continue
            if tensor.name in statistics or value.numel() < 2 or value.dtype == torch.int64:
                self.register_buffer(f"constant_{index}", value)
            else:
                self.register_parameter(f"constant_{index}", nn.Parameter(value, requires_grad=False))

    def optimized(self, threads: int) -> "OnnxNetwork":
        """The file itself with all optimizations of ONNX Runtime: what is measured of its speed."""
        twin = copy.copy(self)
        twin.given = replace(self.given, kind=self.given.stated)
        twin._run = _runner(session_of(self.given.path, optimized=True, threads=threads))
        return twin

    def returning(self, picks: Sequence[returned.Pick]) -> "OnnxNetwork":
        """Let it return these outputs."""
        self.picks = tuple(picks)
        return self

    def multiply_adds(self, output: Tensor) -> int:
        """Multiply-adds that made `output`, as counted from the graph."""
        first = output if isinstance(output, Tensor) else output[0]
        return self.macs * int(first.shape[0])

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor] | tuple[Tensor, ...]:
        """N x C x H x W, float32 -> the outputs that are picked, or all of them by name.

        Raises:
            BadInput: ONNX Runtime does not run it.
        """
        images = x.detach().cpu().numpy()
        parts = []
        for at in range(0, len(images), self._together or len(images)):
            some = images[at : at + (self._together or len(images))]
            # What takes eight at a time gets the last ones repeated.
            missing = max(0, (self._together or 0) - len(some))
            full = np.concatenate([some, some[-1:].repeat(missing, axis=0)]) if missing else some
            parts.append([output[: len(output) - missing] for output in self._outputs(full)])
        made = {
            name: torch.from_numpy(np.concatenate(column) if len(column) > 1 else column[0])
            for name, column in zip(self.given.outputs, zip(*parts, strict=True), strict=True)
        }
        if not self.picks:
            return made if len(made) > 1 else next(iter(made.values()))
        rows = tuple(returned.row(made[pick.key or self.given.outputs[0]]) for pick in self.picks)
        return rows if len(rows) > 1 else rows[0]

    def _outputs(self, images: Array) -> Sequence[Array]:
        try:
            return [np.ascontiguousarray(output) for output in self._run(as_taken(self.given, images))]
        except Exception as error:  # ONNX Runtime's own types, which have no common one
            raise BadInput(
                f"{self.given.path} does not run in ONNX Runtime on images of {pixels_text(images.shape[2:])}: "
                f"{short_reason(error)}; --input-size gives the size"
            ) from error


def _tensor(tensor: TensorProto) -> Tensor | None:
    try:
        return torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
    except TypeError:  # texts, and types that PyTorch does not have
        return None


def as_taken(given: GivenGraph, images: Array) -> Array:
    """Float32 [N, C, H, W] as the graph takes it; for one that takes pixels from 0..1."""
    if given.takes_pixels:
        images = np.rint(images * np.float32(_PIXEL))
    if given.channels_last:
        images = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images.astype(helper.tensor_dtype_to_np_dtype(given.kind)))


def session_of(
    model: onnx.ModelProto | Path, *, optimized: bool = False, threads: int = 0
) -> onnxruntime.InferenceSession:
    """A graph or a file in ONNX Runtime on the CPU.

    Raises:
        BadInput: ONNX Runtime does not take it.
    """
    options = session_options(threads, optimized=optimized or None)
    source = model if isinstance(model, Path) else model.SerializeToString()
    try:
        return make_session(source, options)
    except Exception as error:  # its own types, which have no common one
        named = f"{model}: " if isinstance(model, Path) else ""
        raise BadInput(f"{named}ONNX Runtime does not take the graph: {short_reason(error)}") from error


def _runner(session: onnxruntime.InferenceSession) -> Callable[[Array], Sequence[Array]]:
    (signature,) = session.get_inputs()
    return lambda images: session.run(None, {signature.name: images})


@dataclass
class _Trial:
    """Finds out how many images a file takes at a time, by running it."""

    given: GivenGraph
    size: tuple[int, int]
    channels: int

    def __post_init__(self) -> None:
        shape = (_TRIED, self.channels, *self.size)
        self.images = np.random.default_rng(0).random(shape, np.float32)

    def rows(self, run: Callable[[Array], Sequence[Array]], together: int, kind: int) -> list[Array] | None:
        """The outputs, so many images at a time; None where it does not run, or returns no row for each image."""
        at_a_time = []
        graph = replace(self.given, kind=kind)
        try:
            for at in range(0, len(self.images), together):
                some = self.images[at : at + together]
                full = np.concatenate([some, some[-1:].repeat(together - len(some), axis=0)])
                made = run(as_taken(graph, full))
                if any(output.ndim < 1 or len(output) != together for output in made):
                    return None
                at_a_time.append([output[: len(some)] for output in made])
        except Exception:  # ONNX Runtime's own types, which have no common one
            return None
        return [np.concatenate(column) for column in zip(*at_a_time, strict=True)]


def _alike(one: Sequence[Array] | None, other: Sequence[Array] | None, limit: float) -> bool:
    if one is None or other is None:
        return False
    for left, right in zip(one, other, strict=True):
        if left.shape != right.shape:
            return False
        first, second = (side.astype(np.float64) for side in (left, right))
        if not np.abs(first - second).max(initial=0.0) <= limit * max(float(np.abs(first).max(initial=0.0)), 1e-30):
            return False
    return True


def load_network(path: Path, size: tuple[int, int], given: GivenGraph, channels: int) -> OnnxNetwork:
    """Load a file and find out how many images it takes at a time.

    Raises:
        BadInput: ONNX Runtime does not take it, it takes several images at a time and no other number, or it computes
            something else in float32.
    """
    original = _runner(session_of(path))
    trial, notes = _Trial(given, size, channels), []
    reference = original
    if given.widened:
        reference = _runner(session_of(given.model))
        together = given.batch or 1
        if not _alike(
            trial.rows(original, together, given.stated), trial.rows(reference, together, given.kind), _ALIKE_WIDENED
        ):
            raise BadInput(
                f"{path} computes something else when its float16 numbers are float32; "
                f"`convoy serve {path}` serves it as it is"
            )
        notes.append("its float16 numbers were made float32, and it is compared with that")
    alone = given.batch or 1
    singly = trial.rows(reference, alone, given.kind)
    if given.batch is None and _alike(singly, trial.rows(reference, _TRIED, given.kind), _ALIKE):
        return OnnxNetwork(given, reference, None, notes)
    opened = for_any_batch(replace(given, batch=alone))
    try:
        several = trial.rows(_runner(session_of(opened)), _TRIED, given.kind)
    except BadInput:
        several = None
    if _alike(singly, several, _ALIKE):
        notes.append(
            f"the file takes {alone} image{'s' * (alone > 1)} at a time; its graph was made to take any number, and "
            f"computes the same for {_TRIED}"
        )
        return OnnxNetwork(replace(given, model=opened, batch=None), reference, alone, notes)
    if alone > 1:
        raise BadInput(
            f"{path} takes exactly {alone} images at a time, and its graph computes something else for others: export "
            "it again with a dynamic batch"
        )
    notes.append("the file takes one image at a time, so that it is published with batches of one")
    return OnnxNetwork(replace(given, batch=1), reference, 1, notes)


def arch_from_onnx(config: ExportConfig) -> Arch:
    """Describe the network of an ONNX file.

    Raises:
        BadInput: it cannot be read, takes no images, or returns what is no output of a network for images.
    """
    path = Path(config.arch)
    given = read_given(path)
    wanted = config.input_size or tuple(
        own or usual for own, usual in zip(given.size, IMAGENET_PREPROCESS.size, strict=True)
    )
    size = (wanted[0], wanted[1])
    if any(own not in (None, side) for own, side in zip(given.size, size, strict=True)):
        axes = "x".join("any" if own is None else str(own) for own in given.size)
        raise BadInput(f"--input-size {size[0]}x{size[1]}: {path} takes images of {axes} pixels; leave the option out")
    channels = given.channels or (len(config.mean) if config.mean is not None else 3)
    network = load_network(path, size, given, channels)
    preprocess, source = _preprocess(config, given, size, channels)
    outputs = _outputs(path, network, (channels, *size), config)
    task: Task = "segmentation" if len(outputs.shape) == _MAP else "classification"
    return Arch(
        name=path.name,
        paper=PAPER,
        source="user",
        num_classes=outputs.classes,
        preprocess=preprocess,
        preprocess_source=source,
        build=partial(_same, path, network, outputs.classes),
        labels=lambda: [str(index) for index in range(outputs.classes)],
        published=network.state_dict,
        published_name=f"as {path.name} has them ({given.made_by}){outputs.changed}",
        task=task,
        deploy=lambda module: network.returning(outputs.picks) if module is network else module,
        outputs=outputs.others,
    )


def _same(path: Path, network: OnnxNetwork, classes: int, asked: int) -> nn.Module:
    if asked != classes:
        raise BadInput(f"{path} has {classes} classes, not {asked}; give as many --labels")
    return network


def _preprocess(
    config: ExportConfig, given: GivenGraph, size: tuple[int, int], channels: int
) -> tuple[Preprocess, str]:
    found = preprocessing.default(size, channels)
    if not given.takes_pixels:
        return found, f"by default: an ONNX file says nothing of it{preprocessing.RESIZED}"
    if config.mean is not None:
        raise BadInput(f"--mean: {given.path} takes uint8 pixels, and normalises them itself; leave the option out")
    plain = replace(found, mean=(0.0,) * channels, std=(1.0,) * channels)
    return plain, f"the file takes pixels, and normalises them itself{preprocessing.RESIZED}"


def _outputs(
    path: Path, network: OnnxNetwork, input_size: tuple[int, int, int], config: ExportConfig
) -> returned.Outputs:
    """The outputs that are exported: rows, or maps of several channels."""
    with torch.no_grad():
        made = network(torch.zeros(2, *input_size))
    parts = made if isinstance(made, dict) else {network.given.outputs[0]: made}
    network.shapes = {name: tuple(output.shape) for name, output in parts.items() if isinstance(output, Tensor)}
    if isinstance(made, Tensor):
        alone = made
        rank = 2 if alone.ndim < 2 or prod(alone.shape[2:]) == 1 else alone.ndim
        if rank not in (2, _MAP) or (rank == _MAP and alone.shape[1] < 2) or not alone.is_floating_point():
            kind = str(alone.dtype).removeprefix("torch.")
            raise BadInput(
                f"{path} returns {kind} {list(alone.shape)} for two images, and an export is for float [2, classes] or "
                f"maps [2, classes, h, w]; `convoy serve {path}` serves it as it is"
            )
    return returned.outputs_of(path.name, network, input_size, config.outputs)


def float_outputs(network: OnnxNetwork) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the graph that is published returns: name in the file -> name of ours, and the shape of a row."""
    found = {}
    for pick in network.picks:
        name = pick.key or network.given.outputs[0]
        found[name] = (pick.name, tuple(returned.row(torch.empty(network.shapes[name], device="meta")).shape[1:]))
    return found
