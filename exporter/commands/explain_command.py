"""`convoy explain --add`: the output that explains an answer, for a model that is published or an ONNX file.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import sys

from convoynet.exporter import atomic_file
from convoynet.exporter.commands.cli import guarded
from convoynet.exporter.errors import BadInput


def run(arguments: argparse.Namespace) -> int:
    """Add an output that says where in the image the evidence for a class lies, as the flags of `add_flags` say."""
    return guarded("convoy explain", lambda: _add(arguments), "interrupted; nothing was written")


def _add(arguments: argparse.Namespace) -> None:
    source, output = arguments.add, arguments.output
    if source.is_dir() and output is not None:
        raise BadInput(f"--output {output} is for an ONNX file; of the model {source} the next version is published")
    if not source.exists():
        raise BadInput(f"--add {source}: no such file or folder")
    if output is not None and output.exists() and output.samefile(source):
        raise BadInput(f"--output {output} is the file that --add reads: name another")
    if not source.is_dir() and output is None:
        raise BadInput(f"--add {source}: no model's folder in a repository; for an ONNX file say --output FILE as well")

    from convoynet.exporter.publishing.explained_model import explain_file, explain_model

    if source.is_dir():
        told = explain_model(source, features=arguments.features)
        file = told.file
    else:
        made, told = explain_file(source, arguments.of, features=arguments.features)
        file = output
        atomic_file.write(file, made.SerializeToString())
    height, width = told.size
    if arguments.json:
        found: dict[str, object] = {"file": str(file), "features": told.features, "size": [height, width]}
        if told.embedding is not None:
            found["embedding"] = {"tensor": told.embedding[0], "size": told.embedding[1]}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write(f"wrote     {file}\nexplains  the winning class, {height} x {width} at {told.features}\n")
        if told.embedding is not None:
            sys.stdout.write(f"features  {told.embedding[1]} at {told.embedding[0]}\n")
    sys.stdout.flush()


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that belong to --add alone; --add, --output and --json are the command's."""
    group.add_argument(
        "--of",
        default="",
        metavar="NAME",
        help="the output of an ONNX file that has a score for each class (default: its first)",
    )
    group.add_argument(
        "--features", action="store_true", help="add the output 'features' as well: what the last layer reads"
    )
