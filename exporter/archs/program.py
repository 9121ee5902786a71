"""A program that `torch.export.save` wrote, as a network: `convoy export --arch FILE.pt2`.

`torch.export.load` can run code from the file: it unpickles sample inputs and unusual tensors, and evaluates the
formulas of sizes as Python. A program is opened on the user's word, as their own Python modules are.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils.flop_counter import FlopCounterMode

from convoynet.exporter.archs.dry_run import dry_run
from convoynet.exporter.errors import BadInput, reason

# Operators that stand for another computation in training, and the argument that says so.
_TRAINING = {
    "batch_norm.default": "training",
    "native_batch_norm.default": "training",
    "_native_batch_norm_legit.default": "training",
    "_native_batch_norm_legit_functional.default": "training",
    "dropout.default": "train",
    "dropout_.default": "train",
    "feature_dropout.default": "train",
    "alpha_dropout.default": "train",
    "native_dropout.default": "train",
}


@dataclass(frozen=True)
class Program:
    """A program that takes images and returns one tensor.

    Attributes:
        network: the program as a module; it has no training mode.
        channels: of the image.
        size: (height, width) of the image; None along an axis of which the program takes any.
    """

    network: "ProgramModule"
    channels: int
    size: tuple[int | None, int | None]


class ProgramModule(nn.Module):
    """An exported program that bears being put into evaluation mode, which it is in already."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        # Without guards: the sizes that it was traced at bind nobody, and parity is measured at all that are promised.
        self.program = program.module(check_guards=False)
        self._macs = 0

    def measure(self, input_size: tuple[int, int, int]) -> None:
        """Count its multiply-adds for an image (channels, height, width); the layers that could be counted are gone."""
        with FlopCounterMode(display=False) as counter:
            dry_run(self, input_size, before=counter.flop_counts.clear)
        self._macs = counter.get_total_flops() // 2

    def train(self, mode: bool = True) -> "ProgramModule":
        """Do nothing: a program's mode is written into its operators."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> whatever the program returns."""
        result: Tensor = self.program(x)
        return result

    def multiply_adds(self, output: Tensor) -> int:
        """Multiply-adds that made `output`, as measured."""
        return self._macs * output.shape[0]


def load_program(path: Path) -> Program:
    """Read a program and check that it can be served.

    Raises:
        BadInput: the file is missing or no such program, the program was exported for training or for one batch size,
            or it takes or returns something else than images and logits.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; torch.export.save(program, FILE) writes one")
    try:
        with _silence():
            program = torch.export.load(path)
    # A damaged archive, or one of another version, can fail in almost any way inside torch.export.load.
    except Exception as error:
        raise BadInput(
            f"{path}: PyTorch {torch.__version__} cannot read it as an exported program ({reason(error)}); "
            "save it again with torch.export.save(program, FILE)"
        ) from error
    _require_evaluation(path, program)
    image = _image(path, program)
    channels = image.shape[1]
    if not isinstance(channels, int) or channels not in (1, 3):
        raise BadInput(f"{path}: takes {channels} channels; an image has 3, or 1 in grey")
    height, width = (size if isinstance(size, int) else None for size in image.shape[2:])
    return Program(ProgramModule(program), channels, (height, width))


def _require_evaluation(path: Path, program: ExportedProgram) -> None:
    found = [str(name) for name in program.graph_signature.buffers_to_mutate.values()]
    found += [str(node.target) for node in program.graph.nodes if _trains(node)]
    if found:
        raise BadInput(f"{path}: was exported in training mode ({found[0]}); call model.eval() and export it again")


def _trains(node: torch.fx.Node) -> bool:
    name = _TRAINING.get(getattr(node.target, "__name__", ""))
    if name is None:
        return False
    arguments = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    index = arguments.index(name)
    return bool(node.kwargs.get(name, node.args[index] if index < len(node.args) else False))


def _image(path: Path, program: ExportedProgram) -> Tensor:
    """The one input, as the tracer knows it: sizes that are symbols are dynamic."""
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 4:
        raise BadInput(f"{path}: must take one tensor, the images [N, C, H, W]; it takes {_shapes(values)}")
    image: Tensor = values[0]
    if image.dtype != torch.float32:
        raise BadInput(f"{path}: takes {image.dtype}; export it with float32 images")
    if isinstance(image.shape[0], int):
        raise BadInput(
            f"{path}: takes exactly {image.shape[0]} images at a time; export it again with a dynamic batch: "
            "torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), with two "
            "images or more"
        )
    return image


def _shapes(values: list[Any]) -> str:
    return ", ".join(str(list(value.shape)) if isinstance(value, Tensor) else repr(value) for value in values) or "none"


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the library's log lines from the user; what they say comes as an exception too."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
