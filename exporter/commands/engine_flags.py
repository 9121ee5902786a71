"""The flags of `convoy export` that say how a TensorRT engine is built. Imports no heavy library."""

import argparse
from pathlib import Path
from typing import Any

from convoynet.exporter.engine_options import Profile


def batch_option(text: str) -> tuple[int, ...]:
    """Read batch sizes: N or MIN:MAX as two numbers, MIN:USUAL:MAX as three."""
    try:
        sizes = tuple(int(size) for size in text.split(":"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, like 1:32, or MIN:USUAL:MAX, like 1:8:32")
    return sizes * 2 if len(sizes) == 1 else sizes


def add_engine(group: argparse._ArgumentGroup) -> None:
    """Add how a TensorRT engine is built."""
    group.add_argument(
        "--defer-build",
        action="store_true",
        help="publish the graph alone; the server builds the engine for its own GPU at first load, and keeps it",
    )
    group.add_argument(
        "--optimization-level",
        type=int,
        metavar="0-5",
        help="how long to search for fast kernels (default: TensorRT's own)",
    )
    group.add_argument(
        "--workspace-mib", type=int, metavar="N", help="scratch memory that a layer may take (default: all there is)"
    )
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="keep measured kernels between builds: the next is faster"
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="for later versions of TensorRT too; may be slower"
    )
    group.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="for GPUs of other kinds too (Ampere and later); may be slower",
    )


def take_batches(arguments: dict[str, Any]) -> None:
    """Put what --batch gave, as `batches` in parsed `arguments`, where ExportConfig has it: `batch` or `profiles`."""
    batches: list[tuple[int, ...]] = arguments.pop("batches")
    if len(batches) == 1 and len(batches[0]) == 2:
        arguments["batch"] = batches[0]
    else:
        arguments["profiles"] = tuple(Profile.parse(":".join(map(str, sizes))) for sizes in batches)
