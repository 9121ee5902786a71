"""`convoy inspect --erf` and `--units`: looking inside a network with its weights, on pictures.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.exporter.config import ExportConfig, is_factory, is_library, is_program
from convoynet.exporter.data.folder import require_images
from convoynet.exporter.errors import BadInput
from convoynet.tables import fitted

if TYPE_CHECKING:
    from convoynet.exporter.looking.found import Found
    from convoynet.exporter.looking.opened import Images, Opened

_MOST_IMAGES = 300
# Of what stands in for pictures.
_MADE_IMAGES = 64
_LAST = ""
_INDENT = 13
_ALONE = ("images", "weights", "html", "max_images")


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
    group.add_argument("--images", type=Path, metavar="DIR", help="pictures, at any depth")
    group.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help=f"look at no more; of a larger folder at as many evenly spread ones (default {_MOST_IMAGES})",
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
    if arguments.erf is not None:
        return True
    for name in _ALONE:
        if getattr(arguments, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} does nothing without --erf; add it or drop this")
    return False


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

    from convoynet.exporter.archs import own

    with own.nothing_on_stdout():
        found = _found(arguments, _opened(arguments, config, file))
    if arguments.html is not None:
        from convoynet.exporter import atomic_file
        from convoynet.exporter.looking.page import html

        atomic_file.write(arguments.html, html(found).encode())
    sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n" if arguments.json else _text(found))
    sys.stdout.flush()


def _check(arguments: argparse.Namespace, file: Path | None) -> None:
    """See what is wrong and shows without PyTorch."""
    if arguments.fully_convolutional:
        raise BadInput("--fully-convolutional goes with the table alone; leave it out with --erf")
    if file is not None and arguments.weights is not None:
        raise BadInput(f"--weights {arguments.weights}: {file} has its weights; leave the option out")
    if arguments.max_images is not None and arguments.max_images < 1:
        raise BadInput(f"--max-images {arguments.max_images} is not 1 or more")
    if arguments.html is not None and not arguments.html.parent.is_dir():
        raise BadInput(f"--html {arguments.html}: there is no folder {arguments.html.parent}")
    if arguments.images is None:
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


def _found(arguments: argparse.Namespace, opened: "Opened") -> "Found":
    from convoynet.exporter.looking.effective_field import effective_field
    from convoynet.exporter.looking.found import Found
    from convoynet.exporter.progress import Quiet, Terminal

    progress = Quiet() if arguments.json else Terminal()
    layer = opened.last_map() if arguments.erf == _LAST else opened.layer(arguments.erf)
    images, source = _images(arguments, opened)
    return Found(opened, effective_field(opened, layer, images, source, progress))


def _images(arguments: argparse.Namespace, opened: "Opened") -> "tuple[Images, str]":
    """The pictures, or where none are given what stands in for them, and which they are."""
    from convoynet.exporter.data.images import calibration_images

    folder: Path | None = arguments.images
    most = arguments.max_images or (_MOST_IMAGES if folder else _MADE_IMAGES)
    images, source = calibration_images(opened.preprocess, folder, most, 0, opened.name)
    return images, source.replace("--calibration", "--images")


def _text(found: "Found") -> str:
    from convoynet.exporter.looking.found import effective_rows

    lines = [found.title, ""]
    if found.effective is not None:
        lines += [f"{name:<{_INDENT}}{told}".rstrip() for name, told in effective_rows(found.effective)]
    told = "\n".join(lines)
    return (fitted(told, shutil.get_terminal_size().columns, _INDENT) if sys.stdout.isatty() else told) + "\n"
