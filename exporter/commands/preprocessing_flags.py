"""The flags that say how an image becomes an input of the network. Imports no heavy library."""

import argparse
from pathlib import Path
from typing import Any

from convoynet.exporter.commands.flags import size_option
from convoynet.exporter.config import CHANNEL_ORDERS, INTERPOLATIONS
from convoynet.exporter.errors import BadInput


def add_preprocessing(group: argparse._ArgumentGroup) -> None:
    """Add them; what none of them says is the network's own."""
    group.add_argument(
        "--resize",
        type=_resize,
        metavar="N|HxW",
        help="before the crop: the shorter side to N pixels, or the image to HxW whatever its proportions are "
        "(default: as timm or torchvision say of the network; else to the input size)",
    )
    group.add_argument(
        "--crop",
        type=_crop,
        metavar="SHARE|PIXELS",
        help="cut the centre out: a share of the resized image's shorter side in the place of --resize, such as 0.875 "
        "or 87.5%% (1 cuts off the longer side alone), or the input size in pixels, such as 224",
    )
    group.add_argument(
        "--interpolation", choices=INTERPOLATIONS, help="how to resize (default: the network's; bilinear for your own)"
    )
    group.add_argument(
        "--channel-order", choices=CHANNEL_ORDERS, help="bgr for networks trained on OpenCV's or Caffe's images"
    )
    group.add_argument(
        "--mean",
        type=_values,
        metavar="R,G,B",
        help="subtracted from pixels of 0 to 1, in the network's order of channels; one number for grey (default: the "
        "network's; ImageNet's for your own)",
    )
    group.add_argument("--std", type=_values, metavar="R,G,B", help="what the rest is divided by; goes with --mean")
    group.add_argument(
        "--check-preprocessing",
        nargs=2,
        type=Path,
        metavar=("FILE.npy", "IMAGE"),
        help="refuse (exit 3), before any work, when the input that your own pipeline made of IMAGE differs from ours, "
        "and say what in the preprocessing is the likely cause",
    )


def take_preprocessing(arguments: dict[str, Any]) -> None:
    """Make what was parsed the fields of an ExportConfig.

    Raises:
        BadInput: --crop and --input-size name two sizes.
    """
    if (pair := arguments["check_preprocessing"]) is not None:
        arguments["check_preprocessing"] = (pair[0], pair[1])
    crop, size = arguments["crop"], arguments["input_size"]
    if not isinstance(crop, tuple):
        return
    if size not in (None, crop):
        raise BadInput(
            f"--crop {crop[0]}x{crop[1]} and --input-size {size[0]}x{size[1]}: what is cut out is the network's input; "
            "give one of them, or --crop a share such as 0.875"
        )
    arguments["input_size"], arguments["crop"] = crop, None


def _resize(text: str) -> int | tuple[int, int]:
    size = size_option(text)
    return size if "x" in text else size[0]


def _crop(text: str) -> float | tuple[int, int]:
    share = text.removesuffix("%")
    try:
        value = float(share) / (100 if share != text else 1)
    except ValueError:
        value = None
    if value is not None and 0 < value <= 1:
        return value
    try:
        return size_option(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a share such as 0.875 or 87.5% nor pixels such as 224 or 256x320"
        ) from error


def _values(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not R,G,B or one number, like 0.485,0.456,0.406") from error
