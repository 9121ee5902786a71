"""`convoy inspect`: a table of what each layer of a network or of an ONNX model costs and sees, or a look inside.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.exporter.commands.cli import guarded
from convoynet.exporter.commands.flags import size_option
from convoynet.exporter.commands.inside_flags import add_inside, is_asked, look
from convoynet.exporter.config import ExportConfig, is_factory, is_library, is_program
from convoynet.exporter.errors import BadInput
from convoynet.exporter.publishing.repository import versions
from convoynet.tables import Column, show
from convoynet.usage import Parser

if TYPE_CHECKING:
    from convoynet.exporter.inspecting.inspection import Inspection, Layer

_DESCRIPTION = """\
Show what each layer of a network costs and sees: output shape, parameters, multiply-adds, receptive field, stride
and centre of the field, precision and zeros among the weights.
"""
_EXAMPLES = """\
examples:
  convoy inspect resnet50
      a network that `convoy archs` lists; no weights are loaded
  convoy inspect vgg16 --fully-convolutional --input-size 384
      its fully connected layers as convolutions over a larger image
  convoy inspect models/resnet50
      what was exported: which layers run in INT8, and how many of their weights are zero

  convoy inspect squeezenet1_0 --erf --images photos/ --html field.html
      what the last map really sees, with the published weights, and a page with the picture of it
  convoy inspect squeezenet1_0 --concepts concepts/ --random photos/ --images zebras/ --class zebra --layer features.9
      whether the class hangs on what the folders in concepts/ show

docs/inspecting.md explains the columns. Exit codes: 0; 2 an argument or file is not usable
"""
_MODEL_FILE, _PLAN_SUFFIX = "model.onnx", ".plan"
_UNITS = ((10**9, "G"), (10**6, "M"), (10**3, "k"))


def inspect(argv: Sequence[str]) -> int:
    """Show what each layer of a network or an ONNX model costs and sees."""
    return guarded("convoy inspect", lambda: _inspect(argv))


def _inspect(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    file = _file(arguments)
    if is_asked(arguments):
        look(arguments, file)
        return
    found = _inspection_of_arch(arguments.source, arguments) if file is None else _inspection_of_file(file, arguments)
    if arguments.json:
        sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n")
    else:
        sys.stdout.write(_table(found))
    sys.stdout.flush()


def _parser() -> Parser:
    parser = Parser(
        prog="convoy inspect",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="NAME|PATH",
        help="a network that `convoy archs` lists, your own package.module:factory or FILE.pt2, an ONNX file, or a "
        "model's folder in a repository",
    )
    parser.add_argument(
        "--input-size", type=size_option, metavar="H[xW]", help="size of the image in pixels (default: the network's)"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="size of the output (default: the network's)")
    parser.add_argument(
        "--task", choices=("segmentation", "detection"), help="what your own network returns, where it is no classes"
    )
    parser.add_argument(
        "--fully-convolutional",
        action="store_true",
        help="read the global pooling or the flattening at the end, and the fully connected layers behind it, as "
        "convolutions: VGG's first is one of 7x7",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_inside(parser.add_argument_group("looking inside", "what a network with its weights sees in pictures"))
    return parser


def _file(arguments: argparse.Namespace) -> Path | None:
    """The ONNX file that is meant; None for a network that is built by name."""
    source: str = arguments.source
    path = Path(source)
    if is_program(source) or is_factory(source) or is_library(source):
        return None
    if path.suffix != ".onnx" and os.sep not in source:
        from convoynet.exporter import archs

        # A folder of the same name is meant by ./NAME.
        if source in archs.names() or not path.exists():
            return None
    if arguments.num_classes is not None:
        raise BadInput("--num-classes builds a network of the zoo; an exported model has its classes")
    if arguments.task is not None:
        raise BadInput("--task is for a network of your own, module:factory; an exported model says what it returns")
    return model_file(path)


def _inspection_of_file(file: Path, arguments: argparse.Namespace) -> "Inspection":
    from convoynet.exporter.graph.onnx_read import read_model, reading
    from convoynet.exporter.inspecting.inspection import inspection
    from convoynet.exporter.inspecting.trace_from_onnx import trace_from_onnx

    size, spread = arguments.input_size, arguments.fully_convolutional
    model = read_model(file)
    with reading(str(file), model):
        trace = trace_from_onnx(str(file), model, size, keep_size=spread)
        return inspection(trace, size, fully_convolutional=spread)


def _inspection_of_arch(name: str, arguments: argparse.Namespace) -> "Inspection":
    from convoynet.exporter.pipeline import first_look

    size, spread = arguments.input_size, arguments.fully_convolutional
    own = is_program(name) or is_factory(name)
    config = ExportConfig(
        name,
        weights="default" if own else "random",
        name="inspected",
        num_classes=arguments.num_classes,
        task=arguments.task,
        # The size that a network of the user's is made for is the one that they give.
        input_size=size if (own or is_library(name)) and not spread else None,
    )
    first_look.check_network(config)  # before the seconds that PyTorch takes

    import torch

    from convoynet.exporter.archs import custom
    from convoynet.exporter.inspecting.inspection import inspection
    from convoynet.exporter.inspecting.trace_from_torch import trace_from_torch

    arch = custom.resolve(config)
    with torch.device("meta"):
        network = arch.build(arguments.num_classes or arch.num_classes)
    # Read as convolutions, the network is the one for its own size, slid over the image.
    traced = arch.preprocess.size if spread or size is None else size
    try:
        trace = trace_from_torch(name, network, (arch.preprocess.channels, *traced))
    except BadInput as error:
        raise BadInput(f"{error}; --fully-convolutional may") from error
    return inspection(trace, size, fully_convolutional=spread)


def model_file(path: Path) -> Path:
    """The ONNX file that `path` is, or that the model's or the version's folder holds.

    Raises:
        BadInput: there is none.
    """
    if path.is_file() and path.suffix != _PLAN_SUFFIX:
        return path
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    found = versions(path)
    folder = path.parent if path.is_file() else path / str(found[-1]) if found else path
    file = folder / _MODEL_FILE
    if path.is_dir() and file.is_file():
        return file
    if plan := path if path.is_file() else next(folder.glob(f"*{_PLAN_SUFFIX}"), None):
        instead = f"the {_MODEL_FILE} beside it" if file.is_file() else "the ONNX file that it was built from"
        raise BadInput(f"{plan} is a TensorRT engine, which has no graph to read: name {instead}")
    raise BadInput(f"{path} holds no {_MODEL_FILE}: name an ONNX file, or a model's folder in a repository")


_Column = tuple[str, Callable[["Layer"], str]]


def _table(found: "Inspection") -> str:
    from rich.console import Console

    console = Console(highlight=False)
    layers = [layer for layer in found.layers if not layer.quiet]
    columns = _columns(found)
    titles = [Column("name", text=True, style="cyan"), *(Column(title, text=title == "type") for title, _ in columns)]
    rows = [[layer.name, *(text(layer) for _, text in columns)] for layer in layers]
    # Captured, since rich ends the process itself when the reader of a pipe goes away.
    with console.capture() as text:
        show(console, titles, rows)
        for line in _summary(found, len(found.layers) - len(layers)):
            console.print(line, markup=False, soft_wrap=True)
    return text.get()


def _columns(found: "Inspection") -> list[_Column]:
    """The columns behind the name; one that says the same of all rows is left to the summary."""
    columns: list[_Column] = [
        ("type", lambda layer: layer.type),
        ("output", lambda layer: "?" if layer.output_shape is None else "x".join(map(str, layer.output_shape))),
        ("parameters", lambda layer: f"{layer.parameters:,}" if layer.parameters else ""),
        ("MACs", lambda layer: _amount(layer.macs) if layer.macs else ""),
        ("field", lambda layer: _both(layer, "size", always=True)),
        ("stride", lambda layer: _both(layer, "stride")),
        ("centre", lambda layer: _both(layer, "centre")),
    ]
    if any(cells.unseen for layer in found.layers for cells in layer.cells or ()):
        columns.append(("unseen", _unseen))
    if len({layer.precision for layer in found.layers}) > 1:
        columns.append(("precision", lambda layer: layer.precision))
    if found.sparsity is not None:
        columns.append(("zeros", _zeros))
    return columns


def _summary(found: "Inspection", left_out: int) -> list[str]:
    height, width = found.input_size
    precisions = sorted(found.macs_by_precision.items(), key=lambda item: -item[1])
    shares = ", ".join(kind if len(precisions) == 1 else f"{kind} {macs / found.macs:.1%}" for kind, macs in precisions)
    parts = [
        f"{found.name} at {height}x{width}{', fully convolutional' if found.fully_convolutional else ''}",
        f"{found.parameters:,} parameters",
        f"{found.macs:,} multiply-adds ({shares})",
    ]
    if found.unused_parameters:
        parts[1] += f" ({found.unused_parameters:,} of them unused)"
    if found.sparsity is not None:
        parts.append(f"{found.sparsity:.1%} of the weights are zero")
    lines = ["", "; ".join(parts)]
    if left_out:
        layers, are = ("layer that changes", "is") if left_out == 1 else ("layers that change", "are")
        lines.append(f"{left_out} {layers} neither shape nor field (activations) {are} in --json only")
    return lines


def _both(layer: "Layer", what: str, *, always: bool = False) -> str:
    """A number of the field along both axes: once where they agree, unless `always` both."""
    if layer.field is None:
        return "?"
    height, width = (getattr(axis, what) for axis in layer.field)
    if height is None or width is None:
        return "-"
    return _decimal(height) if height == width and not always else f"{_decimal(height)}x{_decimal(width)}"


def _decimal(value: Fraction) -> str:
    return f"{float(value):.7g}"


def _amount(count: int) -> str:
    return next((f"{count / unit:.3g} {letter}" for unit, letter in _UNITS if count >= unit), str(count))


def _unseen(layer: "Layer") -> str:
    """Cells that a stack of dilated layers skips, along an axis, of those within its field."""
    if layer.cells is None:
        return ""
    height, width = (f"{cells.unseen} of {cells.extent}" for cells in layer.cells)
    return height if height == width else f"{height} x {width}"


def _zeros(layer: "Layer") -> str:
    if layer.weights is None:
        return ""
    share = f"{layer.weights.zeros / layer.weights.count:.1%}"
    return f"{share} 2:4" if layer.weights.two_of_four else share
