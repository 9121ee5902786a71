"""`convoy export` and `convoy archs`: flags to ExportConfig, errors to one line and an exit code.

Importable without torch and onnx, so that `convoy --help` and a serving image can have it.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from exporter.config import (
    CALIBRATION_METHODS,
    FORMATS,
    INPUTS,
    MAX_BATCH,
    MAX_PIXELS,
    OPSETS,
    TARGETS,
    ExportConfig,
    find_target,
)
from exporter.errors import ExporterError, Missing

INTERRUPTED = 130
_BUG = 1
# Widths in characters of the table of networks.
_OTHER_COLUMNS, _MIN_PAPER, _PIPE_WIDTH = 82, 20, 240

_DESCRIPTION = """\
Turn a classic ConvNet into a small, fast, verified model for a server.

The network is built by name, gets its weights, becomes ONNX (and INT8 if asked), is compared with PyTorch on images,
timed, and published into a model repository together with the evidence. Where the result is too far from PyTorch
nothing is published.
"""

_EXAMPLES = """\
examples:
  convoy export --arch lenet5
      the packaged network, to models/lenet5/1
  convoy export --arch resnet50 --int8 --calibration photos/ --target cpu
      four times smaller, and faster: the report says by how much; photos/ holds a few hundred typical images
  convoy export --arch resnet20 --weights trained.pt --int8 --calibration train/ --eval test/ --max-drop 0.5
      refused (exit 3) if INT8 loses more than half a point of top-1 on test/<class>/*.jpg
  convoy export --arch vgg16 --num-classes 37 --labels pets.txt --weights pets.safetensors --input uint8 --name pets
      your own classes; clients send pixels, and the graph normalises them
  convoy export --arch nets:small --num-classes 5 --input-size 128 --int8 --calibration photos/
      your own network: the function small in ./nets.py returns the module
  convoy export --arch vgg16 --fully-convolutional --input-size 384
      a map of 6x6 logits a class instead of one

exit codes: 0 published; 2 an argument or file is not usable; 3 refused: too far from PyTorch, or not fit for the
runtime; 4 a part is not installed
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


_interrupted = threading.Event()


def export(argv: Sequence[str]) -> int:
    """Turn a network into a verified, compressed model in a model repository."""
    return guarded("convoy export", lambda: _export(argv))


def archs(argv: Sequence[str]) -> int:
    """List the networks that can be exported."""
    return guarded("convoy archs", lambda: _archs(argv))


def main() -> NoReturn:
    """Run the script `export`, which is `convoy export`."""
    sys.exit(export(sys.argv[1:]))


def guarded(program: str, work: Callable[[], None]) -> int:
    """Run the command `program` by `work`, and turn whatever it raises into one line on stderr and an exit code."""
    try:
        with _signals_interrupt():
            work()
    except SystemExit as stop:  # argparse: --help, or a flag that it does not know
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        # The reader of stdout went away (`| head`); what was asked for is done.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (Exception, KeyboardInterrupt) as error:
        line, code = _explain(error)
        # A message of another library's may have lines of its own.
        sys.stderr.write(f"{program}: {' '.join(line.split())}\n")
        return code
    return 0


def _explain(error: BaseException) -> tuple[str, int]:
    """Return what to tell a person about `error`, and the exit code."""
    if os.environ.get("CONVOY_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, ExporterError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was published", INTERRUPTED
    if isinstance(error, ImportError):
        name = error.name or str(error)
        return f"{name} is missing or does not load; pip install 'convoy[export,cpu]' brings it", Missing.exit_code
    return f"this is a bug in Convoy: {type(error).__name__}: {error} (CONVOY_DEBUG=1 shows where)", _BUG


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that it leaves nothing behind either, and remember that one of them came."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    _interrupted.clear()
    previous = [(number, signal.signal(number, interrupt)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def _export(argv: Sequence[str]) -> None:
    arguments = vars(_export_parser().parse_args(argv))
    as_json = arguments.pop("json")
    arguments["target"] = arguments["target"] or find_target()
    config = ExportConfig(**arguments)

    from exporter import pipeline, report
    from exporter.progress import Interruptible, Quiet, Terminal

    progress = Interruptible(Quiet() if as_json else Terminal(), _interrupted.is_set)
    published = pipeline.run(config, progress)
    if as_json:
        sys.stdout.write(published.report.to_json())
    else:
        sys.stdout.write(report.summary(published.report, published.folder, config.repository) + "\n")
    sys.stdout.flush()


def _export_parser() -> Parser:
    parser = Parser(
        prog="convoy export",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_network(parser.add_argument_group("network"))
    _add_result(parser.add_argument_group("result"))
    _add_compression(parser.add_argument_group("compression"))
    _add_checks(parser.add_argument_group("checks"))
    parser.add_argument("--json", action="store_true", help="print report.json on stdout and nothing else")
    return parser


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--arch",
        required=True,
        metavar="NAME|MODULE:FACTORY|FILE.pt2",
        help="a network that `convoy archs` lists; your own function that returns one, such as package.module:factory, "
        "found from the current directory; or a file of torch.export.save, which may run code: open only those that "
        "you trust",
    )
    group.add_argument(
        "--weights",
        default="default",
        metavar="default|random|FILE",
        help="published weights (the default, may download; of your own network those that it was built with), "
        "random ones, or a checkpoint: .pt .pth .th .safetensors, read without running code from it",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights and made images (default 0)")
    group.add_argument("--num-classes", type=int, metavar="N", help="size of the output (default: the network's)")
    group.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, one a line, in the order of the outputs"
    )
    group.add_argument(
        "--input-size",
        type=size_option,
        metavar="H[xW]",
        help="size of the image in pixels, such as 384 or 256x320, where the network takes it; images are resized in "
        "proportion before the crop (default: the network's; 224 for your own)",
    )
    group.add_argument(
        "--mean",
        type=_values,
        metavar="R,G,B",
        help="subtracted from pixels of 0 to 1; one number for grey (default: the network's; ImageNet's for your own)",
    )
    group.add_argument("--std", type=_values, metavar="R,G,B", help="what the rest is divided by; goes with --mean")
    group.add_argument(
        "--fully-convolutional",
        action="store_true",
        help="turn the fully connected layers of VGG, AlexNet and the like into convolutions: an image larger than "
        "the network's own gives a map of logits",
    )


def size_option(text: str) -> tuple[int, int]:
    """Read a size in pixels, H or HxW, as (height, width)."""
    height, cross, width = text.partition("x")
    try:
        size = int(height), int(width if cross else height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not H or HxW, like 384 or 256x320") from error
    if not all(1 <= pixels <= MAX_PIXELS for pixels in size):
        raise argparse.ArgumentTypeError(f"{text!r} is not within 1 and {MAX_PIXELS} pixels")
    return size


def _values(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not R,G,B or one number, like 0.485,0.456,0.406") from error


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model-repository",
        dest="repository",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="where to publish (default models)",
    )
    group.add_argument(
        "--name",
        default="",
        metavar="NAME",
        help="the model's name there (default: the arch, the factory or the file's stem)",
    )
    group.add_argument("--version", type=int, metavar="N", help="version to publish (default: the next)")
    group.add_argument("--force", action="store_true", help="replace --version where it exists")
    group.add_argument("--format", choices=FORMATS, default="onnx", help="file format (default onnx)")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="machine that will run it; decides how INT8 is written, and a model made for one is slow or wrong on "
        "the other (default: gpu where an NVIDIA GPU is found, else cpu)",
    )
    group.add_argument(
        "--input",
        choices=INPUTS,
        default="float32",
        help="float32: clients normalise; uint8: clients send pixels, a quarter of the bytes (default float32)",
    )
    group.add_argument(
        "--batch",
        type=_batch,
        metavar="MIN:MAX",
        help=f"batch sizes that the model must take, at most {MAX_BATCH} (default 1:32; segmentation 1:8, "
        "detection 1:4)",
    )
    group.add_argument(
        "--opset",
        type=int,
        default=20,
        metavar="N",
        help=f"ONNX operator set, {OPSETS.start} to {OPSETS.stop - 1} (default 20)",
    )


def _add_compression(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--int8", action="store_true", help="quantize weights and activations to 8 bits")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="typical images, at any depth; they set the INT8 ranges and check the result "
        "(default: packaged or made ones, which suit a trial only)",
    )
    group.add_argument(
        "--calibration-samples",
        type=int,
        default=256,
        metavar="N",
        help="images to calibrate on; more takes longer (default 256)",
    )
    group.add_argument(
        "--calibration-method",
        choices=CALIBRATION_METHODS,
        help="how to choose the range of each activation: minmax keeps the largest value, percentile cuts the rarest "
        "off, entropy and mse clip where least is lost, auto tries all for each tensor and takes longer (default mse)",
    )


def _add_checks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--eval", type=Path, metavar="DIR", help="class folders to measure accuracy on, before and after"
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="refuse when top-1 on --eval falls by more percentage points than this",
    )


def _batch(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        return int(low), int(high if colon else low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, like 1:32") from error


def _archs(argv: Sequence[str]) -> None:
    parser = Parser(prog="convoy archs", description="List the networks that can be exported.")
    parser.add_argument("--json", action="store_true", help="print a JSON list, for programs")
    as_json = parser.parse_args(argv).json
    networks = _networks()
    if as_json:
        sys.stdout.write(json.dumps(networks, indent=2) + "\n")
    else:
        _print_table(networks)
    sys.stdout.flush()


def _networks() -> list[dict[str, Any]]:
    from exporter import assets

    # Recorded, and compared with the registry by a test: importing torch and counting take half a minute.
    networks: list[dict[str, Any]] = json.loads(assets.ZOO.read_text(encoding="utf-8"))
    return networks


def _print_table(networks: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a pipe has no width to keep to
        console.width = _PIPE_WIDTH
    room = console.width - _OTHER_COLUMNS
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", style="cyan", no_wrap=True)
    for column in ("input", "classes", "M params", "G MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("source", "weights", "paper")[: 3 if room >= _MIN_PAPER else 2]:
        table.add_column(column, no_wrap=True)
    for network in networks:
        cells = [
            network["name"],
            "x".join(map(str, network["input_size"])),
            str(network["num_classes"]),
            f"{network['parameters'] / 1e6:.2f}",
            f"{network['macs'] / 1e9:.3f}",
            network["source"],
            "yes" if network["published_weights"] else "none",
        ]
        if room >= _MIN_PAPER:
            cells.append(textwrap.shorten(network["paper"], room, placeholder=" …"))
        table.add_row(*cells)
    console.print(table)
