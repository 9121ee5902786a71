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

import grpc
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.arguments import add_model, positive
from server.client import Client, ClientError, Prediction, Unreachable

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Enough for the server to batch, few enough to hold the files in memory.
_IN_FLIGHT = 8
_EPILOG = """\
The image files are sent as they are; the server decodes, resizes and normalises them as the model's config
says. Probabilities are the softmax over all classes where the config says so, else the bare outputs.

examples:
  convoy predict --model resnet50 cat.jpg
  convoy predict --model resnet50 --top 1 --json holiday/ > labels.json
  convoy predict --model lenet5 --url gpu-box:8001 --version 3 digits/*.png

exit codes:
  0  every image was classified
  1  some images failed; the others are shown
  2  nothing could be classified: no server, no such model, no image that can be read
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one image: its classes, best first, or the error in one line."""

    image: Path
    predictions: Sequence[Prediction] = ()
    error: str = ""


def predict(argv: Sequence[str] | None = None) -> int:
    """Label images with a served model."""
    arguments = _parser().parse_args(argv)
    try:
        images = list(_expand(arguments.images))
        with Client(arguments.url, timeout=arguments.timeout) as client:
            outcomes = classify_each(client, arguments.model, images, top=arguments.top, version=arguments.version)
    except (ClientError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"convoy predict: {escape(str(error))}", highlight=False)
        return 2
    if arguments.json:
        json.dump([_as_json(outcome) for outcome in outcomes], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_table(outcomes)
    errors = Console(stderr=True, soft_wrap=True)
    for outcome in outcomes:
        if outcome.error:
            errors.print(f"convoy predict: {escape(outcome.error)}", highlight=False)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    return 0 if not failed else 2 if failed == len(outcomes) else 1


def classify_each(client: Client, model: str, images: Sequence[Path], *, top: int, version: str = "") -> list[Outcome]:
    """Classify every image by a request of its own, several at a time, so that one bad file fails alone.

    Returns:
        One outcome for each image, in order.

    Raises:
        ClientError: there is no server or no such model, or the model takes no image files.
    """
    try:
        config = client.model_config(model, version)
    except Unreachable as error:
        raise ClientError(
            f"{error}; start one with `convoy serve --model-repository DIR` or name another with --url",
            error.code,
        ) from error
    except ClientError as error:
        raise ClientError(f"{error}{_served(client)}", error.code) from error
    if "preprocess" not in config.parameters:
        raise ClientError(
            f"model '{model}' takes no image files: its config.pbtxt has no parameter 'preprocess'",
            grpc.StatusCode.INVALID_ARGUMENT,
        )

    def classify(image: Path) -> Outcome:
        try:
            data = image.read_bytes()
            if not _is_image(data):
                return Outcome(image, error=f"{image}: not an image file ({', '.join(sorted(SUFFIXES))})")
            return Outcome(image, client.classify(model, [data], top=top, version=version)[0])
        except ClientError as error:
            return Outcome(image, error=f"{image}: {error}")
        except OSError as error:
            return Outcome(image, error=f"{image}: {error.strerror or error}")

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        return list(pool.map(classify, images))


def _served(client: Client) -> str:
    """The end of an error message: the names that the server does have, if it tells."""
    try:
        models = client.models()
    except ClientError:
        return ""
    return f"; {client.url} serves {', '.join(models)}" if models else f"; {client.url} serves no model"


def _expand(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, each folder replaced by the image files in and below it, sorted."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise FileNotFoundError(f"folder '{path}' holds no image ({', '.join(sorted(SUFFIXES))})")
        yield from found


def _is_image(data: bytes) -> bool:
    """Whether it is an image at all, by its header; other faults are the server's to word."""
    try:
        Image.open(io.BytesIO(data)).close()
    except UnidentifiedImageError:
        return False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True
    return True


def _as_json(outcome: Outcome) -> dict[str, object]:
    if outcome.error:
        return {"image": str(outcome.image), "error": outcome.error}
    predictions = [
        {"label": each.label, "index": each.class_index, "probability": each.probability}
        for each in outcome.predictions
    ]
    return {"image": str(outcome.image), "predictions": predictions}


def _print_table(outcomes: Sequence[Outcome]) -> None:
    table = Table("image", "label", "class", "probability", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    for outcome in outcomes:
        for rank, each in enumerate(outcome.predictions):
            table.add_row(
                escape(str(outcome.image)) if rank == 0 else "",
                escape(each.label),
                str(each.class_index),
                f"{each.probability:.4f}",
            )
    if table.row_count:
        Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convoy predict",
        description="Label images with a served model: the most probable classes of each image.",
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
        default=5,
        metavar="K",
        help="classes to show for each image (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that one image may take (default: %(default)s)",
    )
    add(
        "--json",
        action="store_true",
        help="print a JSON list with one object for each image instead of a table",
    )
    return parser
