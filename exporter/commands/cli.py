"""`convoy export` and `convoy archs`: flags to ExportConfig, errors to one line and an exit code.

Importable without torch and onnx, so that `convoy --help` and a serving image can have it.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from convoynet.exporter.commands import api, model_flags
from convoynet.exporter.errors import BadInput, ExporterError, Missing, lacking
from convoynet.tables import Column, fitted, show
from convoynet.usage import Parser

if TYPE_CHECKING:
    from convoynet.exporter.archs.facts import Facts

INTERRUPTED = 130
_BUG = 1
# Widths in characters of the table of networks.
_OTHER_COLUMNS, _MIN_PAPER = 87, 20
_SUMMARY_INDENT = 11

_DESCRIPTION = """\
Turn a classic ConvNet into a small, fast, verified model for a server.

The network is built by name, gets its weights, becomes ONNX (and INT8 if asked), is compared with PyTorch on images,
timed, and published into a model repository together with the evidence. Where the result is too far from PyTorch
nothing is published. An ONNX file is compared with itself instead.
"""

_EXAMPLES = """\
examples:
  convoy export --arch lenet5
      the packaged network, to models/lenet5/1
  convoy export --arch resnet50 --int8 --calibration photos/ --target cpu
      four times smaller, and faster: the report says by how much; photos/ holds a few hundred typical images
  convoy export --arch resnet20 --weights trained.pt --int8 --calibration train/ --eval test/ --max-drop 0.5
      refused (exit 3) if INT8 loses more than half a point of top-1 on test/<class>/*.jpg
  convoy export --arch resnet56 --weights trained.pt --prune 0.5 --finetune train/ --int8 --eval test/
      half of the multiply-adds, trained back with the unpruned network as the teacher, then INT8
  convoy export --arch vgg16 --num-classes 37 --labels pets.txt --weights pets.safetensors --input uint8 --name pets
      your own classes; clients send pixels, and the graph normalises them
  convoy export --arch nets:small --num-classes 5 --input-size 128 --int8 --calibration photos/
      your own network: the function small in ./nets.py returns the module
  convoy export --onnx theirs.onnx --int8 --calibration photos/ --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5
      a file of any exporter, which is also what the result is compared with
  convoy export --arch vgg16 --fully-convolutional --input-size 384
      a map of 6x6 logits a class instead of one

  convoy export --arch resnet101 --int8 --calibration photos/ --format tensorrt --batch 1:8:64
      a TensorRT engine for batches up to 64, tuned for 8: docs/gpu.md

exit codes: 0 published; 2 an argument or file is not usable; 3 refused: too far from PyTorch, or not fit for the
runtime; 4 a part is not installed
"""


_interrupted = threading.Event()


def interrupted() -> bool:
    """Whether a signal asked the command that runs to end."""
    return _interrupted.is_set()


def export(argv: Sequence[str]) -> int:
    """Turn a network into a verified, compressed model in a model repository."""
    return guarded("convoy export", lambda: _export(argv), "interrupted; nothing was published")


def archs(argv: Sequence[str]) -> int:
    """List the networks that can be exported."""
    return guarded("convoy archs", lambda: _archs(argv))


def main() -> NoReturn:
    """Run the script `export`, which is `convoy export`."""
    sys.exit(export(sys.argv[1:]))


def guarded(program: str, work: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run the command `program` by `work`, and turn whatever it raises into one line on stderr and an exit code.

    Args:
        program: its name.
        work: what it does.
        interrupted: what to say where a signal ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files, and what a terminal cannot show, by their bytes
            stream.reconfigure(errors="backslashreplace")
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
        line, code = (interrupted, INTERRUPTED) if isinstance(error, KeyboardInterrupt) else _explain(error)
        # A message of another library's may have lines of its own.
        sys.stderr.write(f"{program}: {' '.join(line.split())}\n")
        return code
    return 0


def require_page(page: Path | None) -> None:
    """See that `--html` names a page: a slip would replace a file of another kind.

    Raises:
        BadInput: it does not end in .html, or there is no such folder.
    """
    if page is None:
        return
    if page.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"--html {page}: the name of a page ends in .html")
    if not page.parent.is_dir():
        raise BadInput(f"--html {page}: there is no folder {page.parent}")


def _explain(error: BaseException) -> tuple[str, int]:
    """Return what to tell a person about `error`, and the exit code."""
    if os.environ.get("CONVOY_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, ExporterError):
        return str(error), error.exit_code
    if isinstance(error, ImportError):
        return str(lacking(error)), Missing.exit_code
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
    config = api.config_of(arguments)

    from convoynet.exporter.archs import own
    from convoynet.exporter.evidence import report
    from convoynet.exporter.progress import Interruptible, Quiet, Terminal

    progress = Interruptible(Quiet() if as_json else Terminal(), interrupted)
    with own.nothing_on_stdout():  # a network may print
        published = api.publish(config, progress)
    if as_json:
        sys.stdout.write(published.report.to_json())
    else:
        told = report.summary(published.report, published.folder, config.repository)
        if sys.stdout.isatty():
            told = fitted(told, shutil.get_terminal_size().columns, _SUMMARY_INDENT)
        sys.stdout.write(told + "\n")
    sys.stdout.flush()


def _export_parser() -> Parser:
    parser = Parser(
        prog="convoy export",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model_flags.add_model(parser)
    parser.add_argument("--json", action="store_true", help="print report.json on stdout and nothing else")
    return parser


def _archs(argv: Sequence[str]) -> None:
    parser = Parser(prog="convoy archs", description="List the networks that can be exported.")
    parser.add_argument("--json", action="store_true", help="print a JSON list, for programs")
    parser.add_argument(
        "--all",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="list the names of timm's and torchvision's image classifiers instead; with PATTERN, those that have it "
        "in them, or match it where it has * in it",
    )
    options = parser.parse_args(argv)

    from convoynet.exporter.archs import facts, libraries

    networks = facts.recorded().values()
    if options.all is not None:
        found = libraries.matching(options.all)
        rows = [{"name": name, "module": module} for name, module in found.items()]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n" if options.json else "\n".join([*found, ""]))
    elif options.json:
        sys.stdout.write(json.dumps([_public(network) for network in networks], indent=2) + "\n")
    else:
        _print_table(networks)
    sys.stdout.flush()


def _public(network: "Facts") -> dict[str, Any]:
    """All but the place in our source."""
    return {key: value for key, value in asdict(network).items() if key != "module"}


def _print_table(networks: Iterable["Facts"]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    rows = [
        [
            network.name,
            "x".join(map(str, network.input_size)),
            str(network.num_classes),
            f"{network.parameters / 1e6:.2f}",
            f"{network.macs / 1e9:.3f}",
            network.source,
            "yes" if network.published_weights else "none",
            network.paper,
        ]
        for network in networks
    ]
    columns = [
        Column("name", text=True, style="cyan"),
        *map(Column, ("input", "classes", "M params", "G MACs")),
        *(Column(title, text=True) for title in ("source", "weights", "paper")),
    ]
    room = console.width - _OTHER_COLUMNS
    if console.is_terminal and room >= _MIN_PAPER:  # the paper in what is left of a line, if that is worth it
        rows = [[*others, textwrap.shorten(paper, room, placeholder=" …")] for *others, paper in rows]
    elif console.is_terminal:
        columns.pop()
    show(console, columns, rows)
