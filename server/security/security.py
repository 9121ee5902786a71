"""Who may call what: tokens, certificates, roles, and which listener takes management calls."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convoynet.server.errors import NotPermitted, Unauthenticated
from convoynet.server.security.reloading import InvalidFile, Reloaded
from convoynet.server.types import Call

ROLES = ("infer", "read", "manage")
_ANY = frozenset(ROLES)
_READ = frozenset({"read", "manage"})
_INFER = frozenset({"infer"})
_MANAGE = frozenset({"manage"})

NEEDS: dict[str, frozenset[str]] = {
    "ServerLive": frozenset(),
    "ServerReady": frozenset(),
    "ModelReady": frozenset(),
    "ServerMetadata": _ANY,
    "ModelMetadata": _ANY,
    "ModelConfig": _ANY,
    "ModelInfer": _INFER,
    "ModelStreamInfer": _INFER,
    "ModelStatistics": _READ,
    "RepositoryIndex": _READ,
    "SystemSharedMemoryStatus": _READ,
    "CudaSharedMemoryStatus": _READ,
    "TraceSetting": _READ,
    "LogSettings": _READ,
    "Metrics": _READ,
    "Overview": _READ,
    "ModelReport": _READ,
    "Page": frozenset(),
    "OpenApi": frozenset(),
    "RepositoryModelLoad": _MANAGE,
    "RepositoryModelUnload": _MANAGE,
    "SystemSharedMemoryRegister": _MANAGE,
    "SystemSharedMemoryUnregister": _MANAGE,
    "CudaSharedMemoryRegister": _MANAGE,
    "CudaSharedMemoryUnregister": _MANAGE,
}
"""Which roles allow each call, any one of them; none are needed where the set is empty.

Metrics is the metrics port. Page and OpenApi are the same on every server: the page's own files, and what HTTP offers.
"""
SETTINGS = {"TraceSetting", "LogSettings"}
"""Calls that change something only where their request names settings."""


def changes(rpc: str) -> bool:
    """Whether calls of it can change something beside their own answer."""
    return NEEDS[rpc] is _MANAGE or rpc in SETTINGS


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,252}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_LINES = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the file: who, what they may, and the SHA-256 of their token; "" for a client certificate."""

    name: str
    roles: frozenset[str]
    digest: str


def digest(token: str) -> str:
    """How a token is written in the file: it is long and random, so a plain hash of it cannot be turned back."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def check_name(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: It would not fit into the file.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("the name may hold letters, digits and . _ : / @ - alone")
    return name


def parse_roles(text: str) -> frozenset[str]:
    """`infer,read` as a set.

    Raises:
        ValueError: One of them is no role.
    """
    roles = frozenset(text.split(","))
    if not roles <= _ANY:
        raise ValueError(f"roles must be some of {', '.join(ROLES)}, separated by commas, got '{text}'")
    return roles


def read_tokens(file: Path) -> tuple[Entry, ...]:
    """The entries of a token file; docs/security.md has its format.

    Raises:
        InvalidFile: A line is wrong, or there is none; the message names its number and never a secret.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFile(f"the token file '{file}' cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            entries.append(_entry(words))
        except ValueError as error:
            raise InvalidFile(f"line {number} of the token file '{file}': {error}") from None
    if not 1 <= len(entries) <= _MOST_LINES:
        raise InvalidFile(
            f"the token file '{file}' has {len(entries)} entries, 1 to {_MOST_LINES} are allowed; "
            "`convoy token` adds one"
        )
    return tuple(entries)


def _entry(words: list[str]) -> Entry:
    if len(words) != 3:
        raise ValueError(f"NAME ROLES sha256:HASH or NAME ROLES certificate is expected, got {len(words)} words")
    name, roles, secret = words
    check_name(name)
    if secret != "certificate" and not _DIGEST.fullmatch(secret):  # noqa: S105  the word that stands for one
        raise ValueError("the third word must be sha256: and 64 hexadecimal digits, or 'certificate'")
    return Entry(name, parse_roles(roles), "" if secret == "certificate" else secret)  # noqa: S105


class Guard:
    """Lets a call pass or refuses it; the dispatcher asks it before anything else, whatever the front end.

    Args:
        tokens: The token file's entries; None lets everybody call everything that the listener takes.
        refused: Told of every refusal, to count it.
    """

    def __init__(
        self, tokens: Reloaded[tuple[Entry, ...]] | None = None, refused: Callable[[], None] = lambda: None
    ) -> None:
        self._tokens = tokens
        self._refused = refused

    def check(self, rpc: str, call: Call, request: object = None) -> None:
        """Returns where the caller may call `rpc`; `request` tells an update of settings from a look at them.

        Raises:
            Unauthenticated: There is no token, or it is not in the file.
            NotPermitted: The caller's roles do not allow it, or this listener takes no management calls.
        """
        needs = NEEDS[rpc]
        if rpc in SETTINGS and getattr(request, "settings", None):
            needs = _MANAGE
        try:
            if needs and self._tokens is not None:
                self._authorize(rpc, needs, call, self._tokens.value)
            if needs is _MANAGE and not call.management:
                raise NotPermitted(
                    f"{rpc} is a management call, which this listener does not take; start the server with "
                    "--management on, or with --management PORT for a listener of its own"
                )
        except (Unauthenticated, NotPermitted):
            self._refused()
            raise

    def _authorize(self, rpc: str, needs: frozenset[str], call: Call, entries: tuple[Entry, ...]) -> None:
        token = _token(call)
        held: set[str] = set()
        known = False
        presented = digest(token) if token else ""
        # Every entry is compared, in a time that does not depend on where they differ.
        for entry in entries:
            if entry.digest:
                matches = bool(presented) & hmac.compare_digest(entry.digest, presented)
            else:
                matches = bool(call.identity) and entry.name == call.identity
            if matches:
                known |= bool(entry.digest)
                held |= entry.roles
        if token and not known:
            raise Unauthenticated("the token is not known to this server")
        if not held:
            raise Unauthenticated("this call needs a token: send it as the header `authorization: Bearer TOKEN`")
        if not held & needs:
            raise NotPermitted(f"{rpc} needs the role {' or '.join(sorted(needs))}, the caller has {_list(held)}")


def _list(roles: set[str]) -> str:
    return ", ".join(sorted(roles))


def _token(call: Call) -> str:
    scheme, _, token = call.header("authorization").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else call.header("x-api-key")
