"""`convoy token`: makes a token and the line that lets a server know it."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from convoynet.server.security.reloading import InvalidFile
from convoynet.server.security.security import ROLES, check_name, digest, parse_roles, read_tokens
from convoynet.usage import Parser

_EXAMPLES = """\
examples:
  convoy token camera infer --file tokens
  convoy token prometheus read --file tokens > prometheus.token

The token goes to standard output, this once: the file holds only its SHA-256. A running server with
--auth-tokens tokens takes it within seconds.
"""


def token(argv: Sequence[str]) -> int:
    """Make a token for `convoy serve --auth-tokens`, and the line that goes into its file."""
    arguments = _parser().parse_args(argv)
    try:
        line = f"{check_name(arguments.name)} {','.join(sorted(parse_roles(arguments.roles)))}"
    except ValueError as error:
        sys.stderr.write(f"convoy token: {error}\n")
        return 2
    # 256 random bits: nobody guesses it, so a plain hash of it is safe to keep.
    made = f"convoy_{secrets.token_urlsafe(32)}"
    line = f"{line} {digest(made)}\n"
    if arguments.file is None:
        sys.stderr.write(f"the line for the token file:\n{line}")
    else:
        try:
            _append(arguments.file, line)
        except (OSError, InvalidFile) as error:
            sys.stderr.write(f"convoy token: {error}\n")
            return 1
    sys.stdout.write(f"{made}\n")
    return 0


def _append(file: Path, line: str) -> None:
    """Adds the line at once: a server that reads meanwhile sees the file before it or after it."""
    old = ""
    if file.exists():
        read_tokens(file)
        old = file.read_text(encoding="utf-8")
        old += "" if old.endswith("\n") else "\n"
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
            opened.write(old + line)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _parser() -> Parser:
    parser = Parser(
        prog="convoy token",
        description=(token.__doc__ or "").strip(),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="whose token it is: for people alone")
    parser.add_argument("roles", metavar="ROLES", help=f"what it allows: some of {', '.join(ROLES)}, with commas")
    parser.add_argument("--file", type=Path, metavar="FILE", help="the token file to add it to; made if it is missing")
    return parser
