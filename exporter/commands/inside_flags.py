"""`convoy inspect --erf` and `--units`: looking inside a network with its weights, on pictures.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.exporter.commands.compare_command import text
from convoynet.exporter.config import ExportConfig, is_factory, is_library, is_program
from convoynet.exporter.data.folder import list_images, require_images
from convoynet.exporter.errors import BadInput
from convoynet.tables import fitted

if TYPE_CHECKING:
    from convoynet.exporter.looking.found import Found
    from convoynet.exporter.looking.opened import Images, Opened
    from convoynet.exporter.progress import Progress

_MOST_IMAGES = 300
# Of what stands in for pictures.
_MADE_IMAGES = 64
_MOST_BYTES = 256 * 2**20  # of pictures at a time
_LAST = ""
_INDENT = 13
_ALONE = ("images", "weights", "html", "max_images", "most", "ablate")
# Units in pictures, and pictures on which each unit is left out.
_MOST_UNITS, _MOST_ABLATED = 12, 16


def add_inside(group: argparse._ArgumentGroup) -> None:
    """Add the flags."""
    group.add_argument(
        "--erf",
        nargs="?",
        const=_LAST,
        metavar="LAYER",
        help="the effective receptive field of the middle of LAYER's map (default: of the last map): the pixels that "
        "the gradient on pictures reaches, and the connections that lie between",
    )
    group.add_argument(
        "--units",
        metavar="LAYER",
        help="what the channels of LAYER's map are for: the pictures that excite each most; which are dead, do what "
        "another does, or decide nothing; with --html each in pictures (needs --images)",
    )
    group.add_argument("--images", type=Path, metavar="DIR", help="pictures, at any depth")
    group.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help=f"look at no more; of a larger folder at as many evenly spread ones (default {_MOST_IMAGES})",
    )
    group.add_argument(
        "--ablate",
        type=int,
        metavar="N",
        help="leave each of --units out on N of the pictures, and see which answers change (default "
        f"{_MOST_ABLATED}; 0: of none); most of the time goes here",
    )
    group.add_argument(
        "--most", type=int, metavar="N", help=f"show N of --units in pictures (default {_MOST_UNITS}), with --html"
    )
    group.add_argument(
        "--weights",
        metavar="default|random|FILE",
        help="of a network that is built by name: published ones (the default, may download), random ones, or a "
        "checkpoint",
    )
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page, with the pictures")


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether a network is looked into.

    Raises:
        BadInput: a flag is given that only serves this.
    """
    inside = arguments.erf is not None or arguments.units is not None
    if arguments.units is None:
        names = ("most", "ablate") if inside else _ALONE
        owner = "--units" if inside else "--erf or --units"
        for name in names:
            if getattr(arguments, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')} does nothing without {owner}; add it or drop this")
    return inside


def look(arguments: argparse.Namespace, file: Path | None) -> None:
    """Look into a network and show what was found.

    Args:
        arguments: what was parsed.
        file: the ONNX file that is meant; None for a network that is built by name.

    Raises:
        BadInput: an argument is not usable, or the network has no map to look at.
    """
    _check(arguments, file)
    config = _config(arguments) if file is None else None

    from convoynet.exporter import atomic_file
    from convoynet.exporter.archs import own
    from convoynet.exporter.progress import Quiet, Terminal

    with own.nothing_on_stdout():
        opened = _opened(arguments, config, file)
        progress = Quiet() if arguments.json else Terminal()
        found = _found(arguments, opened, progress)
        page = _page(found, arguments, progress) if arguments.html is not None else None
    if page is not None:
        atomic_file.write(arguments.html, page.encode())
    sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n" if arguments.json else _text(found))
    sys.stdout.flush()


def _check(arguments: argparse.Namespace, file: Path | None) -> None:
    """See what is wrong and shows without PyTorch."""
    if arguments.fully_convolutional:
        raise BadInput("--fully-convolutional goes with the table alone; leave it out with --erf and --units")
    if file is not None and arguments.weights is not None:
        raise BadInput(f"--weights {arguments.weights}: {file} has its weights; leave the option out")
    for name, least in (("max_images", 1), ("most", 0), ("ablate", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} {value} is not {least} or more")
    if arguments.html is not None and not arguments.html.parent.is_dir():
        raise BadInput(f"--html {arguments.html}: there is no folder {arguments.html.parent}")
    if arguments.images is None:
        if arguments.units is not None:
            raise BadInput(f"--units {arguments.units} needs pictures: add --images DIR")
        return
    try:
        require_images(arguments.images)
    except BadInput as error:
        raise BadInput(f"--images {error}") from error


def _config(arguments: argparse.Namespace) -> ExportConfig:
    """The network that is built by name, looked at without PyTorch."""
    from convoynet.exporter.pipeline import first_look

    source = arguments.source
    own = is_program(source) or is_factory(source) or is_library(source)
    config = ExportConfig(
        source,
        weights=arguments.weights or "default",
        name="inspected" if own else "",
        num_classes=arguments.num_classes,
        input_size=arguments.input_size,
    )
    first_look.check_network(config)
    return config


def _opened(arguments: argparse.Namespace, config: ExportConfig | None, file: Path | None) -> "Opened":
    from convoynet.exporter.looking.opened import open_graph, open_network

    if config is not None:
        return open_network(config)
    assert file is not None

    from convoynet.exporter.publishing.published import is_published, read_published

    source, size = arguments.source, arguments.input_size
    if not is_published(Path(source)):
        return open_graph(source, file, size, None)
    published = read_published(Path(source))
    return open_graph(source, file, size, (published.preprocess, published.labels))


def _found(arguments: argparse.Namespace, opened: "Opened", progress: "Progress") -> "Found":
    from convoynet.exporter.looking.effective_field import effective_field
    from convoynet.exporter.looking.found import Found
    from convoynet.exporter.looking.units import units_of

    # Both names are looked at before either takes its time.
    of_units = None if arguments.units is None else opened.layer(arguments.units)
    effective = units = None
    if arguments.erf is not None:
        layer = opened.last_map() if arguments.erf == _LAST else opened.layer(arguments.erf)
        effective = effective_field(opened, layer, *_images(arguments, opened), progress)
    if of_units is not None:
        ablated = _MOST_ABLATED if arguments.ablate is None else arguments.ablate
        units = units_of(opened, of_units, _pictures(arguments), ablated, progress)
    return Found(opened, effective, units)


def _page(found: "Found", arguments: argparse.Namespace, progress: "Progress") -> str:
    from convoynet.exporter.looking.page import html
    from convoynet.exporter.looking.pictures import shown

    if found.units is None:
        return html(found)
    most = _MOST_UNITS if arguments.most is None else arguments.most
    return html(found, *shown(found.opened, found.units, most, progress))


def _pictures(arguments: argparse.Namespace) -> tuple[Path, list[Path], str]:
    """The folder, the files in it that are looked at, and which they are in words."""
    every, most = list_images(arguments.images), arguments.max_images or _MOST_IMAGES
    count = min(most, len(every))
    some = [every[index * len(every) // count] for index in range(count)]
    return arguments.images, some, f"{count} of the {len(every)} images in {arguments.images}"


def _images(arguments: argparse.Namespace, opened: "Opened") -> "tuple[Images, str]":
    """The pictures, or where none are given what stands in for them, and which they are."""
    from convoynet.exporter.data.images import calibration_images

    folder: Path | None = arguments.images
    most = arguments.max_images or (_MOST_IMAGES if folder else _MADE_IMAGES)
    height, width = opened.size
    most = max(1, min(most, _MOST_BYTES // (height * width * opened.preprocess.channels)))
    images, source = calibration_images(opened.preprocess, folder, most, 0, opened.name)
    return images, source.replace("--calibration", "--images")


def _text(found: "Found") -> str:
    from convoynet.exporter.looking.found import effective_rows, unit_rows, unit_table

    lines = [found.title]
    for rows in (
        [] if found.effective is None else effective_rows(found.effective),
        [] if found.units is None else unit_rows(found.units),
    ):
        lines += ["", *(f"{name:<{_INDENT}}{told}" for name, told in rows)] if rows else []
    if found.units is not None:
        rows_of_units = unit_table(found.units)
        lines += ["", text(rows_of_units, ()).rstrip("\n")] if rows_of_units else []
        if (more := len(found.units.order) - len(rows_of_units)) > 0:
            lines.append(f"{more} more units are in --json and --html")
        lines += [f"note: {note}" for note in found.units.notes]
    told = "\n".join(lines)
    return (fitted(told, shutil.get_terminal_size().columns, _INDENT) if sys.stdout.isatty() else told) + "\n"
