"""The flags that the calling commands share."""

from __future__ import annotations

import argparse

from convoynet.server.client.client import DEFAULT_URL


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --version and --url: which model on which server."""
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name on the server")
    parser.add_argument(
        "--version", default="", metavar="N", help="the model's version (default: the newest one served)"
    )
    parser.add_argument(
        "--url", default=DEFAULT_URL, metavar="HOST:PORT", help="the server's gRPC address (default: %(default)s)"
    )


def positive(text: str) -> int:
    """An integer of at least 1, as argparse's `type`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, as argparse's `type`."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} does not lie in 0 to 1")
    return value
