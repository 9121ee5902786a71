"""`convoy compare`: networks and exported models side by side, measured in one run.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convoynet.exporter.commands.cli import guarded
from convoynet.exporter.errors import BadInput
from convoynet.tables import Column, show
from convoynet.usage import Parser

_DESCRIPTION = """\
Put networks and exported models side by side: size, multiply-adds, speed here and now, and accuracy with --eval.
"""
_EXAMPLES = """\
examples:
  convoy compare resnet50 mobilenet_v2 efficientnet_b0
      what they cost, in float32 with random weights
  convoy compare models/resnet56 models/resnet56-half models/resnet56-half-int8 --eval test/ --plot front.png
      what compression gained and lost; a model that another beats in everything is named

Speed is ONNX Runtime's on the CPU of this machine, all models in turn. Images are prepared as each model's config says,
see docs/preprocessing.md. Exit codes: 0; 2 an argument or file is not
usable
"""


def compare(argv: Sequence[str]) -> int:
    """Put networks and exported models side by side."""
    return guarded("convoy compare", lambda: _compare(argv))


def _compare(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.threads < 1:
        raise BadInput(f"--threads {arguments.threads} is not 1 or more")
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        raise BadInput(f"--plot {arguments.plot}: there is no folder {arguments.plot.parent}")

    from convoynet.exporter.progress import Quiet, Terminal
    from convoynet.exporter.studies import variants
    from convoynet.exporter.studies.compare import compare as measure

    if arguments.plot is not None:
        variants.require_kind(arguments.plot)
    progress = Quiet() if arguments.json else Terminal()
    compared = measure(arguments.models, arguments.eval, arguments.threads, progress)
    found = compared.variants
    beaten = variants.dominated(found)
    if arguments.plot is not None:
        try:
            variants.plot(found, arguments.plot)
        except OSError as error:
            raise BadInput(f"--plot {arguments.plot} cannot be written: {error}") from error
    if arguments.json:
        rows = [variant.to_json() | {"beaten_by": beaten.get(variant.name)} for variant in found]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        sys.stderr.writelines(f"{line}\n" for line in compared.remarks)
    else:
        sys.stdout.write(text([variants.columns(variant, found[0]) for variant in found]))
        for name, by in beaten.items():
            sys.stdout.write(f"{name}: {by} is no worse in {variants.counted(found)} and better in something\n")
        sys.stdout.writelines(f"{line}\n" for line in (*variants.doubts(found), *compared.remarks))
    sys.stdout.flush()


def text(rows: Sequence[dict[str, str]], words: Sequence[str] = ("name", "precision")) -> str:
    """Return a table for a terminal; a column in which nothing stands is left out, those of `words` stand left."""
    from rich.console import Console

    console = Console(highlight=False)
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    columns = [Column(name, text=name in words) for name in names]
    # Captured, since rich ends the process itself when the reader of a pipe goes away.
    with console.capture() as shown:
        show(console, columns, [[row[name] for name in names] for row in rows])
    return shown.get()


def _parser() -> Parser:
    parser = Parser(
        prog="convoy compare",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "models", nargs="+", metavar="NAME|DIR", help="a network of `convoy archs`, or the folder of an exported model"
    )
    parser.add_argument("--eval", type=Path, metavar="DIR", help="class folders to measure the models' accuracy on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of one call")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over latency")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
