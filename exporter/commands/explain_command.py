"""`convoy explain`: the output that explains an answer, for a model that is published or an ONNX file.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from convoynet.exporter import atomic_file
from convoynet.exporter.commands.cli import guarded
from convoynet.exporter.errors import BadInput
from convoynet.usage import Parser

_DESCRIPTION = """\
Add an output to a classifier that says where in the image the evidence for the winning class lies, or for another class
that an input asks about: Grad-CAM at its last map of features, as `convoy export --explain` does. The rest of the graph
stays as it is, quantized or not, and so do its answers, which is looked at in ONNX Runtime and OpenVINO before anything
is written.
"""
_EXAMPLES = """\
examples:
  convoy explain --add models/resnet50
      the newest version again, as the next one; a server that watches the repository takes it
  convoy explain --add theirs.onnx --output explained.onnx
      a file of any exporter

docs/explaining.md says what the map is. Exit codes: 0 written; 2 an argument or a file is not usable, or the network
has no map of features; 3 refused: the answers would change
"""


def explain(argv: Sequence[str]) -> int:
    """Add an output that says where in the image the evidence for a class lies."""
    return guarded("convoy explain", lambda: _explain(argv), "interrupted; nothing was written")


def _explain(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    source, output = arguments.add, arguments.output
    if source.is_dir() and output is not None:
        raise BadInput(f"--output {output} is for an ONNX file; of the model {source} the next version is published")
    if not source.exists():
        raise BadInput(f"--add {source}: no such file or folder")
    if not source.is_dir() and output is None:
        raise BadInput(f"--add {source}: no model's folder in a repository; for an ONNX file say --output FILE as well")

    from convoynet.exporter.publishing.explained_model import explain_file, explain_model

    if source.is_dir():
        told = explain_model(source)
        file = told.file
    else:
        made, told = explain_file(source, arguments.of)
        file = output
        atomic_file.write(file, made.SerializeToString())
    height, width = told.size
    if arguments.json:
        sys.stdout.write(json.dumps({"file": str(file), "features": told.features, "size": [height, width]}) + "\n")
    else:
        sys.stdout.write(f"wrote     {file}\nexplains  the winning class, {height} x {width} at {told.features}\n")
    sys.stdout.flush()


def _parser() -> Parser:
    parser = Parser(
        prog="convoy explain",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--add",
        required=True,
        type=Path,
        metavar="MODEL",
        help="a model's folder in a repository, or an ONNX file (with --output)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the graph of an ONNX file goes")
    parser.add_argument(
        "--of",
        default="",
        metavar="NAME",
        help="the output of an ONNX file that has a score for each class (default: its first)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
