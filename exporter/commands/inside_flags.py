"""`convoy inspect --erf`, `--units`, `--concepts`, `--masks`: looking inside a network with its weights, on pictures.

Importable without torch and onnx, as `convoynet.exporter.commands.cli` is.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convoynet.exporter.commands.cli import require_page
from convoynet.exporter.commands.compare_command import text
from convoynet.exporter.config import ExportConfig, is_factory, is_library, is_program
from convoynet.exporter.data.folder import list_images, require_images
from convoynet.exporter.errors import BadInput
from convoynet.tables import fitted

if TYPE_CHECKING:
    from convoynet.exporter.looking.concepts import Concepts
    from convoynet.exporter.looking.dissection import Overlaps
    from convoynet.exporter.looking.effective_field import EffectiveField
    from convoynet.exporter.looking.found import Found
    from convoynet.exporter.looking.opened import Images, Layer, Opened
    from convoynet.exporter.looking.units import Units
    from convoynet.exporter.progress import Progress

_MOST_IMAGES = 300
# Of what stands in for pictures.
_MADE_IMAGES = 64
_MOST_BYTES = 256 * 2**20  # of pictures at a time
_LAST = ""
_INDENT = 13
_ASKS = ("erf", "units", "concepts", "masks")
# What each of the other flags serves.
_SERVES = {
    **dict.fromkeys(("images", "weights", "html", "max_images"), _ASKS),
    **dict.fromkeys(("most", "ablate"), ("units",)),
    "layer": ("concepts", "masks"),
    **dict.fromkeys(("random", "class", "runs"), ("concepts",)),
}
# Units in pictures, and pictures on which each unit is left out.
_MOST_UNITS, _MOST_ABLATED = 12, 16
# Vectors of each concept.
_RUNS, _LEAST_RUNS = 50, 10


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
    _add_concepts(group)
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


def _add_concepts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--concepts",
        type=Path,
        metavar="DIR",
        help="which concepts count for a class, by pictures of each in a folder of its own in DIR (TCAV): the share of "
        "the class's --images that a concept speaks for, and whether a random direction would as well; needs "
        "convoynet[concepts]",
    )
    group.add_argument(
        "--random",
        type=Path,
        metavar="DIR",
        help="pictures that show none of --concepts, which each is told from (default: those of the other concepts)",
    )
    group.add_argument(
        "--class",
        metavar="LABEL|INDEX",
        help="of all --images, with --concepts (default: they lie in folders named by their class)",
    )
    group.add_argument("--runs", type=int, metavar="N", help=f"vectors of each of --concepts (default {_RUNS})")
    group.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="how much each unit overlaps what masks show (network dissection): DIR has a folder for each concept, "
        "with masks of the size and the names of --images, black where it is not",
    )
    group.add_argument(
        "--layer", metavar="LAYER", help="that --concepts and --masks look at (default: the last that has a map)"
    )


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether a network is looked into.

    Raises:
        BadInput: a flag is given that only serves this.
    """
    asked = {name for name in _ASKS if getattr(arguments, name) is not None}
    for name, owners in _SERVES.items():
        if getattr(arguments, name) is not None and asked.isdisjoint(owners):
            *others, last = (f"--{owner}" for owner in owners)
            told = f"{', '.join(others)} or {last}" if others else last
            raise BadInput(f"--{name.replace('_', '-')} does nothing without {told}; add it or drop this")
    return bool(asked)


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
        raise BadInput("--fully-convolutional goes with the table alone; leave it out to look inside")
    if file is not None and arguments.weights is not None:
        raise BadInput(f"--weights {arguments.weights}: {file} has its weights; leave the option out")
    for name, least in (("max_images", 1), ("most", 0), ("ablate", 0), ("runs", _LEAST_RUNS)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} {value} is not {least} or more")
    require_page(arguments.html)
    if arguments.images is None:
        for name in ("units", "concepts", "masks"):
            if (value := getattr(arguments, name)) is not None:
                raise BadInput(f"--{name} {value} needs pictures: add --images DIR")
        return
    try:
        require_images(arguments.images)
    except BadInput as error:
        raise BadInput(f"--images {error}") from error
    if arguments.concepts is not None:
        from convoynet.exporter.looking.concept_folders import concepts_in
        from convoynet.exporter.looking.vectors import require_library

        concepts_in(arguments.concepts, arguments.random, arguments.max_images or _MOST_IMAGES)
        require_library()


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
        task=arguments.task,
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
    from convoynet.exporter.looking.found import Found

    # All names and folders are looked at before any of it takes its time.
    erf, units = _effective_field(arguments, opened), _units(arguments, opened)
    concepts, overlaps = _concepts(arguments, opened), _overlaps(arguments, opened)
    return Found(
        opened,
        None if erf is None else erf(progress),
        None if units is None else units(progress),
        None if concepts is None else concepts(progress),
        None if overlaps is None else overlaps(progress),
    )


def _effective_field(arguments: argparse.Namespace, opened: "Opened") -> "Callable[[Progress], EffectiveField] | None":
    from convoynet.exporter.looking.effective_field import effective_field

    if arguments.erf is None:
        return None
    layer = opened.last_map() if arguments.erf == _LAST else opened.layer(arguments.erf)
    return lambda progress: effective_field(opened, layer, *_images(arguments, opened), progress)


def _units(arguments: argparse.Namespace, opened: "Opened") -> "Callable[[Progress], Units] | None":
    from convoynet.exporter.looking.units import units_of

    if arguments.units is None:
        return None
    layer, pictures = opened.layer(arguments.units), _pictures(arguments)
    ablated = _MOST_ABLATED if arguments.ablate is None else arguments.ablate
    return lambda progress: units_of(opened, layer, pictures, ablated, progress)


def _concepts(arguments: argparse.Namespace, opened: "Opened") -> "Callable[[Progress], Concepts] | None":
    from convoynet.exporter.looking.concept_folders import concepts_in
    from convoynet.exporter.looking.concepts import class_labels, concepts_of, images_of_classes

    if arguments.concepts is None:
        return None
    layer, most = _layer(arguments, opened), arguments.max_images or _MOST_IMAGES
    concepts = concepts_in(arguments.concepts, arguments.random, most)
    images = images_of_classes(arguments.images, getattr(arguments, "class"), class_labels(opened), most)
    return lambda progress: concepts_of(opened, layer, concepts, images, arguments.runs or _RUNS, progress)


def _overlaps(arguments: argparse.Namespace, opened: "Opened") -> "Callable[[Progress], Overlaps] | None":
    from convoynet.exporter.looking.concept_folders import masks_in
    from convoynet.exporter.looking.dissection import most_pictures, overlaps_of

    if arguments.masks is None:
        return None
    layer = _layer(arguments, opened)
    pictures = _pictures(arguments, most_pictures(layer))
    masks = masks_in(arguments.masks, *pictures[:2])
    return lambda progress: overlaps_of(opened, layer, pictures, masks, progress)


def _layer(arguments: argparse.Namespace, opened: "Opened") -> "Layer":
    return opened.last_map() if arguments.layer is None else opened.layer(arguments.layer)


def _page(found: "Found", arguments: argparse.Namespace, progress: "Progress") -> str:
    from convoynet.exporter.looking.page import html, pictures_of

    most = _MOST_UNITS if arguments.most is None else arguments.most
    return html(found, pictures_of(found, most, progress))


def _pictures(arguments: argparse.Namespace, fit: int | None = None) -> tuple[Path, list[Path], str]:
    """The folder, the files in it that are looked at, and which they are in words; no more than fit into memory."""
    from convoynet.exporter.looking.concept_folders import spread

    every, most = list_images(arguments.images), arguments.max_images or _MOST_IMAGES
    some = spread(every, most if fit is None else min(most, fit))
    return arguments.images, some, f"{len(some)} of the {len(every)} images in {arguments.images}"


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
    from convoynet.exporter.looking import found as told

    lines = [found.title]

    def add(rows: list[tuple[str, str]], table: list[dict[str, str]], words: Sequence[str] = ()) -> None:
        lines.extend(("", *(f"{name:<{_INDENT}}{said}" for name, said in rows)))
        if table:
            lines.extend(("", text(table, words).rstrip("\n")))

    def add_more(count: int, what: str) -> None:
        if count > 0:
            lines.append(f"{count} more {what} are in --json and --html")

    if found.effective is not None:
        add(told.effective_rows(found.effective), [])
    if (units := found.units) is not None:
        table = told.unit_table(units)
        add(told.unit_rows(units), table)
        add_more(len(units.order) - len(table), "units")
        lines += [f"note: {note}" for note in units.notes]
    if (concepts := found.concepts) is not None:
        table = told.concept_table(concepts)
        add(told.concept_rows(concepts), table, ("concept", "class", "speaks"))
        add_more(len(concepts.tested) - len(table), "scores")
        lines += [f"note: {note}" for note in concepts.notes]
    if (overlaps := found.overlaps) is not None:
        table = told.overlap_table(overlaps)
        add(told.overlap_rows(overlaps), table, ("concept", *list(table[0])[-1:]))
    whole = "\n".join(lines)
    return (fitted(whole, shutil.get_terminal_size().columns, _INDENT) if sys.stdout.isatty() else whole) + "\n"
