"""The flags of `convoy explain --method`, and the masks that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from convoynet.server.client.arguments import add_model, fraction, positive, seconds
from convoynet.server.client.errors import invalid
from convoynet.server.datatypes import Array
from convoynet.server.explaining.asking import Make
from convoynet.server.explaining.masks import Occlusion, Rise, ScoreCam, Size, squares
from convoynet.server.explaining.pace import SHARE
from convoynet.server.explaining.picture import Color
from convoynet.server.explaining.subject import MAP_RANK
from convoynet.usage import Parser

METHODS = ("rise", "occlusion", "score-cam")
FOLDER = "explanations"
_MOST_MASKS = 100_000
_MOST_CELLS = 32
_MASKS, _GRID, _KEEP = 2000, 7, 0.5
# The methods that flags are for, where not for all.
_FOR = {
    **dict.fromkeys(("masks", "grid", "keep"), ("rise",)),
    **dict.fromkeys(("window", "stride"), ("occlusion",)),
    "seed": ("rise", "occlusion"),
    "maps": ("score-cam",),
}
_OF_LOCAL = ("mean", "std", "input_size", "resize", "interpolation", "channel_order", "labels")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that belong to --method alone; --method, --output and --json are the command's."""
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files")
    add = parser.add_argument_group("with --method").add_argument
    add("--class", dest="class_name", metavar="C", help="a class, by number or label (default: the winner)")
    add("--object", type=positive, metavar="N", help="detector: the object with the N-th highest score (default: 1)")
    add("--masks", type=positive, metavar="N", help=f"rise: masks; more are steadier (default: {_MASKS})")
    add("--grid", type=positive, metavar="N", help=f"rise: cells of a mask along each side (default: {_GRID})")
    add("--keep", type=fraction, metavar="P", help=f"rise: the part of the cells that is kept (default: {_KEEP})")
    add(
        "--window",
        type=positive,
        metavar="PX",
        help="occlusion: side of the square, in pixels of the network's input (default: a seventh of the shorter side)",
    )
    add("--stride", type=positive, metavar="PX", help="occlusion: from one square to the next (default: half of it)")
    add(
        "--baseline",
        type=_color,
        default="mean",
        metavar="mean|R,G,B",
        help="what stands where the image is hidden: its mean colour, or one of 0 to 255 each (default: %(default)s)",
    )
    add("--seed", type=_whole, metavar="N", help="rise, occlusion: of the masks, or of the squares' order (default: 0)")
    add(
        "--maps",
        metavar="OUTPUT",
        help="score-cam: the output with the map of features, [channels, height, width] (default: the only such one)",
    )
    add(
        "--time-limit",
        type=seconds,
        default=600.0,
        metavar="S",
        help="seconds for an image; what is answered by then is shown (default: %(default)g)",
    )
    add(
        "--share",
        type=fraction,
        default=SHARE,
        metavar="P",
        help="of the time, what masks may take beside others' requests, which then wait longer (default: %(default)s)",
    )
    add_model(parser, required=False)
    add = parser.add_argument_group("without a server").add_argument
    add(
        "--local",
        type=Path,
        metavar="PATH",
        help="a model's folder in a repository, or an ONNX file, which this command serves while it runs",
    )
    for name in _OF_LOCAL:
        flag = f"--{name.replace('_', '-')}"
        add(flag, metavar="FILE" if name == "labels" else "TEXT", help=f"of an ONNX file: as {flag} of convoy serve")


def check(parser: Parser, arguments: argparse.Namespace) -> None:
    """End with one line where the flags do not go together."""
    if not arguments.images:
        parser.error("the following arguments are required: IMAGE")
    if (arguments.model is None) == (arguments.local is None):
        parser.error("give --model NAME of a server, or --local PATH")
    for name, methods in _FOR.items():
        if arguments.method not in methods and getattr(arguments, name) is not None:
            parser.error(f"--{name} is for --method {' or '.join(methods)}")
    for name in _OF_LOCAL:
        if arguments.local is None and getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --local; a server's model says it in its config")
    if (arguments.masks or 0) > _MOST_MASKS:
        parser.error(f"--masks {arguments.masks}: at most {_MOST_MASKS}")
    if (arguments.grid or 0) > _MOST_CELLS:
        parser.error(f"--grid {arguments.grid}: at most {_MOST_CELLS} cells along a side")
    if arguments.share == 0:
        parser.error("--share 0 leaves no time for masks: say 0.005 or so")
    if arguments.keep in (0, 1):
        parser.error(f"--keep {arguments.keep:g} hides {'all' if arguments.keep == 0 else 'nothing'}: say 0.5 or so")
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output '{arguments.output}' is not a folder")


def stated(arguments: argparse.Namespace) -> dict[str, str]:
    """What was said of an ONNX file, as `load` takes it."""
    return {name: getattr(arguments, name) for name in _OF_LOCAL if getattr(arguments, name) is not None}


def reads_maps(arguments: argparse.Namespace) -> bool:
    """Whether the masks are made of what the model answers of an image."""
    return arguments.method in _FOR["maps"]


def seed_of(arguments: argparse.Namespace) -> int | None:
    """The seed of what is drawn; None where nothing is."""
    if arguments.method not in _FOR["seed"]:
        return None
    return int(arguments.seed or 0)


def masks_for(arguments: argparse.Namespace, size: Size, maps: str) -> Make:
    """What makes the masks for a target.

    Raises:
        ClientError: the squares are too many, or leave gaps.
    """
    if maps:
        return lambda score, answer: _score_cam(size, maps, answer[maps][0])
    seed = arguments.seed or 0
    if arguments.method == "rise":
        options = (arguments.masks or _MASKS, arguments.grid or _GRID, arguments.keep or _KEEP, seed)
        return lambda score, answer: Rise(size, *options)
    window = arguments.window or -(-min(size) // 7)
    stride = arguments.stride or -(-window // 2)
    if window > max(size):
        raise invalid(f"--window {window} hides all of an input of {size[1]}x{size[0]} pixels")
    if stride > window:
        raise invalid(f"--stride {stride} leaves gaps between squares of {window} pixels: at most {window}")
    if (count := squares(size, window, stride)) > _MOST_MASKS:
        raise invalid(f"--stride {stride} makes {count:,} squares, {_MOST_MASKS:,} are allowed: say a larger one")
    return lambda score, answer: Occlusion(size, window, stride, seed, score)


def _score_cam(size: Size, output: str, found: Array) -> ScoreCam:
    """The masks of a map of features that a model answered.

    Raises:
        ClientError: it is no such map, or is the same at every place.
    """
    if found.ndim != MAP_RANK or found.dtype.kind != "f" or not np.isfinite(found).all():
        shape = list(found.shape)
        raise invalid(f"output '{output}' is {found.dtype} {shape}, no map of finite numbers [channels, height, width]")
    masks = ScoreCam(size, found)
    if not 0 < masks.count <= _MOST_MASKS:
        why = f"{masks.count:,} channels, {_MOST_MASKS:,} are allowed" if masks.count else "the same number everywhere"
        raise invalid(f"output '{output}' has {why}")
    return masks


def _color(text: str) -> Color | str:
    """`mean`, or three numbers, as argparse's `type`."""
    parts = text.split(",")
    if text == "mean":
        return text
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and int(part) < 256 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither mean nor R,G,B of 0 to 255 each")
    red, green, blue = map(int, parts)
    return red, green, blue


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)
