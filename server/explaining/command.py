"""`convoy explain --method`: the flags, and a run over the images."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convoynet.errors import ConvoyError
from convoynet.server.api.loaded import load
from convoynet.server.client.access import Security
from convoynet.server.client.arguments import add_model, fraction, positive, seconds, security
from convoynet.server.client.async_client import AsyncClient
from convoynet.server.client.client import Client
from convoynet.server.client.errors import ClientError, invalid
from convoynet.server.client.operations import image_input_of, region_of
from convoynet.server.client.predict import config_of, is_image
from convoynet.server.datatypes import Array
from convoynet.server.explaining import results
from convoynet.server.explaining.asking import Asker, Make
from convoynet.server.explaining.masks import Occlusion, Rise, ScoreCam, Size, squares
from convoynet.server.explaining.pace import SHARE
from convoynet.server.explaining.picture import Color, picture_of
from convoynet.server.explaining.results import Written
from convoynet.server.explaining.subject import MAP_RANK, Wanted, maps_of, subject_of
from convoynet.server.explaining.subject import check as check_task
from convoynet.tables import Column, show
from convoynet.usage import Parser

METHODS = ("rise", "occlusion", "score-cam")
FOLDER = "explanations"
INTERRUPTED = 130
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


@dataclass(frozen=True)
class _Served:
    """A model on a server; `alone` where no other can ask it."""

    url: str
    model: str
    version: str
    security: Security
    alone: bool = False


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


def run(arguments: argparse.Namespace) -> int:
    """Explain what a model says of images, as the flags of `add_flags` say; returns the exit code."""
    written: list[Written] = []
    try:
        with _terminated_as_interrupted(), _served(arguments) as served:
            asyncio.run(_explain(served, arguments, written))
    except ConvoyError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        done = sum(not one.error for one in written)
        _complain(f"interrupted; {f'{done} of {len(arguments.images)} images are' if done else 'nothing is'} explained")
        return INTERRUPTED
    if arguments.json:
        seed = _seed(arguments) if arguments.method in _FOR["seed"] else None
        json.dump([one.as_json(arguments.method, seed) for one in written], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_table(written)
    for one in written:
        if one.error:
            _complain(one.error)
    failed = sum(bool(one.error) for one in written)
    return 0 if not failed else 2 if failed == len(written) else 1


@contextmanager
def _served(arguments: argparse.Namespace) -> Iterator[_Served]:
    """The model on the server that was named, or on one of its own."""
    if arguments.local is None:
        yield _Served(arguments.url, arguments.model, arguments.version, security(arguments))
        return
    stated = {name: getattr(arguments, name) for name in _OF_LOCAL if getattr(arguments, name) is not None}
    with load(arguments.local, **stated) as model:
        yield _Served(model.url, model.name, arguments.version or model.version, {"tls": False}, alone=True)


async def _explain(served: _Served, arguments: argparse.Namespace, written: list[Written]) -> None:
    """Explain image after image; each is appended to `written` when its files are there."""
    with Client(served.url, **served.security) as client:
        config = config_of(client, served.model, served.version)
    try:
        image_input = image_input_of(config)
    except ClientError as error:
        hint = "; say --mean and --std as for `convoy serve`" if str(arguments.local).endswith(".onnx") else ""
        raise ClientError(f"{error}{hint}", error.code) from error
    check_task(config)
    maps = maps_of(config, arguments.maps) if arguments.method in _FOR["maps"] else ""
    make = _maker(arguments, image_input.size, maps)
    wanted = Wanted(arguments.class_name, arguments.object)
    color = None if arguments.baseline == "mean" else arguments.baseline
    places = results.paths(arguments.images, arguments.output or Path(FOLDER))
    async with AsyncClient(served.url, timeout=None, **served.security) as asked:
        try:
            subject = await subject_of(asked, config, served.version, arguments.time_limit, bare=bool(maps))
        except ClientError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            raise invalid(
                f"no answer from {served.url} within {arguments.time_limit:g} s; give it a longer --time-limit"
            ) from error
        share = None if served.alone else arguments.share
        asker = Asker(asked, config, subject, served.version, [maps] if maps else [], share)
        for image, place in zip(arguments.images, places, strict=True):
            try:
                data = image.read_bytes()
                if not is_image(data):
                    raise invalid("not an image file")
                picture = picture_of(data, image_input, color)
                with _progress(image.name) as tell:
                    found = await asker.explain(picture, wanted, make, arguments.time_limit, tell)
                written.append(results.write(image, data, found, region_of(image_input, data), place))
            except ClientError as error:
                written.append(Written(image, error=f"{image}: {error}"))
            except OSError as error:
                at = "" if error.filename in (None, str(image)) else f"{error.filename}: "
                written.append(Written(image, error=f"{image}: {at}{error.strerror or error}"))


def _seed(arguments: argparse.Namespace) -> int:
    return 0 if arguments.seed is None else int(arguments.seed)


def _maker(arguments: argparse.Namespace, size: Size, maps: str) -> Make:
    """What makes the masks for a target.

    Raises:
        ClientError: the squares are too many, or leave gaps.
    """
    if maps:
        return lambda target, answer: _score_cam(size, maps, answer[maps][0])
    if arguments.method == "rise":
        options = (
            _MASKS if arguments.masks is None else arguments.masks,
            _GRID if arguments.grid is None else arguments.grid,
            _KEEP if arguments.keep is None else arguments.keep,
            _seed(arguments),
        )
        return lambda target, answer: Rise(size, *options)
    window = arguments.window or -(-min(size) // 7)
    stride = arguments.stride or -(-window // 2)
    if window > max(size):
        raise invalid(f"--window {window} hides all of an input of {size[1]}x{size[0]} pixels")
    if stride > window:
        raise invalid(f"--stride {stride} leaves gaps between squares of {window} pixels: at most {window}")
    if (count := squares(size, window, stride)) > _MOST_MASKS:
        raise invalid(f"--stride {stride} makes {count:,} squares, {_MOST_MASKS:,} are allowed: say a larger one")
    return lambda target, answer: Occlusion(size, window, stride, _seed(arguments), target.score)


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


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far it is, and the time left, where somebody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(name), total=None)
        yield lambda done, count: progress.update(task, completed=done, total=count)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_table(written: Sequence[Written]) -> None:
    console = Console()
    rows = []
    for one in written:
        if one.found is not None:
            target, found = one.found.target, one.found
            masks = f"{found.done:,}" if found.done == found.count else f"{found.done:,} of {found.count:,}"
            cells = [str(one.image), target.label, f"{target.score:.4f}", one.evidence, masks, f"{found.seconds:.1f}"]
            rows.append(cells)
    if not rows:
        return
    numbers = map(Column, ("score", "evidence", "masks", "s"))
    show(console, [Column("image", text=True), Column("label", text=True), *numbers], rows)
    for one in written:
        if one.found is not None and one.found.done < one.found.count:
            console.print(
                f"{escape(str(one.image))}: the time was over after {one.found.done:,} of {one.found.count:,} masks; "
                "--time-limit gives more",
                highlight=False,
                soft_wrap=True,
            )
    folder = next(one.picture.parent for one in written if one.picture is not None)
    console.print(f"pictures and numbers (.npy) in {escape(str(folder))}", highlight=False, soft_wrap=True)


def _complain(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"convoy explain: {escape(line)}", highlight=False)


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
