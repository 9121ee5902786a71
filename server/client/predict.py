"""`convoy predict`: what a served model sees in image files."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape

from convoynet.protos.inference.model_config_pb2 import ModelConfig
from convoynet.server.client.arguments import add_model, fraction, positive, security
from convoynet.server.client.client import Client, ClientError, Unreachable, activation_of, task_of
from convoynet.server.client.pictures import picture_paths, save_picture
from convoynet.server.client.retries import RETRIES
from convoynet.server.client.views import EXPLANATION, VIEWS, Query, View, class_of, explaining, view_of
from convoynet.tables import Column, show
from convoynet.usage import Parser

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Enough for the server to batch, few enough to hold the files in memory.
_IN_FLIGHT = 8
_PICTURES = Path("predictions")
_EPILOG = """\
The image files are sent as they are; the server decodes, resizes and normalises them as the model's config
says. What comes back depends on the model's task:

  classification  the most probable classes: "probability" where the config says what makes one of the outputs
                  (the softmax over all classes, or each class's sigmoid), else "output", the bare number
                  with --explain, of a model that has the output "explanation", also the part of the image where most of
                  the evidence for the first of them (or for the one of --class) lies, and a picture under its
                  colours, from blue to red
  segmentation    the share of the pixels that each class has, and a picture with the classes as a coloured mask
  detection       the objects with their scores and boxes (x1 y1 x2 y2 in pixels of the image, from its top
                  left), and a picture with the boxes

Pictures are PNG files named after the images. They show the stored pixels: an EXIF orientation is not applied,
neither here nor by the server. A picture never replaces a file that this command did not make.

examples:
  convoy predict --model resnet50 cat.jpg
  convoy predict --model resnet50 --top 1 --json holiday/ > labels.json
  convoy predict --model lenet5 --url gpu-box:8001 --version 3 digits/*.png
  convoy predict --model resnet50 --explain cat.jpg
  convoy predict --model resnet50 --explain --class "tiger cat" cat.jpg
  convoy predict --model deeplabv3_resnet101 --output masks street.jpg
  convoy predict --model fasterrcnn_resnet101_fpn --min-score 0.8 --no-picture --json street.jpg

exit codes:
  0  every image was answered
  1  some images failed; the others are shown
  2  nothing could be answered: no server, no such model, no image that can be read
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one image: what was seen in it and the picture of that, or the error in one line."""

    image: Path
    entries: Sequence[dict[str, Any]] = ()
    picture: Path | None = None
    error: str = ""


def predict(argv: Sequence[str] | None = None) -> int:
    """Label, segment or find objects in images with a served model."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.explained is not None and not arguments.explain:
        parser.error(f"--class {arguments.explained} says whose evidence is wanted: add --explain")
    try:
        with Client(
            arguments.url, timeout=arguments.timeout, retries=arguments.retries, **security(arguments)
        ) as client:
            view = _view(client, arguments.model, arguments.version, explain=arguments.explain)
            asked = arguments.explained
            explained = None if asked is None else class_of(client, arguments.model, arguments.version, asked)
            folder = _folder(arguments, view)
            images = list(_expand(arguments.images, folder))
            query = Query(
                client=client,
                model=arguments.model,
                version=arguments.version,
                top=arguments.top,
                min_score=arguments.min_score,
                draw=folder is not None,
                explained=explained,
            )
            outcomes = _look_at_each(query, view, images, folder)
    except (ClientError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"convoy predict: {escape(str(error))}", highlight=False)
        return 2
    if arguments.json:
        json.dump([_as_json(outcome, view) for outcome in outcomes], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_table(outcomes, view)
    errors = Console(stderr=True, soft_wrap=True)
    for outcome in outcomes:
        if outcome.error:
            errors.print(f"convoy predict: {escape(outcome.error)}", highlight=False)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    return 0 if not failed else 2 if failed == len(outcomes) else 1


def _folder(arguments: argparse.Namespace, view: View) -> Path | None:
    """Where pictures go; None where there are none."""
    output: Path | None = arguments.output
    if not arguments.picture or not (view.draws or output):
        return None
    return output or _PICTURES


def _view(client: Client, model: str, version: str, *, explain: bool = False) -> View:
    """What the model is for; `explain`, whether its evidence is to be shown.

    Raises:
        ClientError: there is no server or no such model, or it takes no image files, or it has an unknown task, or it
            explains nothing where that is asked for.
    """
    config = config_of(client, model, version)
    if "preprocess" not in config.parameters:
        raise ClientError(
            f"model '{model}' takes no image files: its config.pbtxt has no parameter 'preprocess'",
            grpc.StatusCode.INVALID_ARGUMENT,
        )
    view = view_of(task_of(config), activation_of(config))
    if view is None:
        raise ClientError(
            f"model '{model}' has the task '{task_of(config)}'; this command knows {', '.join(VIEWS)}",
            grpc.StatusCode.UNIMPLEMENTED,
        )
    if not explain:
        return view
    if EXPLANATION not in {output.name for output in config.output}:
        raise ClientError(
            f"--explain: model '{model}' has no output '{EXPLANATION}'; `convoy export --explain` makes a classifier "
            "that has one, and `convoy explain --add` gives it to a published one",
            grpc.StatusCode.INVALID_ARGUMENT,
        )
    return explaining(view)


def config_of(client: Client, model: str, version: str = "") -> ModelConfig:
    """The config of a model that a command was told to use.

    Raises:
        ClientError: there is no server or no such model; the message says what there is, or how to start one.
    """
    try:
        return client.model_config(model, version)
    except Unreachable as error:
        raise ClientError(
            f"{error}; start one with `convoy serve --model-repository DIR` or name another with --url",
            error.code,
        ) from error
    except ClientError as error:
        names = _served(client) if error.code is grpc.StatusCode.NOT_FOUND else ""
        raise ClientError(f"{error}{names}", error.code) from error


def _look_at_each(query: Query, view: View, images: Sequence[Path], folder: Path | None) -> list[Outcome]:
    """Ask for every image by a request of its own, several at a time, so that one bad file fails alone.

    Args:
        query: Whom to ask, for what.
        view: The model's task.
        images: The files.
        folder: Where pictures go, if any are wanted.

    Returns:
        One outcome for each image, in order.

    Raises:
        NotADirectoryError: the folder is a file.
    """
    if folder is not None and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output '{folder}' is not a folder")
    pictures: Sequence[Path | None] = picture_paths(images, folder) if folder else [None] * len(images)

    def look(image: Path, picture: Path | None) -> Outcome:
        try:
            data = image.read_bytes()
            if not is_image(data):
                return Outcome(image, error=f"{image}: not an image file ({', '.join(sorted(SUFFIXES))})")
            seen = view.look(query, data)
        except ClientError as error:
            return Outcome(image, error=f"{image}: {error}")
        except OSError as error:
            return Outcome(image, error=f"{image}: {error.strerror or error}")
        if seen.picture is not None and picture is not None:
            try:
                save_picture(seen.picture, picture)
            except OSError as error:
                return Outcome(
                    image, error=f"{image}: its picture {picture} was not written: {error.strerror or error}"
                )
        return Outcome(image, seen.entries, picture)

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        return list(pool.map(look, images, pictures))


def _served(client: Client) -> str:
    """The end of an error message: the names that the server does have, if it tells."""
    try:
        models = client.models()
    except ClientError:
        return ""
    return f"; {client.url} serves {', '.join(models)}" if models else f"; {client.url} serves no model"


def _expand(paths: Sequence[Path], pictures: Path | None) -> Iterator[Path]:
    """The paths, each folder replaced by the image files in and below it, sorted.

    A folder within it that this command's own pictures go to is left out.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        own = pictures.resolve() if pictures and pictures.resolve() != path.resolve() else None
        found = sorted(
            p
            for p in path.rglob("*")
            if p.suffix.lower() in SUFFIXES and p.is_file() and own not in p.resolve().parents
        )
        if not found:
            raise FileNotFoundError(f"folder '{path}' holds no image ({', '.join(sorted(SUFFIXES))})")
        yield from found


def is_image(data: bytes) -> bool:
    """Whether it is an image at all, by its header; other faults are the server's to word."""
    try:
        Image.open(io.BytesIO(data)).close()
    except UnidentifiedImageError:
        return False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True
    return True


def _as_json(outcome: Outcome, view: View) -> dict[str, object]:
    if outcome.error:
        return {"image": str(outcome.image), "error": outcome.error}
    shown: dict[str, object] = {"image": str(outcome.image), view.key: outcome.entries}
    drawn = {"picture": str(outcome.picture) if outcome.picture else None}
    return shown | drawn if view.draws or outcome.picture else shown


def _print_table(outcomes: Sequence[Outcome], view: View) -> None:
    answered = [outcome for outcome in outcomes if not outcome.error]
    rows = []
    for outcome in answered:
        for rank, entry in enumerate(outcome.entries):
            cells = (text(entry) for text in view.columns.values())
            rows.append([str(outcome.image) if rank == 0 else "", *cells])
        if not outcome.entries:
            rows.append([str(outcome.image), "(nothing)", *[""] * (len(view.columns) - 1)])
    console = Console()
    if rows:
        label, *others = view.columns
        show(console, [Column("image", text=True), Column(label, text=True), *map(Column, others)], rows)
    pictures = [outcome.picture for outcome in answered if outcome.picture]
    if pictures:
        what = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
        console.print(f"{what} in {escape(str(pictures[0].parent))}", highlight=False, soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog="convoy predict",
        description="What a served model sees in images: classes, the class of every pixel, or objects.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image files, or folders that are searched for them",
    )
    add_model(parser)
    add(
        "--top",
        type=positive,
        metavar="K",
        help="the most entries to show for each image (default: 5 classes, or all that a mask or a detector has)",
    )
    add(
        "--min-score",
        type=fraction,
        default=0.5,
        metavar="S",
        help="detection: leave out objects with a lower score, 0 to 1 (default: %(default)s)",
    )
    add(
        "--explain",
        action="store_true",
        help="classification: where the evidence for the first class lies, and a picture of it, from a model that was "
        "exported with --explain",
    )
    add(
        "--class",
        dest="explained",
        metavar="CLASS",
        help="with --explain: the evidence for this class, a label of the model or its number, instead of the first",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="the folder for pictures, made where it is missing (default: of segmentation, detection and --explain "
        f"{_PICTURES}, and of classification none)",
    )
    add(
        "--no-picture",
        dest="picture",
        action="store_false",
        help="write none of these pictures",
    )
    add(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that one image may take (default: %(default)s)",
    )
    add(
        "--retries",
        type=int,
        default=RETRIES,
        metavar="N",
        help="how often an image is sent again where a full server asks for that; 0: never (default: %(default)s)",
    )
    add(
        "--json",
        action="store_true",
        help="print a JSON list with one object for each image instead of a table",
    )
    return parser
