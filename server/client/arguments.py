"""The flags that the calling commands share."""

from __future__ import annotations

import argparse
import math
from typing import cast

from convoynet.server.client.access import Security
from convoynet.server.client.connection import DEFAULT_URL


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --model and --version, and what says which server it is and how it is reached."""
    parser.add_argument("--model", required=required, metavar="NAME", help="the model's name on the server")
    parser.add_argument(
        "--version", default="", metavar="N", help="the model's version (default: the newest one served)"
    )
    _add_server(parser.add_argument_group("server (docs/security.md shows one with TLS and tokens)"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--url", default=DEFAULT_URL, metavar="HOST:PORT", help="the server's gRPC address (default: %(default)s)")
    add(
        "--tls",
        action=argparse.BooleanOptionalAction,
        help="speak TLS, or do not whatever the environment says (default: with --ca, --cert or --server-name)",
    )
    add(
        "--ca",
        metavar="FILE",
        help="PEM file of the authority that signed the server's certificate (default: $CONVOY_CA, or the public ones)",
    )
    add("--cert", metavar="FILE", help="PEM file of this client's certificate (default: $CONVOY_CERT)")
    add("--key", metavar="FILE", help="PEM file of its key (default: $CONVOY_KEY)")
    add("--server-name", metavar="NAME", help="the name in the server's certificate, where --url has another")
    add(
        "--token-file",
        metavar="FILE",
        help="file that holds the token (default: the token in $CONVOY_TOKEN)",
    )
    add("--token", metavar="TOKEN", help="the token itself: others on this machine can see it; better one of the two")
    add(
        "--plain-token",
        action="store_true",
        help="send the token without TLS to another machine too, over a network that is trusted",
    )


def security(arguments: argparse.Namespace) -> Security:
    """What `add_model` parsed of them, as a client takes it."""
    return cast("Security", {name: getattr(arguments, name) for name in Security.__annotations__})


def positive(text: str) -> int:
    """An integer of at least 1, as argparse's `type`."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def fraction(text: str) -> float:
    """A number from 0 to 1, as argparse's `type`."""
    if not 0 <= _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return _number(text)


def seconds(text: str) -> float:
    """A time above 0, as argparse's `type`."""
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return _number(text)


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
